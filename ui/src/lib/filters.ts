// The filters of `weir observe`, by the same names: all must hold; of one given several times, any.

/** One filter. */
export interface Term {
  key: string;
  value: string;
  not: boolean;
}

/** What a filter is for, as the help of `weir observe` says it. */
export const FILTERS: Record<string, string> = {
  pod: 'from or to a pod whose name begins so: [ns/]prefix',
  'from-pod': 'from a pod',
  'to-pod': 'to a pod',
  namespace: 'from or to a namespace',
  'from-namespace': 'from a namespace',
  'to-namespace': 'to a namespace',
  label: 'from or to labels: app=web, app!=db, app in (a,b), reserved:world',
  'from-label': 'from labels',
  'to-label': 'to labels',
  ip: 'from or to an address or prefix',
  'from-ip': 'from an address or prefix',
  'to-ip': 'to an address or prefix',
  port: 'from or to a port',
  'from-port': 'from a port',
  'to-port': 'to a port',
  identity: 'from or to an identity: a number, world, host...',
  'from-identity': 'from an identity',
  'to-identity': 'to an identity',
  service: 'from or to a Service: [ns/]prefix',
  'to-service': 'to a Service',
  workload: 'from or to a pod of a workload: [kind/]name',
  fqdn: 'from or to a DNS name, as *.example.org',
  protocol: 'tcp, udp, sctp, icmpv4, icmpv6',
  verdict: 'forwarded, dropped...',
  'drop-reason': 'why it was dropped, as policy_denied',
  direction: 'ingress or egress, seen from the pod whose policy judged',
  type: 'drop, l7, policy-verdict, trace, new, update, end',
  'tcp-flags': 'with all of these TCP flags, as syn,ack',
  'ip-version': 'v4 or v6',
  interface: 'seen at this interface',
  'node-name': 'seen by this node, as worker-*',
  uuid: 'the flow of this number',
  'http-status': '404, or 4+ for all that begin with 4',
  'http-method': 'GET, POST...',
  'http-path': 'path of the request, a pattern',
  'http-url': 'URL of the request, a pattern',
  'http-header': 'with this header, as name:value',
  'dns-query': 'asking for this DNS name, a pattern',
  latency: 'answers that took at least this long, as 100ms or 2s',
  'cel-expression': 'an expression of CEL, as _flow.l4.TCP.destination_port > 1024u',
};

/** More than anybody types, and short enough for an address. */
const MOST = 32;

/** Reads `key=value`, `!key=value` or `not key=value`; a text says what is wrong with it. */
export function parseTerm(text: string): Term | string {
  const trimmed = text.trim();
  const not = /^(!|-|not\s)/.test(trimmed);
  const rest = not ? trimmed.replace(/^(!|-|not\s)\s*/, '') : trimmed;
  const at = rest.search(/[=:]/);
  if (at < 1) return `Write a filter as name=value, for example pod=shop/web. Names: ${Object.keys(FILTERS).join(', ')}.`;
  const key = rest.slice(0, at).trim().toLowerCase().replace(/^--/, '').replaceAll('_', '-');
  const value = rest.slice(at + 1).trim();
  if (!Object.hasOwn(FILTERS, key)) return `There is no filter “${key}”. Names: ${Object.keys(FILTERS).join(', ')}.`;
  return value ? { key, value, not } : `The filter ${key} needs a value: ${FILTERS[key]}.`;
}

/** As people write it. */
export const termText = (term: Term): string => `${term.not ? '!' : ''}${term.key}=${term.value}`;

const same = (a: Term, b: Term) => a.key === b.key && a.value === b.value && a.not === b.not;

/** True for one and the same filter. */
export const sameTerms = same;

/** With one more; the same one is not added twice, and its opposite goes. */
export function withTerm(terms: readonly Term[], term: Term): Term[] {
  const rest = terms.filter((one) => !same(one, term) && !same(one, { ...term, not: !term.not }));
  return [...rest, term].slice(-MOST);
}

/** Adds the terms to the parameters of an address. */
export function writeTerms(terms: readonly Term[], to: URLSearchParams): void {
  for (const { key, value, not } of terms) {
    to.append(not ? `not.${key}` : key, value);
  }
}

/** Reads the terms out of the parameters of an address; what is no filter is not one. */
export function readTerms(from: URLSearchParams): Term[] {
  const terms: Term[] = [];
  for (const [key, value] of from) {
    const not = key.startsWith('not.');
    const name = not ? key.slice(4) : key;
    if (Object.hasOwn(FILTERS, name) && value) terms.push({ key: name, value, not });
  }
  return terms.slice(0, MOST);
}

/** The same question for a terminal. */
export function commandLine(terms: readonly Term[], more: readonly string[] = []): string {
  const quoted = (value: string) =>
    /^[\w@%+=:,./-]+$/.test(value) ? value : `'${value.replaceAll("'", `'\\''`)}'`;
  const flags = terms.map(({ key, value, not }) => (not ? `--not ${quoted(`${key}=${value}`)}` : `--${key} ${quoted(value)}`));
  return ['weir observe', ...flags, ...more].join(' ');
}
