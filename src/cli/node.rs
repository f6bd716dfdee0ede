//! `weir prepare` and `weir uninstall`: what a node needs before its first agent, and what
//! is to go after its last. Both do nothing that is done already.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal};

use super::Failure;
use super::cni::DirectoryArgs;
use crate::cni::install;
use crate::{api, datapath, encryption, endpoint, netlink};

#[derive(Args)]
pub(super) struct PrepareArgs {
    /// Where the BPF file system is to be.
    #[arg(long, env = "WEIR_BPFFS", value_name = "DIR", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,

    /// Where to look for the cgroup v2 hierarchy; it is mounted at /run/weir/cgroup when it
    /// is neither there nor below.
    #[arg(long, env = "WEIR_CGROUP_ROOT", value_name = "DIR", default_value = "/sys/fs/cgroup")]
    cgroup_root: PathBuf,
}

/// Mounts what the agent needs and the node lacks.
pub(super) fn prepare(args: &PrepareArgs) -> Result<(), Failure> {
    datapath::mount_bpffs(&args.bpffs)?;
    let cgroup = datapath::cgroup_root_below(&args.cgroup_root).or_else(|_| datapath::mount_cgroup())?;
    let mut output = std::io::stdout().lock();
    writeln!(output, "BPF file system at {}, cgroup v2 at {}", args.bpffs.display(), cgroup.display())?;
    Ok(())
}

#[derive(Args)]
pub(super) struct UninstallArgs {
    #[command(flatten)]
    directories: DirectoryArgs,

    /// The BPF file system with the pins.
    #[arg(long, env = "WEIR_BPFFS", value_name = "DIR", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,

    /// The agent's state directory.
    #[arg(long, env = "WEIR_STATE_DIR", value_name = "DIR", default_value = "/var/lib/weir")]
    state_dir: PathBuf,

    /// The agent's socket.
    #[arg(long, env = "WEIR_SOCKET", value_name = "PATH", default_value = api::DEFAULT_SOCKET)]
    socket: PathBuf,

    /// Remove this directory afterwards, when it is empty: the run and state directories by
    /// paths that are no mounts of this container.
    #[arg(long = "remove", value_name = "DIR")]
    removed: Vec<PathBuf>,

    /// Afterwards stay until SIGTERM, as a DaemonSet's container has to.
    #[arg(long)]
    wait: bool,

    /// Only look: fails when anything is left.
    #[arg(long, conflicts_with = "wait")]
    check: bool,
}

/// Takes Weir off this node: the pods that it connected have no network any more.
pub(super) fn uninstall(args: &UninstallArgs) -> Result<(), Failure> {
    if args.check {
        return Ok(check(args)?);
    }
    if api::Client::connect(&args.socket).is_ok() {
        return Err(anyhow!("the agent is running ({} answers): stop it first", args.socket.display()).into());
    }
    let mut output = std::io::stdout().lock();
    install::uninstall(&args.directories.directories())?;
    writeln!(output, "removed the CNI plugin and its configuration")?;
    for pins in entries(&args.bpffs.join("weir"))? {
        datapath::detach_all(&pins)?;
        writeln!(output, "removed links and maps in {}", pins.display())?;
    }
    remove_directory(&args.bpffs.join("weir"))?;
    if crate::agent::end_left_behind(&args.state_dir) {
        writeln!(output, "ended the proxy of layer 7")?;
    }
    if encryption::remove_devices(&args.socket).context("removing the devices that encrypt")? {
        writeln!(output, "removed the devices {}", encryption::DEVICES.join(" and "))?;
    }
    for name in delete_devices()? {
        writeln!(output, "removed the device {name}")?;
    }
    let failed = netlink::sync_routes(&[]).context("removing routes")?;
    if let Some((prefix, error)) = failed.into_iter().next() {
        return Err(anyhow::Error::from(error).context(format!("removing route {prefix}")).into());
    }
    let run = args.socket.parent().unwrap_or(Path::new("/run/weir"));
    // Where `weir prepare` may have mounted cgroup v2.
    let _ = umount2(&run.join("cgroup"), MntFlags::MNT_DETACH);
    for directory in [run, &args.state_dir] {
        for path in entries(directory)? {
            remove(&path)?;
        }
        writeln!(output, "emptied {}", directory.display())?;
    }
    for directory in &args.removed {
        match fs::remove_dir(directory) {
            Ok(()) => writeln!(output, "removed {}", directory.display())?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => writeln!(output, "left {}: {error}", directory.display())?,
        }
    }
    output.flush()?;
    if args.wait {
        wait()?;
    }
    Ok(())
}

fn check(args: &UninstallArgs) -> Result<()> {
    let directories = args.directories.directories();
    let mut left = vec![
        directories.binaries.join(install::PLUGIN),
        directories.configurations.join(install::CONFIGURATION),
        args.bpffs.join("weir"),
    ];
    left.retain(|path| path.exists());
    left.extend(entries(&args.state_dir)?);
    left.extend(devices()?.into_iter().map(PathBuf::from));
    match left.first() {
        None => Ok(()),
        Some(first) => Err(anyhow!("{} and {} more are left", first.display(), left.len() - 1)),
    }
}

/// The tunnel's device, and the node's ends of the pods' links; their routes go with them.
fn delete_devices() -> Result<Vec<String>> {
    let mut deleted = Vec::new();
    for name in devices()? {
        if netlink::delete_link(&name).context("removing a device")? {
            deleted.push(name);
        }
    }
    Ok(deleted)
}

fn devices() -> Result<Vec<String>> {
    let is_ours = |link: &netlink::Link| {
        let is_pods = link.kind == "veth" && endpoint::is_host_interface_name(&link.name);
        // Where fragments wait.
        let is_wait =
            link.kind == "veth" && ["weir_wait", "weir_limit"].iter().any(|name| link.name.starts_with(name));
        let is_proxy = link.kind == "veth" && link.name == "weir_proxy";
        let is_tunnel = link.kind == "vxlan" && link.name.starts_with("weir");
        is_pods || is_wait || is_proxy || is_tunnel || encryption::DEVICES.contains(&link.name.as_str())
    };
    let links = netlink::links().context("listing the devices")?;
    Ok(links.into_iter().filter(is_ours).map(|link| link.name).collect())
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let found = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        found => found.with_context(|| format!("listing {}", directory.display()))?,
    };
    let paths: std::io::Result<Vec<PathBuf>> = found.map(|entry| Ok(entry?.path())).collect();
    paths.with_context(|| format!("listing {}", directory.display()))
}

fn remove(path: &Path) -> Result<()> {
    let is_directory = fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    let removed = if is_directory { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn remove_directory(path: &Path) -> Result<()> {
    if path.exists() { remove(path) } else { Ok(()) }
}

fn wait() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("blocking signals")?;
    signals.wait().context("waiting for a signal")?;
    Ok(())
}
