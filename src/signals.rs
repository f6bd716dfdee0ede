//! The signals that end a process of ours.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Makes `stop` true at SIGTERM or SIGINT; `farewell` is for the log.
pub async fn stop_at_signal(stop: watch::Sender<bool>, farewell: &str) {
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
        tracing::error!("the process gets no signals: only SIGKILL can end it");
        return;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; {farewell}");
    stop.send_replace(true);
}
