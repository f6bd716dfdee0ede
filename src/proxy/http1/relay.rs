//! One connection of HTTP/1: requests are judged and passed on, answers are passed back, refusals stand in order.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep_until};

use crate::model::l7::{HttpMessage, L7Message, RecordKind};
use crate::proxy::session::{Entry, Session};
use crate::proxy::upstream;

use super::answer::{Asked, answer_head};
use super::body::{Body, Framing};
use super::buffer::Buffer;
use super::head::{HEAD_MAX, Refusal, end_of_head, with_head};
use super::judge::{Question, edited, judge};

/// The most requests that wait for their answers.
const OUTSTANDING_MAX: usize = 64;
/// A refused request's body is read up to this length; the connection goes on behind it.
const REFUSED_BODY_MAX: u64 = 64 << 10;
/// How long a client may take to hear the last answer and close.
const LINGER: Duration = Duration::from_secs(1);
/// How an HTTP/2 connection begins.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

type Connecting = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

/// How a connection ended.
pub enum Outcome {
    /// It is over.
    Done,
    /// The client speaks HTTP/2: these are its first bytes.
    Http2(Box<Session>, TcpStream, Vec<u8>),
}

/// A connection of HTTP/1.
pub struct Relay {
    /// `None` only after it was handed on.
    session: Option<Session>,
    client: Option<TcpStream>,
    server: Server,
    up: Buffer,
    down: Buffer,
    request: Requests,
    answer: Answers,
    outstanding: VecDeque<Outstanding>,
    timer: Pin<Box<Sleep>>,
    /// When something last went on.
    moved: Instant,
    /// When the head began that is not whole yet.
    head_began: Option<Instant>,
    is_server_told_end: bool,
    is_client_told_end: bool,
    is_first: bool,
    /// The server is connected to before the client has spoken: it may be the server that speaks first.
    is_eager: bool,
}

enum Server {
    None,
    Connecting(Connecting),
    Connected(TcpStream),
    Gone,
}

/// Where the client's bytes are.
enum Requests {
    /// At a head; how much of it was looked at.
    Head(usize),
    /// Inside a body that goes on.
    Body(Body),
    /// Inside a body that does not.
    Refused(Body),
    /// The server decides whether the connection goes on with another protocol.
    Waiting,
    /// Everything goes on.
    Tunnel,
    /// Nothing goes on.
    Ended,
}

/// Where the server's bytes are.
enum Answers {
    /// At a head.
    Head,
    /// Inside a body.
    Body(Body, bool),
    /// Nobody knows where answers end.
    Unreadable,
    /// Everything goes on.
    Tunnel,
}

/// A request whose answer has not passed yet.
enum Outstanding {
    Asked {
        question: Question,
        began: Instant,
        upgrade: Option<Vec<u8>>,
    },
    /// The proxy's own answer, and whether it is the last one.
    Refused(Vec<u8>, bool),
}

/// The client is cut off without a word.
struct Cut;

impl From<io::Error> for Cut {
    fn from(_: io::Error) -> Self {
        Self
    }
}

impl Future for Relay {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let this = &mut *self;
        let ended = ready!(this.poll_all(cx));
        this.report_unanswered();
        match ended {
            Ok(outcome) => Poll::Ready(outcome),
            Err(Cut) => {
                if let Some(client) = &this.client {
                    // It may be gone.
                    let _ = client.set_zero_linger();
                }
                Poll::Ready(Outcome::Done)
            }
        }
    }
}

impl Relay {
    /// Begins with what the client has sent already.
    pub fn new(session: Session, client: TcpStream) -> Self {
        let now = Instant::now();
        Self {
            timer: Box::pin(sleep_until((now + session.shared.limits.idle).into())),
            is_eager: session.is_visibility_only(),
            session: Some(session),
            client: Some(client),
            server: Server::None,
            up: Buffer::default(),
            down: Buffer::default(),
            request: Requests::Head(0),
            answer: Answers::Head,
            outstanding: VecDeque::new(),
            moved: now,
            head_began: None,
            is_server_told_end: false,
            is_client_told_end: false,
            is_first: true,
        }
    }

    fn poll_all(&mut self, cx: &mut Context<'_>) -> Poll<Result<Outcome, Cut>> {
        loop {
            let mut moved = self.read_client(cx)?;
            match self.judge_requests()? {
                Step::Http2 if matches!(self.server, Server::None) => return Poll::Ready(self.hand_over()),
                Step::Http2 => {
                    self.go_on_unseen()?;
                    moved = true;
                }
                Step::Moved => moved = true,
                Step::Waits => {}
            }
            moved |= self.write_server(cx)?;
            moved |= self.read_server(cx)?;
            moved |= self.judge_answers()?;
            moved |= self.write_client(cx)?;
            if self.is_over() {
                return self.linger();
            }
            if !moved {
                break;
            }
            self.moved = Instant::now();
        }
        self.up.shrink();
        self.down.shrink();
        self.poll_timer(cx)
    }

