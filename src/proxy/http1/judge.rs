//! What becomes of one request: the answer of all rule sets together, and the head as it goes on.

use crate::model::l7::{HttpMessage, L7Message, RuleSetId};
use crate::proxy::http::{Edit, Request, message};
use crate::proxy::session::{Entry, Session};
use crate::proxy::store::Rules;

use super::answer::Asked;
use super::head::Head;

/// A request that may pass.
#[derive(Debug)]
pub struct Allowed {
    /// The changes to make in its head.
    pub edits: Vec<Edit>,
    /// What a rule wants to be said of it.
    pub note: String,
    /// The protocol that the connection may go on with after the answer 101.
    pub upgrade: Option<Vec<u8>>,
}

/// A request that may not.
#[derive(Debug)]
pub struct Denied {
    /// By whom; `None`: no rule set could allow it.
    pub by: Option<RuleSetId>,
    /// Why.
    pub note: String,
}

impl Denied {
    fn because(note: impl Into<String>) -> Self {
        Self { by: None, note: note.into() }
    }
}

/// What all the rule sets of a session say of a request: what it must not be missing is the grant of any.
#[derive(Debug)]
pub struct Grants {
    /// Changes.
    pub edits: Vec<Edit>,
    /// Notes.
    pub note: String,
    names_upgrade: bool,
    names_connect: bool,
}

/// Asks all rule sets; the first that does not allow the request denies it.
pub fn ask(session: &Session, request: &Request<'_>) -> Result<Grants, Denied> {
    let sets = session.sets().map_err(|id| Denied { by: Some(id), note: "rule set not known".to_owned() })?;
    let mut grants =
        Grants { edits: Vec::new(), note: String::new(), names_upgrade: true, names_connect: true };
    for set in sets {
        let Rules::Http(rules) = &set.rules else {
            if set.is_visibility_only {
                continue;
            }
            return Err(Denied { by: Some(set.id), note: "the rules are for another protocol".to_owned() });
        };
        let judgement = rules.judge(request);
        if set.is_visibility_only {
            continue;
        }
        if !judgement.is_allowed {
            return Err(Denied { by: Some(set.id), note: judgement.note });
        }
        grants.names_upgrade &= judgement.names_upgrade;
        grants.names_connect &= judgement.names_connect;
        grants.edits.extend(judgement.edits);
        if !judgement.note.is_empty() {
            grants.note = judgement.note;
        }
    }
    Ok(grants)
}

/// Judges a request of HTTP/1.
pub fn judge(session: &Session, head: &Head<'_>) -> Result<Allowed, Denied> {
    let Grants { mut edits, note, names_upgrade, names_connect } = ask(session, &head.request)?;
    if head.request.method == b"CONNECT" && !names_connect {
        return Err(Denied::because("CONNECT, which no rule names"));
    }
    let upgrade = match head.upgrade {
        None => None,
        Some(protocol) if protocol.eq_ignore_ascii_case(b"websocket") || names_upgrade => {
            Some(protocol.to_vec())
        }
        Some(protocol) if protocol.eq_ignore_ascii_case(b"h2c") => {
            withdraw_h2c(head, &mut edits);
            None
        }
        Some(_) => return Err(Denied::because("an Upgrade that no rule names")),
    };
    Ok(Allowed { edits, note, upgrade })
}

/// Takes out the offer to go on with HTTP/2: the server answers by HTTP/1.1, which the offer allows.
fn withdraw_h2c(head: &Head<'_>, edits: &mut Vec<Edit>) {
    let mut others: Vec<String> = Vec::new();
    for (_, value) in head.request.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(b"connection"))
    {
        for option in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            if !option.eq_ignore_ascii_case(b"upgrade") && !option.eq_ignore_ascii_case(b"http2-settings") {
                others.push(String::from_utf8_lossy(option).into_owned());
            }
        }
    }
    edits.extend(["Upgrade", "HTTP2-Settings", "Connection"].map(|name| Edit::Delete(name.to_owned())));
    if !others.is_empty() {
        edits.push(Edit::Add("Connection".to_owned(), others.join(", ")));
    }
}

/// The head with its changes.
pub fn edited(head: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut lines: Vec<&[u8]> = Vec::new();
    let mut rest = head.strip_suffix(b"\r\n").unwrap_or(head);
    while let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") {
        lines.push(&rest[..end + 2]);
        rest = &rest[end + 2..];
    }
    let mut added = Vec::new();
    for edit in edits {
        match edit {
            Edit::Add(name, value) => added.extend_from_slice(format!("{name}: {value}\r\n").as_bytes()),
            Edit::Delete(name) => {
                let is_it = |line: &[u8]| {
                    line.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name.as_bytes()))
                        && line.get(name.len()) == Some(&b':')
                };
                let mut place = 0;
                lines.retain(|line| {
                    place += 1;
                    place == 1 || !is_it(line)
                });
            }
        }
    }
    let mut edited = lines.concat();
    edited.extend_from_slice(&added);
    edited.extend_from_slice(b"\r\n");
    edited
}

/// What is remembered of a request until its answer has passed.
#[derive(Debug)]
pub struct Question {
    /// For the record of the answer.
    pub message: HttpMessage,
    /// How its answer ends.
    pub asked: Asked,
}

impl Question {
    /// Of a head.
    pub fn of(head: &Head<'_>) -> Self {
        let version = if head.is_11 { "HTTP/1.1" } else { "HTTP/1.0" };
        Self { message: message(version, &head.request), asked: Asked::of(head.request.method) }
    }

    /// The record of the request.
    pub fn entry(&self) -> Entry {
        Entry::request(L7Message::Http(self.message.clone()))
    }
}
