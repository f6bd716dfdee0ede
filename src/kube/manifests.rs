//! A directory of manifests as a source.
//!
//! Every file is parsed when it appears or changes, never otherwise. An object is where
//! its file says it is until the file says otherwise or is gone: a document that became
//! unreadable keeps the object's last good version (a policy what can be read of it, and is closed
//! for the rest: [`super::convert`]), and where one document of a file
//! cannot be read so far as to tell which object it is, all objects of that file that
//! are not found any more stay too. An empty file is one that somebody is just writing.
//!
//! inotify says where to look; a full look every few seconds makes up for what it missed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecursiveMode, Watcher};
use tracing::{debug, info, warn};

use super::Tables;
use super::convert::{Converted, FieldError, ObjectId};
use super::document::{self, Content, Document};
use super::foreign::ForeignPolicies;
use super::health::{Health, Report, closed};
use super::kind::{Kind, Object};
use super::rows::AnyRows;

/// Larger files are refused.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// A full look at the directory, whatever inotify said.
const RESYNC: Duration = Duration::from_secs(3);
/// Changes that follow one another closer than this are read together.
const DEBOUNCE: Duration = Duration::from_millis(2);
/// So long a file that somebody is writing waits for the next sign of him.
const WRITING: Duration = Duration::from_millis(10);
/// And not later than this after the first.
const DEBOUNCE_MAX: Duration = Duration::from_millis(100);
/// The topic of reports on objects that several files define.
const CONFLICTS: &str = "objects defined twice";
/// The topic of reports on the directory itself.
const DIRECTORY: &str = "the directory of manifests";

enum Signal {
    /// These files may have changed; `None`: any of them. Or somebody is writing them.
    Changed(Option<Vec<OsString>>, bool),
    Stop,
}

/// Ends the thread when the future that waits for it is dropped.
struct StopOnDrop(Sender<Signal>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        let _ = self.0.send(Signal::Stop);
    }
}

/// Keeps `tables` equal to what the files of `directory` say. Never returns.
pub async fn run(directory: PathBuf, tables: Arc<Tables>, health: Arc<Health>) {
    let (signals, received) = mpsc::channel();
    let _stop = StopOnDrop(signals.clone());
    let state = Directory::new(directory, tables, health);
    let thread = std::thread::Builder::new().name("manifests".to_owned());
    if let Err(error) = thread.spawn(move || watch(state, &signals, &received)) {
        tracing::error!(%error, "manifests are not read: the thread could not be started");
    }
    std::future::pending().await
}

fn watch(mut state: Directory, signals: &Sender<Signal>, received: &Receiver<Signal>) {
    let mut watcher = None;
    let mut changed = None;
    loop {
        // A directory that was replaced is another one, which nobody watches yet.
        let inode = fs::metadata(&state.path).map(|metadata| metadata.ino()).ok();
        if watcher.as_ref().is_none_or(|(watched, _)| Some(*watched) != inode) {
            watcher = inode.and_then(|inode| Some((inode, subscribe(&state.path, signals.clone())?)));
            changed = None;
        }
        // An error is reported already, and the next look may find the directory again.
        let _ = state.scan(changed.as_ref());
        match next_changes(received) {
            Some(next) => changed = next,
            None => return,
        }
    }
}

/// The files to look at next, `Some(None)` for all of them; `None` when it is time to end.
fn next_changes(received: &Receiver<Signal>) -> Option<Option<BTreeSet<OsString>>> {
    let (mut names, mut written) = (BTreeSet::new(), BTreeSet::new());
    let mut add = |signal| match signal {
        Signal::Changed(Some(some), is_written) => {
            for name in some {
                match is_written {
                    true => written.insert(name.clone()),
                    false => written.remove(&name),
                };
                names.insert(name);
            }
            Some((false, written.is_empty()))
        }
        Signal::Changed(None, _) => Some((true, written.is_empty())),
        Signal::Stop => None,
    };
    let (mut is_full, mut is_whole) = match received.recv_timeout(RESYNC) {
        Ok(signal) => add(signal)?,
        Err(RecvTimeoutError::Timeout) => return Some(None),
        Err(RecvTimeoutError::Disconnected) => return None,
    };
    let end = Instant::now() + DEBOUNCE_MAX;
    let wait = |is_whole: bool| {
        let wait = if is_whole { DEBOUNCE } else { WRITING };
        received.recv_timeout(wait.min(end.saturating_duration_since(Instant::now())))
    };
    while let Ok(signal) = wait(is_whole) {
        let (is_any, is_settled) = add(signal)?;
        is_full |= is_any;
        is_whole = is_settled;
    }
    Some((!is_full).then_some(names))
}

