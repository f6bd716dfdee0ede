// From the wire's JSON (Hubble's GetFlowsResponse in proto3 JSON) to the rows that the page shows.
import { readRequest, type Request } from './request.ts';
import { plain } from './text.ts';

/** A policy that decided. */
export interface Policy {
  kind: string;
  namespace: string;
  name: string;
}

/** One side of a flow. */
export interface Party {
  ip: string;
  /** 0 where the protocol has no ports. */
  port: number;
  identity: number;
  namespace: string;
  pod: string;
  /** Its workload's name, or the best guess from labels and the pod's name. */
  workload: string;
  kind: string;
  /** `world`, `host`, `remote-node`...; empty for pods. */
  reserved: string;
  labels: readonly string[];
  /** DNS names that the address was asked for by. */
  names: readonly string[];
  /** What the map and the groups know it by. */
  key: string;
}

/** One flow, seen from who began it. */
export interface Row {
  serial: number;
  time: number;
  node: string;
  verdict: string;
  /** Name in Hubble's DropReason; empty unless dropped. */
  reason: string;
  /** INGRESS, EGRESS or empty. */
  direction: string;
  reply: boolean;
  protocol: string;
  /** Kind of record: `to-endpoint`, `drop`, `policy-verdict`, `http-request`... */
  type: string;
  source: Party;
  destination: Party;
  /** namespace/name of the Service that the source used. */
  service: string;
  summary: string;
  deniedBy: readonly Policy[];
  /** Without a rule that denies: the policies that isolate the pod. */
  isolatedBy: readonly Policy[];
  allowedBy: readonly Policy[];
  /** What the record tells of its connection; a node that does not say so sends a record for each. */
  event: 'new' | 'update' | 'end' | 'drop' | 'request';
  /** What was asked inside of the connection, of a record that a proxy made. */
  request: Request | null;
  /** Both directions so far. */
  bytes: number;
  /** Milliseconds from the SYN to its answer; 0: not known. */
  roundTrip: number;
  packets: number;
  /** The flow's JSON as it came. */
  raw: string;
}

/** Flows that somebody counted and did not deliver. */
export interface Loss {
  node: string;
  /** HUBBLE_RING_BUFFER, PERF_EVENT_RING_BUFFER, OBSERVER_EVENTS_QUEUE... */
  place: string;
  count: number;
  first: number;
  last: number;
}

/** What the relay says of nodes. */
export interface NodeNews {
  state: string;
  nodes: string[];
  message: string;
  time: number;
}

/** One message of the stream. */
export type Message =
  | { kind: 'flow'; row: Row }
  | { kind: 'loss'; loss: Loss }
  | { kind: 'nodes'; news: NodeNews }
  | { kind: 'other' };

type Json = Record<string, unknown>;

/** Longer than any label that Kubernetes accepts: a label that is cut would select nothing. */
const LABEL = 512;

let serials = 0;

const isObject = (value: unknown): value is Json =>
  typeof value === 'object' && value !== null && !Array.isArray(value);
const object = (value: unknown): Json => (isObject(value) ? value : {});
const list = (value: unknown): unknown[] => (Array.isArray(value) ? value.slice(0, 64) : []);

/** proto3 JSON writes 64-bit numbers as text. */
function whole(value: unknown): number {
  const n = typeof value === 'string' ? Number(value) : value;
  return typeof n === 'number' && Number.isFinite(n) && n >= 0 ? Math.trunc(n) : 0;
}

function time(value: unknown, otherwise: number): number {
  const ms = typeof value === 'string' ? Date.parse(value) : Number.NaN;
  return Number.isFinite(ms) ? ms : otherwise;
}

/** Reads one message; null when it is none that a page could use. */
export function read(text: string, now = Date.now()): Message | null {
  let message: unknown;
  try {
    message = JSON.parse(text);
  } catch {
    return null;
  }
  if (!isObject(message)) return null;
  if (isObject(message.flow)) return { kind: 'flow', row: row(message, message.flow, now, text) };
  if (isObject(message.lost_events)) {
    const lost = message.lost_events;
    const at = time(message.time, now);
    const loss = {
      node: plain(message.node_name),
      place: plain(lost.source) || 'UNKNOWN_LOST_EVENT_SOURCE',
      count: whole(lost.num_events_lost),
      first: time(lost.first, at),
      last: time(lost.last, at),
    };
    return loss.count ? { kind: 'loss', loss } : { kind: 'other' };
  }
  if (isObject(message.node_status)) {
    const status = message.node_status;
    const news = {
      state: plain(status.state_change),
      nodes: list(status.node_names).map((text) => plain(text)),
      message: plain(status.message),
      time: time(message.time, now),
    };
    return { kind: 'nodes', news };
  }
  return { kind: 'other' };
}

