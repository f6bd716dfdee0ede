//! The filters of the command line: a table of flags, of which `--not` turns the next round.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};

use crate::hubble::ask::{Ask, FLAGS, Flag};

const HEADING: &str = "Filters (all must match; of one given several times, any)";
const RAW: [(&str, bool); 2] = [("allowlist", false), ("denylist", true)];

/// The filters that were typed, in their order.
#[derive(Clone, Debug, Default)]
pub struct FilterArgs {
    typed: Vec<(String, String, bool)>,
    raw: Vec<(String, bool)>,
}

impl FilterArgs {
    /// The filters of a request.
    pub fn ask(&self) -> Result<Ask, String> {
        let mut ask = Ask::default();
        for (name, value, not) in &self.typed {
            ask.add(name, value, *not)?;
        }
        for (json, not) in &self.raw {
            ask.add_raw(json, *not)?;
        }
        Ok(ask)
    }
}

/// --cluster asks for all nodes; as a filter the cluster is --from-cluster or --to-cluster.
fn flags() -> impl Iterator<Item = &'static Flag> {
    FLAGS.iter().filter(|flag| flag.name != "cluster")
}

impl Args for FilterArgs {
    fn augment_args(command: Command) -> Command {
        let mut command = command.next_help_heading(HEADING);
        for flag in flags() {
            let mut arg = Arg::new(flag.name).long(flag.name).help(flag.help).aliases(flag.aliases);
            if let Some(short) = flag.short {
                arg = arg.short(short);
            }
            command = command.arg(match flag.value {
                "" => arg.num_args(0).default_missing_value("").action(ArgAction::Append),
                name => arg.value_name(name).action(ArgAction::Append),
            });
        }
        let not =
            "Leave out what the next filter matches: --not --verdict forwarded, or --not verdict=forwarded";
        let not = Arg::new("not").long("not").help(not).value_name("FILTER=VALUE").num_args(0..=1);
        command = command.arg(not.default_missing_value("").action(ArgAction::Append));
        for (name, help) in [
            ("allowlist", "Show what this filter matches: FlowFilter as JSON"),
            ("denylist", "Leave out what this filter matches: FlowFilter as JSON"),
        ] {
            let arg = Arg::new(name).long(name).help(help).value_name("JSON").action(ArgAction::Append);
            command = command.arg(arg);
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for FilterArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut typed = Vec::new();
        for name in flags().map(|flag| flag.name).chain(["not"]) {
            typed.extend(occurrences(matches, name).map(|(at, value)| (at, name.to_owned(), value)));
        }
        typed.sort_by_key(|(at, ..)| *at);
        let mut this = Self::default();
        let mut is_not = false;
        for (_, name, value) in typed {
            match (name.as_str(), value.split_once('=')) {
                ("not", None) => is_not = true,
                ("not", Some((name, value))) => {
                    this.typed.push((name.trim_start_matches('-').to_owned(), value.to_owned(), true));
                }
                _ => this.typed.push((name, value, std::mem::take(&mut is_not))),
            }
        }
        for (name, not) in RAW {
            this.raw.extend(occurrences(matches, name).map(|(_, value)| (value, not)));
        }
        let complaint = |text: String| Error::raw(clap::error::ErrorKind::ValueValidation, text + "\n");
        if is_not {
            return Err(complaint("--not must be followed by a filter".to_owned()));
        }
        this.ask().map_err(complaint)?;
        Ok(this)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Where a flag was typed, and its values.
fn occurrences(matches: &ArgMatches, name: &str) -> impl Iterator<Item = (usize, String)> {
    let is_typed = matches.value_source(name) == Some(ValueSource::CommandLine);
    let at = matches.indices_of(name).into_iter().flatten();
    let values = matches.get_many::<String>(name).into_iter().flatten().cloned();
    at.zip(values).filter(move |_| is_typed).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::hubble::json::to_string;

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        filter: FilterArgs,
    }

    fn lists(line: &str) -> Result<[Vec<String>; 2], String> {
        let typed = Typed::try_parse_from(format!("observe {line}").split_whitespace());
        let ask = typed.map_err(|error| error.to_string())?.filter.ask()?;
        Ok(ask.lists().map(|list| list.iter().map(to_string).collect()))
    }

    #[test]
    fn not_turns_the_next_filter_only() {
        let expected = |white: &[&str], black: &[&str]| {
            Ok([white, black].map(|list| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>()))
        };
        let dropped = r#"{"verdict":["DROPPED"]}"#;
        let udp = r#"{"protocol":["udp"]}"#;
        assert_eq!(lists("--verdict DROPPED"), expected(&[dropped], &[]));
        assert_eq!(lists("--not --verdict DROPPED --protocol udp"), expected(&[udp], &[dropped]));
        assert_eq!(lists("--protocol udp --not verdict=dropped"), expected(&[udp], &[dropped]));
        assert_eq!(lists("--not --verdict DROPPED --not --protocol udp"), expected(&[], &[dropped, udp]));
        assert_eq!(lists("-6 -t drop").map(|[white, _]| white.len()), Ok(1));
        assert_eq!(
            lists("--reply --not --ipv4"),
            expected(&[r#"{"reply":[true]}"#], &[r#"{"ip_version":["IPv4"]}"#])
        );
        assert_eq!(lists(r#"--denylist {"verdict":["DROPPED"]}"#), expected(&[], &[dropped]));
        for bad in [
            "--not",
            "--verdict maybe",
            "--pod a --to-pod b",
            "--not colour=red",
            "--colour red",
            "--allowlist {",
        ] {
            assert!(lists(bad).is_err(), "{bad}");
        }
    }
}
