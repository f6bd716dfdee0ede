//! ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2): tiers above and below NetworkPolicy.
//!
//! What cannot be read of a rule that accepts, accepts nothing; a rule that denies or passes and cannot be
//! read denies everything, as the API asks of who meets a field that he does not know.

use std::sync::Arc;

use super::network_policy::selector;
use crate::kube::Tables;
use crate::kube::convert::{Field, FieldError, Notes, ObjectId, Result, items, marks, names};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{
    Action, IpProtocol, Marks, ObjectKey, Peer, Policy, PolicyDirection, PolicyKind, PolicyRef, PolicyRule,
    PortMatch, PortSelector, Selector, Subject, Tier,
};

/// policy.networking.k8s.io/v1alpha2
pub struct ClusterNetworkPolicy;

/// The last priority that there is.
const PRIORITY_MAX: u64 = 1000;

impl ObjectKind for ClusterNetworkPolicy {
    const META: Meta = Meta {
        name: "ClusterNetworkPolicy",
        plural: "clusternetworkpolicies",
        group: "policy.networking.k8s.io",
        version: "v1alpha2",
        is_namespaced: false,
        is_optional: true,
        doubt: "the policy accepts only what can be read of it; a rule that denies or passes denies everything",
        ..Meta::CORE
    };
    type Row = Policy;

    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<Policy>> {
        notes.read(document.only_known(&["apiVersion", "kind", "metadata", "spec", "status"]));
        let mut reader = Reader { notes, unenforced: Vec::new() };
        let spec = document.get("spec");
        let mut policy = match reader.notes.read(spec) {
            Some(spec) => reader.policy(id, &spec),
            None => nothing(id),
        };
        let unenforced = reader.unenforced;
        policy.marks = marks(document, &mut notes.warnings);
        policy.doubts = notes.texts();
        policy.doubts.extend(unenforced.iter().map(ToString::to_string));
        notes.warnings.extend(unenforced);
        Ok(Some(policy))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<Policy>> {
        rows::plain(tables.of::<Self>(), ObjectKey::clone)
    }
}

fn nothing(id: &ObjectId) -> Policy {
    Policy {
        reference: PolicyRef::new(PolicyKind::ClusterNetworkPolicy, &id.key),
        subject: Subject::Pods { namespaces: Selector::default(), pods: Selector::default() },
        tier: Tier::Admin,
        priority: 0,
        ingress: None,
        egress: None,
        marks: Marks::default(),
        others: Vec::new(),
        doubts: Vec::new(),
    }
}

struct Reader<'a> {
    notes: &'a mut Notes,
    unenforced: Vec<FieldError>,
}