    /// HTTP/2 where the server is connected already: from the client's port there is no second connection.
    fn go_on_unseen(&mut self) -> Result<(), Cut> {
        let session = self.session()?;
        session.refresh().map_err(|_| Cut)?;
        if !session.is_visibility_only() {
            return Err(Cut);
        }
        session.record(Entry::request(L7Message::Unknown));
        (self.request, self.answer) = (Requests::Tunnel, Answers::Tunnel);
        Ok(())
    }

    fn hand_over(&mut self) -> Result<Outcome, Cut> {
        match (self.session.take(), self.client.take()) {
            (Some(session), Some(client)) => Ok(Outcome::Http2(Box::new(session), client, self.up.take())),
            _ => Err(Cut),
        }
    }

    fn read_client(&mut self, cx: &mut Context<'_>) -> Result<bool, Cut> {
        let Some(client) = &mut self.client else { return Err(Cut) };
        let (may_read, is_long) = match &self.request {
            Requests::Head(_) => (self.outstanding.len() < OUTSTANDING_MAX, false),
            Requests::Body(body) | Requests::Refused(body) => (true, body.sure() > HEAD_MAX as u64),
            Requests::Waiting => (self.up.unjudged().len() < HEAD_MAX, false),
            Requests::Tunnel => (true, true),
            Requests::Ended => (false, false),
        };
        if !may_read || self.up.is_ended || self.up.is_full() {
            return Ok(false);
        }
        match self.up.poll_read(client, cx, is_long) {
            Poll::Ready(read) => read.map(|_| true).map_err(Cut::from),
            Poll::Pending => Ok(false),
        }
    }

    fn judge_requests(&mut self) -> Result<Step, Cut> {
        let mut step = Step::Waits;
        loop {
            let bytes = self.up.unjudged();
            if bytes.is_empty() {
                return Ok(step);
            }
            match &mut self.request {
                Requests::Head(looked_at) => {
                    if self.is_first && bytes.starts_with(&PREFACE[..bytes.len().min(PREFACE.len())]) {
                        return Ok(if bytes.len() < PREFACE.len() { step } else { Step::Http2 });
                    }
                    if self.outstanding.len() >= OUTSTANDING_MAX {
                        return Ok(step);
                    }
                    match end_of_head(bytes, *looked_at) {
                        Ok(Some(end)) => self.judge_head(end)?,
                        Ok(None) => {
                            *looked_at = bytes.len();
                            self.head_began.get_or_insert_with(Instant::now);
                            return Ok(step);
                        }
                        Err(refusal) => self.refuse(refusal)?,
                    }
                }
                Requests::Body(body) => match body.take(bytes) {
                    Ok(count) => {
                        let is_done = body.is_done();
                        self.up.pass(count);
                        self.next_head(is_done);
                    }
                    Err(refusal) => self.break_off(refusal)?,
                },
                Requests::Refused(body) => match body.take(bytes) {
                    Ok(count) => {
                        let is_done = body.is_done();
                        self.up.discard(count);
                        self.next_head(is_done);
                    }
                    Err(_) => self.request = Requests::Ended,
                },
                Requests::Waiting => return Ok(step),
                Requests::Tunnel => self.up.pass_all(),
                Requests::Ended => {
                    let count = self.up.unjudged().len();
                    self.up.discard(count);
                }
            }
            step = Step::Moved;
        }
    }

    fn next_head(&mut self, is_done: bool) {
        if is_done {
            self.request = Requests::Head(0);
        }
    }

    fn session(&mut self) -> Result<&mut Session, Cut> {
        self.session.as_mut().ok_or(Cut)
    }

