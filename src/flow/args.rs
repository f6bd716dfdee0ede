//! Settings of flows: whether they are recorded, how many are kept, how often one is reported.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::{ArgAction, Args};

use super::{Event, Redact};
use crate::settings::{SettingError, within};

/// A number of bytes, as `64MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const UNITS: [(&str, u64); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unit = UNITS.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)));
        let (number, bytes) = unit.unwrap_or((text, 1));
        let number: Option<u64> = number.trim().parse().ok();
        number
            .and_then(|number| number.checked_mul(bytes))
            .map(Self)
            .ok_or_else(|| "write a number of bytes, or one with KiB, MiB, GiB or TiB".to_owned())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().rev().find(|(_, bytes)| self.0 >= *bytes && self.0.is_multiple_of(*bytes));
        match unit {
            Some((unit, bytes)) => write!(f, "{}{unit}", self.0 / bytes),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Settings of flows.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Flows")]
pub struct FlowArgs {
    /// Record flows.
    #[arg(long, env = "WEIR_FLOW_EVENTS", action = ArgAction::Set, default_value_t = true)]
    pub flow_events: bool,

    /// The history of flows in memory, 128 bytes each: 64MiB hold 524288. It is taken as flows come.
    #[arg(long, env = "WEIR_FLOW_HISTORY", value_name = "SIZE", default_value = "4MiB")]
    pub flow_history: Size,

    /// The newest flows on disk, below --state-dir: queries read them behind those in memory; 0: none.
    #[arg(long, env = "WEIR_FLOW_HISTORY_DISK", value_name = "SIZE", default_value = "0")]
    pub flow_history_disk: Size,

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
        within("flow-history", self.flow_history, Size(16 << 10)..=Size(4 << 30))?;
        if self.flow_history_disk != Size(0) {
            within("flow-history-disk", self.flow_history_disk, Size(1 << 20)..=Size(1 << 40))?;
        }
        within("flow-report-seconds", self.flow_report_seconds, 1..=3600)
    }

    /// Records that the history in memory holds.
    pub fn records(&self) -> usize {
        usize::try_from(self.flow_history.0).unwrap_or(usize::MAX) / size_of::<Event>()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("64MiB", 64 << 20), ("4096", 4096), ("1GiB", 1 << 30), ("0", 0)] {
            let size: Size = text.parse().expect(text);
            assert_eq!(size, Size(bytes));
            assert_eq!(size.to_string().parse(), Ok(size));
        }
        for text in ["", "MiB", "64MB", "-1", "99999999999TiB"] {
            assert!(text.parse::<Size>().is_err(), "{text:?}");
        }
    }
}
