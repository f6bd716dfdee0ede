//! One leader of several replicas, by a Lease.
//!
//! Whoever writes its name into the Lease leads until the Lease's time is over. Every write
//! names the version that it replaces, so that of two candidates one is refused. Times of
//! different machines are never compared: a candidate takes over when it has itself seen the
//! Lease unchanged for its whole time, by its own clock. The leader counts from before
//! it sent its last renewal, and stops when two thirds of the time are over: it has ended its
//! work before anybody else can begin. A leader that is asked to end first ends its
//! work, then gives the Lease back, and a candidate that looks once a second takes it.
//!
//! Why not `kube-leader-election`: it compares the clocks of different machines.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

/// How often a candidate looks.
const LOOK: Duration = Duration::from_secs(1);

/// A candidate, or the leader.
pub struct Election {
    leases: Api<Lease>,
    lease: String,
    name: String,
    duration: Duration,
    /// The Lease as it was last seen, and since when it is like that.
    seen: Option<(Lease, Instant)>,
}

impl Election {
    /// A candidate called `name` for `lease`, which a leader that says nothing loses after `duration`.
    pub fn new(leases: Api<Lease>, lease: &str, name: &str, duration: Duration) -> Self {
        Self { leases, lease: lease.to_owned(), name: name.to_owned(), duration, seen: None }
    }

    /// Returns once this replica leads; `tried` is told after each look whether there was an answer.
    pub async fn win(&mut self, tried: impl Fn(bool)) -> Instant {
        let mut said = String::new();
        loop {
            let started = Instant::now();
            let looked = timeout(self.request_time(), self.try_win()).await;
            tried(matches!(looked, Ok(Ok(_))));
            match looked {
                Ok(Ok(true)) => return started,
                Ok(Ok(false)) => said.clear(),
                Ok(Err(error)) => warn_once(&mut said, crate::error::chain(&anyhow::Error::new(error))),
                Err(_) => warn_once(&mut said, "the API server does not answer".to_owned()),
            }
            sleep(LOOK).await;
        }
    }

    /// Renews; returns when this replica leads no more. `since` is when it began to; `tried` as for `win`.
    pub async fn keep(&mut self, since: Instant, tried: impl Fn(bool)) {
        let mut renewed = since;
        while renewed.elapsed() < self.duration * 2 / 3 {
            let pause = if renewed.elapsed() < self.duration / 5 { self.duration / 5 } else { LOOK };
            let left = (self.duration * 2 / 3).saturating_sub(renewed.elapsed());
            sleep(pause.min(left)).await;
            let started = Instant::now();
            let left = (self.duration * 2 / 3).saturating_sub(renewed.elapsed());
            let renewing = timeout(self.request_time().min(left), self.renew()).await;
            tried(matches!(renewing, Ok(Ok(_))));
            match renewing {
                Ok(Ok(true)) => renewed = started,
                Ok(Ok(false)) => {
                    warn!("another replica leads");
                    return;
                }
                Ok(Err(error)) => {
                    warn!(error = crate::error::chain(&anyhow::Error::new(error)), "renewing the lease");
                }
                Err(_) => warn!("renewing the lease: the API server does not answer"),
            }
        }
        warn!("the lease could not be renewed in time");
    }

    /// Gives the Lease back.
    pub async fn release(&mut self) {
        let limit = self.request_time();
        let give_back = async {
            // Not what was last seen: the answer to the last renewal may have been lost.
            match self.leases.get_opt(&self.lease).await? {
                Some(lease) if holder(&lease) == self.name => self.replace(lease, "").await,
                _ => Ok(false),
            }
        };
        match timeout(limit, give_back).await {
            Ok(Ok(true)) => info!("gave the lease back"),
            Ok(Ok(false)) => debug!("the lease is not ours to give back"),
            Ok(Err(error)) => warn!(%error, "giving the lease back"),
            Err(_) => warn!("giving the lease back: the API server does not answer"),
        }
    }

    fn request_time(&self) -> Duration {
        self.duration / 3
    }

    async fn try_win(&mut self) -> Result<bool, kube::Error> {
        let Some(lease) = self.leases.get_opt(&self.lease).await? else { return self.create().await };
        let holder = holder(&lease).to_owned();
        let since = match &self.seen {
            Some((seen, since)) if seen.metadata.resource_version == lease.metadata.resource_version => {
                *since
            }
            _ => Instant::now(),
        };
        let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or_default();
        let time = Duration::from_secs(seconds.max(0).unsigned_abs().into()).max(self.duration);
        self.seen = Some((lease.clone(), since));
        if !holder.is_empty() && since.elapsed() < time {
            debug!(holder, "another replica leads");
            return Ok(false);
        }
        let is_won = self.replace(lease, &self.name.clone()).await?;
        if is_won {
            info!(after = holder, "leading");
        }
        Ok(is_won)
    }

    async fn create(&mut self) -> Result<bool, kube::Error> {
        let lease = Lease {
            metadata: ObjectMeta { name: Some(self.lease.clone()), ..ObjectMeta::default() },
            spec: Some(self.spec(&self.name, 0, now())),
        };
        match self.leases.create(&PostParams::default(), &lease).await {
            Ok(lease) => {
                info!("leading, as the first");
                self.seen = Some((lease, Instant::now()));
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn renew(&mut self) -> Result<bool, kube::Error> {
        let Some((lease, _)) = self.seen.clone() else { return Ok(false) };
        if self.replace(lease, &self.name.clone()).await? {
            return Ok(true);
        }
        // The answer to the renewal before may have been lost, or somebody else touched the Lease.
        match self.leases.get_opt(&self.lease).await? {
            Some(lease) if holder(&lease) == self.name => {
                self.seen = Some((lease.clone(), Instant::now()));
                self.replace(lease, &self.name.clone()).await
            }
            _ => Ok(false),
        }
    }

    /// Writes `name` over exactly this version; false when it is not the newest any more.
    async fn replace(&mut self, mut lease: Lease, name: &str) -> Result<bool, kube::Error> {
        let old = lease.spec.take().unwrap_or_default();
        let is_same = old.holder_identity.as_deref() == Some(name);
        let transitions = old.lease_transitions.unwrap_or_default() + i32::from(!is_same && !name.is_empty());
        let acquired = if is_same { old.acquire_time.unwrap_or_else(now) } else { now() };
        lease.spec = Some(self.spec(name, transitions, acquired));
        match self.leases.replace(&self.lease, &PostParams::default(), &lease).await {
            Ok(lease) => {
                self.seen = Some((lease, Instant::now()));
                Ok(true)
            }
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn spec(&self, name: &str, transitions: i32, acquired: MicroTime) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(name.to_owned()),
            lease_duration_seconds: i32::try_from(self.duration.as_secs()).ok(),
            lease_transitions: Some(transitions),
            acquire_time: Some(acquired),
            renew_time: Some(now()),
            ..LeaseSpec::default()
        }
    }
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
}

fn now() -> MicroTime {
    MicroTime(jiff::Timestamp::now())
}

/// Once an outage.
fn warn_once(said: &mut String, error: String) {
    if *said != error {
        warn!(error, "looking who leads");
        *said = error;
    }
}