impl Reader<'_> {
    /// Where the tier, the priority or the subject cannot be read, the policy comes first, is about all pods,
    /// and accepts nothing.
    fn policy(&mut self, id: &ObjectId, spec: &Field) -> Policy {
        let before = self.notes.doubt_count();
        self.notes.read(spec.only_known(&["tier", "priority", "subject", "ingress", "egress"]));
        let tier = self.notes.read(tier(spec));
        let priority = self.notes.read(priority(spec));
        let subject = self.notes.read(spec.get("subject").and_then(|subject| self::subject(&subject)));
        let is_doubtful = self.notes.doubt_count() != before;
        let empty = nothing(id);
        let ingress = self.rules(spec, "ingress", "from", is_doubtful);
        let egress = self.rules(spec, "egress", "to", is_doubtful);
        Policy {
            tier: tier.filter(|_| !is_doubtful).unwrap_or(Tier::Admin),
            priority: priority.filter(|_| !is_doubtful).unwrap_or(0),
            subject: subject.unwrap_or(empty.subject),
            ingress,
            egress,
            reference: empty.reference,
            marks: empty.marks,
            others: Vec::new(),
            doubts: Vec::new(),
        }
    }

    /// `None`: no rule, and so nothing said.
    fn rules(&mut self, spec: &Field, name: &str, peers: &str, is_doubtful: bool) -> Option<PolicyDirection> {
        let list = spec.get(name).and_then(|list| items(&list));
        let rules: Vec<PolicyRule> = match self.notes.read(list) {
            Some(list) => list.iter().filter_map(|rule| self.rule(rule, peers, is_doubtful)).collect(),
            None => vec![DENY_ALL],
        };
        (!rules.is_empty()).then_some(PolicyDirection { default: Action::Pass, rules })
    }

    /// A rule in its place; `None`: it accepts what is not known.
    fn rule(&mut self, rule: &Field, peers: &str, is_doubtful: bool) -> Option<PolicyRule> {
        let action = rule.get("action").and_then(|action| match action.required_string()? {
            "Accept" => Ok(Action::Allow),
            "Deny" => Ok(Action::Deny),
            "Pass" => Ok(Action::Pass),
            other => Err(action.error(format!("{other:?} is not Accept, Deny or Pass"))),
        });
        let Some(action) = self.notes.read(action) else { return Some(DENY_ALL) };
        let closed = || (action != Action::Allow).then_some(DENY_ALL);
        if is_doubtful && action == Action::Allow {
            return None;
        }
        let before = self.notes.doubt_count();
        self.notes.read(rule.only_known(&["name", "action", peers, "protocols"]));
        let peers = self.peers(rule, peers, action);
        let ports = self.notes.read(protocols(rule));
        let is_read = self.notes.doubt_count() == before && !(is_doubtful && action == Action::Pass);
        match (peers, ports) {
            (peers, Some(ports)) if is_read => {
                (!peers.is_empty()).then_some(PolicyRule::new(action, Some(peers), ports))
            }
            _ => closed(),
        }
    }

    fn peers(&mut self, rule: &Field, name: &str, action: Action) -> Vec<Peer> {
        let list = rule.get(name).and_then(|field| match field.items()? {
            Some(list) if !list.is_empty() => Ok(list),
            _ => Err(field.error("is required and has at least one peer")),
        });
        let mut peers = Vec::new();
        for item in self.notes.read(list).unwrap_or_default() {
            let known: &[&str] = match name {
                "from" => &["namespaces", "pods"],
                _ => &["namespaces", "pods", "nodes", "networks", "domainNames"],
            };
            let read = item.only_known(known).and_then(|()| peers_of(&item));
            match self.notes.read(read) {
                Some(Found::Peers(found)) => peers.extend(found),
                // Nothing may be taken away by names that are not looked up: the rule is closed.
                Some(Found::Names) if action != Action::Allow => {
                    self.notes.doubt(item.error("domainNames are for Accept only"))
                }
                Some(Found::Names) => self
                    .unenforced
                    .push(item.error("domainNames are not enforced yet: nothing is accepted by them")),
                None => {}
            }
        }
        peers
    }
}

const DENY_ALL: PolicyRule = PolicyRule { action: Action::Deny, peers: None, ports: None, l7: None };

enum Found {
    Peers(Vec<Peer>),
    /// Of DNS.
    Names,
}

fn tier(spec: &Field) -> Result<Tier> {
    let tier = spec.get("tier")?;
    match tier.required_string()? {
        "Admin" => Ok(Tier::Admin),
        "Baseline" => Ok(Tier::Baseline),
        other => Err(tier.error(format!("{other:?} is not Admin or Baseline"))),
    }
}

fn priority(spec: &Field) -> Result<u32> {
    let field = spec.get("priority")?;
    match field.unsigned()? {
        Some(priority @ 0..=PRIORITY_MAX) => Ok(u32::try_from(priority).unwrap_or(u32::MAX)),
        Some(priority) => Err(field.error(format!("{priority} is more than {PRIORITY_MAX}"))),
        None => Err(field.error("is required")),
    }
}

fn subject(subject: &Field) -> Result<Subject> {
    subject.only_known(&["namespaces", "pods"])?;
    let (namespaces, pods) = pods_of(subject)?
        .ok_or_else(|| subject.error("must have one of namespaces and pods"))?;
    Ok(Subject::Pods { namespaces, pods })
}

/// The selectors of namespaces and pods, of a subject or of a peer.
fn pods_of(of: &Field) -> Result<Option<(Selector, Selector)>> {
    let (namespaces, pods) = (of.get("namespaces")?, of.get("pods")?);
    match (namespaces.is_present(), pods.is_present()) {
        (true, false) => Ok(Some((selector(&namespaces)?, Selector::default()))),
        (false, true) => {
            pods.only_known(&["namespaceSelector", "podSelector"])?;
            Ok(Some((selector(&pods.get("namespaceSelector")?)?, selector(&pods.get("podSelector")?)?)))
        }
        (false, false) => Ok(None),
        (true, true) => Err(of.error("has namespaces and pods, must have one")),
    }
}

