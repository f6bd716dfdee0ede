// The address of the page holds everything that one would send to a colleague: view, filters, time.
import type { Term } from './filters.ts';
import { readTerms, writeTerms } from './filters.ts';

/** The views. */
export type View = 'drops' | 'map' | 'flows' | 'reasons' | 'pod';

/** What is shown. */
export interface Route {
  view: View;
  /** namespace/name; of the pod's view only. */
  pod: string;
  terms: Term[];
  /** Text that a row must contain. */
  text: string;
  /** Length of the window. */
  windowMs: number;
  /** End of the window; null: now, and going on. */
  until: number | null;
  /** How the map is drawn: by namespace or by workload, and which namespaces are drawn the other way. */
  level: 'namespace' | 'workload';
  toggled: string[];
}

/** The windows to choose from. */
export const WINDOWS: readonly (readonly [string, number])[] = [
  ['1m', 60_000],
  ['5m', 300_000],
  ['15m', 900_000],
  ['1h', 3_600_000],
];

const VIEWS: readonly View[] = ['drops', 'map', 'flows', 'reasons'];

/** What a bare address shows. */
export const START: Route = {
  view: 'drops',
  pod: '',
  terms: [],
  text: '',
  windowMs: 300_000,
  until: null,
  level: 'workload',
  toggled: [],
};

/** Reads what stands behind the `#` of an address; nothing in it can fail. */
export function readRoute(hash: string): Route {
  const [path = '', query = ''] = hash.replace(/^#?\/?/, '').split('?', 2);
  const parameters = new URLSearchParams(query);
  const [name = '', namespace = '', pod = ''] = path.split('/').map(decode);
  const isPod = name === 'pod' && namespace !== '' && pod !== '';
  const until = Date.parse(parameters.get('until') ?? '');
  return {
    view: isPod ? 'pod' : (VIEWS.find((view) => view === name) ?? START.view),
    pod: isPod ? `${namespace}/${pod}` : '',
    terms: readTerms(parameters),
    text: (parameters.get('text') ?? '').slice(0, 253),
    windowMs: WINDOWS.find(([text]) => text === parameters.get('window'))?.[1] ?? START.windowMs,
    until: Number.isFinite(until) ? until : null,
    level: parameters.get('level') === 'namespace' ? 'namespace' : 'workload',
    toggled: parameters.getAll('toggle').slice(0, 64),
  };
}

/** The address of a route, from its `#` on. */
export function writeRoute(route: Route): string {
  const parameters = new URLSearchParams();
  writeTerms(route.terms, parameters);
  if (route.text) parameters.set('text', route.text);
  if (route.windowMs !== START.windowMs) parameters.set('window', windowText(route.windowMs));
  if (route.until !== null) parameters.set('until', new Date(route.until).toISOString());
  if (route.level !== START.level) parameters.set('level', route.level);
  for (const namespace of route.toggled) parameters.append('toggle', namespace);
  const path = route.view === 'pod' ? `pod/${route.pod.split('/').map(encodeURIComponent).join('/')}` : route.view;
  const query = parameters.toString();
  return `#/${path}${query ? `?${query}` : ''}`;
}

/** `5m` for its length. */
export function windowText(ms: number): string {
  return WINDOWS.find(([, length]) => length === ms)?.[0] ?? `${Math.round(ms / 60_000)}m`;
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return '';
  }
}

/** So many of the newest flows are asked for when the page goes along with time, over all nodes. */
const NEWEST = 20_000;
/** So many flows of a stopped window are counted, the oldest first. */
export const STOPPED_MOST = 50_000;

/** The parameters of `/api/flows` for a route, where so many nodes answer. */
export function flowsQuery(route: Route, nodes = 1): URLSearchParams {
  const parameters = new URLSearchParams();
  writeTerms(route.terms, parameters);
  const asksVerdict = route.terms.some(({ key, not }) => key === 'verdict' && !not);
  if ((route.view === 'drops' || route.view === 'reasons') && !asksVerdict) parameters.append('verdict', 'DROPPED');
  if (route.view === 'pod') parameters.append('pod', route.pod);
  if (route.until === null) {
    parameters.set('follow', '1');
    // Every node gives as many. With a time instead of a number it would give all that it has.
    parameters.set('last', String(Math.max(100, Math.ceil(NEWEST / Math.max(nodes, 1)))));
  } else {
    parameters.set('since', new Date(route.until - route.windowMs).toISOString());
    parameters.set('until', new Date(route.until).toISOString());
    parameters.set('first', String(STOPPED_MOST));
  }
  return parameters;
}
