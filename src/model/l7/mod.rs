//! Rules on what is said inside a connection, who may ask the proxy for them, and what it saw.
//!
//! The agent compiles [`RuleSet`]s and sends them to `weir proxy` ([`ToProxy`]); the proxy judges requests
//! by them and reports each one ([`Record`] in [`FromProxy`]).

mod automaton;
pub mod dns_message;
mod messages;
mod name;
mod record;
mod rules;

pub use automaton::{Automaton, STATES_MAX, State, WORK_MAX};
pub use messages::*;
pub use name::NamePattern;
pub use record::*;
pub use rules::*;