fn peers_of(item: &Field) -> Result<Found> {
    let pods = pods_of(item)?.map(|(namespaces, pods)| Peer::Pods { namespaces: Some(namespaces), pods });
    let (nodes, networks, names) = (item.get("nodes")?, item.get("networks")?, item.get("domainNames")?);
    match (pods, nodes.is_present(), networks.is_present(), names.is_present()) {
        (Some(pods), false, false, false) => Ok(Found::Peers(vec![pods])),
        (None, true, false, false) => Ok(Found::Peers(vec![Peer::Nodes(selector(&nodes)?)])),
        (None, false, true, false) => {
            let cidrs = items(&networks)?;
            if cidrs.is_empty() {
                return Err(networks.error("has no network"));
            }
            let block = |cidr: &Field| Ok(Peer::Block { cidr: cidr.cidr()?, except: Vec::new() });
            cidrs.iter().map(block).collect::<Result<_>>().map(Found::Peers)
        }
        (None, false, false, true) => Ok(Found::Names),
        _ => Err(item.error("must have exactly one kind of peer")),
    }
}

/// `None`: every protocol.
fn protocols(rule: &Field) -> Result<Option<Vec<PortMatch>>> {
    let field = rule.get("protocols")?;
    let Some(list) = field.items()? else { return Ok(None) };
    if list.is_empty() {
        return Err(field.error("has no protocol; leave it out to mean all"));
    }
    let ports: Vec<Vec<PortMatch>> = list.iter().map(protocol).collect::<Result<_>>()?;
    Ok(Some(ports.into_iter().flatten().collect()))
}

fn protocol(item: &Field) -> Result<Vec<PortMatch>> {
    item.only_known(&["tcp", "udp", "sctp", "destinationNamedPort"])?;
    let mut found = Vec::new();
    for (name, protocol) in ["tcp", "udp", "sctp"].into_iter().zip(IpProtocol::WITH_PORTS) {
        let of = item.get(name)?;
        if of.is_present() {
            of.only_known(&["destinationPort"])?;
            let port = port(&of.get("destinationPort")?)?;
            found.push(vec![PortMatch { protocol, port }]);
        }
    }
    let named = item.get("destinationNamedPort")?;
    if let Some(name) = named.string()? {
        if !names::is_port_name(name) {
            return Err(named.error(format!("{name:?} is not a port's name")));
        }
        let port = || PortSelector::Named(name.to_owned());
        let all = IpProtocol::WITH_PORTS.map(|protocol| PortMatch { protocol, port: port() });
        found.push(all.into());
    }
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(only),
        _ => Err(item.error("must have exactly one of tcp, udp, sctp and destinationNamedPort")),
    }
}

