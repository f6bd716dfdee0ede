//! `GET /api/flows`: flows as server-sent events, asked for by the flags of `weir observe`.

use std::convert::Infallible;
use std::fmt::Write;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::{Page, refuse};
use crate::hubble::ask::Ask;
use crate::hubble::json;
use crate::hubble::proto::observer::{GetFlowsRequest, GetFlowsResponse};
use crate::hubble::proto::timestamp;
use crate::hubble::service::Answers;

/// A silent stream says so often that it lives.
const ALIVE: Duration = Duration::from_secs(10);
/// Answers that are sent at once.
const BATCH: usize = 256;
/// Flows that are asked for at most.
const NUMBER_MAX: u64 = 100_000;

/// Answers a page.
pub(super) async fn flows(
    State(page): State<Page>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let cursor = headers.get("last-event-id").and_then(|value| value.to_str().ok());
    let request = match request(query.as_deref().unwrap_or_default(), cursor) {
        Ok(request) => request,
        Err(words) => return refuse(StatusCode::BAD_REQUEST, words),
    };
    let Ok(slot) = page.streams.clone().try_acquire_owned() else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "too many pages follow flows");
    };
    let answers = match page.flows.flows(request) {
        Ok(answers) => answers,
        Err(status) if status.code() == tonic::Code::InvalidArgument => {
            return refuse(StatusCode::BAD_REQUEST, status.message());
        }
        Err(status) => return refuse(StatusCode::SERVICE_UNAVAILABLE, status.message()),
    };
    let head = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (head, Body::from_stream(events(answers, slot))).into_response()
}

/// Answers as events, as many at once as are there.
fn events(
    answers: Answers<GetFlowsResponse>,
    slot: OwnedSemaphorePermit,
) -> impl futures::Stream<Item = Result<Bytes, Infallible>> {
    let first = stream::once(async { Ok(Bytes::from_static(b"retry: 2000\n\n")) });
    let state = (answers.ready_chunks(BATCH), false, slot);
    first.chain(stream::unfold(state, async |(mut chunks, is_over, slot)| {
        if is_over {
            return None;
        }
        let mut text = String::new();
        let is_over = match timeout(ALIVE, chunks.next()).await {
            Err(_) => {
                text.push_str(": alive\n\n");
                false
            }
            Ok(None) => {
                // A browser would ask again for what has ended: this tells the page not to.
                text.push_str("event: end\ndata: {}\n\n");
                true
            }
            Ok(Some(chunk)) => chunk.into_iter().any(|answer| !write(&mut text, answer)),
        };
        Some((Ok(Bytes::from(text)), (chunks, is_over, slot)))
    }))
}

/// Writes one event; false where the stream has failed.
fn write(text: &mut String, answer: Result<GetFlowsResponse, tonic::Status>) -> bool {
    match answer {
        Ok(answer) => {
            let id = answer
                .time
                .as_ref()
                .map_or(0, |time| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos));
            let _infallible = write!(text, "id: {id}\ndata: {}\n\n", json::to_string(&answer));
            true
        }
        Err(status) => {
            let words = serde_json::json!({"error": status.message()});
            let _infallible = write!(text, "event: failed\ndata: {words}\n\n");
            false
        }
    }
}

/// The request that a query stands for. `not.FLAG` leaves out what FLAG matches.
fn request(query: &str, cursor: Option<&str>) -> Result<GetFlowsRequest, String> {
    let mut request = GetFlowsRequest { number: 100, ..GetFlowsRequest::default() };
    let mut ask = Ask::default();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (decode(name)?, decode(value)?);
        match name.as_str() {
            "last" | "first" => {
                request.number = value.parse().map_err(|_| format!("{name}: {value:?} is no number"))?;
                request.number = request.number.min(NUMBER_MAX);
                request.first = name == "first";
            }
            "follow" => request.follow = matches!(value.as_str(), "" | "1" | "true"),
            "since" => request.since = Some(timestamp(moment(&value)?)),
            "until" => request.until = Some(timestamp(moment(&value)?)),
            name => match name.strip_prefix("not.") {
                Some(name) => ask.add(name, &value, true)?,
                None => ask.add(name, &value, false)?,
            },
        }
    }
    // A page that lost its connection goes on behind what it has seen.
    if let Some(cursor) = cursor.and_then(|cursor| cursor.parse::<i128>().ok())
        && let Ok(time) = Timestamp::from_nanosecond(cursor + 1)
    {
        request.since = Some(timestamp(time));
    }
    [request.whitelist, request.blacklist] = ask.lists();
    Ok(request)
}

/// A time, or how long ago, as 5m.
pub fn moment(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let ago: SignedDuration = text.parse().map_err(|_| {
        format!("{text:?} is no time as 2026-01-31T12:00:00Z, nor a duration as 90s, 5m, 1h30m")
    })?;
    Timestamp::now().checked_sub(ago).map_err(|error| error.to_string())
}

/// `%41+b` as a form has it.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let pair = [rest.next(), rest.next()].map(|digit| digit.map(char::from));
                let digits = pair.map(|digit| digit.and_then(|digit| digit.to_digit(16)));
                match digits {
                    [Some(high), Some(low)] => (high * 16 + low) as u8,
                    _ => return Err(format!("{text:?} is not encoded as an URL is")),
                }
            }
            other => other,
        });
    }
    String::from_utf8(bytes).map_err(|_| format!("{text:?} is not text"))
}
