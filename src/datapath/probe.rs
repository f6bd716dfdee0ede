//! What this kernel can do, found by asking it; what is missing is said in words
//! that tell what to do about it.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libbpf_rs::libbpf_sys;
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::sys::utsname::uname;
use nix::time::{ClockId, clock_getres};
use serde::Serialize;

use super::settings::AttachMode;

/// What was found at start, for `weir status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Features {
    /// The kernel's release.
    pub kernel: String,
    /// CONFIG_HZ.
    pub jiffies_per_second: u32,
    /// tcx links can be made.
    pub has_tcx: bool,
    /// How programs are attached: `tcx` or `clsact`.
    pub attach: AttachMode,
    /// Sockets can be ended by an iterator; else the agent asks for it, one by one.
    pub has_socket_destroy: bool,
    /// Fragments wait for the first one of their packet: the node has devices for that.
    pub fragments_wait: bool,
    /// What pods receive can have a limit: the node has a queue for that.
    pub pods_are_limited: bool,
    /// Programs that are not loaded, and why.
    pub not_loaded: Vec<(String, String)>,
}

/// Programs that a kernel may lack the means for.
const OPTIONAL_PROGRAMS: [&str; 2] = ["destroy_sockets", "destroy_tcp_sockets"];

impl Features {
    pub(super) fn leave_out_optional(&mut self, reason: &str) {
        self.not_loaded = OPTIONAL_PROGRAMS.map(|name| (name.to_owned(), reason.to_owned())).to_vec();
    }
}

/// Asks the kernel everything.
pub(super) fn probe(attach: AttachMode) -> Result<Features> {
    let mut features = Features {
        kernel: kernel_release(),
        jiffies_per_second: jiffies_per_second()?,
        has_tcx: has_tcx()?,
        has_socket_destroy: has_socket_destroy(),
        ..Features::default()
    };
    features.attach = attach.resolve(features.has_tcx)?;
    Ok(features)
}

const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_PERFMON: u64 = 1 << 38;
const CAP_BPF: u64 = 1 << 39;

/// Refuses what cannot work, before the kernel says so in a number.
pub(super) fn check_requirements() -> Result<()> {
    let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let field = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = u64::from_str_radix(field.unwrap_or_default().trim(), 16).unwrap_or(0);
    let missing = missing_capabilities(held);
    if !missing.is_empty() {
        bail!(
            "the process lacks {}: run it as root, or give it CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and CAP_SYS_ADMIN",
            missing.join(", ")
        );
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        bail!(
            "the kernel {} has no /sys/kernel/btf/vmlinux: it must be built with CONFIG_DEBUG_INFO_BTF, and /sys mounted",
            kernel_release()
        );
    }
    Ok(())
}

fn missing_capabilities(held: u64) -> Vec<&'static str> {
    // CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON.
    let needed = [(CAP_BPF, "CAP_BPF"), (CAP_PERFMON, "CAP_PERFMON")];
    let mut missing: Vec<_> = needed
        .into_iter()
        .filter(|(bit, _)| held & (bit | CAP_SYS_ADMIN) == 0)
        .map(|(_, name)| name)
        .collect();
    if held & CAP_NET_ADMIN == 0 {
        missing.push("CAP_NET_ADMIN");
    }
    missing
}

/// The kernel's release, as `uname -r` says it.
pub(super) fn kernel_release() -> String {
    uname().map_or_else(|_| "unknown".to_owned(), |name| name.release().to_string_lossy().into_owned())
}

/// True below 6.1, the oldest kernel that is supported.
pub(super) fn is_too_old(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0_u32));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < (6, 1)
}

/// CONFIG_HZ: the coarse clocks advance by one jiffy.
pub(super) fn jiffies_per_second() -> Result<u32> {
    let resolution =
        clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).context("reading the length of a jiffy")?;
    let nanoseconds = resolution.tv_nsec();
    if resolution.tv_sec() != 0 || nanoseconds <= 0 {
        bail!("the coarse clock has a resolution of {resolution}, which is no CONFIG_HZ");
    }
    // Rounded: 300 Hz has jiffies of 3,333,333 ns.
    u32::try_from((1_000_000_000 + nanoseconds / 2) / nanoseconds).context("reading the length of a jiffy")
}

/// True if the kernel has tcx links (6.6 and later): such a kernel looks for the
/// device first, an older one does not know the attach type.
pub(super) fn has_tcx() -> Result<bool> {
    let program = load_trivial_classifier()?;
    let no_device = i32::MAX;
    // SAFETY: the descriptor is open, and no options are given.
    let result = unsafe {
        libbpf_sys::bpf_link_create(
            program.as_raw_fd(),
            no_device,
            libbpf_sys::BPF_TCX_INGRESS,
            std::ptr::null(),
        )
    };
    Ok(result == -libc::ENODEV)
}

