//! The one integration binary: one link, which matters on small machines.
//!
//! A new test goes into the module that names its subject; a new subject gets a module.

mod cni;
#[path = "../lab/mod.rs"]
mod lab;
mod lab_itself;
mod require;
