//! What `weir-cni` does: understand, ask the agent, answer in the version asked.

use std::io::Read;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::config::{CONFIG_BYTES_MAX, Config};
use super::environment::{Command, Environment};
use super::{
    AddResult, DeleteQueue, Error, ErrorCode, NEWEST_VERSION, Request, Result, VERSIONS, loopback, result,
};
use crate::api::{self, Client};

/// Longer than the agent itself waits for a pod's policy.
const ADD_WITHIN: Duration = Duration::from_secs(100);
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
const STATUS_WITHIN: Duration = Duration::from_secs(5);

/// What the process shall print and return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// For standard output; may be empty.
    pub output: String,
    /// The process's exit code.
    pub exit_code: u8,
}

/// Carries out one invocation; `variable` reads the environment.
pub fn run(variable: impl Fn(&str) -> Option<String>, input: impl Read) -> Outcome {
    let mut version = NEWEST_VERSION.to_owned();
    match answer(&Environment(variable), input, &mut version) {
        Ok(None) => Outcome { output: String::new(), exit_code: 0 },
        Ok(Some(value)) => Outcome { output: value.to_string(), exit_code: 0 },
        Err(Error(refusal)) => {
            let mut error = json!({"cniVersion": version, "code": refusal.code, "msg": refusal.message});
            if !refusal.details.is_empty() {
                error["details"] = json!(refusal.details);
            }
            Outcome { output: error.to_string(), exit_code: 1 }
        }
    }
}

fn answer<F: Fn(&str) -> Option<String>>(
    environment: &Environment<F>,
    input: impl Read,
    version: &mut String,
) -> Result<Option<Value>> {
    let command = environment.command()?;
    let text = read(input)?;
    if command == Command::Version {
        return Ok(Some(versions(&text)));
    }
    let config = Config::parse(&text)?;
    version.clone_from(&config.version);
    if config.plugin == loopback::PLUGIN {
        return loopback::answer(command, environment, &config);
    }
    match command {
        Command::Add => add(&config, environment.add()?).map(Some),
        Command::Del => del(&config, environment.del()?).map(|()| None),
        Command::Check => {
            require(&config, "0.4.0", "CHECK")?;
            check(&config, environment.check()?).map(|()| None)
        }
        Command::Gc => {
            require(&config, "1.1.0", "GC")?;
            gc(config).map(|()| None)
        }
        Command::Status => {
            require(&config, "1.1.0", "STATUS")?;
            status(&config).map(|()| None)
        }
        Command::Version => Ok(Some(versions(&text))),
    }
}

fn read(input: impl Read) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    input.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| {
        Error::new(ErrorCode::Io, "reading the network configuration").with_details(error.to_string())
    })?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(Error::new(ErrorCode::InvalidConfig, "the network configuration is too long"));
    }
    Ok(text)
}

/// In the words of the version asked, where that is one; a runtime asks with any.
fn versions(text: &[u8]) -> Value {
    let asked = serde_json::from_slice::<Value>(text).unwrap_or_default();
    let asked = asked["cniVersion"].as_str().filter(|version| VERSIONS.contains(version));
    json!({"cniVersion": asked.unwrap_or(NEWEST_VERSION), "supportedVersions": VERSIONS})
}

fn require(config: &Config, version: &str, command: &str) -> Result<()> {
    if config.is_at_least(version) {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::IncompatibleVersion,
        format!("version {} of the specification has no {command}", config.version),
    ))
}

fn add(config: &Config, mut request: Request) -> Result<Value> {
    request.port_mappings = config.port_mappings()?;
    request.validate()?;
    let request = api::Request::CniAdd(request);
    let added: AddResult =
        ask(config, &request, ADD_WITHIN).map_err(|error| refusal(error, ErrorCode::TryAgainLater))?;
    result::render(config, &added)
}

/// Succeeds when the pod is disconnected, or will be: then the request is on disk.
fn del(config: &Config, request: Request) -> Result<()> {
    let asked = ask::<Value>(config, &api::Request::CniDel(request.clone()), ANSWER_WITHIN);
    let error = match asked {
        Ok(_) => return Ok(()),
        Err(api::Error::Refused(refusal)) => return Err(Error(refusal)),
        Err(error) => error,
    };
    DeleteQueue::new(&config.state_directory).push(&request).map_err(|queueing| {
        Error::new(ErrorCode::TryAgainLater, "the agent is not available, and the deletion cannot be queued")
            .with_details(format!("{error}; {queueing}"))
    })
}

fn check(config: &Config, mut request: Request) -> Result<()> {
    request.port_mappings = config.port_mappings()?;
    request.validate()?;
    let checked: AddResult = ask(config, &api::Request::CniCheck(request), ANSWER_WITHIN)
        .map_err(|error| refusal(error, ErrorCode::TryAgainLater))?;
    result::compare(config, &checked)
}

fn gc(config: Config) -> Result<()> {
    let Some(valid) = config.valid_attachments.clone() else {
        // Without the list everything would be garbage.
        return Err(Error::new(ErrorCode::InvalidConfig, "a GC needs cni.dev/valid-attachments"));
    };
    ask::<Value>(&config, &api::Request::CniGc { valid }, ADD_WITHIN)
        .map(drop)
        .map_err(|error| refusal(error, ErrorCode::TryAgainLater))
}

fn status(config: &Config) -> Result<()> {
    ask::<Value>(config, &api::Request::CniStatus, STATUS_WITHIN)
        .map(drop)
        .map_err(|error| refusal(error, ErrorCode::NotAvailable))
}

fn ask<T: DeserializeOwned>(
    config: &Config,
    request: &api::Request,
    within: Duration,
) -> std::result::Result<T, api::Error> {
    Client::connect(&config.socket)?.with_timeout(within)?.call(request)
}

/// The agent's own refusal; `code` where it gave none.
fn refusal(error: api::Error, code: ErrorCode) -> Error {
    match error {
        api::Error::Refused(refusal) => Error(refusal),
        api::Error::Unavailable { ref path, ref source } => {
            let details = format!("nobody listens at {}: {source}", path.display());
            Error::new(code, "the Weir agent of this node is not available").with_details(details)
        }
        error => {
            Error::new(code, "the Weir agent of this node did not answer").with_details(error.to_string())
        }
    }
}
