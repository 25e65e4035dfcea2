//! Secrets in files: the tracking keys and the first API key, made at first start; certificates' keys.
//!
//! Owns how such a file comes to be: whole or not at all, for its owner's eyes only, made by
//! whichever process is first. Must not know what a secret is good for, nor where chance comes from.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// What was done with a secret's file, or not.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {path}")]
pub struct SecretError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The text of the file at `path`; if there is none, it is made of what `make` gives, mode 0600,
/// with its directory, and is on disk before this returns. Processes that start together all get
/// the text of the first. Blocks.
///
/// # Errors
/// When the file can be neither read nor made.
pub fn load_or_create(
    path: &Path,
    make: impl FnOnce() -> io::Result<String>,
) -> Result<String, SecretError> {
    let failed = |doing| {
        move |source| SecretError {
            doing,
            path: path.to_owned(),
            source,
        }
    };
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        read => return read.map_err(failed("read")),
    }
    make()
        .and_then(|text| create(path, &text))
        .map_err(failed("make"))?;
    fs::read_to_string(path).map_err(failed("read"))
}

/// Puts `text` in the place of the file at `path`, mode 0600, with its directory: whole or not at
/// all, and on disk when this returns. Blocks.
///
/// # Errors
/// When the disk refuses; the file is as it was.
pub fn replace(path: &Path, text: &str) -> Result<(), SecretError> {
    let replaced = draft(path, text, |draft| fs::rename(draft, path));
    replaced.map_err(|source| SecretError {
        doing: "write",
        path: path.to_owned(),
        source,
    })
}

/// Two threads of one process may make the same secret at the same time.
static DRAFTS: AtomicU32 = AtomicU32::new(0);

/// Makes the file unless another process was faster.
fn create(path: &Path, text: &str) -> io::Result<()> {
    // A link, unlike a rename, replaces nothing, and unlike writing in place it shows no reader
    // half a secret.
    match draft(path, text, |draft| fs::hard_link(draft, path)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Writes a draft beside `path` and lets `publish` put it there.
fn draft(path: &Path, text: &str, publish: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(directory)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (process, number) = (std::process::id(), DRAFTS.fetch_add(1, Ordering::Relaxed));
    let draft = directory.join(format!(".{name}.{process}-{number}.draft"));
    // Left over from a process of the same number that died right here.
    drop(fs::remove_file(&draft));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| publish(&draft));
    drop(fs::remove_file(&draft));
    written?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_secret_is_made_once_and_only_its_owner_reads_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("new/key");
        let first = load_or_create(&path, || Ok("one\n".to_owned())).expect("made");
        let second = load_or_create(&path, || panic!("there is one")).expect("read");
        assert_eq!((first.as_str(), second.as_str()), ("one\n", "one\n"));
        let mode = fs::metadata(&path).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let parent = path.parent().expect("has one");
        assert_eq!(fs::read_dir(parent).expect("list").count(), 1);
    }

    #[test]
    fn a_secret_is_replaced_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("new/key");
        replace(&path, "one").expect("made");
        replace(&path, "two").expect("replaced");
        assert_eq!(fs::read_to_string(&path).expect("read"), "two");
        let mode = fs::metadata(&path).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let parent = path.parent().expect("has one");
        assert_eq!(fs::read_dir(parent).expect("list").count(), 1);
    }

    #[test]
    fn who_comes_second_takes_the_firsts() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        let text = load_or_create(&path, || {
            create(&path, "the other's")?;
            Ok("ours".to_owned())
        });
        assert_eq!(text.expect("read"), "the other's");
    }

    #[test]
    fn all_who_start_together_get_the_same() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        let barrier = std::sync::Barrier::new(8);
        let one = &|number: usize| {
            barrier.wait();
            load_or_create(&path, || Ok(number.to_string())).expect("made or read")
        };
        let texts: Vec<String> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8)
                .map(|number| scope.spawn(move || one(number)))
                .collect();
            all.into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    }

    #[test]
    fn errors_name_the_file_and_leave_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        let error = load_or_create(&path, || Err(io::Error::other("no chance today")));
        let error = error.expect_err("not made");
        assert!(error.to_string().ends_with("/key"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
        assert!(load_or_create(dir.path(), || Ok(String::new())).is_err());
    }
}
