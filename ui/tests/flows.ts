// Makes flows as the agent sends them (Hubble's GetFlowsResponse in proto3 JSON, names as in the
// proto files), for tests: a shop with a few denied flows, or as many workloads as are asked for.

/** A pod, or something outside. */
export interface End {
  namespace: string;
  pod: string;
  app: string;
  ip: string;
  identity: number;
  kind?: string;
}

/** What one flow is made from. */
export interface Spec {
  from: End | 'world';
  to: End | 'world';
  port: number;
  protocol?: 'TCP' | 'UDP' | 'SCTP' | 'ICMPv4';
  reason?: string;
  direction?: 'INGRESS' | 'EGRESS';
  deniedBy?: { namespace: string; name: string; kind?: string }[];
  allowedBy?: { namespace: string; name: string; kind?: string }[];
  service?: { namespace: string; name: string };
  node?: string;
  reply?: boolean;
  event?: 'CONNECTION_NEW' | 'CONNECTION_UPDATE' | 'CONNECTION_END';
  isolatedBy?: { namespace: string; name: string; kind?: string }[];
  time?: number;
  /** What a proxy saw inside of the connection. */
  l7?: { http?: object; dns?: object; kafka?: object; type?: 'REQUEST' | 'RESPONSE'; ms?: number };
}

/** A pod of a workload. */
export function pod(namespace: string, app: string, n = 0, more: Partial<End> = {}): End {
  let hash = 7;
  for (const c of namespace + app) hash = (hash * 31 + c.charCodeAt(0)) % 60_000;
  const name = `${app}-6d5f9c7b8-${'abcdefghij'[n % 10]}x${'klmnopqrst'[(n / 10) % 10 | 0]}2z`;
  return { namespace, app, pod: name, ip: `10.${1 + (hash % 3)}.${hash % 200}.${(hash + n) % 250}`, identity: 1000 + hash, kind: 'Deployment', ...more };
}

const WORLD = { ip: '203.0.113.9', identity: 2 };

function end(one: End | 'world'): object {
  if (one === 'world') return { identity: WORLD.identity, labels: ['reserved:world'] };
  return {
    ID: one.identity % 500,
    identity: one.identity,
    namespace: one.namespace,
    labels: [
      `k8s:app=${one.app}`,
      `k8s:pod-template-hash=6d5f9c7b8`,
      `k8s:io.kubernetes.pod.namespace=${one.namespace}`,
      `k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=${one.namespace}`,
    ],
    pod_name: one.pod,
    workloads: one.kind ? [{ name: one.app, kind: one.kind }] : [],
  };
}

let made = 0;

/** One message of the stream. */
export function flow(spec: Spec): Record<string, unknown> {
  made += 1;
  const time = new Date(spec.time ?? Date.now()).toISOString();
  const protocol = spec.protocol ?? 'TCP';
  const clientPort = 32_768 + (made % 20_000);
  // An answer is sent by the server; `from` is who asked.
  const isAnswer = spec.l7?.type === 'RESPONSE';
  const [from, to] = isAnswer ? [spec.to, spec.from] : [spec.from, spec.to];
  const ip = (one: End | 'world') => (one === 'world' ? WORLD.ip : one.ip);
  const dropped = spec.reason !== undefined;
  const ports = isAnswer ? { source_port: spec.port, destination_port: clientPort } : { source_port: clientPort, destination_port: spec.port };
  const l4 =
    protocol === 'TCP' ? { TCP: { ...ports, flags: { SYN: true } } } : protocol === 'ICMPv4' ? { ICMPv4: { type: 8 } } : { [protocol]: ports };
  const direction = spec.direction ?? (spec.to === 'world' ? 'EGRESS' : 'INGRESS');
  const side = direction === 'EGRESS' ? 'egress' : 'ingress';
  const body = {
    time,
    uuid: `00000000-0000-4000-8000-${String(made).padStart(12, '0')}`,
    verdict: dropped ? 'DROPPED' : 'FORWARDED',
    ethernet: { source: '0a:58:0a:01:00:01', destination: '0a:58:0a:01:00:02' },
    IP: { source: ip(from), destination: ip(to), ipVersion: 'IPv4' },
    l4,
    source: end(from),
    destination: end(to),
    Type: 'L3_L4',
    node_name: spec.node ?? 'node1',
    event_type: dropped ? { type: 1, sub_type: 133 } : { type: 4 },
    traffic_direction: direction,
    ...(spec.service ? { [isAnswer ? 'source_service' : 'destination_service']: spec.service } : {}),
    ...(dropped ? { drop_reason_desc: spec.reason } : { trace_observation_point: 'TO_ENDPOINT', is_reply: spec.reply === true }),
    ...(spec.deniedBy ? { [`${side}_denied_by`]: spec.deniedBy } : {}),
    ...(spec.allowedBy ? { [`${side}_allowed_by`]: spec.allowedBy } : {}),
    weir: {
      event: dropped ? 'PACKET_DROP' : (spec.event ?? 'CONNECTION_NEW'),
      packets_sent: '6',
      packets_received: '5',
      bytes_sent: '1200',
      bytes_received: '84210',
      protocol: protocol === 'TCP' ? 6 : 17,
      isolated_by: spec.isolatedBy ?? [],
    },
    Summary: protocol === 'TCP' ? 'TCP Flags: SYN' : protocol === 'ICMPv4' ? 'ICMPv4 EchoRequest' : protocol,
  };
  return { flow: spec.l7 ? { ...body, ...seen(spec.l7, dropped) } : body, node_name: body.node_name, time };
}

