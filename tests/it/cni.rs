//! The plugin and the agent's half of it, in network namespaces of the test's own.

mod agent;
mod netlink;
mod netns;
mod plugin;
mod socket;
