//! `weir top`: who talks the most, to whom, and what is dropped, now.

mod model;
mod screen;

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use jiff::Timestamp;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use super::cluster::{self, observe::Wanted};
use super::observe::{FilterArgs, From, channel};
use super::{Failure, table};
use crate::hubble::client::ANSWER_BYTES_MAX;
use crate::hubble::json;
use crate::hubble::proto::observer::observer_client::ObserverClient;
use crate::hubble::proto::observer::{GetFlowsRequest, GetFlowsResponse};
use crate::hubble::proto::timestamp;
use model::{By, Model, Numbers, Sort, Summary};

/// Answers that wait to be counted; a screen that is slow slows the servers' answers down, not the servers.
const WAITING_MAX: usize = 4096;
/// The screen is drawn so often.
const DRAW_EVERY: Duration = Duration::from_millis(500);
/// Answers that are counted between two looks at the keys.
const TURN: usize = 2048;

#[derive(Args)]
pub struct TopArgs {
    #[command(flatten)]
    from: From,
    /// Sum up the last so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
    window: u64,
    /// Who the two sides are.
    #[arg(long, value_enum, default_value = "pod")]
    by: By,
    /// What is shown first.
    #[arg(long, value_enum, default_value = "bytes")]
    sort: Sort,
    /// Print it once, for scripts: what the last seconds came to, from the history.
    #[arg(long)]
    once: bool,
    /// Form of what --once prints.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Form,
    /// Rows of each table that --once prints.
    #[arg(long, value_name = "N", default_value_t = 20)]
    rows: usize,
    #[command(flatten)]
    filter: FilterArgs,
}

/// Form of what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// Aligned columns.
    Table,
    /// One JSON object.
    Json,
}

/// What the reader of flows has to say.
enum News {
    Answer(Box<GetFlowsResponse>),
    End(Result<(), Failure>),
}

pub fn run(args: &TopArgs) -> Result<(), Failure> {
    if !args.once && !io::stdout().is_terminal() {
        return Err(anyhow!("this is no terminal: --once prints it once").into());
    }
    let runtime = cluster::runtime()?;
    let (news, received) = sync_channel(WAITING_MAX);
    let request = request(args)?;
    let (from, follow) = (args.from.clone(), !args.once);
    let window = args.window;
    runtime.spawn(async move {
        let show = |answer: &GetFlowsResponse| {
            let answer = News::Answer(Box::new(answer.clone()));
            let sending = tokio::task::block_in_place(|| news.send(answer));
            sending.map_err(|_| anyhow!("nobody looks any more").into())
        };
        let ended = match from.cluster {
            true => from_cluster(&from, &request, follow, window, show).await,
            false => from_server(&from, request, show).await,
        };
        let _nobody_looks = tokio::task::block_in_place(|| news.send(News::End(ended)));
    });
    let model = Model::new(args.by, Duration::from_secs(args.window));
    let outcome = if args.once { once(args, model, &received) } else { live(args, model, &received) };
    runtime.shutdown_background();
    outcome
}

/// The window's flows, and then those that come.
fn request(args: &TopArgs) -> Result<GetFlowsRequest, Failure> {
    let [whitelist, blacklist] = args.filter.ask().map_err(|error| anyhow!(error))?.lists();
    let since = Timestamp::now().checked_sub(jiff::SignedDuration::from_secs(args.window as i64));
    Ok(GetFlowsRequest {
        number: u64::MAX,
        follow: !args.once,
        since: since.ok().map(timestamp),
        whitelist,
        blacklist,
        ..GetFlowsRequest::default()
    })
}

async fn from_server(
    from: &From,
    request: GetFlowsRequest,
    mut show: impl FnMut(&GetFlowsResponse) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let refused = |status: tonic::Status| Failure::Other(anyhow!("{}", status.message().to_owned()));
    let mut client = ObserverClient::new(channel(from).await?).max_decoding_message_size(ANSWER_BYTES_MAX);
    let mut answers = client.get_flows(request).await.map_err(refused)?.into_inner();
    while let Some(answer) = answers.message().await.map_err(refused)? {
        show(&answer)?;
    }
    Ok(())
}

async fn from_cluster(
    from: &From,
    request: &GetFlowsRequest,
    follow: bool,
    window: u64,
    show: impl FnMut(&GetFlowsResponse) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut arguments = ["observe", "--output", "json", "--all", "--since"].map(str::to_owned).to_vec();
    arguments.push(format!("{window}s"));
    arguments.extend(follow.then(|| "--follow".to_owned()));
    for (flag, list) in [("--allowlist", &request.whitelist), ("--denylist", &request.blacklist)] {
        arguments.extend(list.iter().flat_map(|filter| [flag.to_owned(), json::to_string(filter)]));
    }
    cluster::observe::run(&from.of, Wanted { arguments, follow, last: None }, show).await
}

