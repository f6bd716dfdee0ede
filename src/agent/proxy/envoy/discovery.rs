//! Delta discovery: an Envoy gets each listener by itself, when it is new, and hears when it is gone. What it says that
//! it has, it has only in the version that this agent has made.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::Pin;
use std::sync::Arc;

use prost_types::Any;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use super::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use super::resources::LISTENER;

/// The listeners that an Envoy must have, by name.
pub type Listeners = Arc<BTreeMap<String, Resource>>;

/// What the Envoy of now has said of the listeners that it was sent, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// The version that it has.
    accepted: BTreeMap<String, String>,
    /// Why it refuses one.
    pub refused: BTreeMap<String, String>,
}

impl Answers {
    /// It has this listener as it is.
    pub fn has(&self, listener: &Resource) -> bool {
        self.accepted.get(&listener.name) == Some(&listener.version)
    }

    fn hear(&mut self, name: String, version: String, why: Option<String>) {
        self.forget(&name);
        match why {
            Some(why) => self.refused.insert(name, why),
            None => self.accepted.insert(name, version),
        };
    }

    fn forget(&mut self, name: &str) {
        self.accepted.remove(name);
        self.refused.remove(name);
    }
}

/// A listener under the version of its content.
pub fn resource(name: String, listener: Any) -> Resource {
    let mut hasher = DefaultHasher::new();
    listener.value.hash(&mut hasher);
    Resource { name, version: format!("{:016x}", hasher.finish()), resource: Some(listener) }
}

/// Messages that wait to be sent.
const WAITING: usize = 64;

