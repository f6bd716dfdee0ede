//! Whether packets may go past the node's stack: the flag in `node_state`.
//!
//! IPsec policies of the node's own are its stack's to apply, so packets go past the stack only where there
//! are none. Where that cannot be found out they do not go past it, which is slower and stops nothing.

use anyhow::Result;

use super::{Problem, Round, Sink};
use crate::datapath::StackWriter;
use crate::netlink;

/// Asks the kernel in every round.
pub struct Stack {
    writer: StackWriter,
}

impl Stack {
    /// Of the writer.
    pub fn new(writer: StackWriter) -> Self {
        Self { writer }
    }
}

impl Sink for Stack {
    fn name(&self) -> &'static str {
        "stack"
    }

    fn write(&mut self, _round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let policies = netlink::ipsec_policies();
        let is_news = self.writer.write_past_stack(matches!(policies, Ok(0)))?;
        match policies {
            _ if !is_news => {}
            Ok(0) => tracing::info!("packets go past the node's stack"),
            Ok(policies) => {
                tracing::warn!(
                    policies,
                    "packets go by the node's stack, more slowly: it has IPsec policies"
                );
            }
            Err(error) => tracing::warn!(%error, "packets go by the node's stack, more slowly"),
        }
        Ok(Vec::new())
    }
}
