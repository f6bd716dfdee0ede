// The rule that would allow a denied flow, as YAML that can be applied.
import type { Party, Row } from './flow.ts';
import { isPolicy } from './reasons.ts';

/** A rule, with what to know before applying it; or why there is none. */
export type Allow = { yaml: string; notes: string[] } | { none: string };

// Labels that differ between pods of one workload, or between two releases of it.
const VOLATILE = [
  /^pod-template-(hash|generation)$/,
  /^controller-revision-hash$/,
  /^statefulset\.kubernetes\.io\//,
  /^apps\.kubernetes\.io\/pod-index$/,
  /^(batch\.kubernetes\.io\/)?(controller-uid|job-name|job-completion-index)$/,
  /^app\.kubernetes\.io\/(version|managed-by)$/,
  /^(helm\.sh\/chart|chart|heritage|release-revision)$/,
];
// What stands in an identity besides the pod's own labels.
const FOREIGN = /^io\.(kubernetes|cilium)\./;

type Yaml = string | number | Yaml[] | { [key: string]: Yaml };

/** The rule that allows the dropped flow of `row`. */
export function allow(row: Row): Allow {
  if (row.verdict !== 'DROPPED') return { none: 'The flow was not dropped.' };
  if (!isPolicy(row.reason)) return { none: 'No policy dropped this flow, so no rule can allow it.' };
  if (row.reason === 'AUTH_REQUIRED') return { none: 'The policy demands authentication; a further rule does not change that.' };
  if (row.reason === 'POLICY_DENY') {
    const names = row.deniedBy.map((policy) => policy.name).join(', ');
    return { none: `A deny rule counts before every allow: change ${names || 'the policy that denies it'} instead.` };
  }
  const ingress = row.direction ? row.direction === 'INGRESS' : row.destination.namespace !== '';
  const subject = ingress ? row.destination : row.source;
  const peer = ingress ? row.source : row.destination;
  if (!subject.namespace) return { none: 'The flow does not say which pod the policy is for.' };
  const selector = selectorOf(subject);
  if (!Object.keys(selector).length) {
    return { none: `The pod ${subject.pod || subject.key} has no labels that a policy could select it by: give it one, as app.` };
  }
  const from = peerOf(peer);
  if (!from) return { none: 'The flow does not say who the other side is.' };
  const notes = [...from.notes];
  notes.push(...wayNotes(row, ingress));
  return row.protocol.startsWith('ICMP')
    ? icmp(row, ingress, subject, peer, selector, notes)
    : { yaml: networkPolicy(row, ingress, subject, selector, from.rule), notes };
}

function networkPolicy(row: Row, ingress: boolean, subject: Party, selector: Record<string, string>, peer: Yaml): string {
  const port: { [key: string]: Yaml } = {};
  if (['TCP', 'UDP', 'SCTP'].includes(row.protocol)) {
    port.protocol = row.protocol;
    if (row.destination.port) port.port = row.destination.port;
  }
  const rule: { [key: string]: Yaml } = { [ingress ? 'from' : 'to']: [peer] };
  if (Object.keys(port).length) rule.ports = [port];
  return document('networking.k8s.io/v1', 'NetworkPolicy', row, subject, {
    podSelector: { matchLabels: selector },
    policyTypes: [ingress ? 'Ingress' : 'Egress'],
    [ingress ? 'ingress' : 'egress']: [rule],
  });
}

// NetworkPolicy has no words for ICMP.
function icmp(row: Row, ingress: boolean, subject: Party, peer: Party, selector: Record<string, string>, notes: string[]): Allow {
  const l4 = /"(?:ICMPv4|ICMPv6)":\{[^}]*"type":(\d+)/.exec(row.raw);
  const side = ingress ? 'ingress' : 'egress';
  const prefix = ingress ? 'from' : 'to';
  const rule: { [key: string]: Yaml } = {};
  if (peer.namespace) {
    rule[`${prefix}Endpoints`] = [{ matchLabels: { 'k8s:io.kubernetes.pod.namespace': peer.namespace, ...selectorOf(peer) } }];
  } else if (peer.reserved && peer.reserved !== 'world') {
    rule[`${prefix}Entities`] = [peer.reserved];
  } else {
    rule[`${prefix}CIDR`] = [cidr(peer.ip)];
  }
  const type: Yaml = { family: row.protocol === 'ICMPv6' ? 'IPv6' : 'IPv4', type: Number(l4?.[1] ?? (row.protocol === 'ICMPv6' ? 128 : 8)) };
  rule.icmps = [{ fields: [type] }];
  const yaml = document('cilium.io/v2', 'CiliumNetworkPolicy', row, subject, {
    endpointSelector: { matchLabels: selector },
    [side]: [rule],
  });
  return { yaml, notes: ['NetworkPolicy cannot name ICMP, so this is a CiliumNetworkPolicy.', ...notes] };
}

