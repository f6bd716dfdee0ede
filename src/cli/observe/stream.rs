//! Flows by Hubble's API, or from a file, as they are printed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, anyhow};
use tonic::transport::Channel;

use super::{Colour, FlowFormat, From, ObserveArgs};
use crate::cli::cluster::observe::{Wanted, run as observe_cluster};
use crate::cli::{Connection, Failure, cluster, output};
use crate::flow::Colours;
use crate::hubble::args::socket_beside;
use crate::hubble::client::{ANSWER_BYTES_MAX, connect, connect_socket};
use crate::hubble::filter::Filters;
use crate::hubble::json;
use crate::hubble::mask::Mask;
use crate::hubble::proto::flow::Flow;
use crate::hubble::proto::observer::get_flows_response::ResponseTypes;
use crate::hubble::proto::observer::observer_client::ObserverClient;
use crate::hubble::proto::observer::{GetFlowsRequest, GetFlowsResponse};
use crate::hubble::proto::{time, timestamp};
use crate::hubble::text::{HEADS, Style, compact, dict, other, row};

const DEFAULT_LAST: u64 = 20;
/// Longer lines are no flow.
const LINE_BYTES_MAX: usize = 1024 * 1024;

/// Shows what is asked for.
pub fn run(args: &ObserveArgs) -> Result<(), Failure> {
    let mut printer = Printer::new(args);
    match &args.input_file {
        Some(path) => from_file(args, path, &mut printer)?,
        None => {
            let runtime = cluster::runtime()?;
            let outcome = match args.from.cluster {
                true => runtime.block_on(from_cluster(args, &mut printer)),
                false => runtime.block_on(from_server(args, &mut printer)),
            };
            runtime.shutdown_background();
            // What came is shown, also where nodes are missing.
            if let Err(error) = outcome {
                printer.end()?;
                return Err(error);
            }
        }
    }
    printer.end()
}

/// The filters as the stock command line prints them.
pub fn print_filters(args: &ObserveArgs) -> Result<(), Failure> {
    let lists = args.filter.ask().map_err(|error| anyhow!(error))?.lists();
    let mut out = io::stdout().lock();
    for (name, list) in ["allowlist", "denylist"].into_iter().zip(lists).filter(|(_, list)| !list.is_empty())
    {
        writeln!(out, "{name}:")?;
        list.iter().try_for_each(|filter| writeln!(out, "    - '{}'", json::to_string(filter)))?;
    }
    Ok(())
}

fn request(args: &ObserveArgs) -> Result<GetFlowsRequest, Failure> {
    let [whitelist, blacklist] = args.filter.ask().map_err(|error| anyhow!(error))?.lists();
    let is_bounded = args.since.is_some() || args.until.is_some();
    let number = match (args.first.or(args.last), args.all || is_bounded) {
        (Some(number), _) => number,
        (None, true) => u64::MAX,
        (None, false) if args.follow => 0,
        (None, false) => DEFAULT_LAST,
    };
    let paths = args.field_mask.clone();
    Ok(GetFlowsRequest {
        number,
        first: args.first.is_some(),
        follow: args.follow,
        whitelist,
        blacklist,
        since: args.since.map(timestamp),
        until: args.until.map(timestamp),
        field_mask: (!paths.is_empty()).then_some(prost_types::FieldMask { paths }),
        ..GetFlowsRequest::default()
    })
}

/// The server that is asked.
pub async fn channel(from: &From) -> Result<Channel, Failure> {
    let Some(server) = &from.server else { return node_channel(&from.connection).await };
    if let Some(path) = server.strip_prefix("unix:") {
        return Ok(connect_socket(Path::new(path.trim_start_matches("//"))).await?);
    }
    let identity = from.identity()?;
    let server = server.strip_prefix("tls://").unwrap_or(server);
    Ok(connect(server, identity.as_ref(), from.tls_server_name.as_deref()).await?)
}

async fn from_server(args: &ObserveArgs, printer: &mut Printer<'_>) -> Result<(), Failure> {
    let request = request(args)?;
    let mut client =
        ObserverClient::new(channel(&args.from).await?).max_decoding_message_size(ANSWER_BYTES_MAX);
    let refused = |status: tonic::Status| Failure::Other(anyhow!("{}", status.message().to_owned()));
    let mut answers = client.get_flows(request).await.map_err(refused)?.into_inner();
    while let Some(answer) = answers.message().await.map_err(refused)? {
        printer.show(&answer)?;
        if args.follow {
            printer.out.flush()?;
        }
    }
    Ok(())
}

/// Calls `each` for every flow that this node's agent answers a request with.
pub fn flows_of(
    connection: &Connection,
    request: GetFlowsRequest,
    mut each: impl FnMut(&Flow),
) -> Result<(), Failure> {
    let refused = |status: tonic::Status| Failure::Other(anyhow!("{}", status.message().to_owned()));
    let runtime = cluster::runtime()?;
    runtime.block_on(async {
        let channel = node_channel(connection).await?;
        let mut client = ObserverClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        let mut answers = client.get_flows(request).await.map_err(refused)?.into_inner();
        while let Some(answer) = answers.message().await.map_err(refused)? {
            if let Some(ResponseTypes::Flow(flow)) = &answer.response_types {
                each(flow);
            }
        }
        Ok(())
    })
}

/// This node's agent.
async fn node_channel(connection: &Connection) -> Result<Channel, Failure> {
    let socket = socket_beside(&connection.socket);
    let connected = connect_socket(&socket).await;
    Ok(connected.with_context(|| format!("does the agent run? asking at {}", socket.display()))?)
}