    fn judge_head(&mut self, end: usize) -> Result<(), Cut> {
        self.head_began = None;
        self.is_first = false;
        let Some(session) = &mut self.session else { return Err(Cut) };
        session.refresh().map_err(|_| Cut)?;
        let bytes = &self.up.unjudged()[..end];
        let judged = with_head(bytes, |head| {
            let question = Question::of(head);
            let verdict = judge(session, head);
            (question, verdict, head.framing, head.expects, head.closes)
        });
        let (question, verdict, framing, expects, closes) = match judged {
            Ok(judged) => judged,
            Err(refusal) => return self.refuse(refusal),
        };
        match verdict {
            Ok(allowed) => {
                session.record(Entry { note: allowed.note, ..question.entry() });
                if allowed.edits.is_empty() {
                    self.up.pass(end);
                } else {
                    let changed = edited(bytes, &allowed.edits);
                    self.up.replace(end, &changed);
                }
                let is_waiting = allowed.upgrade.is_some() || question.asked == Asked::Connect;
                let upgrade = allowed.upgrade;
                self.outstanding.push_back(Outstanding::Asked { question, began: Instant::now(), upgrade });
                self.request = match framing {
                    // What comes next may be of another protocol, or the next request: the answer says.
                    Framing::None if is_waiting => Requests::Waiting,
                    Framing::None => Requests::Head(0),
                    _ if is_waiting => return Err(Cut),
                    framing => Requests::Body(Body::new(framing)),
                };
            }
            Err(denied) => {
                session.record(Entry::denied(
                    L7Message::Http(HttpMessage { status: Some(403), ..question.message }),
                    denied.by,
                    denied.note,
                ));
                self.up.discard(end);
                let is_short = match framing {
                    Framing::Length(length) => length <= REFUSED_BODY_MAX,
                    framing => framing == Framing::None,
                };
                let is_last = closes || expects || !is_short;
                let is_head = question.asked == Asked::Head;
                self.outstanding.push_back(Outstanding::Refused(answer(403, is_last, is_head), is_last));
                self.request = if is_last { Requests::Ended } else { Requests::Refused(Body::new(framing)) };
                if framing == Framing::None && !is_last {
                    self.request = Requests::Head(0);
                }
            }
        }
        Ok(())
    }

    /// The client's bytes are not HTTP, or not without doubt.
    fn refuse(&mut self, refusal: Refusal) -> Result<(), Cut> {
        self.head_began = None;
        let session = self.session()?;
        session.refresh().map_err(|_| Cut)?;
        session.record(Entry::error(L7Message::Unknown, refusal.why));
        if session.is_visibility_only() {
            self.request = Requests::Tunnel;
            self.answer = Answers::Tunnel;
            self.outstanding.clear();
            return Ok(());
        }
        self.outstanding.push_back(Outstanding::Refused(answer(refusal.status, true, false), true));
        self.request = Requests::Ended;
        Ok(())
    }

    /// A body that was begun cannot be read on: what the server has of it stays a torso.
    fn break_off(&mut self, refusal: Refusal) -> Result<(), Cut> {
        let session = self.session()?;
        session.record(Entry::error(L7Message::Unknown, refusal.why));
        if session.is_visibility_only() {
            self.request = Requests::Tunnel;
            return Ok(());
        }
        if let Server::Connected(server) = &self.server {
            // It may be gone.
            let _ = server.set_zero_linger();
        }
        Err(Cut)
    }

