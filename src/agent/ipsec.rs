//! News of the node's IPsec policies. Only the node's stack applies them, so that packets may go past it only
//! while the agent knows that there are none.

use std::time::Duration;

use tokio::sync::watch;

use crate::netlink;

/// After a failure.
const RETRY: Duration = Duration::from_secs(5);

/// Changes when a policy comes or goes. Holds whether the kernel is heard: if not, nobody knows of a policy
/// that comes now.
pub type News = watch::Receiver<bool>;

/// Listens from now on.
pub fn follow() -> News {
    let news = netlink::ipsec_news();
    let (told, heard) = watch::channel(news.is_ok());
    tokio::spawn(tell(news, told));
    heard
}

async fn tell(mut news: netlink::Result<Option<watch::Receiver<()>>>, told: watch::Sender<bool>) {
    loop {
        match news {
            // A kernel without IPsec.
            Ok(None) => return std::future::pending().await,
            Ok(Some(mut policies)) => {
                told.send_replace(true);
                while policies.changed().await.is_ok() {
                    told.send_replace(true);
                }
            }
            Err(error) => tracing::warn!(%error, retry = ?RETRY, "following IPsec policies"),
        }
        told.send_replace(false);
        tokio::time::sleep(RETRY).await;
        news = netlink::ipsec_news();
    }
}