async fn from_cluster(args: &ObserveArgs, printer: &mut Printer<'_>) -> Result<(), Failure> {
    let last = match args.all || args.follow {
        true => args.last,
        false => args.last.or(Some(DEFAULT_LAST)),
    };
    let wanted = Wanted::typed(std::env::args(), args.follow, last);
    observe_cluster(&args.from.of, wanted, |answer| {
        printer.show(answer)?;
        if args.follow { Ok(printer.out.flush()?) } else { Ok(()) }
    })
    .await
}

/// Flows of a file, filtered here. Lines are GetFlowsResponse, or Flow alone.
fn from_file(args: &ObserveArgs, path: &Path, printer: &mut Printer<'_>) -> Result<(), Failure> {
    let request = request(args)?;
    let filters = Filters::new(&request.whitelist, &request.blacklist).map_err(anyhow::Error::from)?;
    let mask = Mask::new(&args.field_mask).map_err(anyhow::Error::from)?;
    let mut reader: Box<dyn BufRead> = match path.to_str() {
        Some("-") => Box::new(io::stdin().lock()),
        _ => {
            Box::new(BufReader::new(File::open(path).with_context(|| format!("opening {}", path.display()))?))
        }
    };
    let mut newest = VecDeque::new();
    let mut shown = 0;
    let mut line = String::new();
    for number in 1.. {
        line.clear();
        if io::Read::take(&mut reader, LINE_BYTES_MAX as u64).read_line(&mut line)? == 0 {
            break;
        }
        if line.trim().is_empty() {
            continue;
        }
        let mut answer = parse(&line).with_context(|| format!("line {number} of {}", path.display()))?;
        if let Some(ResponseTypes::Flow(flow)) = &mut answer.response_types {
            let at = flow.time.as_ref().and_then(time);
            let is_in_time = args.since.is_none_or(|since| at >= Some(since))
                && args.until.is_none_or(|until| at.is_some_and(|at| at <= until));
            if !is_in_time || !filters.matches(flow) {
                continue;
            }
            *flow = mask.apply(std::mem::take(flow));
        }
        match (args.first, args.last) {
            (Some(first), _) if shown == first => break,
            (_, Some(last)) => {
                newest.push_back(answer);
                if newest.len() as u64 > last {
                    newest.pop_front();
                }
            }
            _ => printer.show(&answer)?,
        }
        shown += 1;
    }
    newest.iter().try_for_each(|answer| printer.show(answer))
}

fn parse(line: &str) -> Result<GetFlowsResponse, anyhow::Error> {
    let answer: GetFlowsResponse = json::from_str(line)?;
    if answer.response_types.is_some() {
        return Ok(answer);
    }
    let flow: Flow = json::from_str(line)?;
    let (node_name, time) = (flow.node_name.clone(), flow.time);
    Ok(GetFlowsResponse { response_types: Some(ResponseTypes::Flow(flow)), node_name, time })
}

/// Prints answers in the form that was asked for.
struct Printer<'a> {
    args: &'a ObserveArgs,
    style: Style,
    out: io::BufWriter<io::StdoutLock<'static>>,
    rows: Vec<[String; 7]>,
}

impl<'a> Printer<'a> {
    fn new(args: &'a ObserveArgs) -> Self {
        let style = Style {
            colours: match args.color {
                Colour::Auto => output::colours(),
                Colour::Always => Colours::On,
                Colour::Never => Colours::Off,
            },
            time: args.time_format,
            node: args.print_node_name,
            policies: args.print_policy_names,
            numeric: args.numeric || !args.ip_translation,
        };
        Self { args, style, out: io::BufWriter::new(io::stdout().lock()), rows: Vec::new() }
    }

    fn show(&mut self, answer: &GetFlowsResponse) -> Result<(), Failure> {
        let is_flow = matches!(answer.response_types, Some(ResponseTypes::Flow(_)));
        match self.args.output {
            FlowFormat::Json => writeln!(self.out, "{}", json::to_string(answer))?,
            // What is no flow is said aside: whoever counts lines counts flows.
            _ if !is_flow => eprintln!("{}", other(answer)),
            FlowFormat::Compact => writeln!(self.out, "{}", compact(answer, self.style))?,
            FlowFormat::Dict => writeln!(self.out, "{}", dict(answer, self.style))?,
            FlowFormat::Table if self.args.follow => {
                writeln!(self.out, "{}", row(answer, self.style).unwrap_or_default().join("   "))?;
            }
            FlowFormat::Table => self.rows.extend(row(answer, self.style)),
        }
        Ok(())
    }

    /// A table's columns are as wide as their widest cell.
    fn end(mut self) -> Result<(), Failure> {
        if self.args.output == FlowFormat::Table && !self.args.follow {
            let head = HEADS.map(str::to_owned);
            let mut widths = [0; 7];
            for cells in std::iter::once(&head).chain(&self.rows) {
                for (width, cell) in widths.iter_mut().zip(cells) {
                    *width = (*width).max(cell.chars().count());
                }
            }
            for cells in std::iter::once(&head).chain(&self.rows) {
                let shown = cells.iter().zip(widths).enumerate();
                let shown = shown.filter(|(column, _)| self.style.node || *column != 1);
                let line: Vec<String> = shown.map(|(_, (cell, width))| format!("{cell:width$}")).collect();
                writeln!(self.out, "{}", line.join("   ").trim_end())?;
            }
        }
        Ok(self.out.flush()?)
    }
}
