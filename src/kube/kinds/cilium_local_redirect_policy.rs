//! Policies that send what is for a Service, or for an address, to pods of the same node, as for a DNS cache on each node.

use std::sync::Arc;

use super::network_policy::selector;
use crate::kube::Tables;
use crate::kube::convert::{Field, Notes, ObjectId, Result, items};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{LocalRedirect, ObjectKey, RedirectFrom, RedirectPort};

/// cilium.io/v2
pub struct CiliumLocalRedirectPolicy;

impl ObjectKind for CiliumLocalRedirectPolicy {
    const META: Meta = Meta {
        name: "CiliumLocalRedirectPolicy",
        plural: "ciliumlocalredirectpolicies",
        group: "cilium.io",
        version: "v2",
        is_optional: true,
        ..Meta::CORE
    };
    type Row = LocalRedirect;

    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<LocalRedirect>> {
        let spec = document.get("spec")?;
        let skip = spec.get("skipRedirectFromBackend")?;
        if skip.boolean()? == Some(true) {
            notes.warnings.push(skip.error("is not kept: a backend is redirected to the node's backends, too"));
        }
        let backend = spec.get("redirectBackend")?;
        let ports = ports(&backend.get("toPorts")?)?;
        if ports.is_empty() {
            return Err(backend.get("toPorts")?.error("is required"));
        }
        let (from, from_ports) = redirected(id, &spec.get("redirectFrontend")?)?;
        Ok(Some(LocalRedirect {
            key: id.key.clone(),
            from,
            from_ports,
            selector: selector(&backend.get("localEndpointSelector")?)?,
            ports,
        }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<LocalRedirect>> {
        rows::plain(tables.of::<Self>(), ObjectKey::clone)
    }
}

/// What is redirected: a Service of the policy's namespace or an address, and which ports.
fn redirected(id: &ObjectId, frontend: &Field) -> Result<(RedirectFrom, Vec<RedirectPort>)> {
    let (address, matcher) = (frontend.get("addressMatcher")?, frontend.get("serviceMatcher")?);
    if !address.is_present() {
        let namespace = matcher.get("namespace")?;
        if namespace.string()?.is_some_and(|name| *name != *id.key.namespace) {
            return Err(namespace.error("must be the policy's own: who redirects a Service must own it"));
        }
        let name = matcher.get("serviceName")?.required_string()?;
        let service = ObjectKey::new(id.key.namespace.clone(), name);
        return Ok((RedirectFrom::Service(service), ports(&matcher.get("toPorts")?)?));
    }
    if matcher.is_present() {
        return Err(matcher.error("must not be there beside addressMatcher"));
    }
    let ports = ports(&address.get("toPorts")?)?;
    if ports.is_empty() {
        return Err(address.get("toPorts")?.error("is required"));
    }
    Ok((RedirectFrom::Address(address.get("ip")?.address()?), ports))
}

/// Port numbers are strings here.
fn ports(list: &Field) -> Result<Vec<RedirectPort>> {
    let port = |item: &Field| {
        let number = item.get("port")?;
        let text = number.required_string()?;
        let parsed = text.parse().ok().filter(|port| *port != 0);
        Ok(RedirectPort {
            name: item.get("name")?.string()?.unwrap_or_default().to_owned(),
            port: parsed.ok_or_else(|| number.error(format!("{text:?} is not a port number (1 to 65535)")))?,
            protocol: item.get("protocol")?.protocol()?,
        })
    };
    items(list)?.iter().map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::convert::identify;
    use crate::kube::kind;
    use crate::model::Protocol;

    fn read(spec: &str) -> Result<(Option<Arc<LocalRedirect>>, Vec<String>)> {
        let yaml = format!("{{metadata: {{name: dns, namespace: kube-system}}, spec: {spec}}}");
        let value: serde_json::Value = crate::yaml::read(&yaml).expect("YAML");
        let id = identify(CiliumLocalRedirectPolicy::KIND, &Field::root(&value, false)).expect("a name");
        let read = kind::read::<CiliumLocalRedirectPolicy>(&id, &value, false)?;
        Ok((read.row, read.warnings.iter().map(ToString::to_string).collect()))
    }

    const DNS: &str = "{redirectFrontend: {serviceMatcher: {serviceName: kube-dns, namespace: kube-system}}, \
        redirectBackend: {localEndpointSelector: {matchLabels: {k8s-app: node-local-dns}}, \
        toPorts: [{port: '53', name: dns, protocol: UDP}, {port: '53', name: dns-tcp, protocol: TCP}]}}";

    #[test]
    fn the_policy_of_node_local_dns_is_read_unchanged() {
        let (row, warnings) = read(DNS).expect("it is well formed");
        let row = row.expect("a row");
        let service = RedirectFrom::Service(ObjectKey::new("kube-system", "kube-dns"));
        assert_eq!((&row.from, warnings.len()), (&service, 0));
        let port = |name: &str, protocol| RedirectPort { name: name.to_owned(), port: 53, protocol };
        assert_eq!(row.ports, [port("dns", Protocol::Udp), port("dns-tcp", Protocol::Tcp)]);
        assert_eq!(row.from_ports, []);
    }

    #[test]
    fn what_is_not_served_is_said_and_nobody_elses_service_is_redirected() {
        assert!(read(&DNS.replace("namespace: kube-system", "namespace: other")).is_err());
        assert!(read(&DNS.replace("'53'", "'0'")).is_err());
        let skip = DNS.replace("{redirectFrontend", "{skipRedirectFromBackend: true, redirectFrontend");
        assert_eq!(read(&skip).expect("it is well formed").1.len(), 1);
    }

    #[test]
    fn an_address_is_redirected_by_its_ports() {
        let of = |matcher: &str| {
            read(&DNS.replace("serviceMatcher: {serviceName: kube-dns, namespace: kube-system}", matcher))
        };
        let (row, warnings) =
            of("addressMatcher: {ip: 169.254.169.254, toPorts: [{port: '80', name: dns, protocol: TCP}]}")
                .expect("it is well formed");
        let row = row.expect("a row");
        assert_eq!(row.from, RedirectFrom::Address([169, 254, 169, 254].into()));
        assert_eq!((row.from_ports.len(), row.from_ports[0].port, warnings.len()), (1, 80, 0));
        for wrong in [
            "addressMatcher: {ip: 169.254.169.254}",
            "addressMatcher: {ip: here, toPorts: [{port: '80', protocol: TCP}]}",
            "addressMatcher: {ip: 169.254.169.254, toPorts: [{port: '80', protocol: TCP}]}, serviceMatcher: {serviceName: a}",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
