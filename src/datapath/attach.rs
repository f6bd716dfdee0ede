//! Attaches the programs: to devices by tcx links or clsact filters, to sockets
//! at the cgroup root. Links are pinned; a later process finds them and replaces
//! the program in place, so that no packet passes unseen and none is seen twice.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use anyhow::{Context, Result, bail};
use libbpf_rs::query::LinkTypeInfo;
use libbpf_rs::{
    AsRawLibbpf, Link, Program, ProgramMut, TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHook, libbpf_sys,
};

use super::Datapath;
use super::messages::{collect_libbpf_messages, with_messages};
use super::pins::{links, other_versions};
use super::probe::{cgroup_root_below, find_or_mount_cgroup_root};
use super::settings::AttachMode;

/// Programs of devices: `from_*` sees what a device receives, `to_*` what it sends.
pub(super) const TC_PROGRAMS: [&str; 11] = [
    "from_pod",
    "to_pod",
    "from_network",
    "to_network",
    "from_overlay",
    "to_overlay",
    "from_wait",
    "from_limit",
    "from_proxy",
    "before_proxy",
    ENCRYPTED_PROGRAM,
];

/// The program of the device that encrypts; it is loaded where there is such a device.
pub(super) const ENCRYPTED_PROGRAM: &str = "from_encrypted";

/// The programs of a device that leads to the network.
pub(super) const NETWORK_PROGRAMS: [&str; 2] = ["from_network", "to_network"];
/// The programs of the tunnel device.
const OVERLAY_PROGRAMS: [&str; 2] = ["from_overlay", "to_overlay"];

/// Programs of sockets.
const SOCKET_PROGRAMS: [&str; 10] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "bound4",
    "bound6",
];

/// Programs of the sockets of a proxy that is not ours.
const ALIAS_PROGRAMS: [&str; 4] = ["alias_peer4", "alias_peer6", "alias_bind4", "alias_bind6"];

/// The place of our filters among those of a clsact queueing discipline.
const CLSACT_HANDLE: u32 = 1;
const CLSACT_PRIORITY: u32 = 1;

impl Datapath {
    /// Puts a device that leads to the network under `from_network` and `to_network`.
    pub fn attach_network(&self, ifindex: u32) -> Result<()> {
        self.attach_device(ifindex, &NETWORK_PROGRAMS).context("attaching to a network device")
    }

    /// Takes the programs off a device that does not lead to the network any more.
    pub fn detach_network(&self, ifindex: u32) -> Result<()> {
        self.detach_device(ifindex, &NETWORK_PROGRAMS).context("detaching from a network device")
    }

    /// The devices that have a pinned link of `from_network`.
    pub fn network_links(&self) -> Result<Vec<u32>> {
        let Some(pins) = &self.pins else { return Ok(Vec::new()) };
        let ifindex = |path: PathBuf| path.file_name()?.to_str()?.strip_suffix("-from_network")?.parse().ok();
        Ok(pinned_links(&pins.links())?.into_iter().filter_map(ifindex).collect())
    }

    /// Puts the tunnel device under `from_overlay` and `to_overlay`.
    pub fn attach_overlay(&self, ifindex: u32) -> Result<()> {
        self.attach_device(ifindex, &OVERLAY_PROGRAMS).context("attaching to the tunnel device")
    }

    /// Puts the device that encrypts under `from_encrypted`.
    pub fn attach_encrypted(&self, ifindex: u32) -> Result<()> {
        self.attach_device(ifindex, &[ENCRYPTED_PROGRAM]).context("attaching to the device that encrypts")
    }

    /// Verifies that the device that encrypts is under its program.
    pub fn verify_encrypted(&self, ifindex: u32) -> Result<()> {
        self.verify_device(ifindex, &[ENCRYPTED_PROGRAM])
    }

    /// Verifies that a device that leads to the network is under its programs; the error names what is not.
    pub fn verify_network(&self, ifindex: u32) -> Result<()> {
        self.verify_device(ifindex, &NETWORK_PROGRAMS)
    }

    /// Verifies that the tunnel device is under its programs; the error names what is not.
    pub fn verify_overlay(&self, ifindex: u32) -> Result<()> {
        self.verify_device(ifindex, &OVERLAY_PROGRAMS)
    }

    pub(super) fn verify_device(&self, ifindex: u32, names: &[&str]) -> Result<()> {
        let is_attached =
            |name: &&str| self.verify_link(ifindex, name).or_else(|_| self.verify_filter(ifindex, name));
        names.iter().try_for_each(is_attached)
    }

