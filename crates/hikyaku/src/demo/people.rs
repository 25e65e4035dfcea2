//! The thousand people of the demo, as a CSV file that a person could have exported.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// How many people get the newsletter.
pub(crate) const COUNT: usize = 1000;

const FIRST: [&str; 20] = [
    "Aiko",
    "Zoë",
    "Mateo",
    "Fatima",
    "Liam",
    "Ελένη",
    "Noah",
    "Priya",
    "Olga",
    "Chinedu",
    "花子",
    "太郎",
    "José",
    "Sigríður",
    "Wei",
    "Amélie",
    "Tomasz",
    "Leila",
    "Björn",
    "Grace",
];
const LAST: [&str; 10] = [
    "Tanaka",
    "Müller",
    "García",
    "O'Brien",
    "Søndergaard",
    "Nguyen",
    "Kowalska",
    "Haddad",
    "山田",
    "Okafor",
];
const CITIES: [&str; 5] = ["Uji", "Shizuoka", "Darjeeling", "Kagoshima", "Hangzhou"];

/// One line of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Person {
    pub(crate) email: String,
    pub(crate) name: String,
    pub(crate) prospect_id: String,
    pub(crate) points: u32,
    pub(crate) city: String,
}

/// Writes the people of `domains` (a domain and its share of every thousand) to a CSV file.
pub(crate) fn write(path: &Path, domains: &[(String, usize)]) -> Result<()> {
    let mut file = csv::Writer::from_path(path).with_context(|| path.display().to_string())?;
    let homes = domains
        .iter()
        .flat_map(|(domain, share)| std::iter::repeat_n(domain, *share));
    for (at, domain) in homes.cycle().take(COUNT).enumerate() {
        // Every eighth mailbox of a strict domain is one that is gone; elsewhere nobody minds the name.
        let local = if at % 8 == 3 { "gone" } else { "reader" };
        file.serialize(Person {
            email: format!("{local}.{at}@{domain}"),
            name: format!(
                "{} {}",
                FIRST[at % FIRST.len()],
                LAST[at / FIRST.len() % LAST.len()]
            ),
            prospect_id: format!("p-{at}"),
            points: u32::try_from(at * 7 % 1000)?,
            city: CITIES[at % CITIES.len()].to_owned(),
        })?;
    }
    file.flush().with_context(|| path.display().to_string())
}

/// Reads such a file.
pub(crate) fn read(path: &Path) -> Result<Vec<Person>> {
    let mut file = csv::Reader::from_path(path).with_context(|| path.display().to_string())?;
    file.deserialize()
        .map(|person| person.with_context(|| path.display().to_string()))
        .collect()
}
