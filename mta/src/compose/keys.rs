//! DKIM keys as they lie on disk: `DIR/DOMAIN/SELECTOR.pem`.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use content::dkim::{Key, KeyError};

/// Selectors of one domain; each signs every message.
const SELECTORS_MAX: usize = 8;

/// Why the keys of a domain cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// A file or the directory cannot be read.
    #[error("cannot read DKIM key {selector} of {domain}")]
    Read {
        /// Of which domain.
        domain: String,
        /// Which key.
        selector: String,
        /// Why.
        source: io::Error,
    },
    /// A file is no key.
    #[error("DKIM key {selector} of {domain} cannot be used")]
    Key {
        /// Of which domain.
        domain: String,
        /// Which key.
        selector: String,
        /// Why.
        source: KeyError,
    },
    /// More than are of use.
    #[error("{domain} has more than {SELECTORS_MAX} DKIM keys")]
    TooMany {
        /// Which domain.
        domain: String,
    },
}

/// The selectors for which there is a key of `domain` (lower case ASCII), sorted; none when the
/// domain has no directory. Blocks.
///
/// # Errors
/// When the directory cannot be read.
pub fn domain_selectors(dir: &Path, domain: &str) -> Result<Vec<String>, KeysError> {
    let failed = |source| KeysError::Read {
        domain: domain.to_owned(),
        selector: "*".to_owned(),
        source,
    };
    let entries = match fs::read_dir(dir.join(domain)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut selectors = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        if let Some(selector) = name.to_str().and_then(|name| name.strip_suffix(".pem")) {
            selectors.push(selector.to_ascii_lowercase());
        }
    }
    if selectors.len() > SELECTORS_MAX {
        return Err(KeysError::TooMany {
            domain: domain.to_owned(),
        });
    }
    selectors.sort();
    Ok(selectors)
}

/// Reads the keys of `domain` with these selectors, in their order. Blocks.
///
/// # Errors
/// The first that cannot be read or is no key: what was released to be signed with it must not
/// leave otherwise.
pub fn load_keys(dir: &Path, domain: &str, selectors: &[String]) -> Result<Arc<[Key]>, KeysError> {
    let load = |selector: &String| {
        let path = dir.join(domain).join(format!("{selector}.pem"));
        let pem = fs::read_to_string(path).map_err(|source| KeysError::Read {
            domain: domain.to_owned(),
            selector: selector.clone(),
            source,
        })?;
        Key::from_pem(selector, &pem).map_err(|source| KeysError::Key {
            domain: domain.to_owned(),
            selector: selector.clone(),
            source,
        })
    };
    selectors.iter().map(load).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use content::dkim::{Algorithm, generate};

    #[test]
    fn keys_are_found_by_domain_and_selector() {
        let dir = tempfile::tempdir().expect("a directory");
        let domain = dir.path().join("brand.example");
        fs::create_dir(&domain).expect("a directory");
        fs::write(
            domain.join("s2.pem"),
            generate(Algorithm::Ed25519).expect("a key"),
        )
        .expect("written");
        fs::write(domain.join("s1.pem"), "nonsense").expect("written");
        fs::write(domain.join("notes.txt"), "").expect("written");
        let selectors = domain_selectors(dir.path(), "brand.example").expect("selectors");
        assert_eq!(selectors, ["s1", "s2"]);
        assert_eq!(
            load_keys(dir.path(), "brand.example", &selectors[1..])
                .expect("keys")
                .len(),
            1
        );
        assert!(matches!(
            load_keys(dir.path(), "brand.example", &selectors),
            Err(KeysError::Key { .. })
        ));
        assert!(matches!(
            load_keys(dir.path(), "brand.example", &["s3".to_owned()]),
            Err(KeysError::Read { .. })
        ));
        assert!(
            domain_selectors(dir.path(), "other.example")
                .expect("none")
                .is_empty()
        );
    }
}
