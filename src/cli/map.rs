//! `weir map` and `weir verify`: the datapath itself, without an agent.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Failure, Format, output, table};
use crate::datapath::{self, MAP_NAMES, Settings, Verification, pin_directory};

#[derive(Subcommand)]
pub enum MapCommand {
    /// One line for each map: how many rows it has.
    List(MapListArgs),
    /// The rows of a map, one JSON object a line, sorted by key.
    Dump(MapDumpArgs),
}

#[derive(Args)]
struct Pins {
    /// Where the BPF file system is.
    #[arg(long, env = "WEIR_BPFFS", value_name = "DIR", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
}

#[derive(Args)]
pub struct MapListArgs {
    #[command(flatten)]
    pins: Pins,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
}

#[derive(Args)]
pub struct MapDumpArgs {
    #[command(flatten)]
    pins: Pins,
    /// Which map.
    #[arg(value_name = "NAME", value_parser = MAP_NAMES)]
    name: String,
}

#[derive(Args)]
pub struct VerifyArgs {
    /// Fail when a program needs more verified instructions than this.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Fail when a chain of calls takes more bytes of stack than this; the kernel's limit is 512.
    #[arg(long, value_name = "BYTES", default_value_t = datapath::STACK_LIMIT_BYTES)]
    stack_limit: u32,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
}

pub fn run(command: MapCommand) -> Result<(), Failure> {
    match command {
        MapCommand::List(args) => list(&args),
        MapCommand::Dump(args) => dump(&args),
    }
}

fn list(args: &MapListArgs) -> Result<(), Failure> {
    let pins = pin_directory(&args.pins.bpffs);
    let rows = MAP_NAMES
        .iter()
        .map(|name| Ok((*name, datapath::dump(&pins, name)?.len())))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    match args.output {
        Format::Json => {
            let rows: Vec<_> =
                rows.iter().map(|(map, rows)| serde_json::json!({ "map": map, "rows": rows })).collect();
            output::write_json(&mut out, &rows)?;
        }
        Format::Table => {
            let rows: Vec<_> = rows.iter().map(|(map, rows)| [(*map).to_owned(), rows.to_string()]).collect();
            table::write(&mut out, ["MAP", "ROWS"], &rows)?;
        }
    }
    Ok(out.flush()?)
}

fn dump(args: &MapDumpArgs) -> Result<(), Failure> {
    let rows = datapath::dump(&pin_directory(&args.pins.bpffs), &args.name)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    for row in &rows {
        output::write_json_line(&mut out, row)?;
    }
    Ok(out.flush()?)
}

/// With everything on, which is the most that the verifier ever sees; of the drivers' program with native routing
/// in plain, which alone gives it something to do.
fn verify_all() -> anyhow::Result<Vec<Verification>> {
    let plain = Settings { netns_cookie: Some(1), wait_ifindex: Some(1), ..Settings::default() };
    let all = Settings {
        tunnel_ifindex: Some(1),
        encrypt_ifindex: Some(1),
        limit_ifindex: Some(1),
        path_mtu: 1400,
        ..plain.clone()
    };
    let of_drivers = |program: &Verification| program.program == "from_wire";
    let mut programs = datapath::verify(&all)?;
    let plain = datapath::verify(&plain)?.into_iter().find(of_drivers);
    if let (Some(program), Some(plain)) = (programs.iter_mut().find(|program| of_drivers(program)), plain) {
        *program = plain;
    }
    Ok(programs)
}

/// Verifies every program, and says what that took.
pub fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let programs = verify_all()?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    match args.output {
        Format::Json => output::write_json(&mut out, &programs)?,
        Format::Table => {
            let rows: Vec<_> = programs
                .iter()
                .map(|program| {
                    [
                        program.program.clone(),
                        program.verified_instructions.to_string(),
                        program.loaded_instructions.to_string(),
                        program.peak_states.to_string(),
                        program.verification_microseconds.to_string(),
                        program.stack_bytes.to_string(),
                        program.stack_chain.clone(),
                    ]
                })
                .collect();
            table::write(
                &mut out,
                ["PROGRAM", "VERIFIED", "LOADED", "STATES", "MICROSECONDS", "STACK", "DEEPEST CHAIN"],
                &rows,
            )?;
        }
    }
    out.flush()?;
    let limit = args.limit.unwrap_or(u64::MAX);
    if let Some(program) = programs.iter().find(|program| program.stack_bytes > args.stack_limit) {
        return Err(Failure::Other(anyhow::anyhow!(
            "{} takes {} bytes of stack, more than {}: {}",
            program.program,
            program.stack_bytes,
            args.stack_limit,
            program.stack_chain
        )));
    }
    match programs.iter().find(|program| program.verified_instructions > limit) {
        None => Ok(()),
        Some(program) => Err(Failure::Other(anyhow::anyhow!(
            "{} needs {} verified instructions, more than {limit}",
            program.program,
            program.verified_instructions
        ))),
    }
}
