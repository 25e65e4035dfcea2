//! A disk in memory that fails when told to, fills up, loses power, and forgets what was not
//! synced: for crash tests here and in the rooms above.
//!
//! It behaves like the worst file system that keeps its promises. What a power cut leaves of
//! unsynced bytes is chosen page by page, of unsynced names one by one. After a failed sync the
//! pages count as clean, so that a later sync succeeds without them.

use crate::disk::{Disk, DiskFile, DiskLock};
use crate::lock;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Small, so that a torn write tears records and not only files.
const PAGE: usize = 64;

/// What happens to the operation that is to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It answers an I/O error; a write may have written a part, a sync none.
    Io,
    /// A write finds room for a part only; an operation that needs no room succeeds.
    NoSpace,
}

/// The disk. Hand out [`FaultDisk::mount`]s; they die with a [`FaultDisk::kill`] or
/// [`FaultDisk::power_cut`], and with them every handle of the process that used them.
#[derive(Debug, Clone)]
pub struct FaultDisk {
    world: Arc<Mutex<World>>,
}

/// What writes to files wait at while it is closed.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    waiting: usize,
}

impl Gate {
    fn wait_while(&self, state: &mut dyn FnMut(&mut GateState) -> bool) {
        let waited = self.changed.wait_while(lock(&self.state), state);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn close(&self, closed: bool) {
        lock(&self.state).closed = closed;
        self.changed.notify_all();
    }

    fn pass(&self) {
        lock(&self.state).waiting += 1;
        self.changed.notify_all();
        self.wait_while(&mut |state| state.closed);
        lock(&self.state).waiting -= 1;
    }
}

struct World {
    gate: Arc<Gate>,
    rng: fastrand::Rng,
    /// Counts operations that can fail.
    ops: u64,
    plan: Option<(u64, Fault, bool)>,
    capacity: u64,
    epoch: u64,
    nodes: BTreeMap<u64, Node>,
    next_node: u64,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    locks: BTreeSet<PathBuf>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World")
            .field("ops", &self.ops)
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Node {
    directory: bool,
    cached: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
}

impl FaultDisk {
    /// An empty disk; `seed` decides what crashes leave.
    pub fn new(seed: u64) -> Self {
        let world = World {
            gate: Arc::default(),
            rng: fastrand::Rng::with_seed(seed),
            ops: 0,
            plan: None,
            capacity: u64::MAX,
            epoch: 0,
            nodes: BTreeMap::new(),
            next_node: 0,
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            locks: BTreeSet::new(),
        };
        Self {
            world: Arc::new(Mutex::new(world)),
        }
    }

    /// The disk as one process sees it.
    pub fn mount(&self) -> Arc<dyn Disk> {
        let epoch = lock(&self.world).epoch;
        Arc::new(Mount {
            world: Arc::clone(&self.world),
            epoch,
        })
    }

    /// Makes the `n`th operation from now (from 1) fail, and all after it if `for_good`.
    pub fn fail_at(&self, n: u64, fault: Fault, for_good: bool) {
        let mut world = lock(&self.world);
        world.plan = Some((world.ops + n, fault, for_good));
    }

    /// Ends a planned failure; says whether it came to it.
    pub fn heal(&self) -> bool {
        let mut world = lock(&self.world);
        let ops = world.ops;
        world.plan.take().is_some_and(|(at, _, _)| ops >= at)
    }

    /// How many operations that can fail were made so far.
    pub fn operations(&self) -> u64 {
        lock(&self.world).ops
    }

    /// Lets writes to files wait, or no longer.
    pub fn hold_writes(&self, held: bool) {
        let gate = lock(&self.world).gate.clone();
        gate.close(held);
    }

    /// Returns once a write waits. Blocks.
    pub fn wait_for_held_write(&self) {
        let gate = lock(&self.world).gate.clone();
        gate.wait_while(&mut |state| state.waiting == 0);
    }

    /// Bounds what all files hold together.
    pub fn set_capacity(&self, bytes: u64) {
        lock(&self.world).capacity = bytes;
    }

    /// What all files hold together, in bytes.
    pub fn used(&self) -> u64 {
        lock(&self.world).used()
    }

    /// The process dies (`kill -9`): its handles and locks are gone, its writes stay.
    pub fn kill(&self) {
        let mut world = lock(&self.world);
        world.epoch += 1;
        world.locks.clear();
        world.plan = None;
    }

    /// The power goes: of what was not synced, an arbitrary part is gone.
    pub fn power_cut(&self) {
        self.kill();
        let mut world = lock(&self.world);
        let World { rng, nodes, .. } = &mut *world;
        for node in nodes.values_mut() {
            node.lose(rng);
        }
        world.lose_names();
    }

