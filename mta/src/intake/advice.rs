//! What a list of recipients looks like: addresses of roles, and domains that are probably mistyped.
//!
//! Owns the warnings; nobody is rejected for them. Pure, and bounded: it remembers a few examples
//! and a limited number of domains.

use std::collections::HashMap;

use model::{EmailAddress, Row};
use store::BatchHead;

/// Local parts that belong to a function and not to a person (RFC 2142, and what lists have).
const ROLES: [&str; 20] = [
    "abuse",
    "admin",
    "administrator",
    "billing",
    "contact",
    "help",
    "hostmaster",
    "info",
    "list",
    "mail",
    "marketing",
    "no-reply",
    "noreply",
    "office",
    "postmaster",
    "root",
    "sales",
    "security",
    "support",
    "webmaster",
];

/// Domains at which many people have their mail.
const LARGE: [&str; 28] = [
    "aol.com",
    "au.com",
    "comcast.net",
    "docomo.ne.jp",
    "ezweb.ne.jp",
    "free.fr",
    "gmail.com",
    "gmx.de",
    "gmx.net",
    "googlemail.com",
    "hotmail.co.uk",
    "hotmail.com",
    "icloud.com",
    "libero.it",
    "live.com",
    "mail.ru",
    "me.com",
    "msn.com",
    "orange.fr",
    "outlook.com",
    "proton.me",
    "protonmail.com",
    "softbank.ne.jp",
    "t-online.de",
    "web.de",
    "yahoo.co.jp",
    "yahoo.co.uk",
    "yahoo.com",
];
/// Shorter names are a letter apart by chance.
const SHORTEST: usize = 7;
/// Domains that are looked at.
const DOMAINS_MAX: usize = 20_000;
/// Examples told.
const EXAMPLES: usize = 3;

/// What was noticed.
#[derive(Debug, Default)]
pub(crate) struct Advice {
    roles: u64,
    role_examples: Vec<String>,
    /// What is meant by a domain, and how many wrote it.
    domains: HashMap<Box<str>, (Option<&'static str>, u64)>,
    /// By time zone, whether the window opens before the batch expires.
    zones: HashMap<Option<Box<str>>, bool>,
    /// For how many it does not.
    never: u64,
}

impl Advice {
    /// Looks at a recipient that was accepted.
    pub(crate) fn look(&mut self, email: &EmailAddress) {
        let local = email.local_part();
        if ROLES.iter().any(|role| role.eq_ignore_ascii_case(local)) {
            self.roles += 1;
            if self.role_examples.len() < EXAMPLES {
                self.role_examples.push(email.to_string());
            }
        }
        if let Some((_, count)) = self.domains.get_mut(email.domain()) {
            *count += 1;
        } else if self.domains.len() < DOMAINS_MAX {
            let domain = email.domain();
            self.domains.insert(domain.into(), (meant(domain), 1));
        }
    }

    /// Looks whether the window of the batch opens for a recipient while there is time.
    pub(crate) fn look_at_hours(&mut self, row: &Row, head: &BatchHead) {
        let (Some(window), Some(over), false) = (&head.window, head.expires_at, head.held) else {
            return;
        };
        // Names are of the database, so there are some hundred.
        let opens = match self.zones.get(&row.time_zone) {
            Some(opens) => *opens,
            None => {
                let opens = window.opens_at(row.time_zone.as_deref(), head.release_at) < over;
                self.zones.insert(row.time_zone.clone(), opens);
                opens
            }
        };
        self.never += u64::from(!opens);
    }

    /// In words.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.roles > 0 {
            let examples = self.role_examples.join(", ");
            let count = self.roles;
            warnings.push(format!(
                "addresses of roles, such as {examples}: {count}; they are seldom one person's and complain more often"
            ));
        }
        if self.never > 0 {
            let count = self.never;
            warnings.push(format!(
                "recipients for whom the window does not open before expires_at: {count}; they get nothing"
            ));
        }
        let mistyped = self.domains.iter();
        let mistyped =
            mistyped.filter_map(|(domain, (meant, count))| Some((domain, (*meant)?, *count)));
        let mut mistyped: Vec<_> = mistyped.collect();
        mistyped.sort_by(|a, b| b.2.cmp(&a.2).then_with(|| a.0.cmp(b.0)));
        for (domain, meant, count) in mistyped.into_iter().take(10) {
            warnings.push(format!(
                "domain {domain}: {count}, is perhaps {meant} mistyped"
            ));
        }
        warnings
    }
}

/// The large domain that is one slip of the fingers away.
fn meant(domain: &str) -> Option<&'static str> {
    if domain.len() < SHORTEST || LARGE.contains(&domain) {
        return None;
    }
    let near = |large: &&'static str| {
        large.len() >= SHORTEST
            && large.len().abs_diff(domain.len()) <= 1
            && strsim::damerau_levenshtein(large, domain) == 1
    };
    LARGE.iter().copied().find(|large| near(large))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn slips_are_noticed_and_other_domains_are_left_alone() {
        for (domain, expected) in [
            ("gmial.com", Some("gmail.com")),
            ("gmail.co", Some("gmail.com")),
            ("yaho.com", Some("yahoo.com")),
            ("hotmial.com", Some("hotmail.com")),
            ("gmail.com", None),
            ("ymail.example", None),
            ("web.dk", None),
            ("x.example", None),
        ] {
            assert_eq!(meant(domain), expected, "{domain}");
        }
        let mut advice = Advice::default();
        for email in [
            "Info@x.example",
            "a@gmial.com",
            "b@gmial.com",
            "c@x.example",
        ] {
            advice.look(&email.parse().expect("an address"));
        }
        let warnings = advice.warnings();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("Info@x.example: 1"), "{warnings:?}");
        assert!(
            warnings[1].starts_with("domain gmial.com: 2"),
            "{warnings:?}"
        );
        assert!(Advice::default().warnings().is_empty());
    }

    proptest! {
        #[test]
        fn any_domain_is_looked_at(domain in "[a-z]{1,20}\\.[a-z]{2,5}") {
            prop_assert!(meant(&domain).is_none_or(|large| large != domain));
        }
    }
}
