//! Prefixes of rules over addresses: which local identity every address and prefix has.
//!
//! An address that prefixes of rules cover is to policy the pair of who has it and the
//! set of prefixes over it. That pair has a number of this node's own, which never
//! changes its meaning: another set is another number.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::model::l7::DnsRule;
use crate::model::{AddressEntry, BaseAddress, IdentityId, LocalIdentity, PrefixEntry};
use crate::tables::Snapshot;

use super::Error;
use super::named::ByAddress;

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

impl Tree {
    /// True if a rule names exactly this prefix.
    fn has(&self, net: &IpNet) -> bool {
        self.nets.binary_search(net).is_ok()
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
    /// How many addresses and prefixes have each.
    uses: HashMap<IdentityId, usize>,
    next: IdentityId,
    /// The pod CIDRs of the last `assign`.
    cluster: Tree,
}

/// What the address maps should hold.
#[derive(Clone, Default)]
pub struct Assigned {
    /// Exact addresses.
    pub addresses: Snapshot<IpAddr, AddressEntry>,
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
        Self {
            numbers: HashMap::new(),
            uses: HashMap::new(),
            next: first.max(IdentityId::FIRST_LOCAL),
            cluster: Tree::default(),
        }
    }

    /// Forgets what no number stands for any more; numbers are not used again.
    pub fn forget(&mut self) {
        self.numbers.clear();
        self.uses.clear();
    }

    /// Gives every address and prefix its identity.
    pub fn assign(
        &mut self,
        tree: &Tree,
        addresses: &Snapshot<IpAddr, BaseAddress>,
        pod_cidrs: &[IpNet],
        named: &ByAddress,
    ) -> Result<Assigned, Error> {
        self.uses.clear();
        let mut used = BTreeMap::new();
        let entry = |(address, owner): (&IpAddr, &BaseAddress)| {
            Ok((*address, self.entry(tree, *address, owner, &mut used)?))
        };
        let addresses = addresses.iter().map(entry).collect::<Result<_, _>>()?;
        let pod_cidrs: BTreeSet<IpNet> =
            pod_cidrs.iter().map(IpNet::trunc).filter(|net| !is_mapped(net)).collect();
        self.cluster = Tree::new(&pod_cidrs);
        let mut prefixes = BTreeMap::new();
        for net in tree.nets.iter().chain(&pod_cidrs) {
            prefixes.insert(*net, self.prefix(tree, net, None, &mut used)?);
        }
        for (address, rules) in named {
            if !self.may_be_named(address) {
                continue;
            }
            let net = IpNet::from(*address);
            prefixes.insert(net, self.prefix(tree, &net, Some(rules), &mut used)?);
        }
        keep_families_apart(&mut prefixes);
        self.numbers.retain(|_, number| used.contains_key(number));
        Ok(Assigned { addresses, prefixes: Arc::new(prefixes), identities: Arc::new(used) })
    }

    /// Brings `assigned`, which `assign` or this made of `before`, to what it is for `after`; the prefixes
    /// are the same.
    pub fn follow(
        &mut self,
        tree: &Tree,
        before: &Snapshot<IpAddr, BaseAddress>,
        after: &Snapshot<IpAddr, BaseAddress>,
        assigned: &mut Assigned,
    ) -> Result<(), Error> {
        let mut new = BTreeMap::new();
        let mut released = Vec::new();
        for item in before.diff(after) {
            let old = match item {
                DiffItem::Add(address, owner) | DiffItem::Update { new: (address, owner), .. } => {
                    let entry = self.entry(tree, *address, owner, &mut new)?;
                    assigned.addresses.insert(*address, entry)
                }
                DiffItem::Remove(address, _) => assigned.addresses.remove(address),
            };
            released.extend(old.map(|entry| entry.identity).filter(|identity| identity.is_local()));
        }
        self.settle(new, released, assigned);
        Ok(())
    }

    /// Brings `assigned` to what it is for addresses that are named in `changed` otherwise than before.
    pub fn follow_names(
        &mut self,
        tree: &Tree,
        named: &ByAddress,
        changed: impl IntoIterator<Item = IpAddr>,
        assigned: &mut Assigned,
    ) -> Result<(), Error> {
        let mut new = BTreeMap::new();
        let mut released = Vec::new();
        for address in changed {
            if !self.may_be_named(&address) {
                continue;
            }
            let net = IpNet::from(address);
            let rules = named.get(&address);
            let prefixes = Arc::make_mut(&mut assigned.prefixes);
            let old = match rules.is_some() || tree.has(&net) {
                true => prefixes.insert(net, self.prefix(tree, &net, rules, &mut new)?),
                false => prefixes.remove(&net),
            };
            released.extend(old.map(|entry| entry.identity).filter(|identity| identity.is_local()));
        }
        self.settle(new, released, assigned);
        Ok(())
    }

