//! What Weir knows about the cluster, in its own words.
//!
//! Kubernetes objects are converted to these types at the edge (`kube`), once;
//! nothing behind that edge sees an API type. This module knows no other.

mod announcement;
pub mod cni;
mod desired;
mod device;
mod egress;
mod encryption;
mod endpoint;
mod frontend;
mod identity;
pub mod l7;
pub mod names;
mod objects;
mod policy;
mod port_mapping;
mod redirect;
mod service;
mod trace;

pub use announcement::*;
pub use desired::*;
pub use device::*;
pub use egress::*;
pub use encryption::*;
pub use endpoint::*;
pub use frontend::*;
pub use identity::*;
pub use objects::*;
pub use policy::*;
pub use port_mapping::*;
pub use redirect::*;
pub use service::*;
pub use trace::*;
