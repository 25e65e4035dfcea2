use super::*;
use service::clock::{Manual, SystemClock};
use std::collections::HashMap;
use std::sync::Mutex;

type Hosts = Vec<(u16, &'static str)>;

/// DNS as a table; what is not in it does not exist.
#[derive(Default)]
struct Table {
    mx: HashMap<&'static str, Result<Hosts, DnsError>>,
    addresses: HashMap<&'static str, Vec<&'static str>>,
    asked: Mutex<u32>,
}

#[async_trait::async_trait]
impl Dns for Table {
    async fn mx(&self, domain: &str) -> Result<Answer<(u16, String)>, DnsError> {
        *self.asked.lock().expect("unpoisoned") += 1;
        let records = self
            .mx
            .get(domain)
            .cloned()
            .unwrap_or(Err(DnsError::NoDomain(Duration::from_secs(60))))?;
        let records = records
            .into_iter()
            .map(|(preference, host)| (preference, host.to_owned()))
            .collect();
        Ok(Answer {
            records,
            ttl: Duration::from_secs(60),
            secure: false,
            canonical: None,
        })
    }

    async fn addresses(&self, host: &str, _: bool) -> Result<Answer<IpAddr>, DnsError> {
        let addresses = self
            .addresses
            .get(host)
            .ok_or(DnsError::NoDomain(Duration::from_secs(60)))?;
        let records = addresses
            .iter()
            .map(|address| address.parse().expect("an address"))
            .collect();
        Ok(Answer {
            records,
            ttl: Duration::from_secs(60),
            secure: false,
            canonical: None,
        })
    }

    async fn txt(&self, _: &str) -> Result<Answer<Vec<u8>>, DnsError> {
        Err(DnsError::NoDomain(Duration::from_secs(60)))
    }

    async fn tlsa(&self, _: &str) -> Result<Answer<Tlsa>, DnsError> {
        Err(DnsError::NoDomain(Duration::from_secs(60)))
    }

    async fn validates(&self, _: &str) -> Result<bool, DnsError> {
        Ok(false)
    }
}

fn resolver(table: Table, routes: Routes) -> Resolver {
    Resolver::new(
        Arc::new(table),
        SystemClock::shared(),
        routes,
        25,
        vec!["127.0.0.0/8".parse().expect("a network")],
    )
}

fn domain(name: &str) -> Domain {
    name.parse().expect("a domain")
}

#[tokio::test]
async fn what_dns_says_and_what_it_means() {
    let servfail = || Err(DnsError::Temporary("SERVFAIL".into()));
    let none = || Err(DnsError::NoRecords(Duration::from_secs(1)));
    let table = Table {
        mx: HashMap::from([
            (
                "two.example",
                Ok(vec![(20, "b.two.example"), (10, "a.two.example")]),
            ),
            ("null.example", Ok(vec![(0, "")])),
            ("odd.example", Ok(vec![(0, ""), (10, "a.odd.example")])),
            ("implicit.example", none()),
            ("empty.example", none()),
            ("broken.example", servfail()),
        ]),
        addresses: HashMap::from([("implicit.example", vec!["8.8.8.8"])]),
        ..Table::default()
    };
    let resolver = resolver(table, Routes::default());
    let found = [
        ("two.example", Ok("a.two.example:25,b.two.example:25")),
        ("odd.example", Ok("a.odd.example:25")),
        ("implicit.example", Ok("implicit.example:25")),
        ("null.example", Err((Class::NoMx, true))),
        ("empty.example", Err((Class::NoMx, true))),
        ("gone.example", Err((Class::BadDomain, true))),
        ("broken.example", Err((Class::DnsFailure, false))),
    ];
    for (name, wanted) in found {
        let route = resolver.route(&domain(name)).await;
        let seen = route
            .as_ref()
            .map(|(route, _)| route.key())
            .map_err(|trouble| (trouble.class, trouble.is_final));
        assert_eq!(seen, wanted, "{name}");
    }
}

/// A name server that is gone: whoever asks hears nothing for ten seconds.
struct Dead(Manual, Mutex<u32>);

impl Dead {
    fn times_out<T>(&self) -> Result<T, DnsError> {
        *self.1.lock().expect("unpoisoned") += 1;
        self.0.advance(Duration::from_secs(10));
        Err(DnsError::Temporary("timed out".into()))
    }
}

#[async_trait::async_trait]
impl Dns for Dead {
    async fn mx(&self, _: &str) -> Result<Answer<(u16, String)>, DnsError> {
        self.times_out()
    }

    async fn addresses(&self, _: &str, _: bool) -> Result<Answer<IpAddr>, DnsError> {
        self.times_out()
    }

    async fn txt(&self, _: &str) -> Result<Answer<Vec<u8>>, DnsError> {
        self.times_out()
    }

    async fn tlsa(&self, _: &str) -> Result<Answer<Tlsa>, DnsError> {
        self.times_out()
    }

    async fn validates(&self, _: &str) -> Result<bool, DnsError> {
        self.times_out()
    }
}

#[tokio::test]
async fn that_nobody_answered_is_remembered_from_when_that_was_known() {
    let clock = Manual::at(model::Timestamp::from_millis(0));
    let dns = Arc::new(Dead(clock.clone(), Mutex::default()));
    let shared: SharedClock = Arc::new(clock.clone());
    let resolver = Resolver::new(dns.clone(), shared, Routes::default(), 25, Vec::new());
    let asked = || *dns.1.lock().expect("unpoisoned");
    let host = Host {
        preference: 0,
        name: "mx.x.example".into(),
        port: 25,
    };
    let route = Route::new(vec![host.clone()], false);
    let name = domain("x.example");
    for round in 0..2 {
        for _ in 0..3 {
            assert!(resolver.route(&name).await.is_err());
        }
        assert_eq!(asked(), round * 3 + 1);
        for _ in 0..3 {
            assert!(resolver.addresses(&host, &route).await.is_err());
        }
        assert_eq!(asked(), round * 3 + 2);
        for _ in 0..3 {
            assert!(resolver.tlsa("mx.x.example", 25).await.is_err());
        }
        assert_eq!(asked(), round * 3 + 3);
        clock.advance(FAILURE_TTL);
    }
}

#[tokio::test]
async fn hosts_are_tried_by_preference_and_shared_out_within_one() {
    let hosts = |names: &[(u16, &str)]| {
        names
            .iter()
            .map(|(preference, name)| Host {
                preference: *preference,
                name: (*name).into(),
                port: 25,
            })
            .collect()
    };
    let route = Route::new(hosts(&[(10, "a"), (10, "b"), (5, "c"), (20, "d")]), false);
    let mut random = fastrand::Rng::with_seed(7);
    let mut second = std::collections::HashSet::new();
    for _ in 0..50 {
        let order: Vec<_> = route
            .in_order(&mut random)
            .iter()
            .map(|host| host.name.to_string())
            .collect();
        assert_eq!((order[0].as_str(), order[3].as_str()), ("c", "d"));
        second.insert(order[1].clone());
    }
    assert_eq!(second.len(), 2);
}

#[tokio::test]
async fn private_targets_are_refused_unless_the_operator_says_so() {
    let table = Table {
        addresses: HashMap::from([
            ("metadata.example", vec!["169.254.169.254", "10.0.0.1"]),
            ("local.example", vec!["127.0.0.1"]),
            ("both.example", vec!["10.0.0.1", "8.8.8.8"]),
        ]),
        ..Table::default()
    };
    let resolver = resolver(table, Routes::default());
    let host = |name: &str| Host {
        preference: 0,
        name: name.into(),
        port: 25,
    };
    let route = |name: &str, is_static| Route::new(vec![host(name)], is_static);
    let addresses = async |name: &str, is_static| {
        let found = resolver
            .addresses(&host(name), &route(name, is_static))
            .await;
        found
            .map(|found| {
                found
                    .all()
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
            })
            .map_err(|trouble| trouble.class)
    };
    assert_eq!(
        addresses("metadata.example", false).await,
        Err(Class::Policy)
    );
    assert_eq!(
        addresses("local.example", false).await,
        Ok(vec!["127.0.0.1".to_owned()])
    );
    assert_eq!(
        addresses("both.example", false).await,
        Ok(vec!["8.8.8.8".to_owned()])
    );
    assert_eq!(
        addresses("10.0.0.1", true).await,
        Ok(vec!["10.0.0.1".to_owned()])
    );
    assert_eq!(addresses("10.0.0.1", false).await, Err(Class::Policy));
    assert_eq!(
        addresses("gone.example", false).await,
        Err(Class::DnsFailure)
    );
}

#[tokio::test]
async fn a_static_route_asks_nobody() {
    let mut routes = Routes::default();
    let route = service::config::shaping::Route {
        host: "127.0.0.1".into(),
        port: Some(2525),
    };
    routes.by_domain.insert(domain("sink.example"), route);
    let table = Arc::new(Table::default());
    let resolver = Resolver::new(table.clone(), SystemClock::shared(), routes, 25, Vec::new());
    let (route, _) = resolver
        .route(&domain("sink.example"))
        .await
        .expect("a route");
    assert_eq!(
        (route.key(), route.names().collect::<Vec<_>>()),
        ("127.0.0.1:2525", vec!["127.0.0.1:2525"])
    );
    assert_eq!(*table.asked.lock().expect("unpoisoned"), 0);
    for _ in 0..2 {
        let failure = resolver.route(&domain("gone.example")).await;
        assert!(failure.is_err());
    }
    assert_eq!(*table.asked.lock().expect("unpoisoned"), 1);
}

#[test]
fn families_come_as_wanted_and_addresses_get_their_share() {
    let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
    let list = ["192.0.2.1", "2001:db8::1", "192.0.2.2", "2001:db8::2"].map(ip);
    let found = Addresses {
        list: list.into(),
        secure: false,
        canonical: None,
    };
    let mut random = fastrand::Rng::with_seed(7);
    let mut firsts = std::collections::HashSet::new();
    for (families, wanted) in [
        (Families::PreferIpv4, [true, true, false, false].as_slice()),
        (Families::PreferIpv6, &[false, false, true, true]),
        (Families::Ipv4, &[true, true]),
        (Families::Ipv6, &[false, false]),
    ] {
        for _ in 0..20 {
            let order = found.in_order(families, &mut random);
            let kinds: Vec<_> = order.iter().map(IpAddr::is_ipv4).collect();
            assert_eq!(kinds, wanted, "{families:?}");
            firsts.insert(order[0]);
        }
    }
    assert_eq!(firsts.len(), 4, "each is first at times");
}
