//! `weir policy`: the policies in force, why they let something through, and what another one would change.

mod diff;
mod explain;
mod offline;
mod running;
mod suggest;
mod validate;

use clap::Subcommand;

use super::{Failure, list};

#[derive(Subcommand)]
pub enum PolicyCommand {
    /// One line for each policy.
    List(list::ListArgs),
    /// Everything about one policy, as JSON.
    Get(list::GetArgs),
    /// Read a file of policies as Weir would, and say what is wrong with it; exits with 1 if anything is.
    Validate(validate::ValidateArgs),
    /// Say whether one end may speak to another, which rules decide that, and what would change it.
    Explain(explain::ExplainArgs),
    /// Say which pairs of pods a file of policies would let speak or part, and which of the flows seen.
    Diff(diff::DiffArgs),
    /// Write the smallest NetworkPolicy that allows what a pod, workload or namespace was seen doing.
    Suggest(suggest::SuggestArgs),
}

pub fn run(command: PolicyCommand) -> Result<(), Failure> {
    match command {
        PolicyCommand::List(args) => list::policies(&args),
        PolicyCommand::Get(args) => list::policy(&args),
        PolicyCommand::Validate(args) => validate::run(&args),
        PolicyCommand::Explain(args) => explain::run(&args),
        PolicyCommand::Diff(args) => diff::run(&args),
        PolicyCommand::Suggest(args) => suggest::run(&args),
    }
}
