//! What a seed stands for: the people, the hosts and the troubles of a world.

use std::time::Duration;

use super::network::Zone;

/// How a domain's host receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    Plain,
    /// Offers neither PIPELINING nor CHUNKING.
    Old,
    /// 451 before so long has passed.
    Grey(Duration),
    /// Lets so long pass before each reply.
    Tarpit(Duration),
    /// Lets so long pass before the reply to a message.
    Slow(Duration),
    /// Never greets.
    Mute,
    /// Breaks off after the final dot, of 100 messages so many; the message is taken, or not.
    Cutting(u8),
    /// 421, a close or a reset at any point, of 100 so often.
    Rude(u8),
    /// Knows some, and has no room for others at times.
    Picky,
    /// 421 beyond so many MAIL commands in a second.
    Throttling(usize),
}

/// A domain of the world.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) domain: String,
    pub(super) manner: Manner,
    pub(super) zone: Zone,
    /// Has limits of its own, without adaptation, over connections as even as a wire.
    pub(super) is_limited: bool,
    pub(super) people: usize,
}

/// What may happen, each at times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Troubles {
    pub(super) kills: bool,
    pub(super) power_cuts: bool,
    pub(super) freezes: bool,
    pub(super) store: bool,
    pub(super) resets: bool,
    pub(super) stalls: bool,
    pub(super) hosts: bool,
    pub(super) clock: bool,
    pub(super) control: bool,
}

/// The whole of it.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) nodes: usize,
    pub(super) batches: usize,
    pub(super) places: Vec<Place>,
    pub(super) troubles: Troubles,
    /// How long there is trouble.
    pub(super) trouble_for: Duration,
}

impl Plan {
    /// What `seed` stands for.
    pub(super) fn of(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let nodes = [1, 1, 2, 3][random.usize(..4)];
        let mut places: Vec<Place> = (0..random.usize(2..=5))
            .map(|number| Place {
                domain: format!("d{number}.example"),
                manner: manner(&mut random),
                zone: zone(&mut random),
                is_limited: false,
                people: random.usize(1..40),
            })
            .collect();
        places.push(Place {
            domain: "limited.example".to_owned(),
            manner: if random.bool() {
                Manner::Plain
            } else {
                Manner::Old
            },
            zone: Zone::Good,
            is_limited: true,
            people: random.usize(5..60),
        });
        // Of the long tail: one or two at each domain, together in lots.
        for number in 0..random.usize(..6) {
            places.push(Place {
                domain: format!("tail{number}.example"),
                manner: Manner::Plain,
                zone: zone(&mut random),
                is_limited: false,
                people: 1,
            });
        }
        crowd(&mut places, seed, 2);
        let is_calm = random.u8(..10) == 0;
        let mut some = || !is_calm && random.u8(..5) < 2;
        let troubles = Troubles {
            kills: some(),
            power_cuts: some(),
            freezes: some(),
            store: some(),
            resets: some(),
            stalls: some(),
            hosts: some(),
            clock: some(),
            control: some(),
        };
        Self {
            seed,
            nodes,
            batches: random.usize(1..=3),
            places,
            troubles,
            trouble_for: Duration::from_secs(random.u64(10..60)),
        }
    }

    /// What `seed` stands for where everything is small, so that thousands can be lived: a few
    /// people at one or two hosts for some seconds, of which more are full of trouble.
    pub(super) fn little(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let places = (0..random.usize(1..=2)).map(|number| Place {
            domain: format!("d{number}.example"),
            manner: brisk(&mut random),
            zone: Zone::Good,
            is_limited: false,
            people: random.usize(1..6),
        });
        let mut places: Vec<_> = places.collect();
        if random.bool() {
            places.push(Place {
                domain: "limited.example".to_owned(),
                manner: Manner::Plain,
                zone: Zone::Good,
                is_limited: true,
                people: random.usize(10..30),
            });
        }
        crowd(&mut places, seed, 16);
        let mut some = || random.u8(..3) == 0;
        Self {
            seed,
            nodes: 1 + usize::from(some()),
            batches: 1,
            troubles: Troubles {
                kills: some(),
                power_cuts: some(),
                freezes: some(),
                store: some(),
                resets: some(),
                stalls: some(),
                hosts: false,
                clock: some(),
                control: some(),
            },
            places,
            trouble_for: Duration::from_secs(random.u64(3..12)),
        }
    }

    /// A few people at two hosts, and no trouble.
    pub(super) fn small() -> Self {
        let place = |domain: &str, manner, is_limited| Place {
            domain: domain.to_owned(),
            manner,
            zone: Zone::Good,
            is_limited,
            people: 6,
        };
        Self {
            seed: 0,
            nodes: 1,
            batches: 1,
            places: vec![
                place("limited.example", Manner::Plain, true),
                place("picky.example", Manner::Picky, false),
            ],
            troubles: Troubles::default(),
            trouble_for: Duration::ZERO,
        }
    }

    /// Nothing in it can cost a second copy.
    pub(super) fn is_sure(&self) -> bool {
        let Troubles {
            kills,
            power_cuts,
            freezes,
            resets,
            stalls,
            clock,
            store: _,
            hosts: _,
            control: _,
        } = self.troubles;
        let cuts = |place: &Place| matches!(place.manner, Manner::Cutting(_) | Manner::Rude(_));
        let breaks = kills || power_cuts || freezes || resets || stalls || clock;
        !(breaks || self.places.iter().any(cuts))
    }
}

/// In one of so many worlds the first place has more people than a window takes, so that windows have
/// to move for all of them to get their mail.
fn crowd(places: &mut [Place], seed: u64, one_of: u8) {
    // With numbers of its own: those of the rest stay what they were.
    let mut random = fastrand::Rng::with_seed(seed ^ 0xc40d);
    if random.u8(..one_of) == 0
        && let Some(place) = places.first_mut()
    {
        place.people += random.usize(70..160);
    }
}

fn manner(random: &mut fastrand::Rng) -> Manner {
    match random.u8(..14) {
        0..=2 => Manner::Plain,
        3 => Manner::Old,
        4 => Manner::Grey(Duration::from_secs(random.u64(1..30))),
        5 => Manner::Tarpit(Duration::from_secs(random.u64(1..30))),
        6 => Manner::Slow(Duration::from_millis(random.u64(50..10_000))),
        7 => Manner::Mute,
        8 | 9 => Manner::Cutting(random.u8(1..60)),
        10 | 11 => Manner::Rude(random.u8(1..30)),
        12 => Manner::Picky,
        _ => Manner::Throttling(random.usize(1..10)),
    }
}

/// Those that answer soon, however they answer.
fn brisk(random: &mut fastrand::Rng) -> Manner {
    match random.u8(..8) {
        0 | 1 => Manner::Plain,
        2 => Manner::Old,
        3 => Manner::Slow(Duration::from_millis(random.u64(50..3_000))),
        4 => Manner::Cutting(random.u8(1..60)),
        5 => Manner::Rude(random.u8(1..30)),
        6 => Manner::Picky,
        _ => Manner::Grey(Duration::from_secs(random.u64(1..5))),
    }
}

fn zone(random: &mut fastrand::Rng) -> Zone {
    match random.u8(..16) {
        0 => Zone::Slow(Duration::from_secs(random.u64(1..15))),
        1 => Zone::Failing(random.u8(10..70)),
        2 => Zone::NoDomain,
        3 => Zone::NullMx,
        4 => Zone::Moving(Duration::from_secs(random.u64(5..60))),
        _ => Zone::Good,
    }
}
