//! Who may ask a page's server, and what its answers allow: no other site, no other name.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{self, HeaderName, HeaderValue};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::Response;

use super::refuse;

/// Names by which the server may be asked, beside addresses, localhost and names of Services.
#[derive(Clone, Debug, Default)]
pub struct Hosts(pub Vec<String>);

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
                      connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

impl Hosts {
    /// False for a name that somebody else's DNS may point here: their page would read our flows.
    fn allows(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => host.rsplit_once(':').map_or(host, |(name, _)| name),
        };
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        name.parse::<IpAddr>().is_ok()
            || name == "localhost"
            || !name.contains('.')
            || name.ends_with(".svc")
            || name.ends_with(".svc.cluster.local")
            || self.0.iter().any(|known| known.eq_ignore_ascii_case(&name))
    }
}

/// Refuses other sites, and puts the headers on every answer.
pub(super) async fn guard(State(hosts): State<Arc<Hosts>>, request: Request, next: Next) -> Response {
    let mut response = match check(&hosts, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(words) => refuse(StatusCode::FORBIDDEN, words),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn check(hosts: &Hosts, headers: &HeaderMap) -> Result<(), String> {
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let host = text(header::HOST).unwrap_or_default();
    if !hosts.allows(host) {
        return Err("this server is not known by that name: give it with --page-host".to_owned());
    }
    if let Some(origin) = text(header::ORIGIN) {
        let of = origin.split_once("://").map_or("", |(_, rest)| rest);
        if of != host {
            return Err("another site may not ask this server".to_owned());
        }
    }
    let site = text(HeaderName::from_static("sec-fetch-site")).unwrap_or("none");
    let is_navigation = text(HeaderName::from_static("sec-fetch-mode")) == Some("navigate");
    match site {
        "same-origin" | "none" => Ok(()),
        _ if is_navigation => Ok(()),
        _ => Err("another site may not ask this server".to_owned()),
    }
}
