//! Puts the plugin where the container runtime of this node finds it, and takes it away.
//!
//! The binary comes first, the network configuration last: a runtime that reads it calls
//! the plugin at once. Both appear complete, by a rename within their own folder (a runtime
//! may not notice a file that is moved in from another). Neither is taken away when the agent
//! stops: a pod that is created meanwhile is refused with "try again", and started a moment later.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use tracing::info;

use crate::files::{Draft, Survives};

/// The plugin's file name, and its `type` in the network configuration.
pub const PLUGIN: &str = "weir-cni";
/// By this name containerd calls the plugin that raises a pod's `lo`.
pub use super::loopback::PLUGIN as LOOPBACK;
/// Our network configuration; runtimes take the first by name.
pub const CONFIGURATION: &str = "05-weir.conflist";
/// What is appended to the names of other plugins' configurations that are moved aside.
pub const DISABLED_SUFFIX: &str = ".weir-disabled";

/// File names that runtimes read as network configurations.
const CONFIGURATION_SUFFIXES: [&str; 3] = [".conf", ".conflist", ".json"];

/// Where the container runtime looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directories {
    /// For plugins, usually /opt/cni/bin.
    pub binaries: PathBuf,
    /// For network configurations, usually /etc/cni/net.d.
    pub configurations: PathBuf,
}

/// What our network configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration<'a> {
    /// The agent's socket, as the plugin sees it on the node.
    pub socket: &'a Path,
    /// The agent's state directory, likewise.
    pub state_dir: &'a Path,
    /// Move other plugins' configurations aside.
    pub is_exclusive: bool,
}

/// Puts the plugin in place: the one beside the running program.
pub fn install_binary(directories: &Directories) -> Result<()> {
    let program = std::env::current_exe().context("finding the running program")?;
    let plugin = program.with_file_name(PLUGIN);
    install_binary_from(&plugin, directories)
}

fn install_binary_from(plugin: &Path, directories: &Directories) -> Result<()> {
    let wanted = fs::read(plugin).with_context(|| format!("reading {}", plugin.display()))?;
    let target = directories.binaries.join(PLUGIN);
    if put(&target, &wanted, 0o755).with_context(|| format!("installing {}", target.display()))? {
        info!(path = %target.display(), "the CNI plugin is installed");
    }
    link_loopback(directories)
}

/// Where nobody has put a plugin for `lo`, ours is found by its name, too. One that is there stays.
fn link_loopback(directories: &Directories) -> Result<()> {
    let path = directories.binaries.join(LOOPBACK);
    match symlink(PLUGIN, &path) {
        Ok(()) => info!(path = %path.display(), "the CNI plugin answers for lo, too"),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).with_context(|| format!("linking {}", path.display())),
    }
    Ok(())
}

/// Puts our network configuration in place, then moves other plugins' aside. To be called
/// when an ADD would succeed.
pub fn write_configuration(directories: &Directories, configuration: &Configuration<'_>) -> Result<()> {
    // A runtime that knows 1.1.0 takes it from the list; an older one reads the first key only.
    let list = json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "name": "weir",
        "plugins": [{
            "type": PLUGIN,
            "socket": configuration.socket,
            "stateDir": configuration.state_dir,
            "capabilities": {"portMappings": true},
        }],
    });
    let text = serde_json::to_string_pretty(&list).context("writing JSON")? + "\n";
    let target = directories.configurations.join(CONFIGURATION);
    if put(&target, text.as_bytes(), 0o644).with_context(|| format!("writing {}", target.display()))? {
        info!(path = %target.display(), "the network configuration is in place");
    }
    if configuration.is_exclusive { disable_others(&directories.configurations) } else { Ok(()) }
}

/// Takes the network configuration and the plugin away and moves other plugins'
/// configurations back. What is not there is no error.
pub fn uninstall(directories: &Directories) -> Result<()> {
    remove(&directories.configurations.join(CONFIGURATION))?;
    for name in names_in(&directories.configurations)? {
        let Some(original) = name.strip_suffix(DISABLED_SUFFIX) else { continue };
        let (from, to) = (directories.configurations.join(&name), directories.configurations.join(original));
        // Somebody has written a new one meanwhile: theirs is newer.
        if to.exists() {
            remove(&from)?;
        } else {
            fs::rename(&from, &to).with_context(|| format!("moving {} back", to.display()))?;
            info!(path = %to.display(), "another plugin's configuration is back in place");
        }
    }
    let loopback = directories.binaries.join(LOOPBACK);
    if fs::read_link(&loopback).is_ok_and(|target| target == Path::new(PLUGIN)) {
        remove(&loopback)?;
    }
    remove(&directories.binaries.join(PLUGIN))
}

fn disable_others(directory: &Path) -> Result<()> {
    for name in names_in(directory)? {
        let is_configuration = CONFIGURATION_SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
        if !is_configuration || name == CONFIGURATION || name.starts_with('.') {
            continue;
        }
        let path = directory.join(&name);
        fs::rename(&path, directory.join(format!("{name}{DISABLED_SUFFIX}")))
            .with_context(|| format!("moving {} aside", path.display()))?;
        info!(path = %path.display(), "another plugin's configuration is moved aside");
    }
    Ok(())
}

