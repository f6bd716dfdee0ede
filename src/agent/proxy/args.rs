//! Settings of who judges what is said inside of connections.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Who judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Judge {
    /// `weir proxy`.
    Weir,
    /// An Envoy, where it can; `weir proxy` does the rest.
    Envoy,
}

/// Who judges requests, by rules of layer 7.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Layer 7")]
pub struct JudgeArgs {
    /// Who judges requests of HTTP and gRPC: weir (weir proxy), or envoy, an Envoy that is there already. Kafka, DNS, TLS
    /// names, rules that change headers, and flows that both ends' rules are for are always judged by weir proxy.
    #[arg(long, env = "WEIR_PROXY", value_name = "WHO", value_enum, default_value = "weir")]
    pub proxy: Judge,

    /// The Envoy that judges with --proxy=envoy.
    #[arg(long, env = "WEIR_ENVOY", value_name = "PATH", default_value = "/usr/local/bin/envoy")]
    pub envoy: PathBuf,
}

impl JudgeArgs {
    /// The Envoy, where one judges.
    pub fn envoy(&self) -> Option<PathBuf> {
        (self.proxy == Judge::Envoy).then(|| self.envoy.clone())
    }
}
