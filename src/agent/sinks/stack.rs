//! Whether packets may go past the node's stack: the flag in `node_state`.
//!
//! IPsec policies of the node's own are its stack's to apply, so packets go past the stack only where there
//! are none, and where a policy that comes is heard of at once. Where that cannot be found out they do not go
//! past it, which is slower and stops nothing.

use anyhow::Result;

use super::{Problem, Round, Sink};
use crate::agent::ipsec;
use crate::datapath::StackWriter;
use crate::netlink;

/// Asks the kernel in every round, and before the first one.
pub struct Stack {
    writer: StackWriter,
    news: ipsec::News,
}

impl Stack {
    /// Of the writer, and of what is heard of IPsec policies.
    pub fn new(writer: StackWriter, news: ipsec::News) -> Self {
        Self { writer, news }
    }

    fn steer(&mut self) -> Result<()> {
        let is_heard = *self.news.borrow();
        let policies = netlink::ipsec_policies();
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