const TRACE_POINTS: Record<string, string> = { UNKNOWN_POINT: 'trace' };
const EVENTS: Record<string, Row['event']> = { CONNECTION_NEW: 'new', CONNECTION_UPDATE: 'update', CONNECTION_END: 'end' };

function row(message: Json, flow: Json, now: number, raw: string): Row {
  const ip = object(flow.IP);
  const [protocol, l4] = transport(flow.l4);
  const port = (value: unknown) => Math.min(whole(value), 65535);
  const sent = party(flow.source, ip.source, port(l4.source_port), flow.source_names);
  const received = party(flow.destination, ip.destination, port(l4.destination_port), flow.destination_names);
  const verdict = plain(flow.verdict) || 'VERDICT_UNKNOWN';
  const reply = flow.is_reply === true;
  const service = object(reply ? flow.source_service : flow.destination_service);
  const reason = plain(flow.drop_reason_desc);
  const weir = object(flow.weir);
  const request = readRequest(flow.l7);
  const isRequest = request !== null || whole(object(flow.event_type).type) === 129;
  return {
    serial: (serials += 1),
    time: time(flow.time ?? message.time, now),
    node: plain(flow.node_name ?? message.node_name),
    verdict,
    reason: verdict === 'DROPPED' ? reason || 'DROP_REASON_UNKNOWN' : '',
    direction: plain(flow.traffic_direction).replace('TRAFFIC_DIRECTION_UNKNOWN', ''),
    reply,
    protocol,
    type: type(flow),
    source: reply ? received : sent,
    destination: reply ? sent : received,
    service: service.name ? `${plain(service.namespace)}/${plain(service.name)}` : plain(weir.service),
    summary: plain(flow.Summary),
    deniedBy: policies(flow, 'denied'),
    allowedBy: policies(flow, 'allowed'),
    isolatedBy: policyList(weir.isolated_by),
    event: isRequest ? 'request' : verdict === 'DROPPED' ? 'drop' : (EVENTS[plain(weir.event)] ?? 'new'),
    request,
    bytes: whole(weir.bytes_sent) + whole(weir.bytes_received),
    packets: whole(weir.packets_sent) + whole(weir.packets_received),
    roundTrip: whole(weir.round_trip_ns) / 1e6,
    raw,
  };
}

function transport(value: unknown): [string, Json] {
  for (const [name, l4] of Object.entries(object(value))) return [plain(name), object(l4)];
  return ['', {}];
}

function type(flow: Json): string {
  const l7 = object(flow.l7);
  if (isObject(flow.l7)) {
    const layer = 'dns' in l7 ? 'dns' : 'kafka' in l7 ? 'kafka' : 'http';
    return `${layer}-${plain(l7.type).toLowerCase() || 'record'}`;
  }
  switch (whole(object(flow.event_type).type)) {
    case 1:
      return 'drop';
    case 5:
      return 'policy-verdict';
    case 4: {
      const point = plain(flow.trace_observation_point);
      return TRACE_POINTS[point] ?? (point.toLowerCase().replaceAll('_', '-') || 'trace');
    }
    default:
      return flow.verdict === 'DROPPED' ? 'drop' : 'flow';
  }
}

function policies(flow: Json, what: 'allowed' | 'denied'): Policy[] {
  return policyList([...list(flow[`egress_${what}_by`]), ...list(flow[`ingress_${what}_by`])]);
}

function policyList(value: unknown): Policy[] {
  const found = new Map<string, Policy>();
  for (const one of list(value).map(object)) {
    const policy = { kind: plain(one.kind), namespace: plain(one.namespace), name: plain(one.name) };
    if (policy.name) found.set(policyText(policy), policy);
  }
  return [...found.values()];
}

/** `namespace/name`, with the kind unless it is the usual one. */
export function policyText(policy: Policy): string {
  const name = policy.namespace ? `${policy.namespace}/${policy.name}` : policy.name;
  return policy.kind && policy.kind !== 'NetworkPolicy' ? `${policy.kind} ${name}` : name;
}