/// Serves every Envoy that connects; there is one.
pub struct Discovery {
    /// What it must have.
    pub listeners: watch::Receiver<Listeners>,
    /// What it says of that.
    pub answers: watch::Sender<Answers>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        requests: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (send, sending) = mpsc::channel(WAITING);
        let speaker = Speaker {
            listeners: self.listeners.clone(),
            answers: self.answers.clone(),
            send,
            sent: BTreeMap::new(),
            next: 0,
            unanswered: BTreeMap::new(),
        };
        self.answers.send_replace(Answers::default());
        tokio::spawn(speaker.speak(requests.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }
}

/// One connection of an Envoy.
struct Speaker {
    listeners: watch::Receiver<Listeners>,
    answers: watch::Sender<Answers>,
    send: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    /// What it has, or was sent, and in which version.
    sent: BTreeMap<String, String>,
    next: u64,
    /// Listeners, and their versions, of messages that it has not answered.
    unanswered: BTreeMap<String, (String, String)>,
}

impl Speaker {
    async fn speak(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let mut asks = false;
        loop {
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) if request.type_url == LISTENER => {
                        let begins = !std::mem::replace(&mut asks, true);
                        if begins {
                            self.begin(request.initial_resource_versions);
                        } else {
                            self.hear(request);
                        }
                        // It begins to work only when it has had an answer, even an empty one.
                        if !self.tell(begins).await { return }
                    }
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return,
                },
                changed = self.listeners.changed(), if asks => {
                    if changed.is_err() || !self.tell(false).await { return }
                }
            }
        }
    }

    /// Notes what it had from connections before: that alone counts which is as it would be sent now.
    fn begin(&mut self, has: impl IntoIterator<Item = (String, String)>) {
        self.sent = has.into_iter().collect();
        let wanted = self.listeners.borrow().clone();
        let is_same = |(name, version): &(&String, &String)| {
            wanted.get(*name).is_some_and(|listener| listener.version == **version)
        };
        let same = self.sent.iter().filter(is_same).map(|(name, version)| (name.clone(), version.clone()));
        self.answers.send_modify(|answers| answers.accepted.extend(same));
    }

    /// Notes what it says of what it was sent.
    fn hear(&mut self, request: DeltaDiscoveryRequest) {
        let Some((name, version)) = self.unanswered.remove(&request.response_nonce) else { return };
        let why = request.error_detail.map(|error| error.message);
        if let Some(why) = &why {
            tracing::warn!(listener = name, why, "Envoy refuses a rule set: it allows nothing");
        }
        self.answers.send_modify(|answers| answers.hear(name, version, why));
    }

    /// Sends what is new and what is gone; false: the connection is over.
    async fn tell(&mut self, must_answer: bool) -> bool {
        let wanted = self.listeners.borrow_and_update().clone();
        let gone: Vec<String> =
            self.sent.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
        if !gone.is_empty() {
            self.answers.send_modify(|answers| gone.iter().for_each(|name| answers.forget(name)));
        }
        self.sent.retain(|name, _| wanted.contains_key(name));
        let is_new = |listener: &&Resource| self.sent.get(&listener.name) != Some(&listener.version);
        let new: Vec<_> = wanted.values().filter(is_new).collect();
        if (!gone.is_empty() || must_answer && new.is_empty()) && !self.answer(Vec::new(), gone).await {
            return false;
        }
        for listener in new {
            // By itself, so that one which is refused takes no other with it.
            self.sent.insert(listener.name.clone(), listener.version.clone());
            if !self.answer(vec![listener.clone()], Vec::new()).await {
                return false;
            }
        }
        true
    }

    async fn answer(&mut self, resources: Vec<Resource>, removed_resources: Vec<String>) -> bool {
        self.next += 1;
        let nonce = self.next.to_string();
        if let [resource] = &resources[..] {
            self.unanswered.insert(nonce.clone(), (resource.name.clone(), resource.version.clone()));
        }
        let response = DeltaDiscoveryResponse {
            system_version_info: nonce.clone(),
            resources,
            type_url: LISTENER.to_owned(),
            nonce,
            removed_resources,
        };
        self.send.send(Ok(response)).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::proxy::envoy::proto::discovery::Status as Refusal;

    fn listener(name: &str, content: &[u8]) -> Resource {
        resource(name.to_owned(), Any { type_url: LISTENER.to_owned(), value: content.to_vec() })
    }

    type Sending = mpsc::Receiver<Result<DeltaDiscoveryResponse, Status>>;

    fn speaker(listeners: &[Resource]) -> (Speaker, Sending, watch::Receiver<Answers>) {
        let all = listeners.iter().map(|listener| (listener.name.clone(), listener.clone()));
        let (_, listeners) = watch::channel(Arc::new(all.collect()));
        let (answers, answering) = watch::channel(Answers::default());
        let (send, sending) = mpsc::channel(WAITING);
        let (sent, unanswered) = (BTreeMap::new(), BTreeMap::new());
        (Speaker { listeners, answers, send, sent, next: 0, unanswered }, sending, answering)
    }

    fn next(sending: &mut Sending) -> DeltaDiscoveryResponse {
        sending.try_recv().expect("a message").expect("an answer")
    }

    #[tokio::test]
    async fn what_an_envoy_has_of_an_agent_before_is_not_this_agents() {
        let [same, other] = [listener("rules/1", b"a"), listener("rules/2", b"b")];
        let (mut speaker, mut sending, answers) = speaker(&[same.clone(), other.clone()]);
        let has = [("rules/1", &same.version[..]), ("rules/2", "1"), ("rules/3", "1")];
        speaker.begin(has.map(|(name, version)| (name.to_owned(), version.to_owned())));
        assert!(answers.borrow().has(&same) && !answers.borrow().has(&other));
        assert!(speaker.tell(true).await);
        assert_eq!(next(&mut sending).removed_resources, ["rules/3"]);
        let sent = next(&mut sending);
        assert_eq!(sent.resources, std::slice::from_ref(&other));
        assert!(sending.try_recv().is_err(), "what is the same is not sent");
        assert!(!answers.borrow().has(&other), "it was sent, and not answered yet");
        speaker.hear(DeltaDiscoveryRequest { response_nonce: sent.nonce, ..Default::default() });
        assert!(answers.borrow().has(&other));
        assert!(!answers.borrow().has(&listener("rules/2", b"c")), "it has other rules");
    }

    #[tokio::test]
    async fn what_an_envoy_refuses_it_has_not() {
        let refused = listener("rules/1", b"a");
        let (mut speaker, mut sending, answers) = speaker(std::slice::from_ref(&refused));
        assert!(speaker.tell(true).await);
        let error_detail = Some(Refusal { code: 13, message: "an expression".to_owned() });
        let response_nonce = next(&mut sending).nonce;
        speaker.hear(DeltaDiscoveryRequest { response_nonce, error_detail, ..Default::default() });
        assert!(!answers.borrow().has(&refused));
        assert_eq!(answers.borrow().refused.get("rules/1").map(String::as_str), Some("an expression"));
    }
}
