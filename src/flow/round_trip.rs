//! A time in one byte, as the programs write it.

use std::time::Duration;

use crate::datapath::types::round_trip;

/// The middle of what a byte of an event stands for (`enum round_trip`); `None`: nothing was measured.
pub fn decode(byte: u8) -> Option<Duration> {
    let steps = round_trip::ROUND_TRIP_STEPS.0;
    let number = u32::from(byte).checked_sub(1)?;
    let (exponent, step) = (number / steps, number % steps);
    // Twice the middle of a step, so that it is whole.
    let nanoseconds =
        (1000 * u64::from(2 * (steps + step) + 1)) << exponent.min(round_trip::ROUND_TRIP_EXPONENT_MAX.0);
    Some(Duration::from_nanos(nanoseconds / u64::from(2 * steps)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_right_within_a_sixteenth() {
        assert_eq!(decode(0), None);
        assert_eq!(decode(1), Some(Duration::from_nanos(1062)));
        assert_eq!(decode(2), Some(Duration::from_nanos(1187)));
        // 2^10 microseconds, and the last step before 2^11.
        assert_eq!(decode(81), Some(Duration::from_nanos(1_088_000)));
        assert_eq!(decode(88), Some(Duration::from_nanos(1_984_000)));
        let last = 8 * (round_trip::ROUND_TRIP_EXPONENT_MAX.0 as u8 + 1);
        let all: Vec<Duration> = (1..=last).filter_map(decode).collect();
        assert!(all.windows(2).all(|two| two[0] <= two[1]), "{all:?}");
    }
}
