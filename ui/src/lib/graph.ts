// From pairs of workloads to what the map draws: folded by namespace, and never more than it can show.
import { keyText, namespaceOf } from './flow.ts';
import type { Edge, Model } from './model.ts';
import { type Kind, quantile, type Requests } from './request.ts';

/** What the map draws at most. */
export const CAPS = { nodes: 150, edges: 1_000 };

/** One box. */
export interface Box {
  id: string;
  title: string;
  namespace: string;
  /** What is outside the cluster: callers left, the called right. */
  edge?: 'left' | 'right';
  /** How many workloads it stands for; 1 unless folded. */
  folds: number;
  drops: number;
}

/** One line. */
export interface Line {
  id: string;
  from: string;
  to: string;
  /** Per second, now. */
  rate: number;
  dropRate: number;
  /** Within the window. */
  flows: number;
  drops: number;
  /** The commonest ports, the most used first. */
  ports: string[];
  reasons: Map<string, number>;
  /** What is asked, where a proxy sees it; null where none does. */
  asked: Asked | null;
  last: number;
  /** When something last passed; 0: never. */
  passed: number;
  edges: Edge[];
}

/** Requests of one line. */
export interface Asked {
  protocols: string[];
  /** Per second, now. */
  rate: number;
  answered: number;
  faults: number;
  denied: number;
}

/** The drawing. */
export interface Graph {
  boxes: Box[];
  lines: Line[];
  /** Namespaces that were folded as there was no room for their workloads. */
  folded: string[];
  hidden: { boxes: number; lines: number };
}

/** Draws the pairs that `model` has at `now`. */
export function graph(model: Model, now: number, level: 'namespace' | 'workload', toggled: readonly string[]): Graph {
  const edges = [...model.edges.values()];
  const closed = new Set<string>();
  for (const name of namespaces(edges).keys()) {
    if ((level === 'namespace') !== toggled.includes(name)) closed.add(name);
  }
  const folded = makeRoom(edges, closed);
  return draw(model, now, edges, closed, folded);
}

/** The workloads of every namespace. */
function namespaces(edges: readonly Edge[]): Map<string, Set<string>> {
  const all = new Map<string, Set<string>>();
  for (const key of edges.flatMap((edge) => [edge.from, edge.to])) {
    const name = namespaceOf(key);
    if (!name) continue;
    const members = all.get(name) ?? new Set();
    all.set(name, members.add(key));
  }
  return all;
}

/** Closes the largest namespaces until what is open fits. */
function makeRoom(edges: readonly Edge[], closed: Set<string>): string[] {
  const open = [...namespaces(edges)].filter(([name]) => !closed.has(name)).sort(([, a], [, b]) => b.size - a.size);
  let count = new Set(edges.flatMap((edge) => [idOf(edge.from, closed, 'from'), idOf(edge.to, closed, 'to')])).size;
  const folded: string[] = [];
  for (const [name, members] of open) {
    if (count <= CAPS.nodes || members.size < 2) break;
    closed.add(name);
    folded.push(name);
    count -= members.size - 1;
  }
  return folded.sort();
}

/**
 * The box of a key: its own, or its namespace's. What is no pod has a box as client and another one as
 * server: the world that calls the shop is another one than the world that the shop calls.
 */
function idOf(key: string, closed: ReadonlySet<string>, side: 'from' | 'to'): string {
  const name = namespaceOf(key);
  if (!name) return `${side}:${key}`;
  return closed.has(name) ? `ns:${name}` : key;
}

/** The key that a box of one key stands for. */
export const keyOfBox = (id: string): string => id.replace(/^(from|to):/, '');

/** What a box is called. */
export function boxText(id: string): string {
  return id.startsWith('ns:') ? `namespace ${id.slice(3)}` : keyText(keyOfBox(id));
}

