//! `weir confined`: gives up privileges, and becomes another program that judges what pods say.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use clap::Args;

use super::Failure;
use crate::netlink::{keep_transparent_sockets_only, raise_descriptor_limit};

/// Arguments of `weir confined`.
#[derive(Args, Debug)]
pub struct ConfinedArgs {
    /// The program.
    program: PathBuf,

    /// Its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Returns only if the program cannot be run.
pub fn run(args: &ConfinedArgs) -> Result<(), Failure> {
    raise_descriptor_limit().context("raising the limit of descriptors")?;
    keep_transparent_sockets_only().context("giving up privileges")?;
    let error = Command::new(&args.program).args(&args.arguments).exec();
    Err(anyhow::Error::from(error).context(format!("running {}", args.program.display())).into())
}