fn once(args: &TopArgs, mut model: Model, received: &Receiver<News>) -> Result<(), Failure> {
    let mut outcome = Ok(());
    for news in received {
        match news {
            News::Answer(answer) => model.add(&answer),
            News::End(ended) => {
                outcome = ended;
                break;
            }
        }
    }
    let mut summary = model.summary(Timestamp::now(), args.sort);
    summary.talkers.truncate(args.rows);
    summary.pairs.truncate(args.rows);
    summary.drops.truncate(args.rows);
    let mut out = io::stdout().lock();
    match args.output {
        Form::Json => super::output::write_json(&mut out, &summary)?,
        Form::Table => print(&mut out, &summary)?,
    }
    out.flush()?;
    outcome
}

fn print(out: &mut impl Write, summary: &Summary) -> io::Result<()> {
    writeln!(out, "{}", screen::headline(summary))?;
    let talkers = summary.talkers.iter().map(|it| {
        let Numbers { flows, drops, .. } = it.numbers;
        [it.of.name.clone(), screen::bytes(it.numbers.bytes), flows.to_string(), drops.to_string()]
    });
    let pairs = summary.pairs.iter().map(|it| {
        let Numbers { flows, drops, .. } = it.numbers;
        let [from, to] = screen::pair(&it.of);
        [from, to, screen::bytes(it.numbers.bytes), flows.to_string(), drops.to_string()]
    });
    let drops = summary.drops.iter().map(|it| {
        let [from, to] = screen::pair(&it.of.pair);
        [it.of.reason.clone(), it.of.direction.clone(), from, to, it.numbers.drops.to_string()]
    });
    writeln!(out)?;
    table::write(out, ["TALKER", "BYTES", "FLOWS", "DROPS"], &talkers.collect::<Vec<_>>())?;
    writeln!(out)?;
    let heads = ["SOURCE", "DESTINATION", "BYTES", "FLOWS", "DROPS"];
    table::write(out, heads, &pairs.collect::<Vec<_>>())?;
    writeln!(out)?;
    let heads = ["DROPPED BECAUSE", "WAY", "SOURCE", "DESTINATION", "PACKETS"];
    table::write(out, heads, &drops.collect::<Vec<_>>())
}

/// Until q.
fn live(args: &TopArgs, mut model: Model, received: &Receiver<News>) -> Result<(), Failure> {
    let mut terminal = ratatui::try_init()?;
    let mut view = screen::View { sort: args.sort, ..screen::View::default() };
    let mut shown = Summary::default();
    let mut ended = None;
    let mut drawn = None::<Instant>;
    let outcome = loop {
        if let Err(error) = take(received, &mut model, &mut ended) {
            break Err(error);
        }
        if drawn.is_none_or(|at| at.elapsed() >= DRAW_EVERY) {
            if !view.is_paused {
                shown = model.summary(Timestamp::now(), view.sort);
            }
            view.by = model.by();
            if let Err(error) = terminal.draw(|frame| screen::draw(frame, &shown, &view)) {
                break Err(error.into());
            }
            drawn = Some(Instant::now());
        }
        match key() {
            Err(error) => break Err(error.into()),
            Ok(None) => continue,
            Ok(Some(key)) => match view.press(key) {
                screen::Pressed::Quit => break Ok(()),
                screen::Pressed::By => model.set_by(view.next_by()),
                screen::Pressed::Nothing => {}
            },
        }
        drawn = None;
    };
    ratatui::restore();
    outcome
}

/// Counts what has come; an end that is an error ends it all.
fn take(received: &Receiver<News>, model: &mut Model, ended: &mut Option<()>) -> Result<(), Failure> {
    for _ in 0..TURN {
        match received.recv_timeout(Duration::ZERO) {
            Ok(News::Answer(answer)) => model.add(&answer),
            Ok(News::End(Err(error))) => return Err(error),
            Ok(News::End(Ok(()))) => *ended = Some(()),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    match ended {
        Some(()) => Err(anyhow!("the server has ended the stream of flows").into()),
        None => Ok(()),
    }
}

/// The next key, if one comes soon.
fn key() -> io::Result<Option<KeyCode>> {
    if !event::poll(Duration::from_millis(50))? {
        return Ok(None);
    }
    Ok(match event::read()? {
        Event::Key(key) if key.kind != KeyEventKind::Press => None,
        Event::Key(key)
            if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') =>
        {
            Some(KeyCode::Char('q'))
        }
        Event::Key(key) => Some(key.code),
        _ => None,
    })
}
