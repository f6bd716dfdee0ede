//! Prefixes of rules over addresses: which local identity every address and prefix has (K6).
//!
//! An address that prefixes of rules cover is to policy the pair of who has it and the
//! set of prefixes over it. That pair has a number of this node's own, which never
//! changes its meaning: another set is another number.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::model::{AddressEntry, BaseAddress, IdentityId, LocalIdentity, PrefixEntry};

use super::Error;

/// The prefixes of rules, each with those that contain it.
#[derive(Default)]
pub struct Tree {
    /// Sorted: what contains a prefix stands before it.
    nets: Vec<IpNet>,
    parents: Vec<Option<usize>>,
    /// The prefix itself and all above it, sorted.
    covers: Vec<Arc<[IpNet]>>,
}

impl Tree {
    /// Arranges `nets`; those inside ::ffff:0:0/96 are addresses of no packet and are left out.
    pub fn new(nets: &BTreeSet<IpNet>) -> Self {
        let mut tree = Self::default();
        let mut above: Vec<usize> = Vec::new();
        for net in nets.iter().filter(|net| !is_mapped(net)) {
            while above.last().is_some_and(|last| !tree.nets[*last].contains(net)) {
                above.pop();
            }
            tree.parents.push(above.last().copied());
            above.push(tree.nets.len());
            tree.nets.push(*net);
            tree.covers.push(above.iter().map(|index| tree.nets[*index]).collect());
        }
        tree
    }

    /// The longest prefix that contains `net`: those that contain it are its cover.
    fn longest(&self, net: &IpNet) -> Option<usize> {
        let mut found = self.nets.partition_point(|known| known <= net).checked_sub(1);
        while let Some(index) = found {
            if self.nets[index].contains(net) {
                break;
            }
            found = self.parents[index];
        }
        found
    }
}

fn is_mapped(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(net) if mapped().contains(net))
}

/// Where the maps keep IPv4: ::ffff:0:0/96.
fn mapped() -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96)
}

/// The numbers of local identities that are in use.
pub struct Locals {
    numbers: HashMap<LocalIdentity, IdentityId>,
    next: IdentityId,
}

/// What the address maps should hold.
#[derive(Clone, Default)]
pub struct Assigned {
    /// Exact addresses.
    pub addresses: Arc<BTreeMap<IpAddr, AddressEntry>>,
    /// Prefixes of rules, and pod CIDRs.
    pub prefixes: Arc<BTreeMap<IpNet, PrefixEntry>>,
    /// What the local numbers in both mean.
    pub identities: Arc<BTreeMap<IdentityId, LocalIdentity>>,
}

impl Locals {
    /// The last number that there is (IDENTITY_LAST_LOCAL in abi.h).
    const LAST: IdentityId = IdentityId(0x1ff_ffff);

    /// Numbers from `first` on, or from the first local one.
    pub fn new(first: IdentityId) -> Self {
        Self { numbers: HashMap::new(), next: first.max(IdentityId::FIRST_LOCAL) }
    }

    /// Forgets what no number stands for any more; numbers are not used again.
    pub fn forget(&mut self) {
        self.numbers.clear();
    }

    /// Gives every address and prefix its identity.
    pub fn assign(
        &mut self,
        tree: &Tree,
        addresses: &BTreeMap<IpAddr, BaseAddress>,
        pod_cidrs: &[IpNet],
    ) -> Result<Assigned, Error> {
        let mut round = Round { locals: self, tree, known: HashMap::new(), used: BTreeMap::new() };
        let mut entries = Vec::with_capacity(addresses.len());
        for (address, owner) in addresses {
            let identity = match tree.longest(&IpNet::from(*address)) {
                Some(cover) => round.number(Some(owner.identity), cover)?,
                None => owner.identity,
            };
            let BaseAddress { node, endpoint, kind, .. } = owner.clone();
            entries.push((*address, AddressEntry { identity, node, endpoint, kind }));
        }
        let pod_cidrs: BTreeSet<IpNet> =
            pod_cidrs.iter().map(IpNet::trunc).filter(|net| !is_mapped(net)).collect();
        let mut prefixes = BTreeMap::new();
        for net in tree.nets.iter().chain(&pod_cidrs) {
            let identity = match tree.longest(net) {
                Some(cover) => round.number(None, cover)?,
                None => IdentityId::WORLD,
            };
            let is_pod_cidr = pod_cidrs.iter().any(|cidr| cidr.contains(net));
            prefixes.insert(*net, PrefixEntry { identity, is_pod_cidr });
        }
        keep_families_apart(&mut prefixes);
        let used = round.used;
        self.numbers.retain(|_, number| used.contains_key(number));
        Ok(Assigned {
            addresses: Arc::new(entries.into_iter().collect()),
            prefixes: Arc::new(prefixes),
            identities: Arc::new(used),
        })
    }
}

/// IPv4 lies inside IPv6 in the map: a short IPv6 prefix must not speak for it.
fn keep_families_apart(prefixes: &mut BTreeMap<IpNet, PrefixEntry>) {
    if prefixes.keys().any(|net| matches!(net, IpNet::V6(net) if net.contains(&mapped()))) {
        prefixes
            .entry(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into())
            .or_insert(PrefixEntry { identity: IdentityId::WORLD, is_pod_cidr: false });
    }
}

struct Round<'a> {
    locals: &'a mut Locals,
    tree: &'a Tree,
    known: HashMap<(Option<IdentityId>, usize), IdentityId>,
    used: BTreeMap<IdentityId, LocalIdentity>,
}

impl Round<'_> {
    fn number(&mut self, base: Option<IdentityId>, cover: usize) -> Result<IdentityId, Error> {
        if let Some(number) = self.known.get(&(base, cover)) {
            return Ok(*number);
        }
        let identity = LocalIdentity { base, prefixes: self.tree.covers[cover].clone() };
        let number = match self.locals.numbers.get(&identity) {
            Some(number) => *number,
            None if self.locals.next > Locals::LAST => return Err(Error::LocalIdentitiesExhausted),
            None => {
                let number = self.locals.next;
                self.locals.next = IdentityId(number.0 + 1);
                self.locals.numbers.insert(identity.clone(), number);
                number
            }
        };
        self.known.insert((base, cover), number);
        self.used.insert(number, identity);
        Ok(number)
    }
}
