//! The one integration binary: one link, which matters on small machines.
//!
//! A new test goes into the module that names its subject; a new subject gets a module.

mod announced;
mod api_server;
mod audit;
mod bandwidth;
mod cni;
mod control_plane;
mod datapath;
mod demo;
mod egress;
mod encryption;
mod envoy;
mod floods;
mod flows;
mod fragments;
mod golden;
mod host_policy;
mod host_ports;
mod kafka;
mod l7;
#[path = "../lab/mod.rs"]
mod lab;
mod lab_itself;
mod layers;
mod life_cycle;
mod loaded_policy;
mod long_packets;
mod malformed;
mod masquerade;
mod model;
mod names;
mod node_ports;
mod operator;
mod packets;
mod page;
mod policies;
mod policy_changes;
mod policy_classes;
mod policy_commands;
mod policy_model;
mod policy_names;
mod proxy;
mod published_policies;
mod real_node;
mod require;
mod resolvers;
mod restart;
mod same_node;
mod senders;
mod service_cells;
mod services;
#[path = "../shop/mod.rs"]
mod shop;
mod sinks;
mod sockets;
mod stock_hubble;
mod tools;
mod two_nodes;
mod upgrade;
mod verdicts;
#[allow(dead_code)]
#[path = "../bench/cluster/world.rs"]
mod world;
