//! Settings of flows: whether they are recorded, how many are kept, how often one is reported.

use std::time::Duration;

use clap::{ArgAction, Args};

use super::Redact;
use crate::settings::{SettingError, within};

/// Settings of flows.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Flows")]
pub struct FlowArgs {
    /// Record flows.
    #[arg(long, env = "WEIR_FLOW_EVENTS", action = ArgAction::Set, default_value_t = true)]
    pub flow_events: bool,

    /// Flows kept in memory, 128 bytes each: 524288 are 64 MiB.
    #[arg(long, env = "WEIR_FLOW_BUFFER", value_name = "N", default_value_t = 16_384)]
    pub flow_buffer: usize,

    /// Do not keep what follows ? in the URLs of requests.
    #[arg(long, env = "WEIR_FLOW_REDACT_URL_QUERY", action = ArgAction::Set, default_value_t = false)]
    pub flow_redact_url_query: bool,

    /// Do not keep user and password in the URLs of requests.
    #[arg(long, env = "WEIR_FLOW_REDACT_USER_INFO", action = ArgAction::Set, default_value_t = true)]
    pub flow_redact_user_info: bool,

    /// Headers of requests that are not kept. Only host, traceparent and grpc-status ever are.
    #[arg(long, env = "WEIR_FLOW_REDACT_HEADERS", value_name = "NAME", value_delimiter = ',')]
    pub flow_redact_headers: Vec<String>,

    /// A running connection is reported this often, in seconds.
    #[arg(long, env = "WEIR_FLOW_REPORT_SECONDS", value_name = "SECONDS", default_value_t = 5)]
    pub flow_report_seconds: u32,
}

impl FlowArgs {
    /// Refuses numbers that make no sense.
    pub fn check(&self) -> Result<(), SettingError> {
        within("flow-buffer", self.flow_buffer, 128..=4_194_304)?;
        within("flow-report-seconds", self.flow_report_seconds, 1..=3600)
    }

    /// What is not kept of requests.
    pub fn redact(&self) -> Redact {
        Redact {
            url_query: self.flow_redact_url_query,
            user_info: self.flow_redact_user_info,
            headers: self.flow_redact_headers.iter().map(|name| name.trim().to_ascii_lowercase()).collect(),
        }
    }

    /// How often a running connection is reported.
    pub fn report_every(&self) -> Duration {
        Duration::from_secs(self.flow_report_seconds.into())
    }
}
