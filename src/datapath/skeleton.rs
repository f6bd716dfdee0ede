//! The skeleton that libbpf-cargo made of `bpf/`: programs, maps and the types of abi.h.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::undocumented_unsafe_blocks, clippy::unwrap_used)]

include!(concat!(env!("OUT_DIR"), "/datapath.skel.rs"));
