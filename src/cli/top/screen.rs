//! The screen: a line of sums, talkers, pairs, and drops by reason. Every name is escaped.

use ratatui::Frame;
use ratatui::crossterm::event::KeyCode;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Row, Table};

use super::model::{By, Numbers, Pair, Sort, Summary};
use crate::flow::escape;

/// What the keys have chosen.
#[derive(Clone, Copy, Debug, Default)]
pub struct View {
    /// What is shown first.
    pub sort: Sort,
    /// Who the two sides are.
    pub by: By,
    /// The numbers stand still.
    pub is_paused: bool,
}

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pressed {
    /// The end.
    Quit,
    /// Other sides.
    By,
    /// Another look, at most.
    Nothing,
}

impl View {
    /// Does what a key says.
    pub fn press(&mut self, key: KeyCode) -> Pressed {
        match key {
            KeyCode::Char('q') | KeyCode::Esc => return Pressed::Quit,
            KeyCode::Char('b') => return Pressed::By,
            KeyCode::Char('p' | ' ') => self.is_paused = !self.is_paused,
            KeyCode::Char('s') => {
                self.sort = match self.sort {
                    Sort::Bytes => Sort::Flows,
                    Sort::Flows => Sort::Drops,
                    Sort::Drops => Sort::Bytes,
                };
            }
            _ => {}
        }
        Pressed::Nothing
    }

