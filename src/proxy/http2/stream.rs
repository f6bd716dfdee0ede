//! One stream of HTTP/2: judged, and passed on with its body, its trailers and its resets.

use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};

use crate::model::l7::{HttpMessage, L7Message, RecordKind};
use crate::proxy::http::{Edit, Request as Asked, message};
use crate::proxy::http1::{Denied, Grants, ask};
use crate::proxy::session::{Entry, Session};

use super::Connection;

/// PERMISSION_DENIED and UNAVAILABLE of gRPC.
const PERMISSION_DENIED: u16 = 7;
const UNAVAILABLE: u16 = 14;

/// Serves a stream until both of its directions have ended.
pub async fn serve(connection: &Connection, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let mut session = Session::clone(&connection.session);
    if session.refresh().is_err() {
        return respond.send_reset(Reason::REFUSED_STREAM);
    }
    let began = Instant::now();
    let (mut parts, body) = request.into_parts();
    let is_grpc = is_grpc(&parts.headers);
    let (said, judged) = match judge(&session, &parts) {
        Ok(judged) => judged,
        Err(why) => {
            session.record(Entry::error(L7Message::Unknown, why));
            return refuse(&mut respond, StatusCode::BAD_REQUEST, None);
        }
    };
    let grants = match judged {
        Ok(grants) => grants,
        Err(denied) => {
            let (status, grpc) = if is_grpc { (200, Some(PERMISSION_DENIED)) } else { (403, None) };
            let said = HttpMessage { status: Some(status), grpc_status: grpc, ..said };
            session.record(Entry::denied(L7Message::Http(said), denied.by, denied.note));
            return refuse(&mut respond, StatusCode::FORBIDDEN, is_grpc.then_some(PERMISSION_DENIED));
        }
    };
    session.record(Entry { note: grants.note, ..Entry::request(L7Message::Http(said.clone())) });
    edit(&mut parts.headers, &grants.edits);
    let request = Request::from_parts(parts, ());
    let answer = Answer { session: &session, said, began, is_grpc };
    let Err(why) = pass(connection, request, body, &mut respond, &answer).await else { return };
    answer.failed(why);
    refuse(&mut respond, StatusCode::SERVICE_UNAVAILABLE, is_grpc.then_some(UNAVAILABLE));
}

type Judged = (HttpMessage, Result<Grants, Denied>);

/// What the rules say; `Err`: the request could be read in two ways.
fn judge(session: &Session, parts: &http::request::Parts) -> Result<Judged, &'static str> {
    let authority = parts.uri.authority().map(http::uri::Authority::as_str);
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next().map(HeaderValue::as_bytes);
    if hosts.next().is_some() {
        return Err("several Host headers");
    }
    if let (Some(authority), Some(host)) = (authority, host)
        && !authority.as_bytes().eq_ignore_ascii_case(host)
    {
        return Err("another host than :authority");
    }
    if parts.method == Method::CONNECT {
        return Err("CONNECT over HTTP/2");
    }
    let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    if !(path.starts_with('/') || path == "*" && parts.method == Method::OPTIONS) {
        return Err("a target that is no path");
    }
    let headers: Vec<(&[u8], &[u8])> =
        parts.headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())).collect();
    if headers.len() > 100 {
        return Err("too many headers");
    }
    let host = authority.map(str::as_bytes).or(host).unwrap_or_default();
    let request =
        Asked { method: parts.method.as_str().as_bytes(), path: path.as_bytes(), host, headers: &headers };
    Ok((message("HTTP/2", &request), ask(session, &request)))
}

fn edit(headers: &mut HeaderMap, edits: &[Edit]) {
    for edit in edits {
        match edit {
            Edit::Add(name, value) => {
                // The rule was checked: both are of the form that headers have.
                if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                    headers.append(name, value);
                }
            }
            Edit::Delete(name) => drop(headers.remove(name.as_str())),
        }
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.is_some_and(|kind| kind.starts_with(b"application/grpc"))
}

/// The proxy's own answer; of gRPC the status is in the headers, and nothing follows.
fn refuse(respond: &mut SendResponse<Bytes>, status: StatusCode, grpc: Option<u16>) {
    let mut response = Response::new(());
    *response.status_mut() = if grpc.is_some() { StatusCode::OK } else { status };
    let headers = response.headers_mut();
    let body = if grpc.is_some() { "" } else { "Access denied\r\n" };
    if let Some(code) = grpc {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(code));
        let text = if code == PERMISSION_DENIED { "Access denied" } else { "The server cannot be reached" };
        headers.insert("grpc-message", HeaderValue::from_static(text));
    } else {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    }
    // The client may have reset the stream.
    if let Ok(mut stream) = respond.send_response(response, body.is_empty())
        && !body.is_empty()
    {
        let _ = stream.send_data(Bytes::from_static(body.as_bytes()), true);
    }
    // What the client still sends of its body is refused when the body is dropped.
}

