//! Delta discovery: an Envoy gets each listener by itself, when it is new, and hears when it is gone.

use std::collections::BTreeMap;
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
pub type Listeners = Arc<BTreeMap<String, Any>>;
/// What an Envoy refuses, and why.
pub type Refused = BTreeMap<String, String>;

/// Messages that wait to be sent.
const WAITING: usize = 64;
/// A rule set never changes, so a listener has one version.
const VERSION: &str = "1";

/// Serves every Envoy that connects; there is one.
pub struct Discovery {
    /// What it must have.
    pub listeners: watch::Receiver<Listeners>,
    /// What it refuses.
    pub refused: watch::Sender<Refused>,
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
            refused: self.refused.clone(),
            send,
            sent: BTreeMap::new(),
            next: 0,
            unanswered: BTreeMap::new(),
        };
        self.refused.send_replace(Refused::new());
        tokio::spawn(speaker.speak(requests.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(sending))))
    }
}

/// One connection of an Envoy.
struct Speaker {
    listeners: watch::Receiver<Listeners>,
    refused: watch::Sender<Refused>,
    send: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    /// What it has, or was sent.
    sent: BTreeMap<String, ()>,
    next: u64,
    /// Listeners of messages that it has not answered.
    unanswered: BTreeMap<String, String>,
}

impl Speaker {
    async fn speak(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let mut asks = false;
        loop {
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) if request.type_url == LISTENER => {
                        // The first request says what an agent before this one has sent.
                        let begins = !std::mem::replace(&mut asks, true);
                        if begins {
                            self.sent.extend(request.initial_resource_versions.keys().map(|name| (name.clone(), ())));
                        }
                        self.hear(request);
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

    /// Notes what it says of what it was sent.
    fn hear(&mut self, request: DeltaDiscoveryRequest) {
        let Some(name) = self.unanswered.remove(&request.response_nonce) else { return };
        let why = request.error_detail.map(|error| error.message);
        self.refused.send_if_modified(|refused| match why {
            Some(why) => {
                tracing::warn!(listener = name, why, "Envoy refuses a rule set: it allows nothing");
                refused.insert(name, why);
                true
            }
            None => refused.remove(&name).is_some(),
        });
    }

    /// Sends what is new and what is gone; false: the connection is over.
    async fn tell(&mut self, must_answer: bool) -> bool {
        let wanted = self.listeners.borrow_and_update().clone();
        let gone: Vec<String> =
            self.sent.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
        self.refused.send_if_modified(|refused| gone.iter().any(|name| refused.remove(name).is_some()));
        self.sent.retain(|name, ()| wanted.contains_key(name));
        let new: Vec<_> = wanted.iter().filter(|(name, _)| !self.sent.contains_key(*name)).collect();
        if (!gone.is_empty() || must_answer && new.is_empty()) && !self.answer(Vec::new(), gone).await {
            return false;
        }
        for (name, listener) in new {
            // By itself, so that one which is refused takes no other with it.
            let resource = Resource {
                name: name.clone(),
                version: VERSION.to_owned(),
                resource: Some(listener.clone()),
            };
            self.sent.insert(name.clone(), ());
            if !self.answer(vec![resource], Vec::new()).await {
                return false;
            }
        }
        true
    }

    async fn answer(&mut self, resources: Vec<Resource>, removed_resources: Vec<String>) -> bool {
        self.next += 1;
        let nonce = self.next.to_string();
        if let [resource] = &resources[..] {
            self.unanswered.insert(nonce.clone(), resource.name.clone());
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
