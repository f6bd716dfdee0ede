//! A rule set as what an Envoy has for it: one listener, whichever pods the rules are for.
//!
//! ```text
//! 127.0.0.1:PORT, [::1]:PORT   bpf/proxy.bpf.c brings the flows that this rule set alone judges, whatever their address
//!   original_dst, original_src  whom a connection is for; its client's address and port go to the server, too
//!   http_connection_manager     rbac: a request that no rule matches gets 403 (gRPC: PERMISSION_DENIED)
//!                               router: cluster `server`, which is whom the connection is for
//! ```

use std::collections::HashMap;
use std::time::Duration;

use prost::Message;
use prost_types::Any;

use super::CLUSTER_OF_AGENT;
use super::paths::ONE_READING;
use super::proto::discovery::http_connection_manager::{
    PathWithEscapedSlashesAction, ServerHeaderTransformation, UpgradeConfig,
};
use super::proto::discovery::{
    AccessLog, AccessLogFilter, AdditionalAddress, Address, CommonGrpcAccessLogConfig, ComparisonFilter,
    DataSource, EnvoyGrpc, Filter, FilterChain, GrpcService, HeaderMatcher, HttpConnectionManager,
    HttpFilter, HttpGrpcAccessLogConfig, Listener, ListenerFilter, LocalReplyConfig, OriginalDst,
    OriginalSrc, Permission, Policy, Principal, Rbac, RbacFilter, RegexMatcher, ResponseMapper, Route,
    RouteAction, RouteConfiguration, RouteMatch, Router, RuntimeUInt32, SocketAddress, StatusCodeFilter,
    StringMatcher, VirtualHost, header_matcher, permission, string_matcher,
};
use crate::model::l7::{HeaderRule, HttpRule, L7Rules, Mismatch, RuleSet, RuleSetId};

/// Envoy's name for a listener.
pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
/// The cluster whose address is whom a connection is for.
pub const CLUSTER_OF_SERVERS: &str = "server";
/// By what the programs know the sockets that an Envoy binds (ALIAS_SOCKET_MARK of bpf/alias.bpf.c).
const SOCKET_MARK: u32 = 0x5745_4952;
/// Below this port nobody listens without a privilege.
const FIRST_PORT: u16 = 1024;
/// How long the head of a request may take, and what it may be, as for `weir proxy`.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
const HEAD_KIB_MAX: u32 = 16;
/// Bytes of one connection that wait for a slow peer.
const WAITING_BYTES: u32 = 64 << 10;
/// How long an entry of the log may wait for more.
const LOG_EVERY: Duration = Duration::from_millis(100);

/// The port that the listener of a rule set has; `None`: an Envoy does not judge by the set, `weir proxy` does.
pub fn port_of(set: &RuleSet) -> Option<u16> {
    let L7Rules::Http(rules) = &set.rules else { return None };
    let denies = |header: &HeaderRule| header.mismatch == Mismatch::Deny;
    let can = !set.visibility_only && rules.iter().all(|rule| rule.headers.iter().all(denies));
    set.id.0.checked_add(FIRST_PORT).filter(|_| can)
}

/// The listener's name.
pub fn name_of(id: RuleSetId) -> String {
    format!("rules/{id}")
}

/// The listener of a rule set; `None` where `port_of` has none.
pub fn listener(set: &RuleSet, has_ipv6: bool) -> Option<Any> {
    let port = u32::from(port_of(set)?);
    let L7Rules::Http(rules) = &set.rules else { return None };
    let address = |address: &str| Address {
        socket_address: Some(SocketAddress { address: address.to_owned(), port_value: port }),
    };
    let ipv6 = AdditionalAddress { address: Some(address("::1")) };
    let manager = any(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        &manager(&name_of(set.id), rules),
    );
    let filter = Filter { name: "http".to_owned(), typed_config: Some(manager) };
    let listener = Listener {
        name: name_of(set.id),
        address: Some(address("127.0.0.1")),
        additional_addresses: Some(ipv6).filter(|_| has_ipv6).into_iter().collect(),
        transparent: Some(true),
        // One socket that all threads share: the programs give it each connection.
        enable_reuse_port: Some(false),
        tcp_backlog_size: Some(4096),
        per_connection_buffer_limit_bytes: Some(WAITING_BYTES),
        listener_filters: vec![
            of_listener(
                "original_dst",
                "envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
                &OriginalDst {},
            ),
            of_listener(
                "original_src",
                "envoy.extensions.filters.listener.original_src.v3.OriginalSrc",
                &OriginalSrc { bind_port: true, mark: SOCKET_MARK },
            ),
        ],
        filter_chains: vec![FilterChain { filters: vec![filter] }],
    };
    Some(Any { type_url: LISTENER.to_owned(), value: listener.encode_to_vec() })
}