    /// Overwrites a byte on the medium, synced as it may be.
    ///
    /// # Panics
    /// When there is no such file or byte.
    pub fn damage(&self, path: &Path, offset: usize) {
        let mut world = lock(&self.world);
        let id = world.names.get(path).copied();
        let node = id.and_then(|id| world.nodes.get_mut(&id));
        let byte = node
            .and_then(|node| node.cached.get_mut(offset))
            .expect("a byte to damage");
        *byte = !*byte;
    }
}

impl Node {
    fn page(&self, page: usize) -> std::ops::Range<usize> {
        page * PAGE..((page + 1) * PAGE).min(self.cached.len())
    }

    fn mark(&mut self, from: usize, to: usize) {
        if from < to {
            self.dirty.extend(from / PAGE..=(to - 1) / PAGE);
        }
    }

    fn sync(&mut self) {
        self.durable.resize(self.cached.len(), 0);
        for page in std::mem::take(&mut self.dirty) {
            let range = self.page(page);
            if !range.is_empty() {
                self.durable[range.clone()].copy_from_slice(&self.cached[range]);
            }
        }
    }

    fn lose(&mut self, rng: &mut fastrand::Rng) {
        // The size may have got there before, after or without the bytes.
        let (least, most) = (
            self.durable.len().min(self.cached.len()),
            self.durable.len().max(self.cached.len()),
        );
        let dirty: Vec<usize> = std::mem::take(&mut self.dirty).into_iter().collect();
        let len = if rng.bool() {
            rng.usize(least..=most)
        } else {
            self.cached.len()
        };
        let mut left = self.durable.clone();
        left.resize(len, 0);
        let keep_all = rng.u8(..4) == 0;
        for page in dirty {
            let range = self.page(page);
            let range = range.start.min(len)..range.end.min(len);
            if keep_all || rng.bool() {
                left[range.clone()].copy_from_slice(&self.cached[range]);
            }
        }
        self.cached.clone_from(&left);
        self.durable = left;
    }
}

impl World {
    fn used(&self) -> u64 {
        self.names
            .values()
            .filter_map(|id| self.nodes.get(id))
            .map(|n| n.cached.len() as u64)
            .sum()
    }

    /// Counts an operation and says how it is to fail.
    fn operation(&mut self) -> Option<Fault> {
        self.ops += 1;
        let (at, fault, for_good) = self.plan?;
        (self.ops == at || for_good && self.ops > at).then_some(fault)
    }

    /// An operation that needs no room.
    fn plain(&mut self) -> io::Result<()> {
        match self.operation() {
            Some(Fault::Io) => Err(io::Error::other("injected fault")),
            Some(Fault::NoSpace) | None => Ok(()),
        }
    }

    fn node(&mut self, path: &Path) -> io::Result<u64> {
        self.names
            .get(path)
            .copied()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn add(&mut self, path: &Path, directory: bool) -> u64 {
        let id = self.next_node;
        self.next_node += 1;
        self.nodes.insert(
            id,
            Node {
                directory,
                ..Node::default()
            },
        );
        self.names.insert(path.to_owned(), id);
        id
    }

    fn lose_names(&mut self) {
        let paths: BTreeSet<PathBuf> = self
            .names
            .keys()
            .chain(self.durable_names.keys())
            .cloned()
            .collect();
        let mut left = BTreeMap::new();
        // Parents come before what is in them.
        for path in paths {
            let (new, old) = (self.names.get(&path), self.durable_names.get(&path));
            let id = if new == old || self.rng.bool() {
                new
            } else {
                old
            };
            let parent = path.parent().filter(|parent| *parent != Path::new("/"));
            let reachable = parent.is_none_or(|parent| left.contains_key(parent));
            if let (Some(&id), true) = (id, reachable) {
                left.insert(path, id);
            }
        }
        self.names.clone_from(&left);
        self.durable_names = left;
    }
}

#[derive(Debug)]
struct Mount {
    world: Arc<Mutex<World>>,
    epoch: u64,
}

#[derive(Debug)]
struct Handle {
    mount: Mount,
    id: u64,
}

#[derive(Debug)]
struct Held {
    mount: Mount,
    path: PathBuf,
}

impl Mount {
    fn enter<T>(&self, act: impl FnOnce(&mut World) -> io::Result<T>) -> io::Result<T> {
        let mut world = lock(&self.world);
        if world.epoch != self.epoch {
            return Err(io::Error::other("this process is dead"));
        }
        act(&mut world)
    }

    fn again(&self) -> Self {
        Self {
            world: Arc::clone(&self.world),
            epoch: self.epoch,
        }
    }
}

impl Disk for Mount {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.enter(|world| {
            world.plain()?;
            let mut missing: Vec<&Path> = dir
                .ancestors()
                .filter(|dir| *dir != Path::new("/") && !world.names.contains_key(*dir))
                .collect();
            while let Some(dir) = missing.pop() {
                world.add(dir, true);
            }
            Ok(())
        })
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.enter(|world| {
            world.plain()?;
            world.node(dir)?;
            let inside = world.names.keys().filter(|path| path.parent() == Some(dir));
            Ok(inside
                .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
                .collect())
        })
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.enter(|world| {
            match world.operation() {
                Some(Fault::Io) => return Err(io::Error::other("injected fault")),
                Some(Fault::NoSpace) => return Err(io::ErrorKind::StorageFull.into()),
                None => {}
            }
            if world.names.contains_key(path) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let id = world.add(path, false);
            Ok(Arc::new(Handle {
                mount: self.again(),
                id,
            }) as Arc<dyn DiskFile>)
        })
    }