function document(apiVersion: string, kind: string, row: Row, subject: Party, spec: Yaml): string {
  const metadata = { name: name(row), namespace: subject.namespace };
  return write({ apiVersion, kind, metadata, spec });
}

/** The labels by which a policy should select the party: those that its workload keeps. */
export function selectorOf(party: Party): Record<string, string> {
  const selector: Record<string, string> = {};
  for (const text of party.labels) {
    if (!text.startsWith('k8s:')) continue;
    const at = text.indexOf('=');
    const key = text.slice(4, at < 0 ? undefined : at);
    if (FOREIGN.test(key) || VOLATILE.some((pattern) => pattern.test(key))) continue;
    selector[key] = at < 0 ? '' : text.slice(at + 1);
  }
  return selector;
}

function peerOf(party: Party): { rule: Yaml; notes: string[] } | null {
  if (party.namespace) {
    const selector = selectorOf(party);
    const notes = Object.keys(selector).length
      ? []
      : [`The other pod has no labels of its own: the rule allows every pod of ${party.namespace}.`];
    const rule: { [key: string]: Yaml } = {
      namespaceSelector: { matchLabels: { 'kubernetes.io/metadata.name': party.namespace } },
    };
    if (Object.keys(selector).length) rule.podSelector = { matchLabels: selector };
    return { rule, notes };
  }
  if (!party.ip) return null;
  const notes =
    party.reserved === 'world' || !party.reserved
      ? [`${party.ip} is an address${party.names[0] ? ` of ${party.names[0]}` : ''} outside the cluster: if it changes, the rule must, too.`]
      : [`${party.ip} is an address of a node: other nodes need a rule of their own.`];
  return { rule: { ipBlock: { cidr: cidr(party.ip) } }, notes };
}

function wayNotes(row: Row, ingress: boolean): string[] {
  const notes = [];
  if (row.service) notes.push(`The client used Service ${row.service}; rules name the backend's port, ${row.destination.port}.`);
  if (!ingress && row.destination.namespace) notes.push("The destination's own ingress policies still decide, too.");
  if (ingress && row.source.namespace) notes.push("The source's egress policies let the flow pass; only this side denied it.");
  return notes;
}

const cidr = (ip: string) => `${ip}/${ip.includes(':') ? 128 : 32}`;

/** A DNS label of at most 63 characters that says what the rule is for. */
function name(row: Row): string {
  const of = (party: Party) => party.workload || party.pod || party.names[0] || party.reserved || party.ip;
  const port = row.destination.port || row.protocol;
  const text = `allow-${of(row.source)}-to-${of(row.destination)}`.toLowerCase().replace(/[^a-z0-9]+/g, '-');
  return `${text.slice(0, 56).replace(/-+$/, '')}-${port}`.toLowerCase();
}

// A plain scalar that no YAML reader takes for something else.
const PLAIN = /^[A-Za-z][A-Za-z0-9._/-]*$/;
const WORDS = /^(true|false|yes|no|on|off|y|n|null|nan|inf)$/i;

function scalar(value: string | number): string {
  if (typeof value === 'number') return String(value);
  return PLAIN.test(value) && !WORDS.test(value) ? value : JSON.stringify(value);
}

function write(value: Yaml, indent = ''): string {
  if (Array.isArray(value)) {
    return value.map((item) => `${indent}- ${write(item, `${indent}  `).trimStart()}`).join('');
  }
  if (typeof value !== 'object') return `${indent}${scalar(value)}\n`;
  let text = '';
  for (const [key, inner] of Object.entries(value)) {
    const isScalar = typeof inner !== 'object';
    if (isScalar) text += `${indent}${scalar(key)}: ${scalar(inner)}\n`;
    else text += `${indent}${scalar(key)}:\n${write(inner, Array.isArray(inner) ? indent : `${indent}  `)}`;
  }
  return text;
}
