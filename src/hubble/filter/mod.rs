//! `FlowFilter`, compiled: first what the raw record can tell, then the rest on the flow.
//!
//! A flow is shown that the whitelist matches (or there is none) and the blacklist does not.

mod cel;
mod one;
mod pattern;
mod raw;

#[cfg(test)]
mod tests;

use super::proto::flow::{Flow, FlowFilter};
use crate::flow::Event;
use one::One;

/// A request with more filters than this is refused.
const FILTERS_MAX: usize = 256;

/// A request with more expressions of CEL than this is refused: each costs every flow some microseconds.
const CEL_MAX: usize = 8;

/// Why a filter is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("filter {field}: {reason}")]
pub struct BadFilter {
    field: &'static str,
    reason: String,
}

/// A whitelist and a blacklist.
#[derive(Default)]
pub struct Filters {
    white: Vec<One>,
    black: Vec<One>,
}

impl Filters {
    /// Compiles both lists.
    pub fn new(white: &[FlowFilter], black: &[FlowFilter]) -> Result<Self, BadFilter> {
        if white.len() + black.len() > FILTERS_MAX {
            return Err(BadFilter { field: "list", reason: format!("more than {FILTERS_MAX} filters") });
        }
        let of =
            |filter: &FlowFilter| filter.experimental.as_ref().map_or(0, |more| more.cel_expression.len());
        if white.iter().chain(black).map(of).sum::<usize>() > CEL_MAX {
            let reason = format!("a request has {CEL_MAX} expressions at most");
            return Err(BadFilter { field: "cel_expression", reason });
        }
        let compile = |list: &[FlowFilter]| list.iter().map(One::new).collect::<Result<_, _>>();
        Ok(Self { white: compile(white)?, black: compile(black)? })
    }

    /// False if the raw record alone tells that its flow is not asked for.
    pub fn may_match(&self, event: &Event) -> bool {
        (self.white.is_empty() || self.white.iter().any(|filter| filter.raw.may_match(event)))
            && !self.black.iter().any(|filter| filter.is_raw_alone && filter.raw.may_match(event))
    }

    /// False if the event that stands for a request alone tells that its flow is not asked for.
    pub fn may_match_request(&self, event: &Event) -> bool {
        self.white.is_empty() || self.white.iter().any(|filter| filter.raw.may_match_sides(event))
    }

    /// True if the flow is asked for.
    pub fn matches(&self, flow: &Flow) -> bool {
        (self.white.is_empty() || self.white.iter().any(|filter| filter.matches(flow)))
            && !self.black.iter().any(|filter| filter.matches(flow))
    }
}

/// No condition, or one of them holds.
fn any<T>(wanted: &[T], holds: impl FnMut(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(holds)
}
