//! Packets through the real programs by BPF_PROG_TEST_RUN: what is given, the
//! packet, the verdict, what comes out, what is reported and remembered.

mod announced;
mod backends;
mod denied;
mod dns;
mod drops;
mod early;
mod encryption;
mod ends;
mod fairness;
mod flows;
mod fragments;
pub mod frame;
mod frontends;
mod fuzz;
mod hops;
mod host;
mod late;
mod layer7;
mod masquerade;
mod network;
mod newcomers;
mod outside;
mod pieces;
mod queries;
mod quoted;
mod senders;
mod services;
mod tunnel;
mod ways;
pub mod world;