fn load_trivial_classifier() -> Result<OwnedFd> {
    let instruction = |code, imm| libbpf_sys::bpf_insn { code, imm, ..Default::default() };
    // r0 = 0; exit
    let instructions = [instruction(0xb7, 0), instruction(0x95, 0)];
    // SAFETY: name and license are C strings, and the instructions outlive the call.
    let result = unsafe {
        libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_SCHED_CLS,
            c"weir_probe".as_ptr(),
            c"GPL".as_ptr(),
            instructions.as_ptr(),
            instructions.len() as libbpf_sys::size_t,
            std::ptr::null_mut(),
        )
    };
    if result < 0 {
        return Err(std::io::Error::from_raw_os_error(-result)).context("loading a trivial program");
    }
    // SAFETY: a non-negative result is a descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

/// True if the kernel has the function that ends sockets (6.5 and later).
pub(super) fn has_socket_destroy() -> bool {
    // SAFETY: the function takes no arguments; null is handled below.
    let btf = unsafe { libbpf_sys::btf__load_vmlinux_btf() };
    if btf.is_null() {
        return false;
    }
    // SAFETY: the BTF was loaded above, the name is a C string, and it is freed once.
    unsafe {
        let id =
            libbpf_sys::btf__find_by_name_kind(btf, c"bpf_sock_destroy".as_ptr(), libbpf_sys::BTF_KIND_FUNC);
        libbpf_sys::btf__free(btf);
        id > 0
    }
}

/// Where the cgroup v2 hierarchy is mounted.
pub fn find_cgroup_root() -> Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    Ok(cgroup_root_of(&mounts))
}

/// Where the cgroup v2 hierarchy is mounted, after mounting it when it is nowhere.
pub(super) fn find_or_mount_cgroup_root() -> Result<PathBuf> {
    match find_cgroup_root()? {
        Some(root) => Ok(root),
        None => mount_cgroup(),
    }
}

/// Where [`mount_cgroup`] mounts the cgroup v2 hierarchy of a node that has it nowhere.
const CGROUP_DIRECTORY: &str = "/run/weir/cgroup";

/// Mounts the cgroup v2 hierarchy at /run/weir/cgroup, unless it is there.
pub fn mount_cgroup() -> Result<PathBuf> {
    let root = Path::new(CGROUP_DIRECTORY);
    if is_cgroup_root(root) {
        return Ok(root.to_owned());
    }
    fs::create_dir_all(root).with_context(|| format!("making {}", root.display()))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("cgroup2"), root, Some("cgroup2"), flags, None::<&str>)
        .with_context(|| format!("mounting cgroup v2 at {}", root.display()))?;
    tracing::info!(directory = %root.display(), "mounted cgroup v2");
    Ok(root.to_owned())
}

/// The cgroup v2 hierarchy that is mounted at a directory or below it, as a container sees
/// the node's; else the one that `weir prepare` has mounted.
pub fn cgroup_root_below(directory: &Path) -> Result<PathBuf> {
    if is_cgroup_root(directory) {
        return Ok(directory.to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    // A container may have a cgroup namespace of its own, where the node's root has no name.
    let below = cgroup_mounts(&mounts).map(|(_, mounted)| mounted).filter(|path| path.starts_with(directory));
    if let Some(root) = below.min_by_key(|path| path.components().count()) {
        return Ok(root);
    }
    let mounted = Path::new(CGROUP_DIRECTORY);
    if is_cgroup_root(mounted) {
        return Ok(mounted.to_owned());
    }
    bail!("no cgroup v2 is mounted at {} or below it: mount one, or run `weir prepare`", directory.display())
}

fn is_cgroup_root(directory: &Path) -> bool {
    statfs(directory).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

fn cgroup_root_of(mounts: &str) -> Option<PathBuf> {
    cgroup_mounts(mounts).find(|(root, _)| *root == "/").map(|(_, mounted)| mounted)
}

/// Of each cgroup v2 mount, what of the hierarchy is mounted and where.
fn cgroup_mounts(mounts: &str) -> impl Iterator<Item = (&str, PathBuf)> {
    mounts.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        if file_system.split(' ').next() != Some("cgroup2") {
            return None;
        }
        // mount id, parent, device, root within the file system, mount point
        let mut fields = mount.split(' ').skip(3);
        Some((fields.next()?, PathBuf::from(fields.next()?)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_named_when_missing() {
        assert_eq!(missing_capabilities(CAP_SYS_ADMIN | CAP_NET_ADMIN), Vec::<&str>::new());
        assert_eq!(missing_capabilities(CAP_BPF | CAP_NET_ADMIN), ["CAP_PERFMON"]);
        assert_eq!(missing_capabilities(0), ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]);
    }

    #[test]
    fn the_oldest_kernel_is_6_1() {
        let releases = ["5.15.0-91-generic", "6.0.19", "6.1.0-18-amd64", "6.18.5", "7.0.0"];
        assert_eq!(releases.map(is_too_old), [true, true, false, false, false]);
    }

    #[test]
    fn the_whole_cgroup2_hierarchy_is_found_in_hybrid_mounts() {
        let mounts = "\
30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - tmpfs tmpfs rw,mode=755
31 30 0:27 /kubepods /mnt/part rw,nosuid shared:10 - cgroup2 cgroup2 rw
32 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
";
        assert_eq!(cgroup_root_of(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup_root_of("31 30 0:27 / / rw - ext4 /dev/vda rw"), None);
    }
}