/// Writes a file by renaming a complete one to its name; false when it holds just this already.
fn put(target: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    let is_there = fs::read(target).is_ok_and(|there| there == content)
        && fs::symlink_metadata(target)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o7777 == mode);
    if is_there {
        return Ok(false);
    }
    let directory = target.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    // Always the same name: what an earlier run left that died while it wrote is replaced.
    let draft = directory.join(format!(".{name}.new"));
    Draft::new(draft, content, mode, Survives::Machine)?.replace(target)?;
    fs::File::open(directory)?.sync_all()?;
    Ok(true)
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("listing {}", directory.display()))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", directory.display()))?;
        // No plugin has a name that is no text.
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => {
            info!(path = %path.display(), "removed");
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("removing {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use serde_json::Value;
    use tempfile::TempDir;

    use super::*;

    struct Node {
        root: TempDir,
        directories: Directories,
    }

    fn node() -> Node {
        let root = TempDir::new().expect("a temporary directory");
        let directories =
            Directories { binaries: root.path().join("bin"), configurations: root.path().join("net.d") };
        fs::create_dir(&directories.configurations).expect("making net.d");
        Node { root, directories }
    }

    impl Node {
        fn write(&self, name: &str, text: &str) {
            fs::write(self.directories.configurations.join(name), text).expect("writing a configuration");
        }

        fn configure(&self, is_exclusive: bool) {
            let configuration = Configuration {
                socket: Path::new("/run/weir/agent.sock"),
                state_dir: Path::new("/var/lib/weir"),
                is_exclusive,
            };
            write_configuration(&self.directories, &configuration).expect("writing the configuration");
        }

        fn names(&self) -> Vec<String> {
            names_in(&self.directories.configurations).expect("listing net.d")
        }
    }

    #[test]
    fn the_plugin_is_replaced_as_a_whole_and_only_when_it_differs() {
        let node = node();
        let source = node.root.path().join("weir-cni");
        let target = node.directories.binaries.join(PLUGIN);
        fs::write(&source, "one").expect("writing a plugin");
        install_binary_from(&source, &node.directories).expect("installing");
        let first = fs::metadata(&target).expect("the plugin");
        assert_eq!(first.permissions().mode() & 0o7777, 0o755);

        // A leftover of an agent that died while it wrote.
        fs::write(node.directories.binaries.join(".weir-cni.new"), "half").expect("writing a leftover");
        install_binary_from(&source, &node.directories).expect("installing");
        assert_eq!(fs::metadata(&target).expect("the plugin").ino(), first.ino());

        // A running plugin keeps its file: another one takes its name.
        let running = fs::File::open(&target).expect("opening the plugin");
        fs::write(&source, "two").expect("writing a plugin");
        install_binary_from(&source, &node.directories).expect("installing");
        assert_eq!(fs::read_to_string(&target).ok().as_deref(), Some("two"));
        assert_eq!(io::read_to_string(running).ok().as_deref(), Some("one"));
        assert_eq!(names_in(&node.directories.binaries).expect("listing"), [LOOPBACK, PLUGIN]);
    }

    #[test]
    fn a_plugin_for_lo_is_added_only_where_there_is_none() {
        let (bare, packaged) = (node(), node());
        fs::create_dir(&packaged.directories.binaries).expect("making bin");
        let theirs = packaged.directories.binaries.join(LOOPBACK);
        fs::write(&theirs, "theirs").expect("writing a plugin");
        for node in [&bare, &packaged] {
            let source = node.root.path().join("weir-cni");
            fs::write(&source, "ours").expect("writing a plugin");
            install_binary_from(&source, &node.directories).expect("installing");
            install_binary_from(&source, &node.directories).expect("installing again");
        }
        let added = bare.directories.binaries.join(LOOPBACK);
        assert_eq!(fs::read_to_string(&added).ok().as_deref(), Some("ours"));
        assert_eq!(fs::read_to_string(&theirs).ok().as_deref(), Some("theirs"));

        for node in [&bare, &packaged] {
            uninstall(&node.directories).expect("uninstalling");
        }
        assert_eq!(names_in(&bare.directories.binaries).expect("listing"), [""; 0]);
        assert_eq!(names_in(&packaged.directories.binaries).expect("listing"), [LOOPBACK]);
    }

    #[test]
    fn others_are_moved_aside_and_back() {
        let node = node();
        for name in ["10-other.conflist", "20-old.conf", "readme.txt"] {
            node.write(name, name);
        }
        node.configure(true);
        let aside = ["05-weir.conflist", "10-other.conflist.weir-disabled", "20-old.conf.weir-disabled"];
        assert_eq!(node.names(), [&aside[..], &["readme.txt"]].concat());
        // The other plugin is still running and writes its file again.
        node.write("10-other.conflist", "newer");
        node.configure(true);
        assert_eq!(node.names(), [&aside[..], &["readme.txt"]].concat());

        uninstall(&node.directories).expect("uninstalling");
        assert_eq!(node.names(), ["10-other.conflist", "20-old.conf", "readme.txt"]);
        let other = fs::read_to_string(node.directories.configurations.join("10-other.conflist"));
        assert_eq!(other.ok().as_deref(), Some("newer"));
        uninstall(&node.directories).expect("uninstalling what is not there");
    }

    #[test]
    fn others_stay_when_we_are_not_alone() {
        let node = node();
        node.write("00-multus.conf", "{}");
        node.configure(false);
        assert_eq!(node.names(), ["00-multus.conf", "05-weir.conflist"]);
    }

    #[test]
    fn the_configuration_is_a_list_that_old_runtimes_read() {
        let node = node();
        node.configure(true);
        let path = node.directories.configurations.join(CONFIGURATION);
        let text = fs::read_to_string(path).expect("the configuration");
        let list: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(list["cniVersion"], "1.0.0");
        assert_eq!(list["plugins"][0]["type"], "weir-cni");
        assert_eq!(list["plugins"][0]["socket"], "/run/weir/agent.sock");
        assert_eq!(list["plugins"][0]["capabilities"]["portMappings"], true);
    }
}
