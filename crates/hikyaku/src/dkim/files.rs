//! Key files: `DOMAIN/SELECTOR.pem` in the key directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use content::dkim::Key;
use model::Domain;

/// The largest file that is read; a key of 8192 bits has 6 KiB.
const LARGEST: u64 = 64 << 10;

/// Where the key goes.
///
/// # Errors
/// When there is a key of that name: a key that signs is never replaced.
pub(super) fn place(directory: &Path, domain: &Domain, selector: &str) -> Result<PathBuf> {
    let label = |label: &str| {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
        (1..=63).contains(&label.len()) && label.bytes().all(plain)
    };
    if !selector.split('.').all(label) || selector.len() > 200 {
        bail!("{selector:?} is not a selector: letters, digits, - and _, labels joined by dots");
    }
    let file = directory
        .join(domain.as_str())
        .join(format!("{selector}.pem"));
    if file
        .try_exists()
        .with_context(|| format!("cannot look at {}", file.display()))?
    {
        bail!(
            "{} exists and is not replaced: choose another --selector",
            file.display()
        );
    }
    Ok(file)
}

/// Writes the key, on disk when this returns, readable for its owner alone.
///
/// # Errors
/// When the file exists or cannot be written; then nothing is left behind.
pub(super) fn write(file: &Path, pem: &str) -> Result<()> {
    let attempt = || -> io::Result<()> {
        let directory = file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(directory)?;
        let mut opened = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(file)?;
        let written = opened
            .write_all(pem.as_bytes())
            .and_then(|()| opened.sync_all());
        if written.is_err() {
            // Half a key would be refused at every start.
            fs::remove_file(file).ok();
        }
        written?;
        File::open(directory)?.sync_all()?;
        // The domain's directory may be new as well.
        match directory.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    };
    attempt().with_context(|| format!("cannot write {}", file.display()))
}

/// The keys of a domain, by selector; none if it has no directory.
///
/// # Errors
/// When a file cannot be read or is not a key, naming it.
pub(crate) fn keys_of(directory: &Path, domain: &Domain) -> Result<Vec<Key>> {
    let place = directory.join(domain.as_str());
    let entries = match fs::read_dir(&place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read {}", place.display()))?,
    };
    let mut keys = Vec::new();
    for entry in entries {
        let file = entry
            .with_context(|| format!("cannot read {}", place.display()))?
            .path();
        if file.extension().is_some_and(|extension| extension == "pem") {
            keys.push(read(&file).with_context(|| file.display().to_string())?);
        }
    }
    keys.sort_by(|a, b| a.selector().cmp(b.selector()));
    Ok(keys)
}

fn read(file: &Path) -> Result<Key> {
    let selector = file
        .file_stem()
        .and_then(|stem| stem.to_str())
        .context("not a selector")?;
    if fs::metadata(file)?.len() > LARGEST {
        bail!("too large for a key");
    }
    Ok(Key::from_pem(selector, &fs::read_to_string(file)?)?)
}
