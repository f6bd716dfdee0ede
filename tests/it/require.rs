//! What a test needs of the machine; what is missing is said loudly and by name.

use std::io::Write;

/// Returns from the test, saying so, when no lab can be built here.
macro_rules! require_lab {
    () => {
        if $crate::require::is_skipped() {
            return Ok(());
        }
    };
}
pub(crate) use require_lab;

/// Returns from the test, saying so, when the loaded datapath has filters instead of links.
macro_rules! require_tcx {
    ($datapath:expr) => {
        if !$datapath.features().has_tcx {
            $crate::require::say_skipped("needs tcx links, Linux 6.6");
            return Ok(());
        }
    };
}
pub(crate) use require_tcx;

/// True, after saying so, when no lab can be built here.
pub fn is_skipped() -> bool {
    let lack = crate::lab::machine_lacks();
    if let Some(lack) = &lack {
        say_skipped(lack);
    }
    lack.is_some()
}

/// True if the kernel takes IPv6 out of an IPv4 tunnel (BPF_F_ADJ_ROOM_DECAP_L3_IPV6, Linux 6.3); says so if not.
pub fn takes_ipv6_out_of_ipv4() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.trim().parse::<u32>().ok());
    let is_known = (numbers.next(), numbers.next()) >= (Some(6), Some(3));
    if !is_known {
        say_skipped("IPv6 out of an IPv4 tunnel needs Linux 6.3");
    }
    is_known
}

/// Says past the test runner's capture what the machine lacks for this test.
pub fn say_skipped(lack: &str) {
    let current = std::thread::current();
    let name = current.name().unwrap_or("a test");
    // eprintln! would be captured, and a passing test's output is not shown.
    let _ = writeln!(std::io::stderr().lock(), "SKIPPED ({lack}): {name}");
}
