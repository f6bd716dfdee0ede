//! The flags in `node_state`: whether packets may go past the node's stack, and which device encrypts.
//!
//! IPsec policies of the node's own are its stack's to apply, so packets go past the stack only where there
//! are none, and where a policy that comes is heard of at once. Where that cannot be found out they do not go
//! past it, which is slower and stops nothing.

use std::sync::Arc;

use anyhow::Result;

use super::{Problem, Round, Sink};
use crate::agent::ipsec;
use crate::datapath::StackWriter;
use crate::encryption::{Device, IPSEC_NUMBER};
use crate::netlink;

/// Asks the kernel in every round, and before the first one.
pub struct Stack {
    writer: StackWriter,
    news: ipsec::News,
    device: Option<Arc<Device>>,
}

impl Stack {
    /// Of the writer, of what is heard of IPsec policies, and of the devices that encrypt.
    pub fn new(writer: StackWriter, news: ipsec::News, device: Option<Arc<Device>>) -> Self {
        Self { writer, news, device }
    }

    /// Says in the programs by which key the node sends.
    fn choose_key(&mut self) -> Result<()> {
        let Some(device) = &self.device else { return Ok(()) };
        let (generation, is_second) = device.wanted();
        if self.writer.write_encrypt_second(is_second)? {
            tracing::info!(generation, device = device.name(), "sending by the key of this generation");
        }
        device.set_in_force(generation);
        Ok(())
    }

    fn steer(&mut self) -> Result<()> {
        self.choose_key()?;
        let is_heard = *self.news.borrow();
        let policies = netlink::ipsec_policies(IPSEC_NUMBER);
        let is_news = self.writer.write_past_stack(is_heard && matches!(policies, Ok(0)))?;
        match policies {
            _ if !is_news => {}
            Ok(0) if !is_heard => {
                tracing::warn!(
                    "packets go by the node's stack, more slowly: IPsec policies cannot be followed"
                );
            }
            Ok(0) => tracing::info!("packets go past the node's stack"),
            Ok(policies) => {
                tracing::warn!(
                    policies,
                    "packets go by the node's stack, more slowly: it has IPsec policies"
                );
            }
            Err(error) => tracing::warn!(%error, "packets go by the node's stack, more slowly"),
        }
        Ok(())
    }
}

impl Sink for Stack {
    fn name(&self) -> &'static str {
        "stack"
    }

    fn write_early(&mut self) -> Result<()> {
        self.steer()
    }

    fn write(&mut self, _round: &mut Round<'_>) -> Result<Vec<Problem>> {
        self.steer()?;
        Ok(Vec::new())
    }
}