    fn open(&self, path: &Path, _write: bool) -> io::Result<Arc<dyn DiskFile>> {
        self.enter(|world| {
            world.plain()?;
            let id = world.node(path)?;
            Ok(Arc::new(Handle {
                mount: self.again(),
                id,
            }) as Arc<dyn DiskFile>)
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.enter(|world| {
            world.plain()?;
            world.node(path)?;
            world.names.remove(path);
            Ok(())
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.enter(|world| {
            world.plain()?;
            let id = world.node(from)?;
            world.names.remove(from);
            world.names.insert(to.to_owned(), id);
            Ok(())
        })
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.enter(|world| {
            world.plain()?;
            if dir != Path::new("/") {
                world.node(dir)?;
            }
            world
                .durable_names
                .retain(|path, _| path.parent() != Some(dir));
            let inside = world
                .names
                .iter()
                .filter(|(path, _)| path.parent() == Some(dir));
            let inside: Vec<_> = inside.map(|(path, id)| (path.clone(), *id)).collect();
            world.durable_names.extend(inside);
            Ok(())
        })
    }

    fn try_lock(&self, path: &Path) -> io::Result<Option<Box<dyn DiskLock>>> {
        self.enter(|world| {
            world.plain()?;
            if !world.names.contains_key(path) {
                world.add(path, false);
            }
            let ours = world.locks.insert(path.to_owned());
            let held = || {
                Box::new(Held {
                    mount: self.again(),
                    path: path.to_owned(),
                })
            };
            Ok(ours.then(|| held() as Box<dyn DiskLock>))
        })
    }
}

impl DiskLock for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        // A dead process has no locks to free; perhaps another has this one now.
        let freed = self.mount.enter(|world| Ok(world.locks.remove(&self.path)));
        drop(freed);
    }
}

impl Handle {
    fn enter<T>(&self, act: impl FnOnce(&mut World, &mut Node) -> io::Result<T>) -> io::Result<T> {
        self.mount.enter(|world| {
            let mut node = world.nodes.remove(&self.id).unwrap_or_default();
            debug_assert!(!node.directory, "a directory is no file");
            let result = act(world, &mut node);
            world.nodes.insert(self.id, node);
            result
        })
    }
}

impl DiskFile for Handle {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let gate = lock(&self.mount.world).gate.clone();
        gate.pass();
        self.enter(|world, node| {
            let fault = world.operation();
            let at = usize::try_from(offset).map_err(io::Error::other)?;
            let grows = (at + bytes.len()).saturating_sub(node.cached.len());
            // The node is out of the table now, so `used` is without it.
            let room = world
                .capacity
                .saturating_sub(world.used() + node.cached.len() as u64);
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            let fits = bytes.len() - grows.saturating_sub(room);
            let (part, error) = match fault {
                Some(Fault::Io) => (
                    world.rng.usize(0..=bytes.len()),
                    Some(io::Error::other("injected fault")),
                ),
                Some(Fault::NoSpace) => (
                    world.rng.usize(0..=fits),
                    Some(io::ErrorKind::StorageFull.into()),
                ),
                None if fits == 0 && !bytes.is_empty() => {
                    (0, Some(io::ErrorKind::StorageFull.into()))
                }
                None => (fits, None),
            };
            if node.cached.len() < at + part {
                node.cached.resize(at + part, 0);
            }
            node.cached[at..at + part].copy_from_slice(&bytes[..part]);
            node.mark(at, at + part);
            error.map_or(Ok(part), Err)
        })
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.enter(|world, node| {
            world.plain()?;
            let at = usize::try_from(offset).map_err(io::Error::other)?;
            let there = node.cached.get(at..).unwrap_or_default();
            let read = there.len().min(into.len());
            into[..read].copy_from_slice(&there[..read]);
            Ok(read)
        })
    }

    fn size(&self) -> io::Result<u64> {
        self.enter(|world, node| {
            world.plain()?;
            Ok(node.cached.len() as u64)
        })
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.enter(|world, node| {
            world.plain()?;
            let (old, new) = (
                node.cached.len(),
                usize::try_from(size).map_err(io::Error::other)?,
            );
            node.cached.resize(new, 0);
            node.mark(old.min(new), new);
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.enter(|world, node| {
            if let Err(error) = world.plain() {
                // The kernel reports a failed write-back once and takes the pages for clean.
                node.dirty.clear();
                return Err(error);
            }
            node.sync();
            Ok(())
        })
    }
}
