//! Printing: JSON and text that cannot command a terminal.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::flow::Colours;

/// Colours only for people: on a terminal, and unless NO_COLOR says otherwise.
pub fn colours() -> Colours {
    let is_unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    match io::stdout().is_terminal() && !is_unwanted {
        true => Colours::On,
        false => Colours::Off,
    }
}

/// A value as one line of JSON.
pub fn write_json_line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    writeln!(out, "{}", printable(&serde_json::to_string(value)?))
}

/// A value as JSON over several lines.
pub fn write_json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    writeln!(out, "{}", printable(&serde_json::to_string_pretty(value)?))
}

/// JSON escapes the control characters of ASCII; terminals know others.
fn printable(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_control() && character != '\n' {
            let _infallible = write!(text, "\\u{:04x}", u32::from(character));
        } else {
            text.push(character);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_cannot_command_a_terminal() {
        let mut out = Vec::new();
        write_json_line(&mut out, &"a\x1b[1m\u{7f}\u{9b}2J").expect("memory");
        assert_eq!(String::from_utf8(out).expect("text"), "\"a\\u001b[1m\\u007f\\u009b2J\"\n");
    }
}
