//! The operator's settings: `OperatorArgs` is what was typed, `OperatorConfig` is what the code uses.

use std::net::SocketAddr;

use clap::Args;

use super::pools::{self, Pool};
use crate::kube::args::{ApiArgs, TimingArgs};
use crate::settings::{LogArgs, SettingError, within};

/// Flags of `weir operator`; each can also be set by its environment variable.
#[derive(Args, Clone, Debug)]
pub struct OperatorArgs {
    /// Name of this replica, by which it leads.
    #[arg(long, env = "WEIR_OPERATOR_NAME", value_name = "NAME")]
    pub operator_name: String,

    /// Time after which a leader that was killed is replaced.
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

    /// Time after a Node was deleted after which its objects are deleted and its pod CIDRs are free again.
    #[arg(long, env = "WEIR_NODE_FORGET_SECONDS", value_name = "SECONDS", default_value_t = 60)]
    pub node_forget_seconds: u32,

    /// Name of the cluster in flows.
    #[arg(long, env = "WEIR_CLUSTER_NAME", value_name = "NAME", default_value = "default")]
    pub cluster_name: String,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub api: ApiArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub timing: TimingArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogArgs,
}

/// Validated settings.
#[derive(Clone, Debug)]
pub struct OperatorConfig {
    /// As typed, with every rule below checked.
    pub args: OperatorArgs,
}

impl TryFrom<OperatorArgs> for OperatorConfig {
    type Error = SettingError;

    fn try_from(args: OperatorArgs) -> Result<Self, SettingError> {
        args.api.check()?;
        args.timing.check()?;
        within("operator-lease-seconds", args.operator_lease_seconds, 3..=300)?;
        within("node-forget-seconds", args.node_forget_seconds, 0..=86_400)?;
        // A leader that cannot hear heartbeats must lose the lease before it calls nodes silent.
        if args.timing.node_stale_seconds < args.operator_lease_seconds {
            let allowed = "must be at least --operator-lease-seconds";
            return Err(SettingError::new("node-stale-seconds", args.timing.node_stale_seconds, allowed));
        }
        if args.operator_name.is_empty() {
            return Err(SettingError::new("operator-name", "", "must not be empty"));
        }
        if let Some((one, two)) = pools::overlap(&args.pod_cidr_pools) {
            let allowed = "these overlap: no address may be in two pools";
            return Err(SettingError::new("pod-cidr-pools", format!("{one},{two}"), allowed));
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
