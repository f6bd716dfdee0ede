// The page's state: where it is, what it knows, and how it stands with the server.
import { type Party, read, type Row } from './lib/flow.ts';
import type { Term } from './lib/filters.ts';
import { withTerm } from './lib/filters.ts';
import { Model } from './lib/model.ts';
import type { Route } from './lib/route.ts';
import { flowsQuery, readRoute, STOPPED_MOST, writeRoute } from './lib/route.ts';
import { request } from './lib/stream.ts';
import { plain } from './lib/text.ts';

/** How it stands with `/api/flows`. */
export type Connection =
  | { kind: 'connecting' }
  | { kind: 'live' }
  | { kind: 'complete' }
  | { kind: 'retrying'; since: number; why: string }
  | { kind: 'refused'; status: number; text: string };

/** A node, as `/api/status` and the stream tell. */
export interface NodeRow {
  name: string;
  state: string;
  version: string;
  flows: number;
  message: string;
}

/** What `/api/status` said last. */
export interface Status {
  version: string;
  rate: number | null;
  seen: number;
  nodes: NodeRow[];
  away: string[];
}

/** The theme that was chosen; auto follows the system. */
export type Theme = 'auto' | 'light' | 'dark';

/** Between two looks of the views at the model. */
const TICK_MS = 250;
const STATUS_MS = 5_000;
/** The longest wait between two attempts to connect. */
const RETRY_MS = 10_000;

class App {
  route = $state.raw<Route>(readRoute(location.hash));
  connection = $state.raw<Connection>({ kind: 'connecting' });
  status = $state.raw<Status | null>(null);
  statusError = $state('');
  /** Grows whenever the views should look at the model again. */
  tick = $state(0);
  /** The end of the window that is shown. */
  now = $state(Date.now());
  truncated = $state(false);
  theme = $state<Theme>(readTheme());
  help = $state(false);
  nodesOpen = $state(false);
  /** Said to those who listen instead of looking. */
  announcement = $state('');
  model = new Model(this.route.windowMs);
  #skew = 0;
  /** How many of the newest flows were asked for, by when, and how many of then came. */
  #asked = Number.POSITIVE_INFINITY;
  #askedAt = 0;
  #history = 0;
  #dirty = true;
  #query = '';
  #abort = new AbortController();
  /** Settled when the number of nodes is known, or is not to be waited for. */
  #known: Promise<void> = Promise.resolve();

