// A small server that speaks the relay's HTTP API, with the headers that the relay sends, so that the
// page can be tried without a kernel. The end-to-end test tries it against a real relay.
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { readFile } from 'node:fs/promises';
import type { AddressInfo } from 'node:net';
import { extname, join, normalize } from 'node:path';

/** The policy that the relay sends. */
export const CSP =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const TYPES: Record<string, string> = { '.html': 'text/html; charset=utf-8', '.js': 'text/javascript', '.css': 'text/css', '.svg': 'image/svg+xml', '.md': 'text/plain' };
const DIST = new URL('../dist/', import.meta.url).pathname;

type Json = Record<string, unknown>;

/** The server, what it holds, and what it was asked. */
export class Relay {
  /** Messages that are there when somebody asks, the oldest first. */
  history: Json[] = [];
  status: Json | null = { version: 'weir test', num_flows: '1200', seen_flows: '51200', flows_rate: 128.4, nodes: ['node1', 'node2', 'node3'].map((name) => ({ name, state: 'NODE_CONNECTED', version: '0.1.0', num_flows: '400' })) };
  refuse: { status: number; text: string } | null = null;
  readonly asked: URLSearchParams[] = [];
  readonly lastIds: string[] = [];
  #sent = 0;
  #followers = new Map<ServerResponse, URLSearchParams>();
  readonly #server: Server;

  private constructor() {
    this.#server = createServer((request, response) => void this.#answer(request, response));
  }

