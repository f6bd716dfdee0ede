//! What `weir encryption status` and the metrics of peers say.

use std::sync::Arc;

use super::Known;
use crate::api::Refusal;
use crate::api::answers::{EncryptionAnswer, EncryptionDevice, EncryptionPeerRow};
use crate::model::{KeyAt, Node, NodeKey, PeerState};

impl Known {
    pub(super) fn encryption(&self) -> EncryptionAnswer {
        let is_strict = self.config.args.encryption.encryption_strict;
        let Some(device) = self.loaded.get().and_then(|loaded| loaded.encryption.as_ref()) else {
            return EncryptionAnswer { device: None, is_strict, peers: Vec::new(), error: None };
        };
        let published = device.published();
        let shown = published.map(|NodeKey { active, .. }| EncryptionDevice {
            name: device.name().to_owned(),
            kind: device.kind().to_string(),
            mtu: device.mtu(),
            pid: device.pid(),
            public_key: active.public_key,
            port: active.port,
            generation: active.generation,
            change: device.change(),
        });
        let (states, error) = match device.peers() {
            Ok(states) => (states, None),
            Err(error) => (Vec::new(), Some(crate::error::chain(&error))),
        };
        let current = self.current.load();
        let row = |node: &Arc<Node>| {
            let key = current.keys.get(node.name.as_str());
            let with = |key: &KeyAt| states.iter().find(|state| state.public_key == key.public_key);
            // By the key that this node sends by; while keys change the other one may send by another.
            let state = key.and_then(|key| {
                let own = published.and_then(|own| key.at(own.active.generation));
                own.and_then(with).or_else(|| with(&key.active))
            });
            let public_key = key.map(|key| key.active.public_key);
            EncryptionPeerRow { node: node.name.clone(), public_key, state: state.cloned() }
        };
        let peers = current.nodes.iter().map(row).collect();
        EncryptionAnswer { device: shown, is_strict, peers, error }
    }

    /// Asks for new keys, on every node.
    pub(super) fn rotate(&self) -> Result<String, Refusal> {
        match self.loaded.get().and_then(|loaded| loaded.encryption.as_ref()) {
            Some(device) => Ok(device.ask_for_new_keys()),
            None => Err(super::refused("nothing is encrypted here: WEIR_ENCRYPTION is off".to_owned())),
        }
    }

    pub(super) fn encryption_metrics(&self) -> Vec<(String, PeerState)> {
        let peers = self.encryption().peers;
        peers.into_iter().filter_map(|peer| Some((peer.node, peer.state?))).collect()
    }
}
