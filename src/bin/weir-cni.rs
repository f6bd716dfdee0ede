//! The CNI plugin: started by the container runtime for every pod, once to
//! connect it and once to disconnect it. It has no state and no thread; the
//! agent does the work.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let outcome = weir::cni::run(variable, std::io::stdin().lock());
    let mut output = std::io::stdout().lock();
    if !outcome.output.is_empty() && writeln!(output, "{}", outcome.output).is_err() {
        // The runtime went away: it cannot know that this succeeded.
        return ExitCode::FAILURE;
    }
    ExitCode::from(outcome.exit_code)
}
