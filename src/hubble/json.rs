//! JSON as proto3 defines it, with the names of the `.proto` files: what `hubble observe -o jsonpb` prints.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions,
};
use serde::Serializer;

use super::proto::DESCRIPTORS;

static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).expect("build.rs wrote these descriptors"));

/// Why something is not the message that it should be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotThatMessage(String);

impl NotThatMessage {
    pub(super) fn new(reason: String) -> Self {
        Self(reason)
    }
}

/// A message's name on the wire, as `flow.Flow`.
pub trait Named: Message + Default {
    /// The full name.
    const NAME: &'static str;
}

macro_rules! named {
    ($($type:ty = $name:literal,)*) => { $( impl Named for $type { const NAME: &'static str = $name; } )* };
}

named! {
    super::proto::flow::Flow = "flow.Flow",
    super::proto::flow::FlowFilter = "flow.FlowFilter",
    super::proto::observer::GetFlowsRequest = "observer.GetFlowsRequest",
    super::proto::observer::GetFlowsResponse = "observer.GetFlowsResponse",
    super::proto::observer::GetAgentEventsResponse = "observer.GetAgentEventsResponse",
    super::proto::observer::ExportEvent = "observer.ExportEvent",
    super::proto::observer::ServerStatusResponse = "observer.ServerStatusResponse",
    super::proto::observer::GetNodesResponse = "observer.GetNodesResponse",
}

/// The descriptor of a message.
pub fn descriptor<M: Named>() -> MessageDescriptor {
    POOL.get_message_by_name(M::NAME).expect("every named message is in proto/")
}

/// The message as one line of JSON.
pub fn to_string<M: Named>(message: &M) -> String {
    let mut out = Vec::with_capacity(1024);
    let mut serializer = serde_json::Serializer::new(&mut out);
    // Into memory, of a message that was just encoded: neither can fail.
    let _infallible = serialize(message, &mut serializer);
    String::from_utf8(out).unwrap_or_default()
}

/// The message as a JSON value.
pub fn to_value<M: Named>(message: &M) -> serde_json::Value {
    serialize(message, serde_json::value::Serializer).unwrap_or_default()
}

fn serialize<M: Named, S: Serializer>(message: &M, serializer: S) -> Result<S::Ok, S::Error> {
    let options = SerializeOptions::new().use_proto_field_name(true);
    dynamic(message).serialize_with_options(serializer, &options)
}

pub(super) fn dynamic<M: Named>(message: &M) -> DynamicMessage {
    DynamicMessage::decode(descriptor::<M>(), message.encode_to_vec().as_slice())
        .expect("a message of the same descriptor")
}

/// A message from JSON. Fields and values that this version does not know are skipped.
pub fn from_str<M: Named>(text: &str) -> Result<M, NotThatMessage> {
    read(text, &DeserializeOptions::new().deny_unknown_fields(false))
}

/// A message from JSON, which must not have what this version does not know: a filter that was misspelled
/// would show everything.
pub fn from_str_strict<M: Named>(text: &str) -> Result<M, NotThatMessage> {
    read(text, &DeserializeOptions::new().deny_unknown_fields(true))
}

fn read<M: Named>(text: &str, options: &DeserializeOptions) -> Result<M, NotThatMessage> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let dynamic = DynamicMessage::deserialize_with_options(descriptor::<M>(), &mut deserializer, options)
        .map_err(|error| NotThatMessage(error.to_string()))?;
    deserializer.end().map_err(|error| NotThatMessage(error.to_string()))?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(|error| NotThatMessage(error.to_string()))
}
