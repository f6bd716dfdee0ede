import { expect, test } from 'vitest';
import { read, type Row } from '../../src/lib/flow.ts';
import { graph, CAPS } from '../../src/lib/graph.ts';
import { curve, place } from '../../src/lib/layout.ts';
import { LIMITS, Model } from '../../src/lib/model.ts';
import { rank } from '../../src/lib/rank.ts';
import { Series } from '../../src/lib/series.ts';
import { crowd, flow, pod, shop, type Spec } from '../flows.ts';

const T = Date.parse('2026-11-30T12:00:00Z');
const [web, db] = [pod('shop', 'web'), pod('data', 'db')];

function rows(messages: object[]): Row[] {
  return messages.map((message) => {
    const got = read(JSON.stringify(message));
    if (got?.kind !== 'flow') throw new Error('no flow');
    return got.row;
  });
}

function model(specs: Spec[], windowMs = 300_000): Model {
  const made = new Model(windowMs);
  for (const row of rows(specs.map(flow))) made.add(row);
  return made;
}

test('a series forgets what is older than its window', () => {
  const series = new Series();
  series.add(100);
  series.add(130, 2);
  expect([series.sum(130), series.sum(159), series.sum(160), series.sum(190)]).toEqual([3, 3, 2, 0]);
  series.add(159);
  series.add(70);
  expect(series.sum(159)).toBe(4);
  series.add(100_000);
  expect(series.window(100_000).reduce((a, b) => a + b)).toBe(1);
});

test('drops are one kind when source, destination, port, reason and policy agree', () => {
  const drop = { from: web, to: db, port: 5432, reason: 'POLICY_DENIED' };
  const made = model([
    { ...drop, time: T },
    { ...drop, from: pod('shop', 'web', 3), time: T + 1000 },
    { ...drop, port: 80, time: T },
    { ...drop, reason: 'POLICY_DENY', deniedBy: [{ namespace: 'data', name: 'closed' }], time: T },
    { from: web, to: db, port: 5432, time: T },
  ]);
  expect(made.drops.size).toBe(3);
  const first = [...made.drops.values()][0]!;
  expect(first.sources.size).toBe(2);
  expect(first.series.sum(made.bucket(T + 1000))).toBe(2);
});

test('since when: a minute of silence begins anew', () => {
  const drop = { from: web, to: db, port: 5432, reason: 'POLICY_DENIED' };
  const since = (...times: number[]) => [...model(times.map((time) => ({ ...drop, time }))).drops.values()][0]!.since;
  expect(since(T, T + 59_000, T + 110_000)).toBe(T);
  expect(since(T, T + 61_000)).toBe(T + 61_000);
  expect(since(T + 10, T)).toBe(T);
});

test('both nodes report a connection, and it counts once', () => {
  const both = (['INGRESS', 'EGRESS'] as const).map((direction) => ({ from: web, to: db, port: 5432, direction, time: T }));
  const edge = [...model([...both, both[0]!]).edges.values()][0]!;
  expect(edge.forwarded.sum(Math.floor(T / 5_000))).toBe(2);
});

test('a connection with several records counts once, and its pair goes on', () => {
  const made = model((['CONNECTION_NEW', 'CONNECTION_UPDATE', 'CONNECTION_END'] as const).map((event, i) => ({ from: web, to: db, port: 5432, event, time: T + i })));
  const edge = [...made.edges.values()][0]!;
  expect([edge.forwarded.sum(made.bucket(T)), edge.last, edge.passed, made.forwarded.sum(made.bucket(T))]).toEqual([1, T + 2, T + 2, 1]);
});

test('nothing grows without end', () => {
  const made = new Model(300_000);
  for (let i = 0; i < 3 * LIMITS.edges; i += 1) {
    const [row] = rows([flow({ from: pod('a', `w${i}`, 0, { ip: '10.0.0.1' }), to: db, port: 1, reason: 'POLICY_DENIED', time: T + i })]);
    made.add(row!);
    made.lose({ node: `n${i}`, place: 'X', count: 1, first: T, last: T });
    made.news({ state: 'NODE_CONNECTED', nodes: [`n${i}`], message: '', time: T });
  }
  expect(made.drops.size).toBeLessThanOrEqual(LIMITS.drops);
  expect(made.edges.size).toBeLessThanOrEqual(LIMITS.edges);
  expect(made.rows()).toHaveLength(LIMITS.rows);
  expect(made.losses).toHaveLength(LIMITS.losses);
  expect(made.nodes.size).toBe(LIMITS.nodes);
  expect(made.forgotten.drops).toBeGreaterThan(LIMITS.drops);
  // What happened last is never what is put aside.
  expect([...made.drops.values()].some((drop) => drop.last === T + 3 * LIMITS.edges - 1)).toBe(true);
  made.expire(T + 10_000_000);
  expect([made.drops.size, made.edges.size]).toEqual([0, 0]);
});

test('rows come newest first, whatever order they arrived in', () => {
  const times = model([3, 1, 2].map((n) => ({ from: web, to: db, port: 1, time: T + n }))).rows().map((row) => row.time - T);
  expect(times).toEqual([3, 2, 1]);
});

test('losses of one place and time are one', () => {
  const made = new Model(300_000);
  const loss = { node: 'n1', place: 'HUBBLE_RING_BUFFER', count: 5, first: T, last: T };
  made.lose(loss);
  made.lose({ ...loss, first: T + 1000, last: T + 1000 });
  made.lose({ ...loss, node: 'n2' });
  expect(made.losses.map(({ node, count }) => [node, count])).toEqual([['n1', 10], ['n2', 5]]);
});

