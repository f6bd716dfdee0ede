//! `weir policy validate`.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, anyhow};
use clap::Args;

use crate::cli::Failure;
use crate::kube::check;

#[derive(Args)]
pub struct ValidateArgs {
    /// Files of YAML or JSON; - is the standard input.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Say nothing of what is right.
    #[arg(long, short)]
    quiet: bool,
}

pub fn run(args: &ValidateArgs) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let mut wrong = 0;
    for file in &args.files {
        let text = read(file)?;
        let name = file.display();
        let documents = match check::check(&text) {
            Ok(documents) => documents,
            Err(error) => {
                wrong += 1;
                writeln!(out, "{name}: error: {error}")?;
                continue;
            }
        };
        for document in documents {
            let object = document.object.as_deref().unwrap_or("document");
            let said = document.errors.iter().map(|error| ("error", error));
            let said: Vec<_> =
                said.chain(document.warnings.iter().map(|warning| ("warning", warning))).collect();
            wrong += document.errors.len();
            for (kind, text) in &said {
                writeln!(out, "{name}:{}: {object}: {kind}: {text}", document.line)?;
            }
            if said.is_empty() && !args.quiet {
                writeln!(out, "{name}:{}: {object}: ok", document.line)?;
            }
        }
    }
    match wrong {
        0 => Ok(()),
        count => Err(Failure::Other(anyhow!("{count} error{} found", if count == 1 { "" } else { "s" }))),
    }
}

/// A file's text, or what comes in.
pub fn read(file: &PathBuf) -> Result<String, Failure> {
    let text = match file.as_os_str() == "-" {
        true => io::read_to_string(io::stdin()).context("reading the standard input")?,
        false => std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?,
    };
    Ok(text)
}