  static async start(): Promise<Relay> {
    const relay = new Relay();
    await new Promise<void>((done) => relay.#server.listen(0, '127.0.0.1', done));
    return relay;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}/`;
  }

  get followers(): number {
    return this.#followers.size;
  }

  /** A message that happens now. */
  send(message: Json): void {
    this.history.push(message);
    for (const [response, query] of this.#followers) this.#write(response, query, message);
  }

  /** Ends every stream, as a relay that dies does. */
  cut(): void {
    for (const response of this.#followers.keys()) response.destroy();
    this.#followers.clear();
  }

  async stop(): Promise<void> {
    this.cut();
    this.#server.closeAllConnections();
    await new Promise((done) => this.#server.close(done));
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const url = new URL(request.url ?? '/', 'http://relay');
    response.setHeader('content-security-policy', CSP);
    response.setHeader('x-content-type-options', 'nosniff');
    if (url.pathname === '/api/flows') return this.#flows(request, response, url.searchParams);
    if (url.pathname === '/api/allow') return void answerRule(request, response);
    if (url.pathname === '/api/status') {
      if (!this.status) return void response.writeHead(503).end('no node');
      response.setHeader('content-type', 'application/json');
      return void response.end(JSON.stringify(this.status));
    }
    const path = url.pathname === '/' ? 'index.html' : normalize(url.pathname).replace(/^(\.\.[/\\])+/, '');
    try {
      const body = await readFile(join(DIST, path));
      response.setHeader('content-type', TYPES[extname(path)] ?? 'application/octet-stream');
      response.end(body);
    } catch {
      response.writeHead(404).end();
    }
  }

  #flows(request: IncomingMessage, response: ServerResponse, query: URLSearchParams): void {
    this.asked.push(query);
    this.lastIds.push(String(request.headers['last-event-id'] ?? ''));
    if (this.refuse) return void response.writeHead(this.refuse.status, { 'content-type': 'text/plain' }).end(this.refuse.text);
    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' });
    response.flushHeaders();
    const after = Number(request.headers['last-event-id'] ?? 0);
    const kept = this.history.filter((message, i) => i >= after && matches(query, message));
    const first = query.get('first');
    const asked = first ? kept.slice(0, Number(first)) : query.has('since') ? kept : kept.slice(-Number(query.get('last') ?? 100));
    for (const message of asked) this.#write(response, query, message);
    if (query.get('follow') !== '1') return void response.end('event: end\ndata: {}\n\n');
    this.#followers.set(response, query);
    request.on('close', () => this.#followers.delete(response));
  }

  #write(response: ServerResponse, query: URLSearchParams, message: Json): void {
    if (!matches(query, message)) return;
    this.#sent += 1;
    response.write(`id: ${Math.max(this.history.length, this.#sent)}\ndata: ${JSON.stringify(message)}\n\n`);
  }
}

/** A rule by hand; the relay's own are tested in src/policy/allow.rs, and in tests/real on a real one. */
async function answerRule(request: IncomingMessage, response: ServerResponse): Promise<void> {
  let body = '';
  for await (const part of request) body += part;
  const flow = JSON.parse(body).flow;
  const app = (end: Record<string, any>) => JSON.stringify(String(end.labels.find((label: string) => label.startsWith('k8s:app=')) ?? '').slice(8));
  const { destination, source } = flow;
  const reason = flow.drop_reason_desc;
  const none = reason === 'POLICY_DENY' ? 'A deny rule counts before every allow: change the policy that denies it instead.' : '';
  const kind = flow.l7 ? 'CiliumNetworkPolicy' : 'NetworkPolicy';
  const yaml = `apiVersion: v1\nkind: ${kind}\nmetadata:\n  name: allow\n  namespace: ${JSON.stringify(destination.namespace ?? '')}\nspec:\n  podSelector:\n    matchLabels:\n      app: ${app(destination)}\n  ingress:\n  - from:\n    - podSelector:\n        matchLabels:\n          app: ${app(source)}\n`;
  response.setHeader('content-type', 'application/json');
  response.end(JSON.stringify(none ? { none } : { yaml, notes: ["The source's egress policies let the flow pass; only this side denied it."] }));
}

/** The filters that the tests use, as the agent understands them. */
function matches(query: URLSearchParams, message: Json): boolean {
  const flow = message.flow as Record<string, any> | undefined;
  if (!flow) return true;
  const time = Date.parse(String(message.time));
  const [since, until] = [query.get('since'), query.get('until')];
  if (since && time < Date.parse(since)) return false;
  if (until && time > Date.parse(until)) return false;
  for (const key of new Set(query.keys())) {
    const wanted = query.getAll(key);
    if (key.startsWith('not.')) {
      if (wanted.some((value) => holds(flow, key.slice(4), value))) return false;
    } else if (isFilter(key) && !wanted.some((value) => holds(flow, key, value))) return false;
  }
  return true;
}

const isFilter = (key: string) => !['since', 'until', 'last', 'first', 'follow'].includes(key);

function holds(flow: Record<string, any>, key: string, value: string): boolean {
  const l4 = Object.values(flow.l4 ?? {})[0] as Record<string, number> | undefined;
  const named = (end: Record<string, any>) => `${end.namespace ?? ''}/${end.pod_name ?? ''}`.startsWith(value);
  const labelled = (end: Record<string, any>) => end.labels.some((label: string) => label === value || label === `k8s:${value}`);
  switch (key) {
    case 'verdict':
      return flow.verdict === value.toUpperCase();
    case 'drop-reason':
      return flow.drop_reason_desc === value.toUpperCase();
    case 'namespace':
      return flow.source.namespace === value || flow.destination.namespace === value;
    case 'from-namespace':
      return flow.source.namespace === value;
    case 'to-namespace':
      return flow.destination.namespace === value;
    case 'pod':
      return named(flow.source) || named(flow.destination);
    case 'from-pod':
      return named(flow.source);
    case 'to-pod':
      return named(flow.destination);
    case 'from-label':
      return labelled(flow.source);
    case 'to-label':
      return labelled(flow.destination);
    case 'port':
    case 'to-port':
      return l4?.destination_port === Number(value);
    case 'type':
      return value === 'l7' ? flow.l7 !== undefined : false;
    case 'http-status':
      return flow.l7?.type === 'RESPONSE' && String(flow.l7?.http?.code ?? '').startsWith(value.replace('+', ''));
    case 'http-path':
      return new RegExp(value).test(/^http:\/\/[^/]*([^?]*)/.exec(flow.l7?.http?.url ?? '')?.[1] ?? '\n');
    case 'latency':
      return Number(flow.l7?.latency_ns ?? 0) >= Number.parseFloat(value) * 1e6;
    default:
      throw new Error(`the test server does not know the filter ${key}`);
  }
}
