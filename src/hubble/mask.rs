//! Field masks: only what a client asks for goes to it.

use std::collections::BTreeMap;

use prost::Message;
use prost_reflect::{DynamicMessage, MessageDescriptor, Value};

use super::json::{NotThatMessage, descriptor, dynamic};
use super::proto::flow::Flow;

/// The fields of `Flow` to keep, as a tree; empty: all of a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask(BTreeMap<u32, Mask>);

impl Mask {
    /// From paths as `source.pod_name`. No path at all: every field.
    pub fn new(paths: &[String]) -> Result<Self, NotThatMessage> {
        let mut root = Self::default();
        for path in paths {
            root.add(path, &descriptor::<Flow>())
                .ok_or_else(|| NotThatMessage::new(format!("field mask: a flow has no field {path:?}")))?;
        }
        Ok(root)
    }

    /// True if there is nothing to take away.
    pub fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    /// `flow` with the fields of the mask alone.
    pub fn apply(&self, flow: Flow) -> Flow {
        if self.is_everything() {
            return flow;
        }
        let mut message = dynamic(&flow);
        self.prune(&mut message);
        Flow::decode(message.encode_to_vec().as_slice()).unwrap_or_default()
    }

    fn add(&mut self, path: &str, of: &MessageDescriptor) -> Option<()> {
        let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
        let field = of.get_field_by_name(name)?;
        let is_new = !self.0.contains_key(&field.number());
        let below = self.0.entry(field.number()).or_default();
        match rest {
            // The whole message: narrower paths of before or after add nothing.
            None => below.0.clear(),
            Some(_) if !is_new && below.0.is_empty() => {}
            Some(rest) => below.add(rest, field.kind().as_message()?)?,
        }
        Some(())
    }

    fn prune(&self, message: &mut DynamicMessage) {
        let fields: Vec<_> = message.fields().map(|(field, _)| field).collect();
        for field in fields {
            match self.0.get(&field.number()) {
                None => message.clear_field(&field),
                Some(below) if below.is_everything() => {}
                Some(below) => {
                    if let Value::Message(inner) = message.get_field_mut(&field) {
                        below.prune(inner);
                    }
                }
            }
        }
    }
}