  /** Begins to work; called once. */
  start(): void {
    applyTheme(this.theme);
    addEventListener('hashchange', () => this.#read());
    setInterval(() => this.#look(), TICK_MS);
    setInterval(() => document.hidden || this.#askStatus(), STATUS_MS);
    document.addEventListener('visibilitychange', () => document.hidden || this.#askStatus());
    this.#known = Promise.race([this.#askStatus(), new Promise<void>((done) => setTimeout(done, 500))]);
    this.#read();
  }

  /** Changes a part of the address; `replace` leaves no step to go back to. */
  go(part: Partial<Route>, replace = false): void {
    const hash = writeRoute({ ...this.route, ...part });
    if (replace) history.replaceState(null, '', hash);
    else history.pushState(null, '', hash);
    this.#read();
  }

  /** The address that `part` would lead to. */
  link(part: Partial<Route>): string {
    return writeRoute({ ...this.route, ...part });
  }

  addFilter(term: Term): void {
    this.go({ terms: withTerm(this.route.terms, term) });
  }

  /** Stops time at the end of what is shown, or at `at`. */
  stop(at = this.now): void {
    this.go({ until: Math.round(Math.min(at, this.#clock())) });
    this.announcement = 'Time is stopped.';
  }

  resume(): void {
    this.go({ until: null });
    this.announcement = 'Live again.';
  }

  /** Moves the window by `part` of its length. */
  step(part: number): void {
    const end = (this.route.until ?? this.now) + part * this.route.windowMs;
    if (end >= this.#clock()) this.resume();
    else this.stop(end);
  }

  /** Asks the server again. */
  retry(): void {
    this.#query = '';
    this.#read();
    void this.#askStatus();
  }

  setTheme(theme: Theme): void {
    this.theme = theme;
    applyTheme(theme);
  }

  /** The server's clock, as near as its answers tell. */
  #clock(): number {
    return Date.now() + this.#skew;
  }

  #read(): void {
    const route = readRoute(location.hash);
    this.route = route;
    const query = flowsQuery(route).toString() + String(route.windowMs);
    if (query === this.#query) return;
    this.#query = query;
    this.#abort.abort();
    this.#abort = new AbortController();
    void this.#run(this.#abort);
  }

  #look(): void {
    const now = this.route.until ?? this.#clock();
    if (this.route.until === null && this.connection.kind === 'live') this.model.expire(now);
    if (!this.#dirty && now === this.now) return;
    // While the connection is away, what is shown is as of then: nothing seems to end.
    if (this.connection.kind !== 'retrying') this.now = now;
    this.#dirty = false;
    this.tick += 1;
  }

  #fresh(): void {
    this.model = new Model(this.route.windowMs);
    this.truncated = false;
    this.#history = 0;
    this.#dirty = true;
  }

  /** Asks, and asks again while the connection breaks, until the address changes. */
  async #run(abort: AbortController): Promise<void> {
    this.connection = { kind: 'connecting' };
    this.#fresh();
    this.now = this.route.until ?? this.#clock();
    await this.#known;
    let lastId = '';
    let broken = 0;
    for (let attempt = 0; !abort.signal.aborted; attempt += 1) {
      // Without a place to go on from, the history comes anew.
      if (attempt && !lastId) this.#fresh();
      const query = flowsQuery(this.route, this.status?.nodes.length);
      this.#asked = Number(query.get('last') ?? Number.POSITIVE_INFINITY);
      this.#askedAt = this.#clock();
      const end = await request(
        `api/flows?${query}`,
        lastId,
        abort.signal,
        (time) => {
          attempt = 0;
          broken = 0;
          this.#opened(time);
        },
        (data, id) => {
          if (abort.signal.aborted) return;
          lastId = id;
          this.#take(data, abort);
        },
      );
      if (abort.signal.aborted) return;
      if (end.kind === 'refused' && end.status >= 400 && end.status < 500 && end.status !== 429) {
        this.connection = { kind: 'refused', status: end.status, text: plain(end.text, 500) };
        return;
      }
      if (end.kind === 'done' && this.route.until !== null) {
        this.connection = { kind: 'complete' };
        this.#dirty = true;
        return;
      }
      broken ||= Date.now();
      const why = end.kind === 'refused' ? `HTTP ${end.status}: ${plain(end.text)}` : end.kind === 'broken' ? plain(end.text, 500) : 'the server ended the stream';
      this.connection = { kind: 'retrying', since: broken, why };
      await pause(Math.min(500 * 2 ** attempt, RETRY_MS), abort.signal);
    }
  }

  #opened(time: number | null): void {
    // The header has whole seconds; less than two is not worth a correction.
    const skew = time === null ? 0 : time - Date.now();
    this.#skew = Math.abs(skew) > 2_000 ? skew : 0;
    this.connection = { kind: 'live' };
    this.#dirty = true;
  }

  #take(data: string[], abort: AbortController): void {
    for (const text of data) {
      const message = read(text);
      if (message?.kind === 'flow') this.#flow(message.row);
      else if (message?.kind === 'loss') this.model.lose(message.loss);
      else if (message?.kind === 'nodes') this.model.news(message.news);
    }
    this.#dirty = true;
    // Every node gives as many as were asked for.
    if (this.route.until !== null && this.model.seen >= STOPPED_MOST) {
      this.truncated = true;
      this.connection = { kind: 'complete' };
      abort.abort();
    }
  }

  #flow(row: Row): void {
    const { view, pod } = this.route;
    // The filter is for names that begin so.
    const isIt = (party: Party) => `${party.namespace}/${party.pod}` === pod;
    if (row.time < this.#askedAt) this.#history += 1;
    if (view !== 'pod' || isIt(row.source) || isIt(row.destination)) this.model.add(row);
  }

  async #askStatus(): Promise<void> {
    try {
      const response = await fetch('api/status', { cache: 'no-store', signal: AbortSignal.timeout(STATUS_MS) });
      if (!response.ok) throw new Error(`HTTP ${response.status}`);
      this.status = readStatus(await response.json());
      this.statusError = '';
    } catch (error) {
      this.statusError = error instanceof Error ? error.message : String(error);
    }
  }

  /** From when on the page knows what happened: the window's begin, or later where more was kept than was asked for. */
  historyFrom(): number {
    void this.tick;
    const start = this.now - this.route.windowMs;
    return this.#history >= this.#asked ? Math.max(start, Math.min(this.model.oldest, this.now)) : start;
  }

  /** Nodes of which nothing comes: what they see is not shown. */
  away(): { name: string; why: string }[] {
    void this.tick;
    const away = new Map<string, string>();
    for (const name of this.status?.away ?? []) away.set(name, '');
    for (const node of this.status?.nodes ?? []) if (isAway(node.state)) away.set(node.name, node.message || stateText(node.state));
    for (const [name, news] of this.model.nodes) {
      if (isAway(news.state)) away.set(name, news.message || stateText(news.state));
    }
    return [...away].map(([name, why]) => ({ name, why })).sort((a, b) => (a.name < b.name ? -1 : 1));
  }
}

const isAway = (state: string) => /UNAVAILABLE|ERROR|GONE/i.test(state);

/** The state of a node in words. */
export function stateText(state: string): string {
  return state.replace(/^NODE_/, '').toLowerCase().replaceAll('_', ' ') || 'unknown';
}

function readStatus(json: unknown): Status {
  const status = (typeof json === 'object' && json !== null ? json : {}) as Record<string, unknown>;
  const list = (value: unknown) => (Array.isArray(value) ? value.slice(0, 5_000) : []);
  const nodes = list(status.nodes).map((node: Record<string, unknown>) => ({
    name: plain(node?.name),
    state: plain(node?.state),
    version: plain(node?.version),
    flows: Number(node?.num_flows) || 0,
    message: plain(node?.message),
  }));
  return {
    version: plain(status.version),
    rate: status.flows_rate === undefined ? null : Number(status.flows_rate) || 0,
    seen: Number(status.seen_flows) || 0,
    nodes,
    away: list(status.unavailable_nodes).map((name) => plain(name)),
  };
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((done) => {
    const timer = setTimeout(done, ms);
    signal.addEventListener('abort', () => (clearTimeout(timer), done()), { once: true });
  });
}

function readTheme(): Theme {
  try {
    const theme = localStorage.getItem('theme');
    return theme === 'light' || theme === 'dark' ? theme : 'auto';
  } catch {
    return 'auto';
  }
}

function applyTheme(theme: Theme): void {
  document.documentElement.dataset.theme = theme;
  try {
    if (theme === 'auto') localStorage.removeItem('theme');
    else localStorage.setItem('theme', theme);
  } catch {
    // A browser that keeps nothing: the choice lasts as long as the page.
  }
}

export const app = new App();
