//! The demo's shop: every verdict of its policies, and the flows that tell them.

use anyhow::Result;

use crate::lab::wait_for;
use crate::require::require_lab;
use crate::shop::{ATTEMPTS, Shop};

#[test]
fn every_verdict_of_the_shop_is_right_and_told_by_the_flows() -> Result<()> {
    require_lab!();
    let shop = Shop::open()?;
    let outcomes = shop.try_until_right()?;
    for (attempt, outcome) in ATTEMPTS.iter().zip(&outcomes) {
        assert!(attempt.is_as_expected(outcome), "{} to {}: {outcome}", attempt.from, attempt.to);
    }
    for attempt in &ATTEMPTS {
        wait_for(&format!("a flow from {} to {}", attempt.from, attempt.to), || {
            Ok(shop.seen(attempt, &shop.flows()?).is_some())
        })?;
    }
    Ok(())
}