/// Signals changes of the directory for as long as the watcher lives; without one the
/// full looks have to do.
fn subscribe(directory: &Path, signals: Sender<Signal>) -> Option<impl Watcher + use<>> {
    let on_event = move |event: notify::Result<notify::Event>| {
        let signal = match event {
            Ok(event) if event.need_rescan() => Signal::Changed(None, false),
            Ok(event) => match event.kind {
                // What is renamed is whole; what is created and filled is when it is closed.
                EventKind::Access(AccessKind::Close(AccessMode::Write))
                | EventKind::Modify(ModifyKind::Name(_))
                | EventKind::Remove(_) => Signal::Changed(names_of(&event.paths), false),
                EventKind::Create(_) | EventKind::Modify(_) => Signal::Changed(names_of(&event.paths), true),
                _ => return,
            },
            Err(_) => Signal::Changed(None, false),
        };
        let _ = signals.send(signal);
    };
    let watcher = notify::recommended_watcher(on_event).and_then(|mut watcher| {
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    watcher
        .inspect_err(|error| warn!(%error, "watching the directory of manifests; looking every few seconds"))
        .ok()
}

/// `None` where a name says nothing about which file changed: mounted ConfigMaps swap
/// a link called `..data` that all files lead through.
fn names_of(paths: &[PathBuf]) -> Option<Vec<OsString>> {
    let name = |path: &PathBuf| path.file_name().map(ToOwned::to_owned);
    paths.iter().map(|path| name(path).filter(|name| !name.as_encoded_bytes().starts_with(b".."))).collect()
}

/// What tells one version of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[derive(Default)]
struct File {
    stamp: Option<Stamp>,
    /// The last good version of each object; `None` for one that makes no row.
    objects: BTreeMap<ObjectId, Option<Object>>,
}

/// What the directory held when it was last looked at.
struct Directory {
    path: PathBuf,
    rows: BTreeMap<Kind, Box<dyn AnyRows>>,
    health: Arc<Health>,
    foreign: Arc<ForeignPolicies>,
    files: BTreeMap<OsString, File>,
    /// The files that define an object; the first one is believed.
    owners: BTreeMap<ObjectId, BTreeSet<OsString>>,
    is_synced: bool,
    unknown_kinds: HashSet<String>,
    files_read: u64,
}

impl Directory {
    fn new(path: PathBuf, tables: Arc<Tables>, health: Arc<Health>) -> Self {
        Self {
            path,
            rows: Kind::ALL.iter().map(|kind| (*kind, kind.rows(&tables))).collect(),
            health,
            foreign: tables.foreign.clone(),
            files: BTreeMap::new(),
            owners: BTreeMap::new(),
            is_synced: false,
            unknown_kinds: HashSet::new(),
            files_read: 0,
        }
    }

    /// Looks at the files called `names`, or at all, and brings the tables up to date.
    fn scan(&mut self, names: Option<&BTreeSet<OsString>>) -> Result<()> {
        let found = match names {
            Some(names) if self.is_synced => Ok(names.clone()),
            _ => self.list(),
        };
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                Kind::ALL.iter().for_each(|kind| self.health.record_error(*kind));
                self.health.replace(
                    DIRECTORY,
                    vec![self.report(&self.path.display(), None, crate::error::chain(&error))],
                );
                return Err(error);
            }
        };
        let mut touched = BTreeSet::new();
        for name in found.iter().filter(|name| is_manifest(name)) {
            self.look(name, names.is_some(), &mut touched);
        }
        self.publish(touched);
        self.health.replace(DIRECTORY, Vec::new());
        Ok(())
    }

    /// The directory's files, and those that were there before.
    fn list(&self) -> Result<BTreeSet<OsString>> {
        let mut names: BTreeSet<OsString> = self.files.keys().cloned().collect();
        let entries = fs::read_dir(&self.path).with_context(|| match self.path.exists() {
            false => format!("the directory {} does not exist; waiting for it", self.path.display()),
            true => format!("listing {}", self.path.display()),
        })?;
        for entry in entries {
            names.insert(entry.with_context(|| format!("listing {}", self.path.display()))?.file_name());
        }
        Ok(names)
    }

    /// Reads one file if it changed; `touched` collects the objects that may have changed.
    fn look(&mut self, name: &OsString, is_named: bool, touched: &mut BTreeSet<ObjectId>) {
        let path = self.path.join(name);
        let metadata = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => return self.forget(name, touched),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return self.forget(name, touched),
            Err(error) => return self.keep(name, None, format!("cannot be read: {error}")),
        };
        let stamp = Stamp::from(&metadata);
        let known = self.files.get(name).and_then(|file| file.stamp);
        // A timestamp is coarser than a writer is fast: what inotify names is always read.
        if known == Some(stamp) && !is_named {
            return;
        }
        self.files_read += 1;
        match read(&path, metadata.size()) {
            Ok(documents) => self.take(name, stamp, documents, touched),
            Err(error) => self.keep(
                name,
                Some(stamp),
                format!("{}; its objects stay as they were", crate::error::chain(&error)),
            ),
        }
    }

    fn keep(&mut self, name: &OsString, stamp: Option<Stamp>, reason: String) {
        self.files.entry(name.clone()).or_default().stamp = stamp;
        let report = self.report(&name.to_string_lossy(), None, reason);
        self.health.replace(&name.to_string_lossy(), vec![report]);
    }

    fn forget(&mut self, name: &OsString, touched: &mut BTreeSet<ObjectId>) {
        let Some(file) = self.files.remove(name) else { return };
        for id in file.objects.into_keys() {
            self.disown(&id, name);
            touched.insert(id);
        }
        self.health.replace(&name.to_string_lossy(), Vec::new());
        self.foreign.delete(&Arc::from(&*name.to_string_lossy()));
    }

    /// Makes the file's objects what `documents` say.
    fn take(
        &mut self,
        name: &OsString,
        stamp: Stamp,
        documents: Vec<Document>,
        touched: &mut BTreeSet<ObjectId>,
    ) {
        let before = self.files.remove(name).map(|file| file.objects).unwrap_or_default();
        let mut objects: BTreeMap<ObjectId, Option<Object>> = BTreeMap::new();
        let mut reports = Vec::new();
        let mut stays: BTreeSet<ObjectId> = BTreeSet::new();
        let mut stays_all = false;
        let mut foreign = BTreeSet::new();
        for document in documents {
            let at = Some((document.number, document.line));
            let mut report = |object: Option<&ObjectId>, reason: String| {
                let mut report = self.report(&name.to_string_lossy(), at, reason);
                report.object = object.map(ToString::to_string);
                reports.push(report);
            };
            match document.content {
                Content::Object(id, _) if objects.contains_key(&id) => {
                    report(
                        Some(&id),
                        "is defined above in this file already; the first one counts".to_owned(),
                    );
                }
                Content::Object(id, Converted { row: object, warnings, doubts }) => {
                    warnings.iter().for_each(|warning| report(Some(&id), warning.to_string()));
                    doubts.iter().for_each(|doubt| report(Some(&id), closed(id.kind, doubt)));
                    objects.insert(id, object);
                }
                Content::BrokenObject(id, error) => {
                    report(Some(&id), outcome(&error, before.contains_key(&id)));
                    stays.insert(id);
                }
                Content::Broken(error) => {
                    report(None, outcome(&error, !before.is_empty()));
                    stays_all = true;
                }
                Content::Foreign(policy) => {
                    report(None, format!("{} {} is not enforced", policy.kind, policy.name));
                    foreign.insert(policy);
                }
                Content::Unknown(kind) => {
                    if self.unknown_kinds.insert(kind.clone()) {
                        info!(kind, file = %name.to_string_lossy(), "objects of this kind are not read");
                    }
                }
            }
        }
        for (id, object) in before {
            if stays_all || stays.contains(&id) {
                objects.entry(id).or_insert(object);
            } else if !objects.contains_key(&id) {
                self.disown(&id, name);
                touched.insert(id);
            }
        }
        for id in objects.keys() {
            self.owners.entry(id.clone()).or_default().insert(name.clone());
            touched.insert(id.clone());
        }
        self.health.replace(&name.to_string_lossy(), reports);
        self.foreign.apply(Arc::from(&*name.to_string_lossy()), Arc::new(foreign));
        self.files.insert(name.clone(), File { stamp: Some(stamp), objects });
    }

    fn disown(&mut self, id: &ObjectId, name: &OsString) {
        if let Some(owners) = self.owners.get_mut(id) {
            owners.remove(name);
            if owners.is_empty() {
                self.owners.remove(id);
            }
        }
    }

    /// Brings the rows of `touched` up to date, or every row when this is the first time.
    fn publish(&mut self, touched: BTreeSet<ObjectId>) {
        if !self.is_synced {
            let winner = |id: &ObjectId| Some((id.clone(), self.winner(id)?));
            let mut all: BTreeMap<Kind, Vec<(ObjectId, Object)>> = BTreeMap::new();
            for (id, object) in self.owners.keys().filter_map(winner) {
                all.entry(id.kind).or_default().push((id, object));
            }
            for (kind, rows) in &mut self.rows {
                rows.reset(all.remove(kind).unwrap_or_default());
                self.health.record_event(*kind);
                self.health.record(*kind, |health| health.is_synced = true);
            }
            self.is_synced = true;
        } else {
            for id in &touched {
                let winner = self.winner(id);
                if let Some(rows) = self.rows.get_mut(&id.kind) {
                    match winner {
                        Some(object) => rows.apply(id, &object),
                        None => rows.delete(id),
                    }
                }
                self.health.record_event(id.kind);
            }
        }
        Kind::ALL.iter().for_each(|kind| self.health.record(*kind, |health| health.is_connected = true));
        if !touched.is_empty() {
            self.report_conflicts();
            debug!(objects = touched.len(), files_read = self.files_read, "manifests read");
        }
    }

    /// The version that counts: the one in the first file by name.
    fn winner(&self, id: &ObjectId) -> Option<Object> {
        let name = self.owners.get(id)?.first()?;
        self.files.get(name)?.objects.get(id)?.clone()
    }

    fn report_conflicts(&self) {
        let mut reports = Vec::new();
        for (id, names) in self.owners.iter().filter(|(_, names)| names.len() > 1) {
            let mut names = names.iter().map(|name| name.to_string_lossy());
            let first = names.next().unwrap_or_default().into_owned();
            for name in names {
                let mut report = self.report(&name, None, format!("is defined in {first} too, which counts"));
                report.object = Some(id.to_string());
                reports.push(report);
            }
        }
        self.health.replace(CONFLICTS, reports);
    }

    fn report(&self, source: &impl ToString, at: Option<(usize, usize)>, reason: String) -> Report {
        let (document, line) = at.unzip();
        Report { source: source.to_string(), document, line, object: None, reason }
    }
}

