//! Which directory is ours: a node's identity lives in its journal directory, and the lock in it
//! says that a process has it. Beside it stands in which run of the machine it was last ours.

use crate::config::{Doing as _, JournalConfig, OpenError};
use crate::disk::{Disk, DiskLock, read_full_at, write_all_at};
use model::JournalId;
use std::io;
use std::path::{Path, PathBuf};

/// A directory that is ours for as long as `lock` lives.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) id: JournalId,
    pub(crate) dir: PathBuf,
    /// The machine was started since the last process that had it.
    pub(crate) rebooted: bool,
    pub(crate) lock: Box<dyn DiskLock>,
}

/// The file that names the run of the machine in which a journal was last opened.
const BOOT: &str = "boot";
/// The most of it that is read: such names are short.
const BOOT_BYTES: usize = 256;

/// Takes the first journal of the role that no process holds, in the order of their ids, or makes
/// one.
pub(crate) fn claim(config: &JournalConfig, disk: &dyn Disk) -> Result<Claim, OpenError> {
    if config.role.is_empty() || !config.role.bytes().all(|byte| byte.is_ascii_lowercase()) {
        return Err(OpenError::Role(config.role.clone()));
    }
    disk.create_dir_all(&config.dir)
        .doing("make", &config.dir)?;
    let mut ids: Vec<JournalId> = disk
        .list(&config.dir)
        .doing("list", &config.dir)?
        .iter()
        .filter_map(|name| parse_dir_name(name))
        .filter_map(|(role, id)| (role == config.role).then_some(id))
        .collect();
    ids.sort_unstable();
    for id in ids {
        if let Some(claim) = try_claim(config, disk, id)? {
            // Its maker may have been killed before this.
            sync_names(config, disk)?;
            return Ok(claim);
        }
    }
    let mut id = config.fresh_id;
    loop {
        let dir = config.dir.join(dir_name(&config.role, id));
        disk.create_dir_all(&dir).doing("make", &dir)?;
        if let Some(claim) = try_claim(config, disk, id)? {
            sync_names(config, disk)?;
            return Ok(claim);
        }
        // Another process that starts now saw our new directory before we locked it.
        id = JournalId::from_bytes(
            u128::from_be_bytes(id.to_bytes())
                .wrapping_add(1)
                .to_be_bytes(),
        );
    }
}

/// Makes the name of our directory outlive a power cut, and those of the directories above it, as
/// any of them may be new.
fn sync_names(config: &JournalConfig, disk: &dyn Disk) -> Result<(), OpenError> {
    for (above, dir) in config.dir.ancestors().enumerate() {
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        match disk.sync_dir(dir) {
            // A directory that we may not even read is none that we made.
            Err(error) if above > 0 && error.kind() == io::ErrorKind::PermissionDenied => break,
            synced => synced.doing("sync", dir)?,
        }
    }
    Ok(())
}

fn try_claim(
    config: &JournalConfig,
    disk: &dyn Disk,
    id: JournalId,
) -> Result<Option<Claim>, OpenError> {
    let dir = config.dir.join(dir_name(&config.role, id));
    let path = dir.join("lock");
    let Some(lock) = disk.try_lock(&path).doing("lock", &path)? else {
        return Ok(None);
    };
    let rebooted = match &config.boot {
        Some(boot) => note_boot(disk, &dir, boot)?,
        None => false,
    };
    Ok(Some(Claim {
        id,
        dir,
        rebooted,
        lock,
    }))
}

/// Writes down in which run of the machine the journal is opened; whether the last time was
/// another.
fn note_boot(disk: &dyn Disk, dir: &Path, boot: &str) -> Result<bool, OpenError> {
    let path = dir.join(BOOT);
    let known = match disk.open(&path, false) {
        Ok(file) => {
            let mut known = vec![0; BOOT_BYTES];
            let read = read_full_at(&*file, &mut known, 0).doing("read", &path)?;
            known.truncate(read);
            Some(known)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).doing("open", &path),
    };
    let is_same = known.as_deref() == Some(boot.as_bytes());
    if !is_same && let Err(error) = replace(disk, &path, boot.as_bytes()) {
        // A full disk, for one: the next start of the process takes itself for the first again.
        tracing::warn!(%error, path = %path.display(), "this start of the machine is not noted");
    }
    Ok(known.is_some() && !is_same)
}

/// Puts a file in the place of another, whole.
fn replace(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    match disk.remove(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = disk.create(&new)?;
    write_all_at(&*file, bytes, 0)?;
    file.sync_data()?;
    disk.rename(&new, path)?;
    disk.sync_dir(path.parent().unwrap_or(path))
}

fn dir_name(role: &str, id: JournalId) -> String {
    format!("{role}-{id}")
}

fn parse_dir_name(name: &str) -> Option<(&str, JournalId)> {
    let (role, id) = name.split_once('-')?;
    Some((role, id.parse().ok()?))
}

/// The role and identity that a journal's directory is named after.
pub(crate) fn identity_of(dir: &Path) -> Result<(String, JournalId), OpenError> {
    dir.file_name()
        .and_then(|name| parse_dir_name(name.to_str()?))
        .map(|(role, id)| (role.to_owned(), id))
        .ok_or_else(|| OpenError::NotAJournal(dir.to_owned()))
}
