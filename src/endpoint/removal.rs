//! DEL and GC, and the deletions that were queued while there was no agent.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use notify::{RecursiveMode, Watcher};
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tracing::{debug, info, warn};

use super::host_interface_name;
use super::manager::{Manager, failed, internal, run_to_end};
use crate::model::Endpoint;
use crate::model::cni::{Attachment, Error, Request};
use crate::netlink;

/// Should the kernel lose a notification, a queued deletion waits no longer than this.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

impl Manager {
    /// Disconnects a pod; one that is not there is disconnected.
    pub async fn delete(self: &Arc<Self>, request: Request) -> Result<(), Error> {
        request.validate()?;
        let manager = Arc::clone(self);
        run_to_end(async move {
            let _turn = manager.turn_to_delete(&request.attachment).await;
            manager.delete_in_turn(&request.attachment).await
        })
        .await
    }

    /// Disconnects every pod that is not listed; goes through all of them whatever fails, then says what did.
    pub async fn gc(self: &Arc<Self>, valid: Vec<Attachment>) -> Result<(), Error> {
        let valid: HashSet<Attachment> = valid.into_iter().collect();
        let mut failures = Vec::new();
        for endpoint in self.list() {
            let attachment = attachment_of(&endpoint);
            // Whoever works on it knows more of it than the list does.
            if valid.contains(&attachment) || self.is_busy(&attachment) {
                continue;
            }
            info!(endpoint = %endpoint.id, pod = %endpoint.pod, "removing an endpoint that the runtime does not know");
            let request =
                Request { attachment, netns: None, pod: None, pod_uid: None, port_mappings: Vec::new() };
            if let Err(error) = self.delete(request).await {
                failures.push(format!("{}: {error}", endpoint.pod));
            }
        }
        if failures.is_empty() {
            return Ok(());
        }
        Err(failed("some pods could not be disconnected").with_details(failures.join("; ")))
    }

    /// Carries out what `weir-cni` queued while there was no agent; to be done before ADDs are answered.
    pub async fn work_off_deletes(self: &Arc<Self>) {
        let queued = match self.queue.list() {
            Ok(queued) => queued,
            Err(error) => {
                warn!(%error, "reading the queued deletions");
                return;
            }
        };
        for (path, request) in queued {
            let outcome = match request {
                Ok(request) => self.delete(request).await.map_err(|error| error.to_string()),
                Err(error) => {
                    warn!(path = %path.display(), %error, "dropping a queued deletion that cannot be read");
                    Ok(())
                }
            };
            // What failed stays queued for the next look.
            match outcome {
                Ok(()) => {
                    if let Err(error) = self.queue.remove(&path) {
                        warn!(path = %path.display(), %error, "taking a deletion off the queue");
                    }
                }
                Err(error) => warn!(path = %path.display(), %error, "carrying out a queued deletion"),
            }
        }
    }

    /// Works off deletions as they are queued, until `shutdown` turns true: a DEL that found nobody may
    /// be queued just after the agent looked.
    pub async fn watch_deletes(self: Arc<Self>, mut shutdown: watch::Receiver<bool>) -> anyhow::Result<()> {
        let directory =
            self.queue.directory().context("making the directory of queued deletions")?.to_owned();
        let changed = Arc::new(Notify::new());
        let notify = Arc::clone(&changed);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading of the directory is an event, too: woken by it, we would read for ever.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                notify.notify_one();
            }
        })
        .context("watching the queued deletions")?;
        watcher
            .watch(&directory, RecursiveMode::NonRecursive)
            .with_context(|| format!("watching {}", directory.display()))?;
        loop {
            self.work_off_deletes().await;
            tokio::select! {
                _ = async { shutdown.wait_for(|stop| *stop).await.map(drop) } => return Ok(()),
                () = changed.notified() => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    async fn delete_in_turn(&self, attachment: &Attachment) -> Result<(), Error> {
        match self.find(attachment) {
            Some(endpoint) => {
                debug!(endpoint = %endpoint.id, pod = %endpoint.pod, "disconnecting a pod");
                self.remove(Endpoint::clone(&endpoint)).await
            }
            // Nobody remembers it: should its device be there, the name finds it.
            None => delete_device(host_interface_name(attachment)).await,
        }
    }

    /// Undoes an ADD: the device, and with it routes and neighbours; the row; the file; the allocation.
    pub(super) async fn remove(&self, endpoint: Endpoint) -> Result<(), Error> {
        delete_device(endpoint.host_interface.clone()).await?;
        self.table.delete(&endpoint.id);
        self.forget(&endpoint);
        Ok(())
    }
}

async fn delete_device(name: String) -> Result<(), Error> {
    spawn_blocking(move || netlink::delete_link(&name))
        .await
        .map_err(|panic| internal(&panic))?
        .map(drop)
        .map_err(|error| failed("deleting the pod's link").with_details(error.to_string()))
}

fn attachment_of(endpoint: &Endpoint) -> Attachment {
    Attachment { container_id: endpoint.container_id.clone(), interface: endpoint.interface.clone() }
}
