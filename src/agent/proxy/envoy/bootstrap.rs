//! What an Envoy is started with: where the agent is, and that servers are whom connections are for.

use std::path::Path;

use serde_json::{Value, json};

use super::CLUSTER_OF_AGENT;
use super::resources::CLUSTER_OF_SERVERS;

/// More than there can be: the shares of pods are the kernel's to keep.
const NO_BOUND: u32 = 1_000_000;

/// The configuration file's content.
pub fn bootstrap(socket: &Path) -> String {
    let agent = json!([{ "envoy_grpc": { "cluster_name": CLUSTER_OF_AGENT } }]);
    json!({
        "node": { "id": "weir", "cluster": "weir" },
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "grpc_services": agent,
            },
            "lds_config": { "resource_api_version": "V3", "ads": {} },
        },
        "static_resources": { "clusters": [of_agent(socket), of_servers()] },
    })
    .to_string()
}

fn http(options: &Value) -> Value {
    let mut options = options.clone();
    options["@type"] = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions".into();
    json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options })
}

fn of_agent(socket: &Path) -> Value {
    let address = json!({ "pipe": { "path": socket } });
    json!({
        "name": CLUSTER_OF_AGENT,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": http(&json!({ "explicit_http_config": { "http2_protocol_options": {} } })),
        "load_assignment": {
            "cluster_name": CLUSTER_OF_AGENT,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address } }] }],
        },
    })
}

/// One connection to the server for each of a client, which ends with it: it has the client's port.
fn of_servers() -> Value {
    let options = json!({ "use_downstream_protocol_config": { "http_protocol_options": {}, "http2_protocol_options": {} } });
    json!({
        "name": CLUSTER_OF_SERVERS,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
        "connection_pool_per_downstream_connection": true,
        "typed_extension_protocol_options": http(&options),
        // The client's last connection with the port may just have ended.
        "upstream_bind_config": { "socket_options": [{
            "description": "SO_REUSEADDR",
            "level": libc::SOL_SOCKET,
            "name": libc::SO_REUSEADDR,
            "int_value": 1,
            "state": "STATE_PREBIND",
        }] },
        "circuit_breakers": { "thresholds": [{
            "max_connections": NO_BOUND,
            "max_pending_requests": NO_BOUND,
            "max_requests": NO_BOUND,
            "max_connection_pools": NO_BOUND,
        }] },
    })
}
