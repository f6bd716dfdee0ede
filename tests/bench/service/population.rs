//! Services by the thousand, with the same backends each.

use std::net::IpAddr;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::Api;
use serde_json::{Value, json};

use crate::load::{ECHO_PORT, service_address};

/// Where the Services are.
pub const NAMESPACE: &str = "services";
/// Objects that are created at the same time.
const AT_ONCE: usize = 48;

/// Services `numbers`, each with all of `backends`, which are on `node`.
pub async fn write(
    client: &Client,
    numbers: std::ops::Range<usize>,
    backends: &[IpAddr],
    node: &str,
) -> Result<()> {
    let write_one = |number: usize| {
        let (services, slices) = (
            Api::<Service>::namespaced(client.clone(), NAMESPACE),
            Api::<EndpointSlice>::namespaced(client.clone(), NAMESPACE),
        );
        async move {
            let service = serde_json::from_value(service(number))?;
            services.create(&Default::default(), &service).await.context("creating a Service")?;
            let slice = serde_json::from_value(slice(number, backends, node))?;
            slices.create(&Default::default(), &slice).await.context("creating an EndpointSlice")?;
            Ok::<_, anyhow::Error>(())
        }
    };
    futures::stream::iter(numbers.map(write_one)).buffer_unordered(AT_ONCE).try_collect().await
}

/// Service `number` as an object.
pub fn service(number: usize) -> Value {
    let address = service_address(number);
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": format!("service-{number}"), "namespace": NAMESPACE},
        "spec": {"clusterIP": address.ip(), "ports": [{"name": "echo", "port": address.port(), "targetPort": ECHO_PORT}]},
    })
}

/// Its EndpointSlice.
pub fn slice(number: usize, backends: &[IpAddr], node: &str) -> Value {
    let endpoint = |address: &IpAddr| {
        json!({"addresses": [address], "nodeName": node,
            "conditions": {"ready": true, "serving": true, "terminating": false}})
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("service-{number}-1"), "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": format!("service-{number}")}},
        "addressType": "IPv4", "ports": [{"name": "echo", "port": ECHO_PORT}],
        "endpoints": backends.iter().map(endpoint).collect::<Vec<_>>(),
    })
}
