//! The one list of settings: every program that is configured by `WEIR_` variables, and what may be set.

use std::collections::BTreeMap;

use clap::{Arg, Args, Command};
use thiserror::Error;

use crate::agent::AgentArgs;
use crate::operator::OperatorArgs;
use crate::relay::RelayArgs;

/// Read before the settings are: what is logged.
const LOG: &str = "WEIR_LOG";

/// Every program with its settings; a new one is a line here. They share a ConfigMap, so each must
/// know the others' settings.
fn programs() -> [Command; 3] {
    [
        AgentArgs::augment_args(Command::new("agent")),
        OperatorArgs::augment_args(Command::new("operator")),
        RelayArgs::augment_args(Command::new("relay")),
    ]
}

/// The settings by variable: the argument, and the programs that have it.
fn settings() -> BTreeMap<String, (Arg, Vec<String>)> {
    let mut settings = BTreeMap::new();
    for program in programs() {
        for argument in program.get_arguments() {
            let Some(name) = argument.get_env().and_then(|name| name.to_str()) else { continue };
            let entry = settings.entry(name.to_owned()).or_insert((argument.clone(), Vec::new()));
            entry.1.push(program.get_name().to_owned());
        }
    }
    settings
}

/// Refuses environment variables that look like settings and are none: a misspelled one would
/// silently do nothing.
pub(super) fn check_variables(variables: impl IntoIterator<Item = String>) -> Result<(), UnknownVariable> {
    let settings = settings();
    let known: Vec<&str> = settings.keys().map(String::as_str).chain([LOG]).collect();
    let is_setting = |name: &str| name.starts_with("WEIR_") && !name.starts_with("WEIR_TEST_");
    let unknown = |name: &String| is_setting(name) && !known.contains(&name.as_str());
    match variables.into_iter().find(unknown) {
        None => Ok(()),
        Some(name) => Err(UnknownVariable { nearest: nearest(&name, &known), name }),
    }
}

/// The same for the variables of this process.
pub(super) fn check_environment() -> Result<(), UnknownVariable> {
    check_variables(std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned()))
}

/// The setting that was probably meant; `weir agent --help` where none is near.
fn nearest(name: &str, known: &[&str]) -> String {
    let own = |name: &str| name.trim_start_matches("WEIR_").to_owned();
    let likeness = |setting: &&str| (strsim::jaro_winkler(&own(name), &own(setting)) * 1000.0) as u32;
    let best = known.iter().copied().max_by_key(likeness).filter(|setting| likeness(setting) > 850);
    best.map_or_else(|| "`weir agent --help` lists them".to_owned(), |best| format!("did you mean {best}?"))
}

/// A variable of the environment that is no setting.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{name} is no setting: {nearest}")]
pub(super) struct UnknownVariable {
    name: String,
    nearest: String,
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    #[test]
    fn a_misspelled_variable_is_refused_by_name() {
        let check = |names: &[&str]| check_variables(names.iter().map(|name| (*name).to_owned()));
        assert_eq!(check(&["PATH", "WEIR_MTU", "WEIR_NODE_NAME", "WEIR_LOG", "HOME"]), Ok(()));
        let message = check(&["WEIR_MTUU"]).expect_err("no such setting").to_string();
        assert_eq!(message, "WEIR_MTUU is no setting: did you mean WEIR_MTU?");
        let message = check(&["WEIR_COLOUR_OF_THE_SKY"]).expect_err("no such setting").to_string();
        assert!(message.ends_with("`weir agent --help` lists them"), "{message}");
    }

    #[test]
    fn the_manifests_have_every_setting_with_its_default() {
        let settings = include_str!("../../deploy/base/settings.env");
        // Not for pods.
        let elsewhere = ["WEIR_MANIFESTS", "WEIR_KUBECONFIG"];
        let manifest = |program: &String| {
            let path = format!("{}/deploy/base/{program}.yaml", env!("CARGO_MANIFEST_DIR"));
            std::fs::read_to_string(path).expect("each program has a manifest")
        };
        for (name, (argument, programs)) in super::settings() {
            let default = argument.get_default_values().first().and_then(|value| value.to_str());
            let line = match default {
                Some(default) => format!("\n{name}={default}\n"),
                None => format!("\n#{name}="),
            };
            let in_pods = |program| manifest(program).contains(&format!("name: {name}"));
            let is_there = settings.contains(&line) || programs.iter().all(in_pods);
            assert!(is_there || elsewhere.contains(&name.as_str()), "deploy/base has no {}", line.trim());
        }
        let names = settings.lines().filter_map(|line| line.trim_start_matches('#').split_once('='));
        let names = names.map(|(name, _)| name.to_owned()).filter(|name| name.starts_with("WEIR_"));
        assert_eq!(check_variables(names), Ok(()));
    }

    /// `UPDATE=1 cargo test --lib cli::settings` writes the file.
    #[test]
    fn docs_list_every_setting() {
        let mut text = "# Settings\n\nEvery setting is an option of a program and a variable of its \
                        environment. On a cluster the variables are in\n`deploy/base/settings.env`. This page is \
                        made from the programs' help (`UPDATE=1 cargo test --lib cli::settings`).\n\n\
                        | variable | option | of | default | what it does |\n|---|---|---|---|---|\n"
            .to_owned();
        for (name, (argument, programs)) in super::settings() {
            let option = argument.get_long().unwrap_or_default();
            let defaults: Vec<_> =
                argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
            let defaults = defaults.join(",").replace(',', ", ");
            let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string);
            let help = help.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
            let programs = programs.join(", ");
            writeln!(
                text,
                "| `{name}` | `--{option}` | {programs} | {defaults} | {} |",
                help.replace('|', "\\|")
            )
            .expect("a String takes everything");
        }
        text += "| `WEIR_LOG` | | all | info | What is logged: error, warn, info, debug, or weir::kube=debug and the like |\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/settings.md");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(path, &text).expect("docs/settings.md can be written");
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            written == text,
            "docs/settings.md is not of these settings: UPDATE=1 cargo test --lib cli::settings"
        );
    }
}
