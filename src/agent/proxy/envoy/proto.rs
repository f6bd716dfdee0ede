//! What an Envoy speaks, of `proto/envoy`.

/// The discovery service and the resources that it gives.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}

/// The access log service.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod accesslog {
    tonic::include_proto!("envoy.service.accesslog.v3");
}
