// What the page knows: the newest rows, and counts by kind of drop, by pair and in all, over one
// window of time. Every list has an end; what did not fit is counted and told.
import type { Loss, NodeNews, Party, Policy, Row } from './flow.ts';
import { policyText, portText } from './flow.ts';
import { Requests, requestText } from './request.ts';
import { BUCKETS, Series } from './series.ts';

/** The most that is kept of each. */
export const LIMITS = { rows: 10_000, drops: 2_000, edges: 5_000, ports: 24, losses: 50, nodes: 5_000, samples: 8 };

/** Rates are those of the newest seconds; a drop is current when it was seen within them. */
export const NOW_MS = 15_000;
/** A kind of drop that was silent for so long has begun anew. */
const STREAK_MS = 60_000;

/** Drops that have everything in common that people ask for. */
export interface Drop {
  key: string;
  source: Party;
  destination: Party;
  port: string;
  reason: string;
  direction: string;
  policies: readonly Policy[];
  service: string;
  series: Series;
  /** Since when, without a minute of silence. */
  since: number;
  last: number;
  /** Different pods and addresses, up to `LIMITS.samples`. */
  sources: Set<string>;
  targets: Set<string>;
  nodes: Set<string>;
  /** What was asked, where a proxy denied it. */
  requests: Set<string>;
  sample: Row;
}

/** What went from one workload to another. */
export interface Edge {
  key: string;
  from: string;
  to: string;
  forwarded: Directed;
  dropped: Series;
  ports: Map<string, { forwarded: number; dropped: number }>;
  reasons: Map<string, number>;
  /** Null as long as no proxy has seen a request. */
  requests: Requests | null;
  /** Questions, in time. */
  asked: Directed;
  last: number;
  /** When something last passed; 0: never. */
  passed: number;
}

/** Both nodes of a connection report it, so the larger of the two counts is the number. */
export class Directed {
  readonly #series = new Map<string, Series>();

  add(direction: string, bucket: number): void {
    let series = this.#series.get(direction);
    if (!series) this.#series.set(direction, (series = new Series()));
    series.add(bucket);
  }

  sum(now: number, buckets = BUCKETS): number {
    let most = 0;
    for (const series of this.#series.values()) most = Math.max(most, series.sum(now, buckets));
    return most;
  }
}

/** Rows, groups and counts of one query. */
export class Model {
  readonly windowMs: number;
  readonly bucketMs: number;
  readonly drops = new Map<string, Drop>();
  readonly edges = new Map<string, Edge>();
  readonly losses: Loss[] = [];
  readonly nodes = new Map<string, { state: string; message: string; time: number }>();
  readonly forwarded = new Series();
  readonly dropped = new Series();
  /** Flows in all, and the time of the newest. */
  seen = 0;
  newest = 0;
  oldest = Number.POSITIVE_INFINITY;
  /** What did not fit. */
  forgotten = { drops: 0, edges: 0 };
  readonly #rows: Row[] = [];
  #next = 0;

  constructor(windowMs: number) {
    this.windowMs = windowMs;
    this.bucketMs = windowMs / BUCKETS;
  }

  /** The bucket of a time. */
  bucket(ms: number): number {
    return Math.floor(ms / this.bucketMs);
  }

  /** How many of the newest buckets are needed for a rate, and how many seconds these are at `now`. */
  recent(now: number): { buckets: number; seconds: number } {
    const buckets = Math.max(1, Math.ceil(NOW_MS / this.bucketMs));
    const begun = now - this.bucket(now) * this.bucketMs;
    return { buckets, seconds: Math.max(1, ((buckets - 1) * this.bucketMs + begun) / 1000) };
  }

