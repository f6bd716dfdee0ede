//! The programs of a former agent with other tables: all are replaced at once, when the tables are complete.

use std::sync::Arc;

use anyhow::Result;

use super::{AttachNode, Problem, Round, Sink};
use crate::datapath::{AttachedDevices, Datapath};
use crate::model::EndpointId;

/// Does its work in the first round that has written the tables. Then there is nothing left to do.
pub struct Succession {
    datapath: Arc<Datapath>,
    attach_node: AttachNode,
}

impl Succession {
    /// `attach_node` attaches the programs of the node's own devices and of sockets.
    pub fn new(datapath: Arc<Datapath>, attach_node: AttachNode) -> Self {
        Self { datapath, attach_node }
    }
}

impl Sink for Succession {
    fn name(&self) -> &'static str {
        "succession"
    }

    fn needs(&self) -> &'static [&'static str] {
        // Services come before in the order, but must not stop this: the old rows may be far too old by then.
        &["endpoints"]
    }

    fn is_for_pods(&self) -> bool {
        true
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        if self.datapath.is_succeeding() {
            let pods = round.desired.endpoints.iter().filter(|(id, _)| **id != EndpointId::HOST);
            let devices = AttachedDevices {
                pods: pods.map(|(_, entry)| entry.endpoint.host_ifindex).collect(),
                network: round.desired.devices.keys().copied().collect(),
            };
            self.datapath.succeed(&devices, &self.attach_node)?;
        }
        Ok(Vec::new())
    }
}