    /// Takes in the identities that are used now, and forgets those that are used no more.
    fn settle(
        &mut self,
        mut new: BTreeMap<IdentityId, LocalIdentity>,
        released: Vec<IdentityId>,
        assigned: &mut Assigned,
    ) {
        new.retain(|number, _| !assigned.identities.contains_key(number));
        if !new.is_empty() {
            Arc::make_mut(&mut assigned.identities).extend(new);
        }
        for number in released {
            let uses = self.uses.entry(number).or_default();
            *uses = uses.saturating_sub(1);
            if *uses == 0 {
                self.uses.remove(&number);
                if let Some(identity) = Arc::make_mut(&mut assigned.identities).remove(&number) {
                    self.numbers.remove(&identity);
                }
            }
        }
    }

    /// Names mean addresses outside of the cluster: whoever answers for them chooses the addresses.
    fn may_be_named(&self, address: &IpAddr) -> bool {
        let net = IpNet::from(*address);
        !is_mapped(&net) && self.cluster.longest(&net).is_none()
    }

    /// The row of a prefix, or of one address that rules name.
    fn prefix(
        &mut self,
        tree: &Tree,
        net: &IpNet,
        rules: Option<&Arc<[DnsRule]>>,
        used: &mut BTreeMap<IdentityId, LocalIdentity>,
    ) -> Result<PrefixEntry, Error> {
        let is_pod_cidr = self.cluster.longest(net).is_some();
        // A pod that nobody has heard of is not outside of the cluster.
        let base = is_pod_cidr.then_some(IdentityId::UNMANAGED);
        let identity = match (tree.longest(net), rules) {
            (None, None) => IdentityId::WORLD,
            (cover, rules) => self.number(tree, base, cover, rules, used)?,
        };
        let is_learned = rules.is_some() && !tree.has(net);
        Ok(PrefixEntry { identity, is_pod_cidr, is_learned, ..PrefixEntry::default() })
    }

    fn entry(
        &mut self,
        tree: &Tree,
        address: IpAddr,
        owner: &BaseAddress,
        used: &mut BTreeMap<IdentityId, LocalIdentity>,
    ) -> Result<AddressEntry, Error> {
        let identity = match tree.longest(&IpNet::from(address)) {
            Some(cover) => self.number(tree, Some(owner.identity), Some(cover), None, used)?,
            None => owner.identity,
        };
        let BaseAddress { node, endpoint, kind, .. } = owner.clone();
        Ok(AddressEntry { identity, node, endpoint, kind })
    }

    /// The number of who has an address under a prefix or a name, noted in `used`.
    fn number(
        &mut self,
        tree: &Tree,
        base: Option<IdentityId>,
        cover: Option<usize>,
        names: Option<&Arc<[DnsRule]>>,
        used: &mut BTreeMap<IdentityId, LocalIdentity>,
    ) -> Result<IdentityId, Error> {
        let prefixes = cover.map_or_else(Arc::default, |cover| tree.covers[cover].clone());
        let identity = LocalIdentity { base, prefixes, names: names.cloned().unwrap_or_default() };
        let number = match self.numbers.get(&identity) {
            Some(number) => *number,
            None if self.next > Self::LAST => return Err(Error::LocalIdentitiesExhausted),
            None => {
                let number = self.next;
                self.next = IdentityId(number.0 + 1);
                self.numbers.insert(identity.clone(), number);
                number
            }
        };
        *self.uses.entry(number).or_default() += 1;
        used.entry(number).or_insert(identity);
        Ok(number)
    }
}

/// IPv4 lies inside IPv6 in the map: a short IPv6 prefix must not speak for it.
fn keep_families_apart(prefixes: &mut BTreeMap<IpNet, PrefixEntry>) {
    if prefixes.keys().any(|net| matches!(net, IpNet::V6(net) if net.contains(&mapped()))) {
        prefixes
            .entry(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into())
            .or_insert(PrefixEntry { identity: IdentityId::WORLD, ..PrefixEntry::default() });
    }
}