fn any(name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
}

fn of_listener(name: &str, kind: &str, message: &impl Message) -> ListenerFilter {
    ListenerFilter { name: name.to_owned(), typed_config: Some(any(kind, message)) }
}

fn duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

/// Requests pass as they came; the path is judged, and passed on, in its normal form.
fn manager(name: &str, rules: &[HttpRule]) -> HttpConnectionManager {
    let filter = |name: &str, config| HttpFilter { name: name.to_owned(), typed_config: Some(config) };
    let rbac = RbacFilter { rules: Some(rbac(rules)) };
    let router = Router { suppress_envoy_headers: true };
    HttpConnectionManager {
        stat_prefix: "rules".to_owned(),
        route_config: Some(routes()),
        http_filters: vec![
            filter("rbac", any("envoy.extensions.filters.http.rbac.v3.RBAC", &rbac)),
            filter("router", any("envoy.extensions.filters.http.router.v3.Router", &router)),
        ],
        access_log: vec![log(name)],
        generate_request_id: Some(false),
        preserve_external_request_id: true,
        skip_xff_append: true,
        upgrade_configs: vec![UpgradeConfig { upgrade_type: "websocket".to_owned() }],
        max_request_headers_kb: Some(HEAD_KIB_MAX),
        normalize_path: Some(true),
        merge_slashes: true,
        path_with_escaped_slashes_action: PathWithEscapedSlashesAction::RejectRequest.into(),
        server_header_transformation: ServerHeaderTransformation::PassThrough.into(),
        local_reply_config: Some(refusal()),
        request_headers_timeout: duration(HEAD_WITHIN),
    }
}