// Parties repeat in nearly every flow, so one object serves all the rows that have it.
const parties = new Map<string, Party>();
const PARTIES_KEPT = 20_000;

function party(value: unknown, address: unknown, port: number, names: unknown): Party {
  const end = object(value);
  const ip = plain(address);
  // Everything that is shown of a party is part of the key: a pod whose labels change is another party.
  const labels = list(end.labels).map((text) => plain(text, LABEL));
  const dns = list(names).map((text) => plain(text));
  const workload = object(list(end.workloads)[0]);
  const key = JSON.stringify([ip, port, end.identity, end.namespace, end.pod_name, labels, dns, workload.name]);
  const known = parties.get(key);
  if (known) return known;
  const made = makeParty(end, ip, port, labels, dns, workload);
  if (parties.size >= PARTIES_KEPT) parties.clear();
  parties.set(key, made);
  return made;
}

function makeParty(end: Json, ip: string, port: number, labels: string[], names: string[], workload: Json): Party {
  const reserved = labels.find((label) => label.startsWith('reserved:'))?.slice('reserved:'.length) ?? '';
  const namespace = plain(end.namespace);
  const pod = plain(end.pod_name);
  const made: Party = {
    ip,
    port,
    identity: whole(end.identity),
    namespace,
    pod,
    workload: plain(workload.name) || guessWorkload(pod, labels),
    kind: plain(workload.kind),
    reserved: namespace ? '' : reserved,
    labels,
    names,
    key: '',
  };
  made.key = keyOf(made);
  return made;
}

const NAME_LABELS = ['app.kubernetes.io/name', 'app', 'k8s-app', 'name', 'app.kubernetes.io/component'];

/** The value of a Kubernetes label. */
export function label(labels: readonly string[], key: string): string {
  const found = labels.find((text) => text.startsWith(`k8s:${key}=`) || text.startsWith(`${key}=`));
  return found ? found.slice(found.indexOf('=') + 1) : '';
}

function guessWorkload(pod: string, labels: readonly string[]): string {
  for (const key of NAME_LABELS) {
    const name = label(labels, key);
    if (name) return name;
  }
  // The names that a Deployment, a DaemonSet or a StatefulSet gives to its pods.
  return pod.replace(/-[a-f0-9]{6,10}-[a-z0-9]{5}$/, '').replace(/-([a-z0-9]{5}|\d{1,4})$/, '');
}

function keyOf(party: Party): string {
  if (party.namespace) return `${party.namespace}/${party.workload || party.pod || party.identity}`;
  if (party.reserved && party.reserved !== 'world') return `reserved:${party.reserved}`;
  if (party.names[0]) return `name:${party.names[0]}`;
  if (party.reserved === 'world') return 'reserved:world';
  return party.ip ? `ip:${party.ip}` : 'unknown';
}

const RESERVED_WORDS: Record<string, string> = {
  world: 'outside the cluster',
  host: 'this node',
  'remote-node': 'another node',
  'kube-apiserver': 'Kubernetes API',
  unmanaged: 'pod without Weir',
  health: 'health check',
  init: 'starting pod',
  ingress: 'ingress',
  unknown: 'unknown sender',
};

/** A key in the words that people use for it. */
export function keyText(key: string): string {
  if (key.startsWith('reserved:')) return RESERVED_WORDS[key.slice(9)] ?? key.slice(9);
  if (key.startsWith('name:')) return key.slice(5);
  if (key.startsWith('ip:')) return key.slice(3);
  return key;
}

/** The namespace of a key; empty when it is none of a pod. */
export function namespaceOf(key: string): string {
  return /^(reserved|name|ip|from|to|ns):/.test(key) || !key.includes('/') ? '' : key.slice(0, key.indexOf('/'));
}

/** A side as one line: the pod, else a name, else the address. */
export function partyText(party: Party): string {
  if (party.pod) return `${party.namespace}/${party.pod}`;
  if (party.namespace) return party.key;
  return party.names[0] ?? (party.ip || keyText(party.key));
}

/** `5432/TCP`, or the protocol alone. */
export function portText(row: Row): string {
  return row.destination.port ? `${row.destination.port}/${row.protocol}` : row.protocol || 'no port';
}
