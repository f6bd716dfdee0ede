//! The other plugin that containerd calls for each pod: it raises the pod's `lo`. Packages of Kubernetes
//! bring one; where nobody does, as on k3s without flannel, ours is found by that name (`install`).
//!
//! No agent is asked: a pod's own addresses need none.

use serde_json::{Value, json};

use super::config::Config;
use super::environment::{Command, Environment};
use super::{Error, ErrorCode, Request, Result};
use crate::netlink;

/// Its file name, and its `type` in a network configuration.
pub const PLUGIN: &str = "loopback";

/// Carries out one invocation.
pub(super) fn answer<F: Fn(&str) -> Option<String>>(
    command: Command,
    environment: &Environment<F>,
    config: &Config,
) -> Result<Option<Value>> {
    match command {
        Command::Add => add(config, environment.check()?).map(Some),
        Command::Check => check(environment.check()?).map(|()| None),
        // It goes with the pod's namespace.
        _ => Ok(None),
    }
}

fn add(config: &Config, request: Request) -> Result<Value> {
    within(&request, |name| {
        let index = netlink::link_index(name)?.ok_or_else(|| absent(name))?;
        netlink::raise_link(index)
    })?;
    let interface = json!({
        "name": request.attachment.interface, "mac": "00:00:00:00:00:00", "sandbox": request.netns,
    });
    let result = json!({"cniVersion": config.version, "interfaces": [interface], "dns": {}});
    Ok(config.previous_result.clone().unwrap_or(result))
}

fn check(request: Request) -> Result<()> {
    within(&request, |name| match netlink::link(name)? {
        Some(link) if link.is_up => Ok(()),
        Some(_) => Err(netlink::Error::Different(format!("{name} is down"))),
        None => Err(absent(name)),
    })
}

/// Does `work` with the device's name in the pod's network namespace.
fn within(request: &Request, work: impl FnOnce(&str) -> netlink::Result<()> + Send) -> Result<()> {
    let netns = request.netns.as_deref().unwrap_or_else(|| "".as_ref());
    let name = request.attachment.interface.as_str();
    netlink::open_namespace(netns).and_then(|namespace| netlink::within(&namespace, || work(name))).map_err(
        |error| Error::new(ErrorCode::Failed, "the pod's lo is not up").with_details(error.to_string()),
    )
}

fn absent(name: &str) -> netlink::Error {
    netlink::Error::Different(format!("there is no device {name}"))
}