    /// Verifies that the programs of sockets are attached to a cgroup; the error names what is not.
    pub fn verify_sockets(&self) -> Result<()> {
        for name in SOCKET_PROGRAMS {
            let path = self.link_pin(&format!("cgroup-{name}"))?;
            let link = Link::open(&path).with_context(|| format!("opening the link {}", path.display()))?;
            if is_zombie(&link.info().context("reading a link")?.info) {
                bail!("{name} is not attached to a cgroup");
            }
        }
        Ok(())
    }

    /// Puts the device where waiting fragments come out under `from_wait`.
    pub fn attach_wait(&self, ifindex: u32) -> Result<()> {
        self.attach_device(ifindex, &["from_wait"]).context("attaching to the device of waiting fragments")
    }

    /// Puts the device where packets for limited pods come out under `from_limit`.
    pub fn attach_limit(&self, ifindex: u32) -> Result<()> {
        self.attach_device(ifindex, &["from_limit"]).context("attaching to the queue of limited pods")
    }

    /// Puts every socket of the node under the programs that translate services.
    pub fn attach_sockets(&self) -> Result<()> {
        self.attach_to_cgroup(&SOCKET_PROGRAMS)
    }

    /// Puts them under the programs that name clients to a proxy that is not ours.
    pub fn attach_aliases(&self) -> Result<()> {
        self.attach_to_cgroup(&ALIAS_PROGRAMS)
    }

    /// Takes these out again.
    pub fn detach_aliases(&self) -> Result<()> {
        ALIAS_PROGRAMS.iter().try_for_each(|name| remove_pin(&self.link_pin(&format!("cgroup-{name}"))?))
    }

    fn attach_to_cgroup(&self, names: &[&str]) -> Result<()> {
        let root = match &self.cgroup_root {
            Some(directory) => cgroup_root_below(directory)?,
            None => find_or_mount_cgroup_root()?,
        };
        let directory =
            File::open(&root).with_context(|| format!("opening the cgroup root {}", root.display()))?;
        let cgroup = directory.metadata().context("identifying the cgroup root")?.ino();
        for name in names {
            let program = self.program(name)?;
            let pin = self.link_pin(&format!("cgroup-{name}"));
            let is_ours = |info: &LinkTypeInfo| matches!(info, LinkTypeInfo::Cgroup(found) if found.cgroup_id == cgroup);
            self.attach_link(pin, &program, is_ours, || {
                program.attach_cgroup(directory.as_raw_fd()).map_err(with_messages)
            })
            .with_context(|| format!("attaching {name} to the cgroup {}", root.display()))?;
        }
        Ok(())
    }

    /// Takes the socket programs out again.
    pub fn detach_sockets(&self) -> Result<()> {
        SOCKET_PROGRAMS.iter().try_for_each(|name| remove_pin(&self.link_pin(&format!("cgroup-{name}"))?))
    }

