//! Groups recipients into lots while they stream by.
//!
//! Owns which recipients travel together: those of one partition and domain, up to [`LOT_ROWS`], and
//! the long tail of small domains in mixed lots of a partition; where a batch has a send window,
//! those of one time zone, so that it opens for all of a lot at once. What it holds at a time is bounded,
//! however many domains a batch has. Pure; numbers lots, and must not store them.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use model::{LotNumber, Partition, Row};
use store::{LOT_ROWS, MIXED, NewLot, WAVES};

use crate::abtest::layout::Dealing;

/// From here on a domain has lots of its own; below, it joins a mixed lot.
pub(crate) const OWN_LOT_ROWS: usize = 50;

/// How much may be held back for grouping, and how large a lot may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Recipients held at most.
    pub(crate) rows: usize,
    /// Bytes held at most, as far as recipients' values go.
    pub(crate) bytes: usize,
    /// A lot is complete when its recipients have this many bytes, though fewer than 500.
    pub(crate) lot_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            rows: 64 << 10,
            bytes: 8 << 20,
            lot_bytes: 1 << 20,
        }
    }
}

/// A batch has more lots than numbers (2^24 in a partition).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more recipients than one batch can have")]
pub(crate) struct TooManyLots;

#[derive(Debug, Default)]
struct Group {
    rows: Vec<Row>,
    bytes: usize,
}

impl Group {
    /// In which order lots are sealed: whoever comes first is sent first, and a test sees the same
    /// lots every time.
    fn first(&self) -> Option<u32> {
        self.rows.first().map(|row| row.index)
    }
}

/// Sorts recipients into lots.
#[derive(Debug)]
pub(crate) struct LotBuilder {
    bounds: Bounds,
    /// Those of one time zone stand together.
    by_zone: bool,
    /// By partition, then domain (and zone), so that looking up needs no new string.
    groups: BTreeMap<Partition, HashMap<Box<str>, Group>>,
    rows: usize,
    bytes: usize,
    /// The next running number; one for all partitions is simplest and long enough.
    next: u32,
    sealed: Vec<NewLot>,
    /// In a batch with variants.
    dealing: Option<Arc<Dealing>>,
}

impl LotBuilder {
    /// No recipients yet; the first lot gets the running number `first`.
    pub(crate) fn new(bounds: Bounds, first: u32) -> Self {
        Self {
            bounds,
            by_zone: false,
            groups: BTreeMap::new(),
            rows: 0,
            bytes: 0,
            next: first,
            sealed: Vec::new(),
            dealing: None,
        }
    }

    /// Deals recipients to variants. Every group becomes a lot for each wave that it has somebody
    /// in, so numbers are given out by as many as there may be waves.
    pub(crate) fn dealt(self, dealing: Option<Arc<Dealing>>) -> Self {
        let next = match dealing {
            Some(_) => self.next.next_multiple_of(WAVES),
            None => self.next,
        };
        Self {
            next,
            dealing,
            ..self
        }
    }

    /// Keeps time zones apart, or not.
    pub(crate) fn by_zone(self, by_zone: bool) -> Self {
        Self { by_zone, ..self }
    }

    /// Takes one recipient.
    ///
    /// # Errors
    /// When the batch has too many lots.
    pub(crate) fn push(&mut self, partition: Partition, row: Row) -> Result<(), TooManyLots> {
        let size = weight(&row);
        let key = match &row.time_zone {
            Some(zone) if self.by_zone => Cow::Owned(format!("{}\n{zone}", row.email.domain())),
            Some(_) | None => Cow::Borrowed(row.email.domain()),
        };
        let domains = self.groups.entry(partition).or_default();
        self.rows += 1;
        self.bytes += size;
        let full = match domains.get_mut(&*key) {
            Some(group) => {
                group.rows.push(row);
                group.bytes += size;
                let is_full = group.rows.len() >= LOT_ROWS || group.bytes >= self.bounds.lot_bytes;
                is_full.then(|| std::mem::take(group))
            }
            None => {
                let (key, rows) = ((&*key).into(), vec![row]);
                domains.insert(key, Group { rows, bytes: size });
                None
            }
        };
        if let Some(full) = full {
            self.seal(partition, full)?;
        }
        if self.rows > self.bounds.rows || self.bytes > self.bounds.bytes {
            self.relieve()?;
        }
        Ok(())
    }

