//! DNS over UDP and TCP: questions are judged, answers are announced before the client has them.

pub mod tcp;
pub mod udp;

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::model::l7::{DnsMessage, DnsRule, L7Message, NamePattern, Names, RuleSetId};

use super::session::{Entry, Session};
use super::store::Rules;
use crate::model::l7::dns_message::{self as message, Answer, NXDOMAIN, Question, REFUSED};

/// The most questions of one flow that wait for their answers.
const PENDING_MAX: usize = 256;

/// The rules of a set; no rule at all allows any name.
#[derive(Debug)]
pub struct DnsRules(Vec<NamePattern>);

impl DnsRules {
    /// Compiles rules.
    pub fn new(rules: &[DnsRule]) -> Self {
        Self(rules.iter().map(DnsRule::pattern).collect())
    }

    /// True if a name may be asked for; its labels are in lower case.
    pub fn allows(&self, name: &[&[u8]]) -> bool {
        self.0.is_empty() || self.0.iter().any(|pattern| pattern.matches(name))
    }
}

/// What becomes of a query.
enum Asked {
    /// It goes on, and its answer is awaited.
    Forward(Question),
    /// It goes on unread: nobody may deny it.
    Unread,
    /// It is answered in the server's place.
    Answer(Vec<u8>),
    /// It is no query, and there is no answer to it.
    Drop,
}

/// Judges a query, and records it.
fn ask(session: &Session, bytes: &[u8]) -> Asked {
    let Some(question) = message::query(bytes) else {
        if session.is_visibility_only() {
            return Asked::Unread;
        }
        session.record(Entry::error(L7Message::Unknown, "not a query of DNS with one question"));
        return Asked::Drop;
    };
    let said = DnsMessage {
        query: question.name.text(),
        types: vec![question.kind_text()],
        ..DnsMessage::default()
    };
    match judge(session, &question) {
        Ok(()) => {
            session.record(Entry::request(L7Message::Dns(said)));
            Asked::Forward(question)
        }
        Err(by) => {
            let code =
                if session.shared.denies_with_nxdomain.load(Ordering::Relaxed) { NXDOMAIN } else { REFUSED };
            let said = DnsMessage { code: Some(code.into()), ..said };
            session.record(Entry::denied(L7Message::Dns(said), Some(by), ""));
            Asked::Answer(message::refusal(bytes, &question, code))
        }
    }
}

fn judge(session: &Session, question: &Question) -> Result<(), RuleSetId> {
    let labels = question.name.labels();
    for set in session.sets()?.iter().filter(|set| !set.is_visibility_only) {
        match &set.rules {
            Rules::Dns(rules) if rules.allows(&labels) => {}
            _ => return Err(set.id),
        }
    }
    Ok(())
}

/// Questions that wait for their answers.
#[derive(Default)]
struct Pending(Vec<(Question, Instant)>);

impl Pending {
    /// A question asked again has one entry; with too many the oldest is forgotten.
    fn push(&mut self, question: Question) {
        self.0.retain(|(known, _)| !known.is_same(&question));
        if self.0.len() >= PENDING_MAX {
            self.0.remove(0);
        }
        self.0.push((question, Instant::now()));
    }

    /// Takes the question of an answer out; `None`: nobody has asked this, the answer is forged or late.
    fn take(&mut self, question: &Question) -> Option<(Question, Instant)> {
        let place = self.0.iter().position(|(known, _)| known.is_same(question))?;
        Some(self.0.swap_remove(place))
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An answer that somebody waits for, and what is to be announced before it may pass.
struct Answered {
    names: Option<Names>,
    must_wait: bool,
}

/// A record has so many of an answer's addresses and names; a server chooses how many there are.
const RECORD_MAX: usize = 16;

/// Reads an answer, and records it; `None`: it must not pass.
fn answered(session: &Session, pending: &mut Pending, bytes: &[u8]) -> Option<Answered> {
    let Some((question, answer)) = message::answer(bytes) else {
        return session.is_visibility_only().then_some(Answered { names: None, must_wait: false });
    };
    let Some((question, began)) = pending.take(&question) else {
        session.record(Entry::error(
            L7Message::Dns(DnsMessage { query: question.name.text(), ..DnsMessage::default() }),
            "an answer to a question that was not asked",
        ));
        return None;
    };
    let Answer { code, addresses, cnames, ttl_s } = answer;
    let query = question.name.text();
    let said = DnsMessage {
        query: query.clone(),
        types: vec![question.kind_text()],
        code: Some(code.into()),
        addresses: addresses.iter().copied().take(RECORD_MAX).collect(),
        cnames: cnames.into_iter().take(RECORD_MAX).collect(),
        ttl_s,
    };
    session.record(Entry::answer(L7Message::Dns(said), began.elapsed()));
    let judges = session.judges();
    // The agent has nothing to remember for a client that is no pod of this node.
    let is_told = !addresses.is_empty() && judges.source_endpoint.is_some();
    let names = vouching(session, &question).filter(|_| is_told).map(|set| Names {
        set,
        endpoint: judges.source_endpoint,
        name: query,
        addresses,
        ttl_s: ttl_s.unwrap_or(0),
        seq: 0,
    });
    Some(Answered { names, must_wait: !session.is_visibility_only() })
}

/// The rules of the pod that asked, where they let the question pass. What is only shown (no rule at all) says
/// nothing of whom to believe, and a server's own rules do not speak for the server.
fn vouching(session: &Session, question: &Question) -> Option<RuleSetId> {
    let id = session.judges().egress?;
    let set = session.sets().ok()?.iter().find(|set| set.id == id)?;
    match &set.rules {
        Rules::Dns(rules) if set.is_visibility_only && rules.0.is_empty() => None,
        Rules::Dns(rules) => rules.allows(&question.name.labels()).then_some(id),
        _ => None,
    }
}

impl Answered {
    /// Returns when the maps have the addresses. Without an agent, or when it takes too long, the answer passes all
    /// the same: it opens nothing, and names that are allowed already go on.
    async fn announced(self, session: &Session) {
        let Some(names) = self.names else { return };
        if self.must_wait {
            session.shared.announcer.announce(names).await;
            return;
        }
        let shared = session.shared.clone();
        tokio::spawn(async move { shared.announcer.announce(names).await });
    }
}
