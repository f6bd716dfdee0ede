//! What libbpf has to say: warnings become part of errors instead of going to
//! stderr, the rest goes to the log.

use std::cell::RefCell;
use std::sync::Once;

use anyhow::anyhow;
use libbpf_rs::{PrintLevel, set_print};

thread_local! {
    /// libbpf's warnings of this thread since they were last taken.
    static MESSAGES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Warnings that are kept: a verifier's log ends with what matters.
const MESSAGES_KEPT: usize = 24;

/// libbpf prints to stderr by default; here its warnings become part of errors.
pub(super) fn collect_libbpf_messages() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        set_print(Some((PrintLevel::Info, |level, message| {
            tracing::debug!(target: "libbpf", message = message.trim_end());
            if matches!(level, PrintLevel::Warn) {
                MESSAGES.with_borrow_mut(|messages| {
                    messages.extend(message.lines().map(str::to_owned));
                    let surplus = messages.len().saturating_sub(MESSAGES_KEPT);
                    messages.drain(..surplus);
                });
            }
        })));
    });
    MESSAGES.with_borrow_mut(Vec::clear);
}

/// Puts what libbpf said before it failed into the error.
pub(super) fn with_messages(error: libbpf_rs::Error) -> anyhow::Error {
    let messages = MESSAGES.with_borrow_mut(std::mem::take);
    if messages.is_empty() { error.into() } else { anyhow!("{error}; libbpf said:\n{}", messages.join("\n")) }
}