    /// The complete lots so far.
    pub(crate) fn take_sealed(&mut self) -> Vec<NewLot> {
        std::mem::take(&mut self.sealed)
    }

    /// How many recipients stand in complete lots not yet taken.
    pub(crate) fn sealed_rows(&self) -> usize {
        self.sealed.iter().map(|lot| lot.rows.len()).sum()
    }

    /// All that is left: no more recipients come.
    ///
    /// # Errors
    /// When the batch has too many lots.
    pub(crate) fn finish(mut self) -> Result<Vec<NewLot>, TooManyLots> {
        self.seal_large()?;
        self.seal_mixed()?;
        Ok(self.sealed)
    }

    /// Too much is held: the large domains go, and when that was not half of it, the small ones too.
    fn relieve(&mut self) -> Result<(), TooManyLots> {
        self.seal_large()?;
        if self.rows > self.bounds.rows / 2 || self.bytes > self.bounds.bytes / 2 {
            self.seal_mixed()?;
        }
        Ok(())
    }

    fn seal_large(&mut self) -> Result<(), TooManyLots> {
        let mut large = Vec::new();
        for (&partition, domains) in &mut self.groups {
            let found = domains.extract_if(|_, group| group.rows.len() >= OWN_LOT_ROWS);
            large.extend(found.map(|(_, group)| (partition, group)));
        }
        large.sort_unstable_by_key(|(_, group)| group.first());
        large
            .into_iter()
            .try_for_each(|(partition, group)| self.seal(partition, group))
    }

    fn seal_mixed(&mut self) -> Result<(), TooManyLots> {
        for (partition, domains) in std::mem::take(&mut self.groups) {
            let mut small: Vec<Group> = domains
                .into_values()
                .filter(|group| !group.rows.is_empty())
                .collect();
            small.sort_unstable_by_key(Group::first);
            if self.by_zone {
                small.sort_by(|a, b| zone(&a.rows).cmp(&zone(&b.rows)));
            }
            let mut mixed = Group::default();
            for row in small.into_iter().flat_map(|group| group.rows) {
                let is_elsewhere = self.by_zone && row.time_zone.as_deref() != zone(&mixed.rows);
                if is_elsewhere && !mixed.rows.is_empty() {
                    self.seal_as(partition, MIXED.into(), std::mem::take(&mut mixed))?;
                }
                mixed.bytes += weight(&row);
                mixed.rows.push(row);
                if mixed.rows.len() >= LOT_ROWS || mixed.bytes >= self.bounds.lot_bytes {
                    self.seal_as(partition, MIXED.into(), std::mem::take(&mut mixed))?;
                }
            }
            if !mixed.rows.is_empty() {
                self.seal_as(partition, MIXED.into(), mixed)?;
            }
        }
        Ok(())
    }

    /// A lot of one domain.
    fn seal(&mut self, partition: Partition, group: Group) -> Result<(), TooManyLots> {
        let domain = group.rows.first().map_or(MIXED, |row| row.email.domain());
        self.seal_as(partition, domain.into(), group)
    }

    fn seal_as(
        &mut self,
        partition: Partition,
        queue: Box<str>,
        group: Group,
    ) -> Result<(), TooManyLots> {
        self.rows = self.rows.saturating_sub(group.rows.len());
        self.bytes = self
            .bytes
            .saturating_sub(group.rows.iter().map(weight).sum());
        let Some(dealing) = &self.dealing else {
            self.sealed.push(NewLot {
                number: LotNumber::new(partition, self.next).ok_or(TooManyLots)?,
                queue,
                rows: group.rows,
                variants: Vec::new(),
            });
            self.next += 1;
            return Ok(());
        };
        for dealt in dealing.deal(group.rows, &*queue == MIXED) {
            let number = LotNumber::new(partition, self.next + dealt.wave);
            self.sealed.push(NewLot {
                number: number.ok_or(TooManyLots)?,
                queue: queue.clone(),
                rows: dealt.rows,
                variants: dealt.variants,
            });
        }
        self.next += WAVES;
        Ok(())
    }
}

fn zone(rows: &[Row]) -> Option<&str> {
    rows.first()?.time_zone.as_deref()
}