    fn write_server(&mut self, cx: &mut Context<'_>) -> Result<bool, Cut> {
        let has_work = self.is_eager || self.up.waiting() > 0 || matches!(self.request, Requests::Tunnel);
        match &mut self.server {
            Server::None if has_work => {
                let session = self.session()?;
                let (client, server, within) =
                    (session.client, session.server, session.shared.limits.connect);
                self.server = Server::Connecting(Box::pin(upstream::connect(client, server, within)));
                Ok(true)
            }
            Server::Connecting(connecting) => match connecting.as_mut().poll(cx) {
                Poll::Pending => Ok(false),
                Poll::Ready(Ok(stream)) => {
                    self.server = Server::Connected(stream);
                    Ok(true)
                }
                Poll::Ready(Err(error)) => self.unreachable(&error),
            },
            Server::Connected(server) if self.up.waiting() > 0 => match self.up.poll_write(server, cx) {
                Poll::Ready(written) => written.map(|_| true).map_err(Cut::from),
                Poll::Pending => Ok(false),
            },
            Server::Connected(server) if self.up.is_ended && !self.is_server_told_end => {
                self.is_server_told_end = true;
                // Nothing is buffered in the stream itself, so this does not wait.
                let _ = Pin::new(server).poll_shutdown(cx);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// The server could not be reached: the first request is answered with 503, and the connection ends.
    fn unreachable(&mut self, error: &io::Error) -> Result<bool, Cut> {
        self.server = Server::Gone;
        let question = self.outstanding.iter().position(|one| matches!(one, Outstanding::Asked { .. }));
        let asked = question.and_then(|place| self.outstanding.remove(place));
        if let Some(Outstanding::Asked { question, began, .. }) = asked {
            let message = L7Message::Http(HttpMessage { status: Some(503), ..question.message });
            let entry = Entry::error(message, format!("connecting to the server: {error}"));
            self.session()?.record(Entry {
                kind: RecordKind::Response,
                latency: Some(began.elapsed()),
                ..entry
            });
        }
        let before = question.unwrap_or(0);
        self.outstanding.truncate(before);
        self.outstanding.push_back(Outstanding::Refused(answer(503, true, false), true));
        self.request = Requests::Ended;
        self.up.take();
        Ok(true)
    }

    fn read_server(&mut self, cx: &mut Context<'_>) -> Result<bool, Cut> {
        let Server::Connected(server) = &mut self.server else { return Ok(false) };
        if self.down.is_ended || self.down.is_full() {
            return Ok(false);
        }
        let is_long = match &self.answer {
            Answers::Body(body, _) => body.sure() > HEAD_MAX as u64,
            Answers::Tunnel | Answers::Unreadable => true,
            Answers::Head => false,
        };
        match self.down.poll_read(server, cx, is_long) {
            Poll::Ready(read) => read.map(|_| true).map_err(Cut::from),
            Poll::Pending => Ok(false),
        }
    }

    fn judge_answers(&mut self) -> Result<bool, Cut> {
        let mut moved = false;
        loop {
            let is_refused = matches!(self.outstanding.back(), Some(Outstanding::Refused(..)));
            if is_refused && matches!(self.answer, Answers::Unreadable) {
                // There is no place between answers for one of the proxy's own.
                return Err(Cut);
            }
            // The proxy's own answers stand where the server's would.
            if let (Answers::Head, Some(Outstanding::Refused(answer, is_last))) =
                (&self.answer, self.outstanding.front())
            {
                let (answer, is_last) = (answer.clone(), *is_last);
                self.down.replace(0, &answer);
                self.outstanding.pop_front();
                if is_last {
                    self.finish();
                }
                moved = true;
                continue;
            }
            let bytes = self.down.unjudged();
            if bytes.is_empty() {
                return Ok(moved);
            }
            match &mut self.answer {
                Answers::Head => {
                    let asked = match self.outstanding.front() {
                        Some(Outstanding::Asked { question, .. }) => question.asked,
                        // The server speaks unasked: nobody knows to which request this belongs.
                        _ => {
                            self.answer = Answers::Unreadable;
                            continue;
                        }
                    };
                    match answer_head(bytes, asked) {
                        Ok(None) if self.down.is_ended => self.answer = Answers::Unreadable,
                        Ok(None) => return Ok(moved),
                        Ok(Some(head)) => self.pass_answer(head)?,
                        Err(_) => self.answer = Answers::Unreadable,
                    }
                }
                Answers::Body(body, closes) => match body.take(bytes) {
                    Ok(count) => {
                        self.down.pass(count);
                        if body.is_done() {
                            let closes = *closes;
                            self.answer = Answers::Head;
                            if closes {
                                self.request = Requests::Ended;
                            }
                        }
                    }
                    Err(_) => self.answer = Answers::Unreadable,
                },
                Answers::Unreadable | Answers::Tunnel => self.down.pass_all(),
            }
            moved = true;
        }
    }

    fn pass_answer(&mut self, head: super::answer::AnswerHead) -> Result<(), Cut> {
        self.down.pass(head.length);
        let is_interim = (100..200).contains(&head.status) && head.status != 101;
        if is_interim {
            return Ok(());
        }
        let Some(Outstanding::Asked { question, began, upgrade }) = self.outstanding.pop_front() else {
            return Err(Cut);
        };
        let message = L7Message::Http(HttpMessage { status: Some(head.status), ..question.message });
        self.session()?.record(Entry::answer(message, began.elapsed()));
        let is_connect = question.asked == Asked::Connect;
        let is_tunnel =
            (head.status == 101 && upgrade.is_some()) || (is_connect && (200..300).contains(&head.status));
        if is_tunnel {
            self.request = Requests::Tunnel;
            self.answer = Answers::Tunnel;
            return Ok(());
        }
        if head.status == 101 {
            // The server goes on with a protocol that nobody asked for.
            return Err(Cut);
        }
        if matches!(self.request, Requests::Waiting) {
            self.request = Requests::Head(0);
        }
        self.answer = Answers::Body(head.body(), head.closes);
        if head.framing == Framing::None {
            self.answer = Answers::Head;
            if head.closes {
                self.request = Requests::Ended;
            }
        }
        Ok(())
    }

    /// No further answer follows.
    fn finish(&mut self) {
        self.outstanding.clear();
        self.request = Requests::Ended;
        self.server = Server::Gone;
        self.up.take();
        self.down.is_ended = true;
    }

    fn write_client(&mut self, cx: &mut Context<'_>) -> Result<bool, Cut> {
        let Some(client) = &mut self.client else { return Err(Cut) };
        if self.down.waiting() == 0 {
            let is_half = matches!(self.answer, Answers::Tunnel) && self.down.is_ended;
            let is_news = is_half && !std::mem::replace(&mut self.is_client_told_end, is_half);
            if is_news {
                // The client may wait for the end. Nothing is buffered in the stream itself, so this does not wait.
                let _ = Pin::new(client).poll_shutdown(cx);
            }
            return Ok(is_news);
        }
        match self.down.poll_write(client, cx) {
            Poll::Ready(written) => written.map(|_| true).map_err(Cut::from),
            Poll::Pending => Ok(false),
        }
    }

    fn is_over(&self) -> bool {
        if self.down.waiting() > 0 {
            return false;
        }
        if matches!(self.answer, Answers::Tunnel) {
            return self.down.is_ended && (self.up.is_ended && self.up.waiting() == 0);
        }
        let is_server_done = self.down.is_ended;
        let is_client_done = (self.up.is_ended || matches!(self.request, Requests::Ended))
            && self.up.waiting() == 0
            && self.outstanding.is_empty()
            && matches!(self.answer, Answers::Head);
        is_server_done || is_client_done
    }

    /// Tells the client that nothing follows, and waits until it has closed: what it still sends must not turn
    /// into a reset that takes the last answer with it.
    fn linger(&mut self) -> Poll<Result<Outcome, Cut>> {
        let Some(client) = self.client.take() else { return Poll::Ready(Err(Cut)) };
        self.server = Server::Gone;
        if !self.up.is_ended {
            tokio::spawn(close(client));
        }
        Poll::Ready(Ok(Outcome::Done))
    }

    /// Records that requests went on whose answers never came.
    fn report_unanswered(&mut self) {
        let Some(session) = &self.session else { return };
        for one in self.outstanding.drain(..) {
            if let Outstanding::Asked { question, began, .. } = one {
                let entry =
                    Entry::error(L7Message::Http(question.message), "the connection ended before the answer");
                let (kind, latency) = (RecordKind::Response, Some(began.elapsed()));
                session.record(Entry { kind, latency, ..entry });
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let limits = self.session.as_ref()?.shared.limits;
        if let Some(began) = self.head_began {
            return Some(began + limits.head);
        }
        let is_idle = self.outstanding.is_empty() && matches!(self.request, Requests::Head(_));
        Some(self.moved + if is_idle { limits.idle } else { limits.silence })
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<Result<Outcome, Cut>> {
        loop {
            let Some(deadline) = self.deadline() else { return Poll::Ready(Err(Cut)) };
            if self.timer.deadline() > deadline.into() {
                self.timer.as_mut().reset(deadline.into());
            }
            ready!(self.timer.as_mut().poll(cx));
            if Instant::now() < deadline {
                self.timer.as_mut().reset(deadline.into());
                continue;
            }
            if self.head_began.take().is_some() {
                self.refuse(Refusal { status: 408, why: "the head did not come in time" })?;
                return self.poll_all(cx);
            }
            return Poll::Ready(Err(Cut));
        }
    }
}

/// What judging requests came to.
enum Step {
    Waits,
    Moved,
    Http2,
}

/// Closes in order: see [`Relay::linger`].
pub async fn close(mut client: TcpStream) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let _ = client.shutdown().await;
    let drain = async {
        let mut scrap = [0; 4096];
        let mut count = 0;
        while let Ok(read @ 1..) = client.read(&mut scrap).await {
            count += read;
            if count > 1 << 20 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, drain).await;
}

/// The proxy's own answer.
fn answer(status: u16, is_last: bool, is_head: bool) -> Vec<u8> {
    let (reason, body) = match status {
        403 => ("Forbidden", "Access denied\r\n"),
        408 => ("Request Timeout", "The request did not come in time\r\n"),
        417 => ("Expectation Failed", "Expectation not known\r\n"),
        431 => ("Request Header Fields Too Large", "The head is too large\r\n"),
        503 => ("Service Unavailable", "The server cannot be reached\r\n"),
        505 => ("HTTP Version Not Supported", "HTTP version not supported\r\n"),
        _ => ("Bad Request", "Not an unambiguous request of HTTP/1.1\r\n"),
    };
    let connection = if is_last { "connection: close\r\n" } else { "" };
    let length = body.len();
    let body = if is_head { "" } else { body };
    format!(
        "HTTP/1.1 {status} {reason}\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\n{connection}\r\n{body}"
    )
    .into_bytes()
}
