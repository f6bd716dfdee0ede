// What was asked inside of a connection (layer 7), as a proxy saw it.
import { plain } from './text.ts';

/** A question or its answer. */
export interface Request {
  protocol: 'HTTP' | 'DNS' | 'Kafka';
  isAnswer: boolean;
  /** HTTP's method, the types of a DNS question, the name of Kafka's API. */
  method: string;
  /** The path with its query, the name that was asked for, the topics. */
  path: string;
  /** The host that HTTP named. */
  host: string;
  /** Of an answer: HTTP's code, or the word for DNS's; empty where nothing was answered. */
  status: string;
  /** An answer that says that the server, or the name, failed. */
  isFault: boolean;
  /** Of an answer: how long it took; null where the record does not say. */
  latencyMs: number | null;
}

type Json = Record<string, unknown>;

const isObject = (value: unknown): value is Json => typeof value === 'object' && value !== null && !Array.isArray(value);
const object = (value: unknown): Json => (isObject(value) ? value : {});
const texts = (value: unknown) => (Array.isArray(value) ? value.slice(0, 16).map((text) => plain(text)) : []);
const number = (value: unknown) => (Number.isFinite(Number(value)) ? Number(value) : 0);

const RCODES = ['No Error', 'Format Error', 'Server Failure', 'Non-Existent Domain', 'Not Implemented', 'Query Refused'];

/** Reads a flow's `l7`; null where it has none. */
export function readRequest(value: unknown): Request | null {
  if (!isObject(value)) return null;
  const isAnswer = value.type === 'RESPONSE';
  const latencyMs = isAnswer && number(value.latency_ns) > 0 ? number(value.latency_ns) / 1e6 : null;
  if ('http' in value) return { ...http(object(value.http), isAnswer), isAnswer, latencyMs };
  if ('dns' in value) return { ...dns(object(value.dns), isAnswer), isAnswer, latencyMs };
  if ('kafka' in value) return { ...kafka(object(value.kafka)), isAnswer, latencyMs };
  return null;
}

type Said = Omit<Request, 'isAnswer' | 'latencyMs'>;

function http(http: Json, isAnswer: boolean): Said {
  const code = number(http.code);
  const url = /^[a-z][a-z0-9+.-]*:\/\/([^/?#]*)(.*)$/is.exec(typeof http.url === 'string' ? http.url : '');
  return {
    protocol: 'HTTP',
    method: plain(http.method),
    path: plain(url ? url[2] || '/' : http.url),
    host: plain(url?.[1] ?? ''),
    status: isAnswer && code ? String(code) : '',
    isFault: code >= 500 || faultOfGrpc(http.headers),
  };
}

/** gRPC answers 200, and says in a trailer that it failed. */
function faultOfGrpc(headers: unknown): boolean {
  const all = Array.isArray(headers) ? headers.slice(0, 64).map(object) : [];
  return all.some((header) => header.key === 'grpc-status' && header.value !== '0');
}

function dns(dns: Json, isAnswer: boolean): Said {
  const code = number(dns.rcode);
  const word = RCODES[code] ?? `code ${code}`;
  const path = plain(dns.query).replace(/(.)\.$/, '$1');
  return { protocol: 'DNS', method: texts(dns.qtypes).join(','), path, host: '', status: isAnswer ? word : '', isFault: isAnswer && code !== 0 };
}

function kafka(kafka: Json): Said {
  const code = number(kafka.error_code);
  return { protocol: 'Kafka', method: plain(kafka.api_key), path: plain(kafka.topic), host: '', status: code ? `error ${code}` : '', isFault: code !== 0 };
}

/** `GET /cart`, `A db.example`; the query of a URL is left out: it makes every request another one. */
export function requestText(request: Request): string {
  const path = request.protocol === 'HTTP' ? request.path.split(/[?#]/, 1)[0] : request.path;
  return `${request.method} ${path}`.trim() || request.protocol;
}

/** A time as people say it: `3.2 ms`, `1.4 s`. */
export function latencyText(ms: number | null): string {
  if (ms === null) return '';
  if (ms < 0.1) return '<0.1 ms';
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 1 : 0)} s`;
}

/** The newest answers' times are kept: a bounded sample of what is slow now. */
const SAMPLES = 128;
/** Different requests of a pair that are told apart; the others are counted as one. */
const KINDS = 24;
/** What stands for the others. */
export const OTHERS = 'others';

/** How many of one kind of request, and what became of them. */
export interface Kind {
  asked: number;
  answered: number;
  faults: number;
  denied: number;
  times: Times;
}

/** The newest times of answers. */
export class Times {
  readonly #ms: number[] = [];
  #next = 0;

  add(ms: number): void {
    this.#ms[this.#next % SAMPLES] = ms;
    this.#next += 1;
  }

  get all(): readonly number[] {
    return this.#ms;
  }
}

/** The time that `part` of all answers took at most; null where there is none. */
export function quantile(times: readonly Times[], part: number): number | null {
  const all = times.flatMap((one) => one.all).sort((a, b) => a - b);
  return all.length ? all[Math.min(all.length - 1, Math.floor(all.length * part))]! : null;
}

const kind = (): Kind => ({ asked: 0, answered: 0, faults: 0, denied: 0, times: new Times() });

/** What is asked between two workloads. */
export class Requests {
  readonly all = kind();
  readonly kinds = new Map<string, Kind>();
  readonly protocols = new Set<string>();

  add(request: Request, isDenied: boolean): void {
    this.protocols.add(request.protocol);
    const text = requestText(request);
    let one = this.kinds.get(text);
    if (!one) {
      const name = this.kinds.size < KINDS ? text : OTHERS;
      one = this.kinds.get(name) ?? kind();
      this.kinds.set(name, one);
    }
    for (const counts of [this.all, one]) count(counts, request, isDenied);
  }
}

function count(counts: Kind, request: Request, isDenied: boolean): void {
  if (isDenied) counts.denied += 1;
  if (!request.isAnswer) {
    counts.asked += 1;
    return;
  }
  counts.answered += 1;
  if (request.isFault) counts.faults += 1;
  if (request.latencyMs !== null) counts.times.add(request.latencyMs);
}
