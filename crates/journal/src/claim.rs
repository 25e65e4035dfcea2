//! Which directory is ours: a node's identity lives in its journal directory, and the lock in it
//! says that a process has it.

use crate::config::{Doing as _, JournalConfig, OpenError};
use crate::disk::{Disk, DiskLock};
use model::JournalId;
use std::io;
use std::path::{Path, PathBuf};

/// A directory that is ours for as long as `lock` lives.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) id: JournalId,
    pub(crate) dir: PathBuf,
    pub(crate) lock: Box<dyn DiskLock>,
}

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
    let lock = disk.try_lock(&path).doing("lock", &path)?;
    Ok(lock.map(|lock| Claim { id, dir, lock }))
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