fn routes() -> RouteConfiguration {
    let route = RouteAction { cluster: CLUSTER_OF_SERVERS.to_owned(), timeout: duration(Duration::ZERO) };
    let all = RouteMatch { prefix: "/".to_owned() };
    let host = VirtualHost {
        name: "all".to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![Route { r#match: Some(all), route: Some(route) }],
    };
    RouteConfiguration { name: "all".to_owned(), virtual_hosts: vec![host] }
}

/// What a denied request is answered, as `weir proxy` does. A server's own 403 passes as it is.
fn refusal() -> LocalReplyConfig {
    let value = RuntimeUInt32 { default_value: 403, runtime_key: "weir".to_owned() };
    let is_denied = StatusCodeFilter { comparison: Some(ComparisonFilter { op: 0, value: Some(value) }) };
    let mapper = ResponseMapper {
        filter: Some(AccessLogFilter { status_code_filter: Some(is_denied) }),
        body: Some(DataSource { inline_string: "Access denied\r\n".to_owned() }),
    };
    LocalReplyConfig { mappers: vec![mapper] }
}

fn log(name: &str) -> AccessLog {
    let agent = EnvoyGrpc { cluster_name: CLUSTER_OF_AGENT.to_owned() };
    let common = CommonGrpcAccessLogConfig {
        log_name: name.to_owned(),
        grpc_service: Some(GrpcService { envoy_grpc: Some(agent) }),
        buffer_flush_interval: duration(LOG_EVERY),
        transport_api_version: 2,
    };
    let config = HttpGrpcAccessLogConfig {
        common_config: Some(common),
        additional_request_headers_to_log: vec![":method".to_owned(), "traceparent".to_owned()],
        additional_response_headers_to_log: vec!["grpc-status".to_owned()],
        additional_response_trailers_to_log: vec!["grpc-status".to_owned()],
    };
    let config = any("envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig", &config);
    AccessLog { name: "agent".to_owned(), typed_config: Some(config) }
}

/// Allows what one of the rules matches; no rule at all allows any request.
fn rbac(rules: &[HttpRule]) -> Rbac {
    let any_request = [HttpRule::default()];
    let rules = if rules.is_empty() { &any_request[..] } else { rules };
    let policy = |rule: &HttpRule| Policy {
        permissions: vec![permission(rule)],
        principals: vec![Principal { any: true }],
    };
    let policies: HashMap<_, _> =
        rules.iter().enumerate().map(|(number, rule)| (number.to_string(), policy(rule))).collect();
    Rbac { action: 0, policies }
}

fn permission(rule: &HttpRule) -> Permission {
    let of = |rule| Permission { rule: Some(rule) };
    let header = |name: &str, is| {
        of(permission::Rule::Header(HeaderMatcher {
            name: name.to_owned(),
            header_match_specifier: Some(is),
        }))
    };
    let pattern = |name: &str, regex: String| {
        let matcher = string_matcher::MatchPattern::SafeRegex(RegexMatcher { regex });
        let matcher = StringMatcher { match_pattern: Some(matcher) };
        header(name, header_matcher::HeaderMatchSpecifier::StringMatch(matcher))
    };
    let mut all = Vec::new();
    all.extend(rule.method.clone().map(|method| pattern(":method", method)));
    if let Some(path) = &rule.path {
        all.push(pattern(":path", path.clone()));
        all.push(pattern(":path", ONE_READING.to_owned()));
    }
    all.extend(rule.host.as_deref().map(|host| pattern(":authority", format!("(?:{host})(?::[0-9]+)?"))));
    for HeaderRule { name, value, .. } in &rule.headers {
        let is = match value {
            None => header_matcher::HeaderMatchSpecifier::PresentMatch(true),
            Some(value) => header_matcher::HeaderMatchSpecifier::StringMatch(StringMatcher {
                match_pattern: Some(string_matcher::MatchPattern::Exact(value.clone())),
            }),
        };
        all.push(header(&name.to_ascii_lowercase(), is));
    }
    match all.is_empty() {
        true => of(permission::Rule::Any(true)),
        false => of(permission::Rule::AndRules(permission::Set { rules: all })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::l7::DnsRule;

    fn set(rules: L7Rules) -> RuleSet {
        RuleSet {
            id: RuleSetId(7),
            rules,
            origins: Vec::new().into(),
            visibility_only: false,
            by_envoy: false,
        }
    }

    fn http(headers: &[(&str, Mismatch)]) -> RuleSet {
        let header = |(line, mismatch): &(&str, Mismatch)| HeaderRule {
            mismatch: *mismatch,
            ..HeaderRule::from_line(line)
        };
        let rule = HttpRule {
            path: Some("/health".to_owned()),
            headers: headers.iter().map(header).collect(),
            ..HttpRule::default()
        };
        set(L7Rules::Http(vec![rule]))
    }

    #[test]
    fn an_envoy_judges_by_rules_that_change_nothing() {
        assert_eq!(port_of(&http(&[("X-Token: a", Mismatch::Deny)])), Some(1031));
        assert_eq!(port_of(&http(&[("X-Token: a", Mismatch::Log)])), None, "Envoy would not say it");
        assert_eq!(port_of(&http(&[("X-Token: a", Mismatch::Replace)])), None);
        assert_eq!(port_of(&set(L7Rules::Dns(vec![DnsRule::MatchName("a.b".to_owned())]))), None);
        assert_eq!(port_of(&RuleSet { visibility_only: true, ..http(&[]) }), None);
        assert_eq!(
            port_of(&RuleSet { id: RuleSetId(u16::MAX - 5), ..http(&[]) }),
            None,
            "there is no such port"
        );
        assert!(listener(&http(&[]), true).is_some_and(|any| any.type_url == LISTENER));
    }

    #[test]
    fn all_parts_of_a_rule_must_hold_and_no_part_allows_all() {
        let rule = HttpRule {
            method: Some("GET".to_owned()),
            host: Some("a|b".to_owned()),
            headers: vec![HeaderRule::from_line("X-A"), HeaderRule::from_line("X-B: 1")],
            ..HttpRule::default()
        };
        let Some(permission::Rule::AndRules(set)) = permission(&rule).rule else {
            panic!("not all must hold")
        };
        let names = set.rules.iter().map(|rule| match &rule.rule {
            Some(permission::Rule::Header(header)) => header.name.clone(),
            other => panic!("{other:?}"),
        });
        assert_eq!(names.collect::<Vec<_>>(), [":method", ":authority", "x-a", "x-b"]);
        let rule = HttpRule { path: Some("/public/.*".to_owned()), ..HttpRule::default() };
        let Some(permission::Rule::AndRules(set)) = permission(&rule).rule else {
            panic!("not all must hold")
        };
        assert!(format!("{set:?}").contains(&format!("{:?}", ONE_READING)), "a path has one reading");
        assert_eq!(permission(&HttpRule::default()).rule, Some(permission::Rule::Any(true)));
        assert_eq!(rbac(&[]).policies.len(), 1, "no rule at all allows any request");
    }
}
