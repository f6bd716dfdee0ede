//! The peers of Cilium's rules.

use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::layer7::name_rule;
use super::selector::{self, entity};
use super::{Named, Peers, Reader, Side};
use crate::kube::convert::{Field, FieldError, Result, items};
use crate::model::{Action, Entity, GroupSelector, Peer, ServiceName, ServiceSelector};

/// Whom an element of a list stands for.
enum Element {
    These(Vec<Peer>),
    Everyone,
}

const INGRESS: [&str; 7] =
    ["fromEndpoints", "fromEntities", "fromCIDR", "fromCIDRSet", "fromNodes", "fromGroups", "fromRequires"];
const EGRESS: [&str; 9] = [
    "toEndpoints",
    "toEntities",
    "toCIDR",
    "toCIDRSet",
    "toNodes",
    "toGroups",
    "toRequires",
    "toServices",
    "toFQDNs",
];

/// The fields of a rule that name peers.
pub fn fields(side: Side) -> &'static [&'static str] {
    match side {
        Side::Ingress => &INGRESS,
        Side::Egress => &EGRESS,
    }
}

impl Reader<'_> {
    /// A list that is there and empty names nobody; where no list is there, everyone is meant.
    pub(super) fn peers(&mut self, rule: &Field, side: Side, action: Action) -> Peers {
        let mut named = Named::Absent;
        let mut kinds = 0;
        for name in fields(side) {
            let list = rule.get(name).and_then(|field| Ok((field.items()?, field)));
            let (list, field) = match self.notes.read(list) {
                Some((Some(list), field)) => (list, field),
                Some((None, _)) => continue,
                None => {
                    named = add(named, self.unread(action));
                    continue;
                }
            };
            kinds += usize::from(!list.is_empty() && !name.ends_with("CIDR"));
            named = add(named, Element::These(Vec::new()));
            for item in &list {
                let element =
                    self.element(name, item, action).unwrap_or_else(|error| self.doubtful(error, action));
                named = add(named, element);
            }
            if name.ends_with("Requires") {
                self.notes.doubt(field.error("is read no more; write what it asked into each selector"));
                // It narrowed what the other lists allow.
                return if action == Action::Allow { Named::These(Vec::new()) } else { named };
            }
        }
        if kinds > 1 && action == Action::Allow {
            self.notes.doubt(rule.error("names peers in several ways; write a rule for each"));
            return Named::These(Vec::new());
        }
        named
    }

    fn doubtful(&mut self, error: FieldError, action: Action) -> Element {
        self.notes.doubt(error);
        self.unread(action)
    }

    fn unread(&self, action: Action) -> Element {
        if action == Action::Allow { Element::These(Vec::new()) } else { Element::Everyone }
    }

    fn element(&mut self, name: &str, item: &Field, action: Action) -> Result<Element> {
        let (_, what) = name.split_at(if name.starts_with("from") { 4 } else { 2 });
        let peer = match what {
            "Endpoints" => self.peer_of(item)?,
            "Entities" => return entities(item),
            "CIDR" => Peer::Outside { cidr: cidr_or_address(item)?, except: Vec::new() },
            "CIDRSet" => cidr_set(item)?,
            "Nodes" => Peer::Nodes(selector::of_nodes(item)?),
            "Services" => self.services(item)?,
            "FQDNs" if action == Action::Allow => {
                let rule = name_rule(item)?;
                rule.check().map_err(|fault| item.error(fault))?;
                Peer::Name(rule)
            }
            "FQDNs" => return Err(item.error("a rule that denies cannot have names of DNS")),
            "Groups" => {
                self.not_yet(item, "a provider's group");
                return Ok(Element::These(Vec::new()));
            }
            _ => return Ok(Element::These(Vec::new())),
        };
        Ok(Element::These(vec![peer]))
    }

    fn services(&self, item: &Field) -> Result<Peer> {
        item.only_known(&["k8sService", "k8sServiceSelector"])?;
        let (named, selected) = (item.get("k8sService")?, item.get("k8sServiceSelector")?);
        let (of, services) = match (named.is_present(), selected.is_present()) {
            (true, false) => {
                named.only_known(&["serviceName", "namespace"])?;
                let name: Arc<str> = named.get("serviceName")?.required_string()?.into();
                (named, ServiceName::Named(name))
            }
            (false, true) => {
                selected.only_known(&["selector", "namespace"])?;
                let selector = selector::of_nodes(&selected.get("selector")?)?;
                (selected, ServiceName::Labelled(selector))
            }
            _ => return Err(item.error("must have one of k8sService and k8sServiceSelector")),
        };
        let namespace = of.get("namespace")?.string()?.filter(|name| !name.is_empty()).map(Arc::from);
        Ok(Peer::Services(ServiceSelector { namespace: namespace.or(self.namespace.clone()), services }))
    }
}

fn add(named: Peers, element: Element) -> Peers {
    match (named, element) {
        (Named::All, _) | (_, Element::Everyone) => Named::All,
        (Named::Absent, Element::These(peers)) => Named::These(peers),
        (Named::These(mut all), Element::These(peers)) => {
            all.extend(peers);
            Named::These(all)
        }
    }
}

fn entities(item: &Field) -> Result<Element> {
    let all_of = |cidr| Element::These(vec![Peer::Outside { cidr, except: Vec::new() }]);
    Ok(match item.required_string()? {
        "all" => Element::Everyone,
        "world-ipv4" => all_of(Ipv4Net::default().into()),
        "world-ipv6" => all_of(Ipv6Net::default().into()),
        // There is one cluster.
        "cluster-mesh" => Element::These(vec![Peer::Entity(Entity::Nobody)]),
        name => match entity(name) {
            Some(entity) => Element::These(vec![Peer::Entity(entity)]),
            None => return Err(item.error(format!("{name:?} is no entity"))),
        },
    })
}

fn cidr_or_address(item: &Field) -> Result<IpNet> {
    match item.required_string()?.contains('/') {
        true => item.cidr(),
        false => Ok(item.address()?.into()),
    }
}

fn cidr_set(item: &Field) -> Result<Peer> {
    item.only_known(&["cidr", "cidrGroupRef", "cidrGroupSelector", "except"])?;
    let (cidr, named, labelled) =
        (item.get("cidr")?, item.get("cidrGroupRef")?, item.get("cidrGroupSelector")?);
    let except = items(&item.get("except")?)?;
    let prefixes = |inside: &dyn Fn(&IpNet) -> bool| {
        let one = |field: &Field| {
            let hole = field.cidr()?;
            inside(&hole).then_some(hole).ok_or_else(|| field.error(format!("{hole} is not within the cidr")))
        };
        except.iter().map(one).collect::<Result<Vec<IpNet>>>()
    };
    match (cidr.is_present(), named.is_present(), labelled.is_present()) {
        (true, false, false) => {
            let cidr = cidr.cidr()?;
            Ok(Peer::Outside { cidr, except: prefixes(&|hole| cidr.contains(hole))? })
        }
        (false, true, false) => {
            let groups = GroupSelector::Named(named.required_string()?.into());
            Ok(Peer::Groups { groups, except: prefixes(&|_| true)? })
        }
        (false, false, true) => {
            let groups = GroupSelector::Labelled(selector::of_nodes(&labelled)?);
            Ok(Peer::Groups { groups, except: prefixes(&|_| true)? })
        }
        _ => Err(item.error("must have one of cidr, cidrGroupRef and cidrGroupSelector")),
    }
}