/** What makes a flow one of layer 7. */
function seen({ type = 'REQUEST', ms = 0, ...record }: NonNullable<Spec['l7']>, dropped: boolean): object {
  const isAnswer = type === 'RESPONSE';
  const http = record.http as Record<string, unknown> | undefined;
  return {
    Type: 'L7',
    event_type: { type: 129 },
    is_reply: isAnswer,
    l7: { type, ...(isAnswer ? { latency_ns: String(ms * 1e6) } : {}), ...record },
    weir: { event: isAnswer ? 'L7_RESPONSE' : 'L7_REQUEST', isolated_by: dropped ? [{ namespace: 'shop', name: 'backend-serves-frontend', kind: 'CiliumNetworkPolicy' }] : [] },
    Summary: http ? `HTTP/1.1 ${isAnswer ? `${http.code} ${ms}ms ` : ''}(${http.method} ${http.url})` : 'DNS',
  };
}

const frontend = pod('shop', 'frontend');
const backend = pod('shop', 'backend');
const cart = pod('shop', 'cart');
const database = pod('data', 'database', 0, { pod: 'database-0', kind: 'StatefulSet' });
const cache = pod('data', 'cache');
const dns = pod('kube-system', 'coredns');
const agent = pod('monitoring', 'prometheus', 0, { pod: 'prometheus-0', kind: 'StatefulSet' });
const scanner = pod('default', 'debug', 0, { pod: 'debug', kind: '' });

const by = (name: string, namespace = 'shop', kind = 'NetworkPolicy') => ({ namespace, name, kind });

/** What happens in the shop: the share of each, and the flow. */
export const SHOP: [number, Spec][] = [
  [12, { from: 'world', to: frontend, port: 8080, allowedBy: [by('frontend-serves-everyone')] }],
  [9, { from: frontend, to: backend, port: 8080, service: { namespace: 'shop', name: 'backend' }, node: 'node2', allowedBy: [by('backend-serves-frontend')] }],
  [9, { from: frontend, to: backend, port: 8080, service: { namespace: 'shop', name: 'backend' }, direction: 'EGRESS' }],
  [4, { from: frontend, to: cart, port: 7070, node: 'node2' }],
  [6, { from: backend, to: database, port: 5432, service: { namespace: 'data', name: 'database' }, allowedBy: [by('database-serves-backend', 'data')] }],
  [5, { from: cart, to: cache, port: 6379, node: 'node3' }],
  [8, { from: frontend, to: dns, port: 53, protocol: 'UDP', service: { namespace: 'kube-system', name: 'kube-dns' }, node: 'node3' }],
  [4, { from: backend, to: dns, port: 53, protocol: 'UDP', service: { namespace: 'kube-system', name: 'kube-dns' }, node: 'node3' }],
  [3, { from: agent, to: frontend, port: 9090 }],
  [3, { from: agent, to: backend, port: 9090, node: 'node2' }],
  [2, { from: backend, to: 'world', port: 443 }],
  [5, { from: frontend, to: database, port: 5432, reason: 'POLICY_DENIED', service: { namespace: 'data', name: 'database' }, isolatedBy: [by('database-serves-backend', 'data')] }],
  [2, { from: cart, to: backend, port: 8080, reason: 'POLICY_DENIED', node: 'node2', isolatedBy: [by('backend-serves-frontend')] }],
  [2, { from: database, to: 'world', port: 443, reason: 'POLICY_DENIED', direction: 'EGRESS', isolatedBy: [by('database-serves-backend', 'data')] }],
  [1, { from: scanner, to: database, port: 5432, reason: 'POLICY_DENY', deniedBy: [by('no-debug-pods', '', 'ClusterNetworkPolicy')] }],
  [1, { from: backend, to: 'world', port: 9443, reason: 'FIB_LOOKUP_FAILED', direction: 'EGRESS', node: 'node2' }],
  [1, { from: frontend, to: cache, port: 6379, reason: 'SERVICE_BACKEND_NOT_FOUND', direction: 'EGRESS', service: { namespace: 'data', name: 'cache' } }],
];

