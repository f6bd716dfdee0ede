//! What `weir encryption status` and the metrics of peers say.

use std::sync::Arc;

use super::Known;
use crate::api::answers::{EncryptionAnswer, EncryptionDevice, EncryptionPeerRow};
use crate::encryption::DEVICE;
use crate::model::{Node, PeerState};

impl Known {
    pub(super) fn encryption(&self) -> EncryptionAnswer {
        let is_strict = self.config.args.encryption.encryption_strict;
        let Some(device) = self.loaded.get().and_then(|loaded| loaded.encryption.as_ref()) else {
            return EncryptionAnswer { device: None, is_strict, peers: Vec::new(), error: None };
        };
        let published = device.published();
        let shown = EncryptionDevice {
            name: DEVICE.to_owned(),
            kind: device.kind().to_string(),
            mtu: device.mtu(),
            pid: device.pid(),
            public_key: published.public_key,
            port: published.port,
        };
        let (states, error) = match device.peers() {
            Ok(states) => (states, None),
            Err(error) => (Vec::new(), Some(crate::error::chain(&error))),
        };
        let current = self.current.load();
        let row = |node: &Arc<Node>| {
            let public_key = current.keys.get(node.name.as_str()).map(|key| key.public_key);
            let state = states.iter().find(|state| Some(state.public_key) == public_key);
            EncryptionPeerRow { node: node.name.clone(), public_key, state: state.cloned() }
        };
        let peers = current.nodes.iter().map(row).collect();
        EncryptionAnswer { device: Some(shown), is_strict, peers, error }
    }

    pub(super) fn encryption_metrics(&self) -> Vec<(String, PeerState)> {
        let peers = self.encryption().peers;
        peers.into_iter().filter_map(|peer| Some((peer.node, peer.state?))).collect()
    }
}
