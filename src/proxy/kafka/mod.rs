//! Kafka: requests are judged by API, version, client and topics; a refused one gets the protocol's own error.
//!
//! The proxy says in `ApiVersions` answers that brokers know only the versions whose topics it can read.

mod refusal;
mod request;
mod wire;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::time::Instant;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::model::l7::{KafkaMessage, KafkaRule, L7Message, RuleSetId, TEXT_MAX};

use super::frames::Frames;
use super::pipe;
use super::session::{Entry, Session};
use super::store::Rules;
use super::upstream;
use request::{Request, Topics};

/// The longest message, as brokers have it by default.
const MESSAGE_MAX: usize = 100 << 20;
/// The most requests that wait for their answers.
const OUTSTANDING_MAX: usize = 1024;
/// The most topics of a record, and of what is remembered of fetches.
const RECORD_TOPICS_MAX: usize = 16;
const FETCHED_MAX: usize = 10_000;

/// The rules of a set; no rule at all allows any request.
#[derive(Debug)]
pub struct KafkaRules(Vec<KafkaRule>);

impl KafkaRules {
    /// Of these rules.
    pub fn new(rules: &[KafkaRule]) -> Self {
        Self(rules.to_vec())
    }

    /// True if rules allow the request, and each of its topics.
    fn allow(&self, request: &Request, topics: &BTreeSet<String>) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let fit = |rule: &&KafkaRule| {
            (rule.api_keys.is_empty() || rule.api_keys.contains(&request.api_key))
                && rule.api_version.is_none_or(|version| version == request.api_version)
                && rule.client_id.as_ref().is_none_or(|client| *client == request.client_id)
        };
        let rules: Vec<&KafkaRule> = self.0.iter().filter(fit).collect();
        let has_any = rules.iter().any(|rule| rule.topic.is_none());
        match request.topics {
            Topics::Unknown => has_any,
            Topics::Known(_) if !topics.is_empty() => topics
                .iter()
                .all(|topic| has_any || rules.iter().any(|rule| rule.topic.as_ref() == Some(topic))),
            Topics::Known(_) | Topics::None => !rules.is_empty(),
        }
    }
}

/// Serves a connection until one side ends it.
pub async fn serve(session: Session, client: TcpStream) {
    if let Err(error) = Connection::new(session, client).run().await {
        tracing::debug!("Kafka: {error}");
    }
}

struct Connection {
    session: Session,
    client: TcpStream,
    server: Option<TcpStream>,
    requests: Frames,
    answers: Frames,
    outstanding: VecDeque<Outstanding>,
    /// The topics of this connection's fetches: a later fetch of the same session does not name them again.
    fetched: BTreeSet<String>,
}

/// A request whose answer has not passed yet: answers come in the order of requests.
enum Outstanding {
    Asked(Request, Instant),
    Refused(Vec<u8>),
}

enum Came {
    Request(Option<Vec<u8>>),
    Answer(Option<Vec<u8>>),
}

/// The connection goes on, or it ends.
type Step = io::Result<bool>;

impl Connection {
    fn new(session: Session, client: TcpStream) -> Self {
        let frames = || Frames::new(4, MESSAGE_MAX);
        Self {
            session,
            client,
            server: None,
            requests: frames(),
            answers: frames(),
            outstanding: VecDeque::new(),
            fetched: BTreeSet::new(),
        }
    }