/// What a recipient takes in memory, roughly.
fn weight(row: &Row) -> usize {
    let text = |value: &Option<Box<str>>| value.as_ref().map_or(0, |text| text.len());
    size_of::<Row>()
        + row.email.as_str().len()
        + text(&row.name)
        + text(&row.prospect_id)
        + text(&row.vars)
        + text(&row.metadata)
        + text(&row.time_zone)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(index: u32, domain: u32) -> Row {
        let email = format!("a{index}@d{domain}.example")
            .parse()
            .expect("an address");
        Row::new(index, email)
    }

    fn build(bounds: Bounds, rows: &[(u8, u32)]) -> (Vec<NewLot>, usize) {
        build_by(false, bounds, rows)
    }

    const ZONES: [Option<&str>; 3] = [None, Some("Asia/Tokyo"), Some("Europe/Paris")];

    /// Every index has the next of the zones.
    fn build_by(by_zone: bool, bounds: Bounds, rows: &[(u8, u32)]) -> (Vec<NewLot>, usize) {
        let mut builder = LotBuilder::new(bounds, 0).by_zone(by_zone);
        let (mut lots, mut most) = (Vec::new(), 0);
        for ((index, &(partition, domain)), zone) in (0..).zip(rows).zip(ZONES.iter().cycle()) {
            let row = Row {
                time_zone: zone.map(Box::from),
                ..row(index, domain)
            };
            builder.push(Partition(partition), row).expect("few lots");
            lots.extend(builder.take_sealed());
            most = most.max(builder.rows);
        }
        lots.extend(builder.finish().expect("few lots"));
        (lots, most)
    }

    #[test]
    fn large_domains_have_lots_of_their_own_and_small_ones_share() {
        let mut rows: Vec<(u8, u32)> = vec![(0, 1); 1_200];
        rows.extend((0..30).map(|n| (0, 100 + n)));
        rows.extend(vec![(0, 2); 49]);
        let (lots, _) = build(Bounds::default(), &rows);
        let sizes: Vec<_> = lots
            .iter()
            .map(|lot| (&*lot.queue, lot.rows.len()))
            .collect();
        assert_eq!(
            sizes,
            [
                ("d1.example", 500),
                ("d1.example", 500),
                ("d1.example", 200),
                (MIXED, 79)
            ]
        );
    }

    #[test]
    fn what_is_held_is_bounded_whatever_the_domains() {
        let bounds = Bounds {
            rows: 1_000,
            ..Bounds::default()
        };
        let rows: Vec<_> = (0..20_000).map(|n| (0, n)).collect();
        let (lots, most) = build(bounds, &rows);
        assert!(most <= 1_000);
        assert!(lots.len() < 60, "the long tail shares lots: {}", lots.len());
        let heavy = Bounds {
            bytes: 10_000,
            lot_bytes: 1_000,
            ..Bounds::default()
        };
        let (lots, _) = build(heavy, &[(0, 1); 500]);
        assert!(
            lots.iter()
                .all(|lot| lot.rows.iter().map(weight).sum::<usize>() < 1_200)
        );
    }

    proptest! {
        #[test]
        fn everyone_is_in_exactly_one_fitting_lot(
            rows in prop::collection::vec((0_u8..3, 0_u32..40), 0..2_000), held in 10_usize..400, by_zone: bool,
        ) {
            let (lots, most) = build_by(by_zone, Bounds { rows: held, ..Bounds::default() }, &rows);
            prop_assert!(most <= held);
            let mut indices: Vec<u32> = lots.iter().flat_map(|lot| lot.rows.iter().map(|row| row.index)).collect();
            indices.sort_unstable();
            prop_assert!(indices.into_iter().eq(0..u32::try_from(rows.len()).expect("few")));
            let mut numbers: Vec<_> = lots.iter().map(|lot| lot.number).collect();
            numbers.sort_unstable();
            numbers.dedup();
            prop_assert_eq!(numbers.len(), lots.len());
            for lot in &lots {
                prop_assert!(!lot.rows.is_empty() && lot.rows.len() <= LOT_ROWS);
                prop_assert!(!by_zone || lot.rows.iter().all(|row| row.time_zone.as_deref() == zone(&lot.rows)));
                for row in &lot.rows {
                    let (partition, _) = rows[row.index as usize];
                    prop_assert_eq!(lot.number.partition(), Partition(partition));
                    prop_assert!(&*lot.queue == MIXED || &*lot.queue == row.email.domain());
                }
            }
        }
    }
}
