//! From the kernel's clock to the wall's.

use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};

/// The distance between CLOCK_MONOTONIC, which events carry, and the wall clock, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    offset_ns: i128,
}

impl Clock {
    /// The distance now.
    pub fn now() -> Self {
        Self { offset_ns: clock_ns(ClockId::CLOCK_REALTIME) - clock_ns(ClockId::CLOCK_MONOTONIC) }
    }

    /// A clock whose monotonic zero is `zero`.
    pub fn starting_at(zero: Timestamp) -> Self {
        Self { offset_ns: zero.as_nanosecond() }
    }

    /// Wall clock time of an event's timestamp.
    pub fn wall(&self, monotonic_ns: u64) -> Timestamp {
        Timestamp::from_nanosecond(i128::from(monotonic_ns) + self.offset_ns).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// The timestamp that an event at `wall` would carry; 0 for times before the machine started.
    pub fn monotonic(&self, wall: Timestamp) -> u64 {
        u64::try_from((wall.as_nanosecond() - self.offset_ns).max(0)).unwrap_or(u64::MAX)
    }
}

/// CLOCK_MONOTONIC now, in nanoseconds.
pub fn monotonic_ns() -> u64 {
    u64::try_from(clock_ns(ClockId::CLOCK_MONOTONIC)).unwrap_or(0)
}

fn clock_ns(id: ClockId) -> i128 {
    let time = clock_gettime(id).expect("Linux has had CLOCK_MONOTONIC and CLOCK_REALTIME since 2.6");
    i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_and_monotonic_are_inverse() {
        let clock = Clock::starting_at("2026-11-22T19:20:13Z".parse().expect("a timestamp"));
        assert_eq!(clock.wall(123_456_789).to_string(), "2026-11-22T19:20:13.123456789Z");
        assert_eq!(clock.monotonic(clock.wall(123_456_789)), 123_456_789);
        assert_eq!(clock.monotonic(Timestamp::UNIX_EPOCH), 0);
    }
}
