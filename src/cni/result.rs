//! The result of an ADD in the words of each version, and what a CHECK compares.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::config::Config;
use super::{AddResult, Error, ErrorCode, Result};
use crate::netlink::{GATEWAY_IPV4, GATEWAY_IPV6};

/// `result` as the configuration's version has it; behind what earlier plugins of the chain made.
pub(super) fn render(config: &Config, result: &AddResult) -> Result<Value> {
    let previous = previous(config)?;
    let mut interfaces = list(&previous, "interfaces")?;
    let mut ips = list(&previous, "ips")?;
    let mut routes = list(&previous, "routes")?;
    let in_pod = interfaces.len() + 1;

    let mut host = json!({"name": result.host_interface, "mac": result.host_mac.to_string()});
    let mut pod = json!({
        "name": result.interface, "mac": result.mac.to_string(), "sandbox": result.netns,
    });
    if config.is_at_least("1.1.0") {
        host["mtu"] = json!(result.mtu);
        pod["mtu"] = json!(result.mtu);
    }
    interfaces.extend([host, pod]);

    for address in result.addresses() {
        let (version, length, everything, gateway) = match address {
            IpAddr::V4(_) => ("4", 32, "0.0.0.0/0", IpAddr::V4(GATEWAY_IPV4)),
            IpAddr::V6(_) => ("6", 128, "::/0", IpAddr::V6(GATEWAY_IPV6)),
        };
        let mut ip =
            json!({"address": format!("{address}/{length}"), "gateway": gateway, "interface": in_pod});
        if !config.is_at_least("1.0.0") {
            ip["version"] = json!(version);
        }
        ips.push(ip);
        if address.is_ipv4() {
            routes.push(json!({"dst": format!("{gateway}/32")}));
        }
        routes.push(json!({"dst": everything, "gw": gateway}));
    }
    let dns = previous.get("dns").cloned().unwrap_or_else(|| json!({}));
    Ok(json!({
        "cniVersion": config.version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": dns,
    }))
}

/// Refuses where the runtime remembers other addresses than the agent.
pub(super) fn compare(config: &Config, result: &AddResult) -> Result<()> {
    if config.previous_result.is_none() {
        return Err(Error::new(ErrorCode::InvalidConfig, "a CHECK needs prevResult"));
    }
    let remembered = list(&previous(config)?, "ips")?;
    for address in result.addresses() {
        let is_remembered = remembered.iter().any(|ip| {
            let text = ip["address"].as_str().and_then(|text| text.split('/').next());
            text.and_then(|text| text.parse().ok()) == Some(address)
        });
        if !is_remembered {
            return Err(Error::new(
                ErrorCode::Failed,
                "the pod has an address that prevResult does not have",
            )
            .with_details(address.to_string()));
        }
    }
    Ok(())
}

fn previous(config: &Config) -> Result<Map<String, Value>> {
    match &config.previous_result {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(previous)) => Ok(previous.clone()),
        Some(_) => Err(Error::new(ErrorCode::InvalidConfig, "prevResult is no object")),
    }
}

fn list(previous: &Map<String, Value>, key: &str) -> Result<Vec<Value>> {
    match previous.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(rows)) => Ok(rows.clone()),
        Some(_) => Err(Error::new(ErrorCode::InvalidConfig, format!("{key} of prevResult is no list"))),
    }
}