    /// The sides that come after these.
    pub fn next_by(&self) -> By {
        match self.by {
            By::Pod => By::Workload,
            By::Workload => By::Namespace,
            By::Namespace => By::Pod,
        }
    }
}

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, summary: &Summary, view: &View) {
    let [head, middle, bottom, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Fill(3),
        Constraint::Fill(2),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let [left, right] = Layout::horizontal([Constraint::Fill(2), Constraint::Fill(3)]).areas(middle);
    let is_bad = summary.lost > 0 || !summary.away.is_empty();
    let style = if is_bad { Style::new().fg(Color::Yellow).bold() } else { Style::new().bold() };
    frame.render_widget(Line::from(headline(summary)).style(style), head);
    let heads = ["BYTES/s", "FLOWS/s", "DROPS"];
    let talkers = summary.talkers.iter().map(|row| (vec![row.of.name.clone()], row.numbers));
    frame.render_widget(columns("Talkers", &["WHO"], &heads, talkers, summary), left);
    let pairs = summary.pairs.iter().map(|row| (pair(&row.of).to_vec(), row.numbers));
    frame.render_widget(columns("Pairs", &["FROM", "TO"], &heads, pairs, summary), right);
    let drops = summary.drops.iter().map(|row| {
        let [from, to] = pair(&row.of.pair);
        let names = [row.of.reason.clone(), row.of.direction.clone(), from, to];
        let cells = names.iter().map(|name| escape(name).into_owned());
        Row::new(cells.chain([row.numbers.drops.to_string()]).collect::<Vec<_>>())
    });
    let widths = [
        Constraint::Fill(2),
        Constraint::Length(8),
        Constraint::Fill(3),
        Constraint::Fill(3),
        Constraint::Length(9),
    ];
    let table = Table::new(drops, widths)
        .header(Row::new(["WHY", "WAY", "FROM", "TO", "PACKETS"]).bold())
        .block(Block::bordered().title("Dropped"));
    frame.render_widget(table, bottom);
    let state = if view.is_paused { "PAUSED  " } else { "" };
    let keys = format!("{state}q quit  p pause  s sort ({:?})  b by ({:?})", view.sort, view.by);
    frame.render_widget(Line::from(keys.to_lowercase()).dim(), foot);
}

fn columns<'a>(
    title: &'a str,
    names: &[&'a str],
    heads: &[&'a str],
    rows: impl Iterator<Item = (Vec<String>, Numbers)>,
    summary: &Summary,
) -> Table<'a> {
    let seconds = summary.seconds.max(1);
    let row = |(names, numbers): (Vec<String>, Numbers)| {
        let cells = names.iter().map(|name| escape(name).into_owned()).collect::<Vec<_>>();
        let rates = [
            bytes(numbers.bytes / seconds),
            (numbers.flows / seconds).to_string(),
            numbers.drops.to_string(),
        ];
        let style = if numbers.drops > 0 { Style::new().fg(Color::Red) } else { Style::new() };
        Row::new(cells.into_iter().chain(rates).collect::<Vec<_>>()).style(style)
    };
    let widths = names.iter().map(|_| Constraint::Fill(1)).chain(heads.iter().map(|_| Constraint::Length(9)));
    Table::new(rows.map(row).collect::<Vec<_>>(), widths.collect::<Vec<_>>())
        .header(Row::new(names.iter().chain(heads).copied().collect::<Vec<_>>()).bold())
        .block(Block::bordered().title(title))
}

/// The sums in one line.
pub fn headline(summary: &Summary) -> String {
    let seconds = summary.seconds.max(1);
    let mut line = format!(
        "last {seconds} s: {}/s, {} flows/s, {} dropped",
        bytes(summary.all.bytes / seconds),
        summary.all.flows / seconds,
        summary.all.drops
    );
    if summary.lost > 0 {
        line += &format!(", {} records lost", summary.lost);
    }
    if !summary.away.is_empty() {
        line += &format!("; without {}", escape(&summary.away.join(", ")));
    }
    line
}

/// Who, and whom with its port.
pub fn pair(pair: &Pair) -> [String; 2] {
    let to = match (pair.port, pair.protocol.as_str()) {
        (0, "") => pair.destination.clone(),
        (0, protocol) => format!("{} {protocol}", pair.destination),
        (port, protocol) => format!("{}:{port} {protocol}", pair.destination),
    };
    [pair.source.clone(), to]
}

/// `1.2 MB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64 / 1000.0;
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::{Drop, Row as Counted, Talker};
    use super::*;

    fn drawn(summary: &Summary, view: &View) -> String {
        let mut terminal = Terminal::new(TestBackend::new(120, 24)).expect("a screen in memory");
        terminal.draw(|frame| draw(frame, summary, view)).expect("drawing");
        terminal.backend().to_string()
    }

    #[test]
    fn the_screen_shows_talkers_pairs_and_drops_and_commands_nothing() {
        let numbers = Numbers { flows: 30, bytes: 45_000_000, packets: 9, drops: 2 };
        let evil = "shop/x\x1b]0;owned\x07\u{202e}".to_owned();
        let pair = Pair {
            source: evil.clone(),
            destination: "shop/db".to_owned(),
            port: 5432,
            protocol: "TCP".to_owned(),
        };
        let drop =
            Drop { reason: "Policy denied".to_owned(), direction: "ingress".to_owned(), pair: pair.clone() };
        let summary = Summary {
            seconds: 15,
            all: numbers,
            lost: 3,
            away: vec![evil.clone()],
            talkers: vec![Counted { of: Talker { name: evil }, numbers }],
            pairs: vec![Counted { of: pair, numbers }],
            drops: vec![Counted { of: drop, numbers }],
        };
        let screen = drawn(&summary, &View::default());
        for text in
            ["last 15 s: 3.0 MB/s, 2 flows/s, 2 dropped, 3 records lost", "shop/db:5432 TCP", "Policy denied"]
        {
            assert!(screen.contains(text), "{text} is not in\n{screen}");
        }
        assert!(screen.chars().all(|letter| letter == '\n' || !letter.is_control()), "{screen}");
        assert!(!screen.contains('\u{202e}'));
        let json = serde_json::to_value(&summary).expect("JSON");
        assert_eq!(json["pairs"][0]["port"], 5432);
        assert_eq!(json["drops"][0]["destination"], "shop/db");
    }

    #[test]
    fn keys_choose_and_quit() {
        let mut view = View::default();
        assert_eq!(view.press(KeyCode::Char('s')), Pressed::Nothing);
        assert_eq!((view.sort, view.press(KeyCode::Char('b'))), (Sort::Flows, Pressed::By));
        assert_eq!(view.press(KeyCode::Char('p')), Pressed::Nothing);
        assert!(view.is_paused && drawn(&Summary::default(), &view).contains("paused"));
        assert_eq!(view.press(KeyCode::Char('q')), Pressed::Quit);
        assert_eq!([999, 1000, 1_234_567].map(bytes), ["999 B", "1.0 kB", "1.2 MB"]);
    }
}
