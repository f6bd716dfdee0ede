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

/// Says past the test runner's capture what the machine lacks for this test.
pub fn say_skipped(lack: &str) {
    let current = std::thread::current();
    let name = current.name().unwrap_or("a test");
    // eprintln! would be captured, and a passing test's output is not shown.
    let _ = writeln!(std::io::stderr().lock(), "SKIPPED ({lack}): {name}");
}