fn port(field: &Field) -> Result<PortSelector> {
    if !field.is_present() {
        return Ok(PortSelector::Any);
    }
    field.only_known(&["number", "range"])?;
    let (number, range) = (field.get("number")?, field.get("range")?);
    match (number.port()?, range.is_present()) {
        (Some(port), false) => Ok(PortSelector::Range(port, port)),
        (None, true) => {
            range.only_known(&["start", "end"])?;
            match (range.get("start")?.port()?, range.get("end")?.port()?) {
                (Some(start), Some(end)) if start <= end => Ok(PortSelector::Range(start, end)),
                _ => Err(range.error("must have start and end, start not after end")),
            }
        }
        _ => Err(field.error("must have one of number and range")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::convert::identify;
    use crate::kube::kind;

    fn read(spec: &str) -> Policy {
        let text = format!("{{metadata: {{name: base}}, spec: {spec}}}");
        let value: serde_json::Value = crate::yaml::read(&text).expect("YAML");
        let id = identify(ClusterNetworkPolicy::KIND, &Field::root(&value, false)).expect("a name");
        let read = kind::read::<ClusterNetworkPolicy>(&id, &value, true).expect("it is always read");
        Policy::clone(&read.row.expect("a row"))
    }

    fn egress(rules: &str) -> Vec<PolicyRule> {
        let policy = read(&format!(
            "{{tier: Admin, priority: 7, subject: {{namespaces: {{}}}}, egress: {rules}}}"
        ));
        assert_eq!((policy.tier, policy.priority), (Tier::Admin, 7));
        policy.egress.map_or_else(Vec::new, |direction| direction.rules)
    }

    fn actions(rules: &str) -> Vec<(Action, bool)> {
        egress(rules).iter().map(|rule| (rule.action, *rule == DENY_ALL)).collect()
    }

    #[test]
    fn tier_priority_and_subject_are_read() {
        let policy = read(
            "{tier: Baseline, priority: 1000, subject: {pods: {namespaceSelector: {matchLabels: {a: b}}, \
             podSelector: {matchLabels: {c: d}}}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}",
        );
        assert_eq!((policy.tier, policy.priority, policy.egress.is_none()), (Tier::Baseline, 1000, true));
        assert_eq!(policy.ingress.expect("ingress").default, Action::Pass);
        assert!(matches!(&policy.subject, Subject::Pods { namespaces, pods }
            if namespaces.requirements.len() == 1 && pods.requirements.len() == 1));
    }

    #[test]
    fn rules_have_an_order_and_ports_of_every_kind() {
        let rules = egress(
            "[{action: Accept, to: [{networks: [10.0.0.0/8, 'fd00::/8']}], protocols: [{tcp: {destinationPort: \
             {number: 80}}}, {udp: {destinationPort: {range: {start: 5, end: 9}}}}, {sctp: {}}]}, \
             {action: Pass, to: [{nodes: {}}]}, {action: Deny, to: [{pods: {podSelector: {}}}], \
             protocols: [{destinationNamedPort: http}]}]",
        );
        let port = |protocol: u8, port| PortMatch { protocol: IpProtocol(protocol), port };
        let accepted = [
            port(6, PortSelector::Range(80, 80)),
            port(17, PortSelector::Range(5, 9)),
            port(132, PortSelector::Any),
        ];
        assert_eq!(rules[0].ports.as_deref(), Some(&accepted[..]));
        assert_eq!(rules[0].peers.as_ref().map(Vec::len), Some(2));
        assert_eq!(rules[1].peers, Some(vec![Peer::Nodes(Selector::default())]));
        assert_eq!(rules[2].ports.as_ref().map(Vec::len), Some(3));
        assert_eq!(rules.iter().map(|rule| rule.action).collect::<Vec<_>>(), [Action::Allow, Action::Pass, Action::Deny]);
    }

    #[test]
    fn what_cannot_be_read_accepts_nothing_and_denies_everything() {
        let all = (Action::Deny, true);
        for (rule, read) in [
            ("{action: Accept, to: [{strange: {}}]}", vec![]),
            ("{action: Deny, to: [{strange: {}}]}", vec![all]),
            ("{action: Pass, to: [{}]}", vec![all]),
            ("{action: Nonsense, to: [{namespaces: {}}]}", vec![all]),
            ("{action: Accept, to: []}", vec![]),
            ("{action: Deny}", vec![all]),
            ("{action: Accept, to: [{namespaces: {}, pods: {}}]}", vec![]),
            ("{action: Accept, to: [{namespaces: {}}], protocols: []}", vec![]),
            ("{action: Accept, to: [{namespaces: {}}], protocols: [{icmp: {}}]}", vec![]),
            ("{action: Accept, to: [{networks: []}]}", vec![]),
            ("{action: Accept, to: [{domainNames: [example.org]}]}", vec![]),
            ("{action: Deny, to: [{domainNames: [example.org]}]}", vec![all]),
            ("{action: Pass, to: [{domainNames: [example.org]}]}", vec![all]),
        ] {
            assert_eq!(actions(&format!("[{rule}]")), read, "{rule}");
        }
    }

    #[test]
    fn bypass_13_a_priority_that_there_is_not_opens_nothing() {
        for (fields, said) in [
            ("tier: Admin, priority: 4294967296", "spec.priority: 4294967296 is more than 1000"),
            ("tier: Admin", "spec.priority: is required"),
            ("tier: Owner, priority: 1", "spec.tier: \"Owner\" is not Admin or Baseline"),
        ] {
            let rules = "[{action: Accept, from: [{namespaces: {}}]}, {action: Deny, from: [{namespaces: {}}]}, \
                         {action: Pass, from: [{namespaces: {}}]}]";
            let policy = read(&format!("{{{fields}, subject: {{namespaces: {{}}}}, ingress: {rules}}}"));
            assert_eq!(policy.doubts, [said]);
            assert_eq!((policy.tier, policy.priority), (Tier::Admin, 0));
            let rules = policy.ingress.expect("ingress").rules;
            assert_eq!(rules.iter().map(|rule| rule.action).collect::<Vec<_>>(), [Action::Deny, Action::Deny]);
        }
    }
}
