//! Prefixes of rules over addresses: which local identity every address and prefix has.
//!
//! An address that prefixes of rules cover is to policy the pair of who has it and the
//! set of prefixes over it. That pair has a number of this node's own; another set is
//! another number. A number gets another meaning only after all others were given, which
//! takes hours (`agent::names` bounds what answers of DNS can take), so that no row, no
//! connection and no record of a flow has it with the old one.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
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

/// Identities that nobody has keep their numbers, so many of them: what goes and comes again takes no other.
const RESTING_MAX: usize = 16_384;

/// The numbers of local identities that are in use, or were lately.
pub struct Locals {
    numbers: HashMap<LocalIdentity, IdentityId>,
    /// The numbers in `numbers`.
    taken: HashSet<IdentityId>,
    /// Those that nobody has.
    resting: HashMap<IdentityId, LocalIdentity>,
    /// In the order in which they were let go; some are in use again.
    let_go: VecDeque<IdentityId>,
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
            taken: HashSet::new(),
            resting: HashMap::new(),
            let_go: VecDeque::new(),
            uses: HashMap::new(),
            next: first.max(IdentityId::FIRST_LOCAL),
            cluster: Tree::default(),
        }
    }

    /// Forgets what numbers stand for; they are not used again soon.
    pub fn forget(&mut self) {
        self.numbers.clear();
        self.taken.clear();
        self.resting.clear();
        self.let_go.clear();
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
        let unused = self.numbers.iter().filter(|(_, number)| !used.contains_key(number));
        let unused: Vec<_> = unused.map(|(identity, number)| (*number, identity.clone())).collect();
        unused.into_iter().for_each(|(number, identity)| self.let_go(number, identity));
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
                    self.let_go(number, identity);
                }
            }
        }
    }

    /// Nobody has an identity any more. It keeps its number until too many others were let go.
    fn let_go(&mut self, number: IdentityId, identity: LocalIdentity) {
        if self.resting.insert(number, identity).is_none() {
            self.let_go.push_back(number);
        }
        while self.let_go.len() > RESTING_MAX {
            let Some(oldest) = self.let_go.pop_front() else { return };
            if let Some(identity) = self.resting.remove(&oldest) {
                self.numbers.remove(&identity);
                self.taken.remove(&oldest);
            }
        }
    }

    /// The next number that nobody has, or had lately; after the last one comes the first.
    fn free(&mut self) -> Result<IdentityId, Error> {
        let count = (Self::LAST.0 - IdentityId::FIRST_LOCAL.0) as usize + 1;
        if self.taken.len() >= count {
            return Err(Error::LocalIdentitiesExhausted);
        }
        loop {
            if self.next > Self::LAST {
                self.next = IdentityId::FIRST_LOCAL;
            }
            let number = self.next;
            self.next = IdentityId(number.0 + 1);
            if self.taken.insert(number) {
                return Ok(number);
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
            None => {
                let number = self.free()?;
                self.numbers.insert(identity.clone(), number);
                number
            }
        };
        self.resting.remove(&number);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Assigns one address of a set of names each; gives their numbers.
    fn numbers(locals: &mut Locals, sets: &[u32]) -> Vec<IdentityId> {
        let named: ByAddress = sets
            .iter()
            .map(|set| {
                let rule = DnsRule::MatchName(format!("n{set}.test"));
                (IpAddr::from(Ipv4Addr::from(0xc612_0000 + set)), Arc::from([rule]))
            })
            .collect();
        let assigned =
            locals.assign(&Tree::default(), &Snapshot::new(), &[], &named).expect("numbers are left");
        assigned.prefixes.values().map(|entry| entry.identity).collect()
    }

    #[test]
    fn a_number_has_another_meaning_only_after_all_others_were_given() {
        let mut locals = Locals::new(IdentityId(Locals::LAST.0 - 1));
        let (first, last) = (IdentityId::FIRST_LOCAL, Locals::LAST);
        let begun = numbers(&mut locals, &[1, 2, 3]);
        assert_eq!(begun, [IdentityId(last.0 - 1), last, first]);
        // What goes and comes again is the same.
        assert_eq!(numbers(&mut locals, &[4]), [IdentityId(first.0 + 1)]);
        assert_eq!(numbers(&mut locals, &[2, 3]), begun[1..]);
        // Once round: what is in use, or was lately, is left out.
        locals.next = IdentityId(last.0 - 1);
        assert_eq!(numbers(&mut locals, &[2, 5]), [last, IdentityId(first.0 + 2)]);
        // Whoever makes many takes none of those in use, and the oldest of the others is forgotten.
        for round in 0..(RESTING_MAX as u32 / 4096 + 2) {
            let many: Vec<u32> = (0..4096).map(|set| 10_000 + round * 4096 + set).chain([2]).collect();
            let many = numbers(&mut locals, &many);
            assert_eq!(many.iter().collect::<BTreeSet<_>>().len(), 4097);
            assert!(many.contains(&last), "what is in use stays");
        }
        assert!(locals.numbers.len() <= RESTING_MAX + 4097 && locals.resting.len() <= RESTING_MAX);
        assert_eq!(locals.numbers.len(), locals.taken.len());
        assert_ne!(numbers(&mut locals, &[4]), [IdentityId(first.0 + 1)]);
    }
}