    async fn run(mut self) -> io::Result<()> {
        let limits = self.session.shared.limits;
        loop {
            let within = if self.outstanding.is_empty() { limits.idle } else { limits.silence };
            let came = match tokio::time::timeout(within, self.next()).await {
                Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                    return self.unread(error).await;
                }
                came => came.map_err(|_| io::ErrorKind::TimedOut)??,
            };
            let goes_on = match came {
                Came::Request(Some(frame)) => match Request::read(&frame[4..]) {
                    Some(request) => self.request(request, frame).await?,
                    None if self.session.is_visibility_only() => return self.pass_unread(frame).await,
                    None => {
                        self.session.record(Entry::error(L7Message::Unknown, "not a request of Kafka"));
                        false
                    }
                },
                Came::Answer(Some(frame)) => self.answer(frame).await?,
                Came::Request(None) | Came::Answer(None) => false,
            };
            if !goes_on {
                return self.client.shutdown().await;
            }
        }
    }

    async fn next(&mut self) -> io::Result<Came> {
        let Self { client, server, requests, answers, outstanding, .. } = self;
        let answer = async {
            match server {
                Some(server) => answers.next(server).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            request = requests.next(client), if outstanding.len() < OUTSTANDING_MAX => Ok(Came::Request(request?)),
            answer = answer => Ok(Came::Answer(answer?)),
        }
    }

    /// A length that no message has.
    async fn unread(self, error: io::Error) -> io::Result<()> {
        if self.session.is_visibility_only() {
            return self.pass_unread(Vec::new()).await;
        }
        self.session.record(Entry::error(L7Message::Unknown, "not a request of Kafka"));
        // It may be gone.
        let _ = self.client.set_zero_linger();
        Err(error)
    }

    /// Nobody may deny what is not Kafka.
    async fn pass_unread(self, frame: Vec<u8>) -> io::Result<()> {
        let Self { session, client, server, requests, answers, .. } = self;
        session.record(Entry::request(L7Message::Unknown));
        let first = [frame, requests.into_rest()].concat();
        match server {
            None => pipe::pipe(session, client, first).await,
            Some(mut server) => {
                let mut client = client;
                let silence = session.shared.limits.silence;
                pipe::write(&mut client, &answers.into_rest(), silence).await?;
                pipe::write(&mut server, &first, silence).await?;
                pipe::join(client, server, silence).await;
            }
        }
        Ok(())
    }

    async fn request(&mut self, request: Request, frame: Vec<u8>) -> Step {
        self.session.refresh().map_err(|_| io::ErrorKind::ConnectionAborted)?;
        let mut topics = request.names();
        if request.goes_on_with_session() {
            topics.extend(self.fetched.iter().cloned());
        }
        if let Err(by) = self.judge(&request, &topics) {
            return self.refuse(request, by).await;
        }
        if request.is_fetch() && self.fetched.len() < FETCHED_MAX {
            self.fetched.extend(topics);
        }
        self.session.record(Entry::request(L7Message::Kafka(said(&request))));
        self.connect().await?;
        if let Some(server) = &mut self.server {
            pipe::write(server, &frame, self.session.shared.limits.silence).await?;
        }
        if request.is_answered {
            self.outstanding.push_back(Outstanding::Asked(request, Instant::now()));
        }
        Ok(true)
    }

    fn judge(&self, request: &Request, topics: &BTreeSet<String>) -> Result<(), RuleSetId> {
        for set in self.session.sets()?.iter().filter(|set| !set.is_visibility_only) {
            match &set.rules {
                Rules::Kafka(rules) if rules.allow(request, topics) => {}
                _ => return Err(set.id),
            }
        }
        Ok(())
    }

    async fn refuse(&mut self, request: Request, by: RuleSetId) -> Step {
        let answer = refusal::refusal(&request);
        let error_code = answer.is_some().then_some(refusal::TOPIC_AUTHORIZATION_FAILED);
        let said = KafkaMessage { error_code, ..said(&request) };
        self.session.record(Entry::denied(L7Message::Kafka(said), Some(by), ""));
        let Some(answer) = answer else { return Ok(!request.is_answered) };
        if !request.is_answered {
            return Ok(true);
        }
        self.outstanding.push_back(Outstanding::Refused(answer));
        self.flush().await?;
        Ok(true)
    }

    /// Sends the refusals whose turn it is.
    async fn flush(&mut self) -> io::Result<()> {
        while let Some(Outstanding::Refused(answer)) = self.outstanding.front() {
            pipe::write(&mut self.client, answer, self.session.shared.limits.silence).await?;
            self.outstanding.pop_front();
        }
        Ok(())
    }

    async fn answer(&mut self, mut frame: Vec<u8>) -> Step {
        let correlation = wire::Reader::new(&frame[4..]).i32();
        let Some(Outstanding::Asked(request, began)) = self.outstanding.pop_front() else {
            return Ok(false);
        };
        if correlation != Some(request.correlation_id) {
            self.session.record(Entry::error(L7Message::Kafka(said(&request)), "an answer out of order"));
            return Ok(false);
        }
        if request.api_key == request::API_VERSIONS {
            request::bound_versions(&mut frame[4..], request.api_version);
        }
        self.session.record(Entry::answer(L7Message::Kafka(said(&request)), began.elapsed()));
        pipe::write(&mut self.client, &frame, self.session.shared.limits.silence).await?;
        self.flush().await?;
        Ok(true)
    }

    async fn connect(&mut self) -> io::Result<()> {
        if self.server.is_some() {
            return Ok(());
        }
        let Session { client, server, shared, .. } = &self.session;
        let connected = upstream::connect(*client, *server, shared.limits.connect).await;
        let server = connected.inspect_err(|error| {
            let message = L7Message::Kafka(KafkaMessage::default());
            self.session.record(Entry::error(message, format!("connecting to the server: {error}")));
            // It may be gone.
            let _ = self.client.set_zero_linger();
        })?;
        self.server = Some(server);
        Ok(())
    }
}

/// A peer chooses how long its texts are; a record has room for so much.
fn cut(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

fn said(request: &Request) -> KafkaMessage {
    KafkaMessage {
        api_key: request.api_key,
        api_version: request.api_version,
        correlation_id: request.correlation_id,
        client_id: cut(&request.client_id),
        topics: request.names().iter().take(RECORD_TOPICS_MAX).map(|topic| cut(topic)).collect(),
        error_code: None,
    }
}