test('the order: current first, then by rate, and held entries stay', () => {
  const entry = (key: string, now: boolean, rate: number, since = T) => ({ drop: { key, since, last: since } as never, now, rate, count: 1 });
  const entries = [entry('slow', true, 0.1), entry('ended', false, 0), entry('fast', true, 50), entry('older', true, 40, T - 5)];
  const keys = (held: string[] = []) => rank(entries, held).map((one) => (one.drop as { key: string }).key);
  expect(keys()).toEqual(['older', 'fast', 'slow', 'ended']);
  expect(keys(['slow', 'ended', 'fast'])).toEqual(['slow', 'ended', 'fast', 'older']);
});

test('the map folds namespaces, and splits outside into callers and called', () => {
  const made = model([
    { from: 'world', to: web, port: 80, time: T },
    { from: web, to: db, port: 5432, time: T },
    { from: web, to: 'world', port: 443, reason: 'POLICY_DENIED', direction: 'EGRESS', time: T },
  ]);
  const open = graph(made, T, 'workload', []);
  expect(open.boxes.map((box) => box.id)).toEqual(['data/db', 'from:reserved:world', 'shop/web', 'to:reserved:world']);
  expect(graph(made, T, 'namespace', []).boxes.map((box) => box.id)).toEqual(['from:reserved:world', 'ns:data', 'ns:shop', 'to:reserved:world']);
  expect(graph(made, T, 'namespace', ['shop']).boxes.map((box) => box.id)).toContain('shop/web');
  expect(open.lines.find((line) => line.to === 'to:reserved:world')).toMatchObject({ drops: 1, flows: 0 });
});

test('a map that is too large folds by itself, and says what it leaves out', () => {
  const made = new Model(300_000);
  for (const row of rows(crowd(600, 2_000, 4, T))) made.add(row);
  const drawn = graph(made, T + 3_000, 'workload', []);
  expect(drawn.boxes.length).toBeLessThanOrEqual(CAPS.nodes);
  expect(drawn.folded.length).toBeGreaterThan(0);
  const alone = new Model(300_000);
  for (const row of rows(Array.from({ length: 400 }, (_, i) => flow({ from: pod(`ns${i}`, 'a'), to: pod(`ns${i}`, 'b'), port: 1, time: T })))) alone.add(row);
  const cut = graph(alone, T, 'namespace', []);
  expect(cut.boxes.length + cut.hidden.boxes).toBe(400);
});

test('the layout: who asks is left, nothing overlaps, circles end', () => {
  const made = new Model(300_000);
  for (const row of rows(shop(2_000, T - 10_000, T))) made.add(row);
  const drawn = graph(made, T, 'workload', []);
  const lines = drawn.lines.map((line) => ({ from: line.from, to: line.to, isDenied: line.flows === 0 }));
  const { boxes, width, height } = place({ boxes: drawn.boxes, lines });
  const x = (id: string) => boxes.get(id)!.x;
  expect(x('from:reserved:world')).toBeLessThan(x('shop/frontend'));
  expect(x('shop/frontend')).toBeLessThan(x('shop/backend'));
  expect(x('shop/backend')).toBeLessThan(x('data/database'));
  const all = [...boxes.values()];
  for (const a of all) {
    expect(a.x >= 0 && a.y >= 0 && a.x + a.width <= width && a.y + a.height <= height).toBe(true);
    for (const b of all) if (a !== b) expect(a.x + a.width <= b.x || b.x + b.width <= a.x || a.y + a.height <= b.y || b.y + b.height <= a.y).toBe(true);
  }
  const ring = { boxes: ['a', 'b', 'c'].map((id) => ({ id, namespace: '' })), lines: [['a', 'b'], ['b', 'c'], ['c', 'a'], ['a', 'a']].map(([from, to]) => ({ from: from!, to: to!, isDenied: false })) };
  expect(place(ring).boxes.size).toBe(3);
  expect(place({ boxes: [...ring.boxes].reverse(), lines: ring.lines })).toEqual(place(ring));
  expect(curve(all[0]!, all[0]!).path).toMatch(/^M[-\d. C]+$/);
});

test('1,000 lines are placed in less than two frames', () => {
  const made = new Model(300_000);
  for (const row of rows(crowd(140, 1_000, 8, T))) made.add(row);
  const drawn = graph(made, T + 1_000, 'workload', []);
  expect([drawn.boxes.length, drawn.lines.length]).toEqual([140, 1_000]);
  const plan = { boxes: drawn.boxes, lines: drawn.lines.map((line) => ({ from: line.from, to: line.to, isDenied: line.flows === 0 })) };
  place(plan);
  let best = Number.POSITIVE_INFINITY;
  // Time of the processor, not of the clock: other work on the machine does not count.
  for (let i = 0; i < 10; i += 1) {
    const begun = process.cpuUsage();
    place(plan);
    graph(made, T + 1_000, 'workload', []);
    best = Math.min(best, process.cpuUsage(begun).user / 1_000);
  }
  console.log(`a layout of 140 boxes and 1,000 lines takes ${Math.round(best)} ms of the processor`);
  // A layout that grows with the square of the lines takes seconds.
  expect(best).toBeLessThan(1_000);
});