    /// Removes pins of links whose device or cgroup is gone; how many.
    pub fn collect_zombie_links(&self) -> Result<usize> {
        let Some(pins) = &self.pins else { return Ok(0) };
        let mut removed = 0;
        for path in pinned_links(&pins.links())? {
            let info = Link::open(&path).and_then(|link| link.info());
            let info = info.with_context(|| format!("opening the link {}", path.display()))?;
            if is_zombie(&info.info) {
                remove_pin(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Removes what an agent of another ABI version has left: links of devices that
    /// nobody attached since, and its maps. Only when everything is attached.
    pub(super) fn remove_other_versions(&self) -> Result<()> {
        let Some(pins) = &self.pins else { return Ok(()) };
        for version in other_versions(pins.root())? {
            tracing::info!(directory = %version.display(), "removing the pins of another version");
            fs::remove_dir_all(&version).with_context(|| format!("removing {}", version.display()))?;
        }
        Ok(())
    }

    /// True if there is a link of each of these programs, perhaps of an agent of another ABI version.
    pub(super) fn has_links(&self, ifindex: u32, names: &[&str]) -> Result<bool> {
        for name in names {
            let pin = self.link_pin(&format!("{ifindex}-{name}"))?;
            self.adopt_link(&pin)?;
            if !pin.exists() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn attach_filters(&self, ifindex: u32, names: &[&str]) -> Result<()> {
        names.iter().try_for_each(|name| self.attach_clsact(ifindex, name, &self.program(name)?))
    }

    pub(super) fn verify_filter(&self, ifindex: u32, name: &str) -> Result<()> {
        let program = self.program(name)?;
        let mut hook = clsact_hook(&program, ifindex, name)?;
        if filter_program(&mut hook)?.as_deref() != Some(name) {
            bail!("{name} is not attached to device {ifindex}");
        }
        Ok(())
    }

    pub(super) fn verify_link(&self, ifindex: u32, name: &str) -> Result<()> {
        let path = self.link_pin(&format!("{ifindex}-{name}"))?;
        let link = Link::open(&path).with_context(|| format!("opening the link {}", path.display()))?;
        let info = link.info().context("reading a link")?;
        if !matches!(info.info, LinkTypeInfo::Tcx(found) if found.ifindex == ifindex) {
            bail!("{name} is not attached to device {ifindex}");
        }
        Ok(())
    }

    pub(super) fn attach_device(&self, ifindex: u32, names: &[&str]) -> Result<()> {
        for &name in names {
            let program = self.program(name)?;
            match self.features.attach {
                AttachMode::Clsact => self.attach_clsact(ifindex, name, &program)?,
                _ => self.attach_tcx(ifindex, name, &program)?,
            }
        }
        Ok(())
    }

    fn attach_tcx(&self, ifindex: u32, name: &str, program: &ProgramMut<'_>) -> Result<()> {
        let is_ours =
            |info: &LinkTypeInfo| matches!(info, LinkTypeInfo::Tcx(found) if found.ifindex == ifindex);
        let pin = self.link_pin(&format!("{ifindex}-{name}"));
        let is_new = self
            .attach_link(pin, program, is_ours, || attach_tcx(program, ifindex))
            .with_context(|| format!("attaching {name} to device {ifindex}"))?;
        if is_new {
            // A former process may have attached by clsact: never two programs on a hook.
            remove_filter(ifindex, name)?;
        }
        Ok(())
    }

    fn attach_clsact(&self, ifindex: u32, name: &str, program: &ProgramMut<'_>) -> Result<()> {
        let mut hook = clsact_hook(program, ifindex, name)?;
        hook.create().map_err(with_messages).with_context(|| format!("adding clsact to device {ifindex}"))?;
        if let Some(other) = filter_program(&mut hook)?.filter(|found| found != name) {
            bail!("another program ({other}) has handle 1 and priority 1 of clsact on device {ifindex}");
        }
        hook.replace(true);
        hook.attach()
            .map_err(with_messages)
            .with_context(|| format!("attaching {name} to device {ifindex} by clsact"))?;
        remove_pin(&self.link_pin(&format!("{ifindex}-{name}"))?)
    }

    pub(super) fn detach_device(&self, ifindex: u32, names: &[&str]) -> Result<()> {
        for name in names {
            remove_pin(&self.link_pin(&format!("{ifindex}-{name}"))?)?;
            remove_filter(ifindex, name)?;
        }
        Ok(())
    }

    pub(super) fn link_pin(&self, name: &str) -> Result<PathBuf> {
        let pins = self.pins.as_ref().context("a datapath with private maps attaches nothing")?;
        Ok(pins.links().join(name))
    }

    /// Replaces the program of the pinned link, or makes and pins a new one; true if new.
    pub(super) fn attach_link(
        &self,
        pin: Result<PathBuf>,
        program: &ProgramMut<'_>,
        is_ours: impl Fn(&LinkTypeInfo) -> bool,
        create: impl FnOnce() -> Result<Link>,
    ) -> Result<bool> {
        let pin = pin?;
        self.adopt_link(&pin)?;
        if update_pinned(&pin, program, is_ours)? {
            return Ok(false);
        }
        remove_pin(&pin)?;
        let mut link = create()?;
        link.pin(&pin).map_err(with_messages).with_context(|| format!("pinning {}", pin.display()))?;
        Ok(true)
    }
}

impl Datapath {
    /// The filter of this name on a device, ready to get our program in the place of the one that it has;
    /// `None`: there is none.
    pub(super) fn filter_to_replace(&self, ifindex: u32, name: &str) -> Result<Option<TcHook>> {
        let program = self.program(name)?;
        let mut hook = clsact_hook(&program, ifindex, name)?;
        let is_there = filter_program(&mut hook)?.as_deref() == Some(name);
        hook.replace(true);
        Ok(is_there.then_some(hook))
    }

    /// Moves the link of this name here from another ABI version's directory.
    fn adopt_link(&self, pin: &Path) -> Result<()> {
        let (Some(pins), Some(name)) = (&self.pins, pin.file_name()) else { return Ok(()) };
        for version in other_versions(pins.root())? {
            let old = links(&version).join(name);
            if !old.exists() {
                continue;
            }
            if pin.exists() {
                remove_pin(&old)?;
            } else {
                fs::rename(&old, pin).with_context(|| format!("taking over the link {}", old.display()))?;
            }
        }
        Ok(())
    }
}

/// Removes every link pin, every filter of ours on a device of this network
/// namespace, and every map pin: what `weir uninstall` does.
pub fn detach_all(pins: &Path) -> Result<()> {
    collect_libbpf_messages();
    for path in pinned_links(&links(pins))? {
        remove_pin(&path)?;
    }
    for device in nix::net::if_::if_nameindex().context("listing the devices")?.iter() {
        for name in TC_PROGRAMS {
            remove_filter(device.index(), name)?;
        }
    }
    match fs::remove_dir_all(pins) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing the pins in {}", pins.display()))
        }
        _ => Ok(()),
    }
}

/// True if the pinned link is on the right target and now runs `program`.
fn update_pinned(
    pin: &Path,
    program: &ProgramMut<'_>,
    is_ours: impl Fn(&LinkTypeInfo) -> bool,
) -> Result<bool> {
    if !pin.exists() {
        return Ok(false);
    }
    let link = Link::open(pin).with_context(|| format!("opening the link {}", pin.display()))?;
    if !is_ours(&link.info().context("reading a link")?.info) {
        return Ok(false);
    }
    // SAFETY: link and program are open; both outlive the call.
    let result = unsafe {
        libbpf_sys::bpf_link__update_program(
            link.as_libbpf_object().as_ptr(),
            program.as_libbpf_object().as_ptr(),
        )
    };
    match result {
        0 => Ok(true),
        // The device or the cgroup has just gone.
        error if -error == nix::libc::ENOLINK => Ok(false),
        error => Err(io::Error::from_raw_os_error(-error))
            .with_context(|| format!("replacing the program of {}", pin.display())),
    }
}

/// Attaches a program to a device, at the hook that its section names, until the link is dropped.
pub fn attach_tcx(program: &ProgramMut<'_>, ifindex: u32) -> Result<Link> {
    let ifindex = i32::try_from(ifindex)?;
    // SAFETY: the program is loaded, and no options are given.
    let link = unsafe {
        libbpf_sys::bpf_program__attach_tcx(program.as_libbpf_object().as_ptr(), ifindex, std::ptr::null())
    };
    let Some(link) = NonNull::new(link) else {
        return Err(with_messages(io::Error::last_os_error().into()));
    };
    // SAFETY: libbpf made the link for us, and nobody else has it.
    Ok(unsafe { Link::from_ptr(link) })
}

fn is_zombie(info: &LinkTypeInfo) -> bool {
    match info {
        LinkTypeInfo::Tcx(link) => link.ifindex == 0,
        LinkTypeInfo::Cgroup(link) => link.cgroup_id == 0,
        LinkTypeInfo::NetNs(link) => link.ino == 0,
        LinkTypeInfo::Xdp(link) => link.ifindex == 0,
        _ => false,
    }
}

pub(super) fn pinned_links(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("listing {}", directory.display()))?,
    };
    entries.map(|entry| Ok(entry?.path())).collect()
}

pub(super) fn remove_pin(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing the pin {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn attach_point(name: &str) -> TcAttachPoint {
    if name.starts_with("from_") { TC_INGRESS } else { TC_EGRESS }
}

fn clsact_hook(program: &Program<'_>, ifindex: u32, name: &str) -> Result<TcHook> {
    Ok(hook_of(TcHook::new(program.as_fd()), i32::try_from(ifindex)?, name))
}

fn hook_of(mut hook: TcHook, ifindex: i32, name: &str) -> TcHook {
    hook.ifindex(ifindex).attach_point(attach_point(name)).handle(CLSACT_HANDLE).priority(CLSACT_PRIORITY);
    hook
}

/// The name of the program in our place, if there is any.
fn filter_program(hook: &mut TcHook) -> Result<Option<String>> {
    let Ok(id) = hook.query() else { return Ok(None) };
    let Ok(program) = Program::fd_from_id(id) else { return Ok(None) };
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut length = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    // SAFETY: info is as long as the length says.
    let result = unsafe {
        libbpf_sys::bpf_obj_get_info_by_fd(program.as_raw_fd(), (&raw mut info).cast(), &mut length)
    };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(-result)).context("reading the program of a filter");
    }
    let name: Vec<u8> = info.name.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
    Ok(Some(String::from_utf8_lossy(&name).into_owned()))
}

/// Removes our clsact filter from a device, if there is one.
fn remove_filter(ifindex: u32, name: &str) -> Result<()> {
    // The descriptor is not used to query or detach.
    let mut hook = hook_of(TcHook::new(io::stdin().as_fd()), i32::try_from(ifindex)?, name);
    if filter_program(&mut hook)?.as_deref() == Some(name) {
        hook.detach().map_err(with_messages).with_context(|| format!("detaching from device {ifindex}"))?;
    }
    Ok(())
}