/// What the record of the answer needs.
struct Answer<'a> {
    session: &'a Session,
    said: HttpMessage,
    began: Instant,
    is_grpc: bool,
}

impl Answer<'_> {
    fn came(&self, status: u16, grpc_status: Option<u16>, latency: Duration) {
        let said = HttpMessage { status: Some(status), grpc_status, ..self.said.clone() };
        self.session.record(Entry::answer(L7Message::Http(said), latency));
    }

    fn failed(&self, why: String) {
        let said = HttpMessage { status: Some(503), ..self.said.clone() };
        let entry = Entry::error(L7Message::Http(said), why);
        let latency = Some(self.began.elapsed());
        self.session.record(Entry { kind: RecordKind::Response, latency, ..entry });
    }
}

/// Passes the request on and its answer back; `Err`: there was no answer.
async fn pass(
    connection: &Connection,
    request: Request<()>,
    body: RecvStream,
    respond: &mut SendResponse<Bytes>,
    answer: &Answer<'_>,
) -> Result<(), String> {
    let server = connection.server().await.map_err(|why| format!("connecting to the server: {why}"))?;
    let silence = connection.session.shared.limits.silence;
    let ready = tokio::time::timeout(silence, server.ready()).await.map_err(|_| SILENT.to_owned())?;
    let mut server = ready.map_err(|error| {
        // The next stream needs another connection, which the client must make.
        connection.broken.notify_one();
        error.to_string()
    })?;
    let is_whole = body.is_end_stream();
    let (response, to_server) = server.send_request(request, is_whole).map_err(|error| error.to_string())?;
    drop(server);
    let up = async {
        if !is_whole {
            pump(body, to_server, silence).await;
        }
    };
    let down = async {
        let response = tokio::select! {
            response = response => response.map_err(|error| error.to_string())?,
            reason = std::future::poll_fn(|cx| respond.poll_reset(cx)) => {
                return Err(format!("the client gave up: {reason:?}"));
            }
            () = tokio::time::sleep(silence) => return Err(SILENT.to_owned()),
        };
        let latency = answer.began.elapsed();
        let (parts, body) = response.into_parts();
        let (status, grpc_status) = (parts.status.as_u16(), grpc_status(&parts.headers));
        let is_whole = body.is_end_stream();
        let sent = respond.send_response(Response::from_parts(parts, ()), is_whole);
        let trailer = match sent {
            Ok(to_client) if !is_whole => pump(body, to_client, silence).await,
            _ => None,
        };
        let grpc_status = grpc_status.or(trailer).filter(|_| answer.is_grpc);
        answer.came(status, grpc_status, latency);
        Ok(())
    };
    tokio::pin!(up, down);
    // An answer may be whole before the request is; then what is left of the request goes on.
    tokio::select! {
        outcome = &mut down => { outcome?; }
        () = &mut up => return down.await,
    }
    up.await;
    Ok(())
}

fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// A stream on which nothing moves ends.
const SILENT: &str = "the server was silent for too long";

/// Passes a body on with its trailers, at the pace of who receives it; gives the status of gRPC in them. Ends the
/// stream where nothing moves for the time of `silence`.
async fn pump(mut from: RecvStream, mut to: SendStream<Bytes>, silence: Duration) -> Option<u16> {
    loop {
        let data = tokio::select! {
            data = from.data() => data,
            // Who receives it wants no more: who sends it hears so when `from` is dropped.
            _ = std::future::poll_fn(|cx| to.poll_reset(cx)) => return None,
            () = tokio::time::sleep(silence) => {
                to.send_reset(Reason::CANCEL);
                return None;
            }
        };
        match data {
            Some(Ok(data)) => {
                let length = data.len();
                match tokio::time::timeout(silence, send(&mut to, data)).await {
                    Ok(sent) => sent?,
                    Err(_) => {
                        to.send_reset(Reason::CANCEL);
                        return None;
                    }
                }
                // It fails for a stream that is over.
                let _ = from.flow_control().release_capacity(length);
            }
            Some(Err(error)) => {
                to.send_reset(error.reason().unwrap_or(Reason::CANCEL));
                return None;
            }
            None => break,
        }
    }
    match from.trailers().await {
        Ok(Some(trailers)) => {
            let status = grpc_status(&trailers);
            to.send_trailers(trailers).ok()?;
            status
        }
        Ok(None) => {
            // It fails for a stream that is over.
            let _ = to.send_data(Bytes::new(), true);
            None
        }
        Err(error) => {
            to.send_reset(error.reason().unwrap_or(Reason::CANCEL));
            None
        }
    }
}

/// Sends as much at a time as there is room for; `None`: the stream is over.
async fn send(to: &mut SendStream<Bytes>, mut data: Bytes) -> Option<()> {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        let room = std::future::poll_fn(|cx| to.poll_capacity(cx)).await?.ok()?;
        let part = data.split_to(room.min(data.len()));
        to.send_data(part, false).ok()?;
    }
    Some(())
}
