//! Backends that were taken out of their services, and when they are gone for good.
//!
//! A backend that is not ready, or that only drains, gets no new connection, but it finishes its running ones.
//! So its TCP sockets live until its address is nobody's any more.

use std::collections::BTreeSet;
use std::net::SocketAddr;

/// What the sockets of a node need to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// No service leads to these any more.
    pub unlisted: Vec<SocketAddr>,
    /// These exist no more.
    pub gone: Vec<SocketAddr>,
}

impl Removed {
    /// Adds what came later.
    pub fn extend(&mut self, more: Self) {
        self.unlisted.extend(more.unlisted);
        self.gone.extend(more.gone);
    }
}

/// Backends that no service leads to, and that still exist.
#[derive(Debug, Default)]
pub struct Leaving {
    backends: BTreeSet<SocketAddr>,
}

impl Leaving {
    /// What is new after a round: `None` if nothing is.
    pub fn update(
        &mut self,
        unlisted: Vec<SocketAddr>,
        exists: impl Fn(&SocketAddr) -> bool,
    ) -> Option<Removed> {
        self.backends.extend(&unlisted);
        let (there, gone): (BTreeSet<SocketAddr>, Vec<SocketAddr>) = std::mem::take(&mut self.backends)
            .into_iter()
            .fold(Default::default(), |(mut there, mut gone), backend| {
                if exists(&backend) {
                    there.insert(backend);
                } else {
                    gone.push(backend);
                }
                (there, gone)
            });
        self.backends = there;
        (!unlisted.is_empty() || !gone.is_empty()).then_some(Removed { unlisted, gone })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_gone_when_its_address_is_nobodys() {
        let backend: SocketAddr = "10.1.1.2:80".parse().expect("an address");
        let mut leaving = Leaving::default();
        let unlisted = Removed { unlisted: vec![backend], gone: vec![] };
        assert_eq!(leaving.update(vec![backend], |_| true), Some(unlisted));
        assert_eq!(leaving.update(vec![], |_| true), None);
        let gone = Removed { unlisted: vec![], gone: vec![backend] };
        assert_eq!(leaving.update(vec![], |_| false), Some(gone));
        assert_eq!(leaving.update(vec![], |_| false), None);
    }
}
