//! The kernel side's other half: loads the programs, attaches them, and owns every map.
//!
//! ```text
//! model::desired ─> endpoints addresses policies services ─> maps ─┐
//!                   (one writer per map)                           ├─> programs of bpf/
//!                   load, pins ─────────────────────────────────────┤
//!                   attach ──────────────────────────────> links ───┘
//! flow <── events (ring buffer)      cli <── dump, verify
//! ```
#![allow(unsafe_code)]

pub mod abi;
pub mod skeleton;

pub use skeleton::types;

/// The linked BPF object, to be opened with `libbpf_rs::ObjectBuilder::open_memory`.
pub static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/datapath.bpf.o"));
