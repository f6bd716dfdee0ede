//! The operator's settings: `OperatorArgs` is what was typed, `OperatorConfig` is what the code uses.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::pools::{self, Pool};
use crate::config::{ConfigError, LogFormat, is_server};

/// Flags of `weir operator`; each can also be set by its environment variable.
#[derive(Args, Clone, Debug)]
pub struct OperatorArgs {
    /// Reach the Kubernetes API with this file; without it, as a pod does.
    #[arg(long, env = "WEIR_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// API servers to begin with, as HOST:PORT; later those of the `kubernetes` Service's EndpointSlice.
    #[arg(
        long,
        env = "WEIR_API_SERVERS",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        conflicts_with = "kubeconfig"
    )]
    pub api_servers: Vec<String>,

    /// Name of this replica, by which it leads.
    #[arg(long, env = "WEIR_OPERATOR_NAME", value_name = "NAME")]
    pub operator_name: String,

    /// A leader that was killed is replaced after so long.
    #[arg(long, env = "WEIR_OPERATOR_LEASE_SECONDS", value_name = "SECONDS", default_value_t = 15)]
    pub operator_lease_seconds: u32,

    /// Where metrics and health are served over HTTP.
    #[arg(
        long,
        env = "WEIR_OPERATOR_METRICS_ADDRESS",
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:9963"
    )]
    pub operator_metrics_address: SocketAddr,

    /// Where nodes get pod CIDRs from that have none in their Node's spec: CIDR=LENGTH, the
    /// length being that of a node's part; pools of one family are used up in this order.
    #[arg(long, env = "WEIR_POD_CIDR_POOLS", value_name = "CIDR=LENGTH", value_delimiter = ',')]
    pub pod_cidr_pools: Vec<Pool>,

    /// An identity that no pod has had for so long is deleted.
    #[arg(long, env = "WEIR_IDENTITY_GRACE_SECONDS", value_name = "SECONDS", default_value_t = 900)]
    pub identity_grace_seconds: u32,

    /// A node whose agent says nothing for so long counts as without one, and is tainted.
    #[arg(long, env = "WEIR_NODE_STALE_SECONDS", value_name = "SECONDS", default_value_t = 60)]
    pub node_stale_seconds: u32,

    /// So long after a Node is gone its objects are deleted and its pod CIDRs are free again.
    #[arg(long, env = "WEIR_NODE_FORGET_SECONDS", value_name = "SECONDS", default_value_t = 60)]
    pub node_forget_seconds: u32,

    /// Form of the log.
    #[arg(long, env = "WEIR_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

/// Validated settings.
#[derive(Clone, Debug)]
pub struct OperatorConfig {
    /// As typed, with every rule below checked.
    pub args: OperatorArgs,
}

impl TryFrom<OperatorArgs> for OperatorConfig {
    type Error = ConfigError;

    fn try_from(args: OperatorArgs) -> Result<Self, ConfigError> {
        for (setting, value, allowed, message) in [
            ("operator-lease-seconds", args.operator_lease_seconds, 3..=300, "must be 3 to 300"),
            ("identity-grace-seconds", args.identity_grace_seconds, 1..=604_800, "must be 1 to 604800"),
            ("node-stale-seconds", args.node_stale_seconds, 4..=3600, "must be 4 to 3600"),
            ("node-forget-seconds", args.node_forget_seconds, 0..=86_400, "must be 0 to 86400"),
        ] {
            if !allowed.contains(&value) {
                return Err(ConfigError::new(setting, value.to_string(), message));
            }
        }
        // A leader that cannot hear heartbeats must lose the lease before it calls nodes silent.
        if args.node_stale_seconds < args.operator_lease_seconds {
            let given = args.node_stale_seconds.to_string();
            return Err(ConfigError::new(
                "node-stale-seconds",
                given,
                "must be at least --operator-lease-seconds",
            ));
        }
        if args.operator_name.is_empty() {
            return Err(ConfigError::new("operator-name", String::new(), "must not be empty"));
        }
        if let Some(server) = args.api_servers.iter().find(|server| !is_server(server)) {
            let allowed = "must be HOST:PORT, an IPv6 address in brackets";
            return Err(ConfigError::new("api-servers", server.clone(), allowed));
        }
        if let Some((one, two)) = pools::overlap(&args.pod_cidr_pools) {
            let given = format!("{one},{two}");
            return Err(ConfigError::new(
                "pod-cidr-pools",
                given,
                "these overlap: no address may be in two pools",
            ));
        }
        Ok(Self { args })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: OperatorArgs,
    }

    fn config(flags: &[&str]) -> Result<OperatorConfig, String> {
        let typed = ["weir-operator", "--operator-name", "a"].iter().chain(flags);
        let command = Command::try_parse_from(typed).map_err(|error| error.to_string())?;
        OperatorConfig::try_from(command.args).map_err(|error| error.to_string())
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        assert!(config(&[]).is_ok());
        assert!(config(&["--pod-cidr-pools", "10.0.0.0/16=24,fd00::/48=64,10.1.0.0/16=25"]).is_ok());
        for (flags, message) in [
            (["--operator-lease-seconds", "1"], "--operator-lease-seconds 1: must be 3 to 300"),
            (
                ["--pod-cidr-pools", "10.0.0.0/8=24,10.5.0.0/16=24"],
                "--pod-cidr-pools 10.0.0.0/8=24,10.5.0.0/16=24: these overlap: no address may be in two pools",
            ),
        ] {
            assert_eq!(config(&flags).err().as_deref(), Some(message));
        }
        let error = config(&["--pod-cidr-pools", "10.0.0.0/8"]).expect_err("no length");
        assert!(error.contains("must be CIDR=LENGTH, as 10.128.0.0/14=24"), "{error}");
    }
}
