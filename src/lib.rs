//! Weir: networking, security and observability for Kubernetes on eBPF.
//!
//! State moves one way: watch -> tables -> pure compile -> reconcile -> maps.
//! Events move the other way and never write a table. See ARCHITECTURE.md.

pub mod agent;
pub mod api;
pub mod backoff;
pub mod cli;
pub mod cni;
pub mod datapath;
pub mod egress;
pub mod encryption;
pub mod endpoint;
pub mod error;
pub mod files;
pub mod flow;
pub mod hubble;
pub mod identity;
pub mod ipam;
pub mod kube;
pub mod model;
pub mod netlink;
pub mod node;
pub mod operator;
pub mod policy;
pub mod proxy;
pub mod relay;
pub mod service;
pub mod settings;
pub mod signals;
pub mod tables;
pub mod telemetry;
pub mod yaml;