  /** Counts one flow. */
  add(row: Row): void {
    this.seen += 1;
    this.newest = Math.max(this.newest, row.time);
    this.oldest = Math.min(this.oldest, row.time);
    if (this.#rows.length < LIMITS.rows) this.#rows.push(row);
    else this.#rows[this.#next % LIMITS.rows] = row;
    this.#next += 1;
    const bucket = this.bucket(row.time);
    const isDrop = row.verdict === 'DROPPED';
    // A connection has several records and counts once.
    const isCounted = row.event === 'new' || isDrop;
    const isQuestion = row.request !== null && !row.request.isAnswer;
    if (isCounted || isQuestion) (isDrop ? this.dropped : this.forwarded).add(bucket);
    if (isDrop) this.#drop(row, bucket);
    this.#edge(row, bucket, isDrop, isCounted);
  }

  /** The rows that are kept, the newest first. */
  rows(): Row[] {
    const kept = this.#rows.length;
    const rows = new Array<Row>(kept);
    for (let i = 0; i < kept; i += 1) rows[i] = this.#rows[(this.#next - 1 - i + 2 * kept) % kept]!;
    // The nodes' clocks and ways differ a little.
    return rows.sort((a, b) => b.time - a.time || b.serial - a.serial);
  }

  /** Flows that somebody lost. */
  lose(loss: Loss): void {
    const newest = this.losses.at(-1);
    if (newest && newest.node === loss.node && newest.place === loss.place && loss.first - newest.last < 10_000) {
      newest.count += loss.count;
      newest.last = Math.max(newest.last, loss.last);
      return;
    }
    this.losses.push({ ...loss });
    if (this.losses.length > LIMITS.losses) this.losses.shift();
  }

  /** A node came, went or failed. */
  news(news: NodeNews): void {
    for (const name of news.nodes) {
      if (!this.nodes.has(name) && this.nodes.size >= LIMITS.nodes) continue;
      this.nodes.set(name, { state: news.state, message: news.message, time: news.time });
    }
  }

  /** Forgets what is older than the window. */
  expire(now: number): void {
    for (const [key, drop] of this.drops) if (now - drop.last > this.windowMs) this.drops.delete(key);
    for (const [key, edge] of this.edges) if (now - edge.last > this.windowMs) this.edges.delete(key);
  }

  #drop(row: Row, bucket: number): void {
    const policies = row.deniedBy.length ? row.deniedBy : row.isolatedBy;
    const port = portText(row);
    const named = policies.map(policyText).join(' ');
    const layer = row.event === 'request' ? (row.request?.protocol ?? 'L7') : '';
    const key = [row.source.key, row.destination.key, port, row.reason, row.direction, named, layer].join('|');
    let drop = this.drops.get(key);
    if (!drop) {
      this.#makeRoom(this.drops, LIMITS.drops, 'drops');
      drop = {
        key,
        source: row.source,
        destination: row.destination,
        port,
        reason: row.reason,
        direction: row.direction,
        policies,
        service: row.service,
        series: new Series(),
        since: row.time,
        last: row.time,
        sources: new Set(),
        targets: new Set(),
        nodes: new Set(),
        requests: new Set(),
        sample: row,
      };
      this.drops.set(key, drop);
    }
    drop.series.add(bucket);
    if (row.time - drop.last > STREAK_MS) drop.since = row.time;
    drop.since = Math.min(drop.since, row.time);
    if (row.time >= drop.last) {
      drop.last = row.time;
      drop.sample = row;
    }
    if (drop.sources.size < LIMITS.samples) drop.sources.add(row.source.pod || row.source.ip);
    if (drop.targets.size < LIMITS.samples) drop.targets.add(row.destination.pod || row.destination.ip);
    if (drop.nodes.size < LIMITS.samples) drop.nodes.add(row.node);
    if (row.request && drop.requests.size < LIMITS.samples) drop.requests.add(requestText(row.request));
  }

  #edge(row: Row, bucket: number, isDrop: boolean, isCounted: boolean): void {
    const key = `${row.source.key}|${row.destination.key}`;
    let edge = this.edges.get(key);
    if (!edge) {
      this.#makeRoom(this.edges, LIMITS.edges, 'edges');
      edge = {
        key,
        from: row.source.key,
        to: row.destination.key,
        forwarded: new Directed(),
        dropped: new Series(),
        ports: new Map(),
        reasons: new Map(),
        requests: null,
        asked: new Directed(),
        last: row.time,
        passed: 0,
      };
      this.edges.set(key, edge);
    }
    edge.last = Math.max(edge.last, row.time);
    if (row.request) {
      (edge.requests ??= new Requests()).add(row.request, isDrop);
      if (!row.request.isAnswer) edge.asked.add(row.direction, bucket);
    }
    const name = portText(row);
    let port = edge.ports.get(name);
    if (!port && edge.ports.size < LIMITS.ports) edge.ports.set(name, (port = { forwarded: 0, dropped: 0 }));
    if (isDrop) {
      edge.dropped.add(bucket);
      if (port) port.dropped += 1;
      if (edge.reasons.has(row.reason) || edge.reasons.size < LIMITS.ports) {
        edge.reasons.set(row.reason, (edge.reasons.get(row.reason) ?? 0) + 1);
      }
    } else {
      edge.passed = Math.max(edge.passed, row.time);
      if (isCounted) edge.forwarded.add(row.direction, bucket);
      if (port) port.forwarded += 1;
    }
  }

  /** Takes the quietest tenth away when `map` is full, so that what happens now always fits. */
  #makeRoom(map: Map<string, { last: number }>, limit: number, what: 'drops' | 'edges'): void {
    if (map.size < limit) return;
    const oldest = [...map].sort(([, a], [, b]) => a.last - b.last).slice(0, Math.ceil(limit / 10));
    for (const [key] of oldest) map.delete(key);
    this.forgotten[what] += oldest.length;
  }
}