fn outcome(error: &FieldError, is_kept: bool) -> String {
    format!("{error}; {}", if is_kept { "the last good version stays" } else { "skipped" })
}

/// Not the temporary files of editors and of our own.
pub(super) fn is_manifest(name: &std::ffi::OsStr) -> bool {
    let path = Path::new(name);
    let extension = path.extension().and_then(|extension| extension.to_str());
    !name.as_encoded_bytes().starts_with(b".") && matches!(extension, Some("yaml" | "yml" | "json"))
}

fn read(path: &Path, size: u64) -> Result<Vec<Document>> {
    documents(&text_of(path, size)?).context("is refused")
}

/// The content of a manifest of `size`.
pub(super) fn text_of(path: &Path, size: u64) -> Result<String> {
    if size > FILE_BYTES_MAX {
        bail!("has {size} bytes; at most {FILE_BYTES_MAX} are read");
    }
    let bytes = fs::read(path).context("cannot be read")?;
    let text = String::from_utf8(bytes).context("is not UTF-8")?;
    if text.trim().is_empty() {
        bail!("is empty: remove the file to remove its objects");
    }
    Ok(text)
}

/// What a manifest holds.
pub(super) fn documents(text: &str) -> Result<Vec<Document>, FieldError> {
    document::read(text.trim_start_matches('\u{feff}'))
}

#[cfg(test)]
mod tests;
