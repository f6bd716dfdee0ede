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

/// True, after saying so past the test runner's capture, when no lab can be built here.
pub fn is_skipped() -> bool {
    let Some(lack) = crate::lab::machine_lacks() else { return false };
    let current = std::thread::current();
    let name = current.name().unwrap_or("a test");
    // eprintln! would be captured, and a passing test's output is not shown.
    let _ = writeln!(std::io::stderr().lock(), "SKIPPED ({lack}): {name}");
    true
}