const http = (method: string, url: string, code?: number) => ({ http: { method, url: `http://backend${url}`, protocol: 'HTTP/1.1', ...(code ? { code } : {}) } });
const asks = { from: frontend, to: backend, port: 8080, node: 'node2', service: { namespace: 'shop', name: 'backend' } };
const names = { from: backend, to: dns, port: 53, protocol: 'UDP' as const, node: 'node3' };

/** What the shop's proxies see. */
export const REQUESTS: [number, Spec][] = [
  [9, { ...asks, l7: http('GET', '/items?page=2') }],
  [9, { ...asks, reply: true, l7: { ...http('GET', '/items?page=2', 200), type: 'RESPONSE', ms: 12 } }],
  [4, { ...asks, l7: http('POST', '/cart') }],
  [3, { ...asks, reply: true, l7: { ...http('POST', '/cart', 201), type: 'RESPONSE', ms: 48 } }],
  [1, { ...asks, reply: true, l7: { ...http('POST', '/cart', 503), type: 'RESPONSE', ms: 1400 } }],
  [2, { ...asks, reason: 'POLICY_DENIED', l7: http('DELETE', '/admin/users') }],
  [3, { ...names, l7: { dns: { query: 'database.data.svc.cluster.local.', qtypes: ['A'] } } }],
  [2, { ...names, reply: true, l7: { dns: { query: 'database.data.svc.cluster.local.', qtypes: ['A'], ips: ['10.1.0.9'] }, type: 'RESPONSE', ms: 1 } }],
  [1, { ...names, reply: true, l7: { dns: { query: 'paypal.example.', qtypes: ['A'], rcode: 3 }, type: 'RESPONSE', ms: 30 } }],
];

/** Numbers that look random and are the same in every run. */
export function dice(seed = 1): () => number {
  let state = seed;
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2_147_483_648;
    return state / 2_147_483_648;
  };
}

/** `count` flows of the shop between two times, the oldest first. */
export function shop(count: number, from: number, to: number, seed = 1, what = SHOP): Record<string, unknown>[] {
  const random = dice(seed);
  const total = what.reduce((sum, [share]) => sum + share, 0);
  return Array.from({ length: count }, (_, i) => {
    let left = random() * total;
    const spec = what.find(([share]) => (left -= share) < 0)?.[1] ?? what[0]![1];
    return flow({ ...spec, time: from + ((i + 0.5) / count) * (to - from) });
  });
}

/** Flows over `pairs` different pairs of `workloads` workloads. */
export function crowd(workloads: number, pairs: number, namespaces: number, time: number, seed = 3): Record<string, unknown>[] {
  const random = dice(seed);
  const ends = Array.from({ length: workloads }, (_, i) => pod(`team-${i % namespaces}`, `service-${i}`, i, { ip: `10.9.${i >> 8}.${i & 255}` }));
  const seen = new Set<string>();
  const flows: Record<string, unknown>[] = [];
  while (flows.length < pairs) {
    const a = Math.floor(random() * workloads);
    const b = Math.floor(random() * workloads);
    if (a === b || seen.has(`${a} ${b}`)) continue;
    seen.add(`${a} ${b}`);
    const drop = random() < 0.05;
    flows.push(flow({ from: ends[a]!, to: ends[b]!, port: 8000 + (b % 20), time: time + flows.length / 1000, ...(drop ? { reason: 'POLICY_DENIED' } : {}) }));
  }
  return flows;
}