function draw(model: Model, now: number, edges: readonly Edge[], closed: ReadonlySet<string>, folded: string[]): Graph {
  const lines = new Map<string, Line>();
  const members = new Map<string, Set<string>>();
  for (const edge of edges) {
    const from = idOf(edge.from, closed, 'from');
    const to = idOf(edge.to, closed, 'to');
    for (const [id, key] of [[from, edge.from], [to, edge.to]] as const) {
      members.set(id, (members.get(id) ?? new Set()).add(key));
    }
    addTo(lines, model, now, from, to, edge);
  }
  const sorted = [...lines.values()].sort(
    (a, b) => Number(b.drops > 0) - Number(a.drops > 0) || b.drops + b.flows - (a.drops + a.flows) || (a.id < b.id ? -1 : 1),
  );
  const shown = new Set<string>();
  const kept: Line[] = [];
  for (const line of sorted) {
    const more = new Set([line.from, line.to].filter((id) => !shown.has(id)));
    if (kept.length >= CAPS.edges || shown.size + more.size > CAPS.nodes) continue;
    for (const id of more) shown.add(id);
    line.asked = askedOf(model, now, line);
    kept.push(line);
  }
  const boxes = [...shown].sort().map((id) => box(id, members.get(id)?.size ?? 1));
  for (const line of kept) {
    const target = boxes.find((one) => one.id === line.to);
    if (target) target.drops += line.drops;
  }
  kept.sort((a, b) => (a.id < b.id ? -1 : 1));
  return { boxes, lines: kept, folded, hidden: { boxes: members.size - boxes.length, lines: lines.size - kept.length } };
}

function askedOf(model: Model, now: number, line: Line): Asked | null {
  const edges = line.edges.filter((edge) => edge.requests);
  if (!edges.length) return null;
  const { buckets, seconds } = model.recent(now);
  const all = edges.map((edge) => edge.requests!);
  const sum = (of: (requests: Requests) => number) => all.reduce((total, one) => total + of(one), 0);
  return {
    protocols: [...new Set(all.flatMap((one) => [...one.protocols]))].sort(),
    rate: edges.reduce((total, edge) => total + edge.asked.sum(model.bucket(now), buckets), 0) / seconds,
    answered: sum((one) => one.all.answered),
    faults: sum((one) => one.all.faults),
    denied: sum((one) => one.all.denied),
  };
}

/** What `part` of the newest answers took at most, in milliseconds; null where none says how long. */
export function speedOf(line: Line, part: number): number | null {
  return quantile(line.edges.flatMap((edge) => (edge.requests ? [edge.requests.all.times] : [])), part);
}

/** Every kind of request of a line, the most asked first. */
export function requestsOf(line: Line): [string, Kind[]][] {
  const kinds = new Map<string, Kind[]>();
  for (const edge of line.edges) {
    for (const [text, kind] of edge.requests?.kinds ?? []) kinds.set(text, [...(kinds.get(text) ?? []), kind]);
  }
  const asked = (list: Kind[]) => list.reduce((total, kind) => total + kind.asked, 0);
  return [...kinds].sort(([, a], [, b]) => asked(b) - asked(a));
}

function addTo(lines: Map<string, Line>, model: Model, now: number, from: string, to: string, edge: Edge): void {
  const id = `${from}|${to}`;
  let line = lines.get(id);
  if (!line) {
    line = { id, from, to, rate: 0, dropRate: 0, flows: 0, drops: 0, ports: [], reasons: new Map(), asked: null, last: 0, passed: 0, edges: [] };
    lines.set(id, line);
  }
  const bucket = model.bucket(now);
  const { buckets, seconds } = model.recent(now);
  line.flows += edge.forwarded.sum(bucket);
  line.drops += edge.dropped.sum(bucket);
  line.rate += edge.forwarded.sum(bucket, buckets) / seconds;
  line.dropRate += edge.dropped.sum(bucket, buckets) / seconds;
  line.last = Math.max(line.last, edge.last);
  line.passed = Math.max(line.passed, edge.passed);
  for (const [reason, count] of edge.reasons) line.reasons.set(reason, (line.reasons.get(reason) ?? 0) + count);
  line.edges.push(edge);
  const ports = [...edge.ports].sort(([, a], [, b]) => b.forwarded + b.dropped - a.forwarded - a.dropped);
  for (const [port] of ports) if (!line.ports.includes(port) && line.ports.length < 8) line.ports.push(port);
}

function box(id: string, folds: number): Box {
  if (id.startsWith('ns:')) return { id, title: id.slice(3), namespace: '', folds, drops: 0 };
  const namespace = namespaceOf(keyOfBox(id));
  const title = namespace ? id.slice(namespace.length + 1) : boxText(id).replace('outside the cluster', 'outside');
  const edge = namespace ? undefined : id.startsWith('from:') ? 'left' : 'right';
  return { id, title, namespace, edge, folds: 1, drops: 0 };
}
