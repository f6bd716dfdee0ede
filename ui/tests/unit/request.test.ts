import { expect, test } from 'vitest';
import { read, type Row } from '../../src/lib/flow.ts';
import { graph, requestsOf, speedOf } from '../../src/lib/graph.ts';
import { Model } from '../../src/lib/model.ts';
import { latencyText, OTHERS, readRequest, Requests, requestText } from '../../src/lib/request.ts';
import { flow, pod, REQUESTS, shop } from '../flows.ts';

const rows = (messages: object[]): Row[] =>
  messages.map((message) => {
    const got = read(JSON.stringify(message));
    if (got?.kind !== 'flow') throw new Error('no flow');
    return got.row;
  });

test('every protocol is read in its own words', () => {
  const asked = readRequest({ type: 'REQUEST', http: { method: 'GET', url: 'http://shop/cart/7?user=1', protocol: 'HTTP/1.1' } })!;
  expect(asked).toMatchObject({ protocol: 'HTTP', isAnswer: false, method: 'GET', host: 'shop', path: '/cart/7?user=1', status: '', latencyMs: null });
  expect(requestText(asked)).toBe('GET /cart/7');
  expect(readRequest({ type: 'RESPONSE', latency_ns: '12500000', http: { code: 503, method: 'GET', url: '/x' } })).toMatchObject({ status: '503', isFault: true, latencyMs: 12.5 });
  expect(readRequest({ type: 'RESPONSE', http: { code: 200, method: 'POST', url: '/x', headers: [{ key: 'grpc-status', value: '14' }] } })).toMatchObject({ isFault: true });
  expect(readRequest({ type: 'RESPONSE', dns: { query: 'a.example.', qtypes: ['A', 'AAAA'], rcode: 3 } })).toMatchObject({ protocol: 'DNS', method: 'A,AAAA', path: 'a.example', status: 'Non-Existent Domain', isFault: true });
  expect(readRequest({ type: 'REQUEST', kafka: { api_key: 'produce', topic: 'orders' } })).toMatchObject({ protocol: 'Kafka', method: 'produce', path: 'orders' });
  for (const other of [undefined, null, 'x', {}, { type: 'REQUEST' }]) expect(readRequest(other)).toBe(null);
  expect(readRequest({ type: 'RESPONSE', latency_ns: 'x', http: { code: {}, method: 7, url: null, headers: 'x' } })).toMatchObject({ method: '7', path: '', status: '' });
});

test('an answer is of the line of who asked', () => {
  const model = new Model(300_000);
  for (const row of rows(shop(300, Date.now() - 5_000, Date.now(), 2, REQUESTS))) model.add(row);
  const drawn = graph(model, Date.now(), 'workload', []);
  expect(drawn.lines.map((line) => line.id).sort()).toEqual(['shop/backend|kube-system/coredns', 'shop/frontend|shop/backend']);
  const line = drawn.lines.find((one) => one.to === 'shop/backend')!;
  expect(line.asked).toMatchObject({ protocols: ['HTTP'] });
  expect(line.asked!.faults).toBeGreaterThan(0);
  expect(line.asked!.denied).toBe(line.drops);
  expect(line.asked!.rate).toBeGreaterThan(0);
  expect(speedOf(line, 0.5)).toBe(12);
  expect(speedOf(line, 0.999)).toBe(1400);
  expect(requestsOf(line).map(([text]) => text)).toEqual(['GET /items', 'POST /cart', 'DELETE /admin/users']);
  // Requests are no connections.
  expect(line.flows).toBe(0);
});

test('paths that a client makes up grow nothing', () => {
  const requests = new Requests();
  for (let i = 0; i < 5_000; i += 1) requests.add(readRequest({ type: 'REQUEST', http: { method: 'GET', url: `/${i}` } })!, false);
  expect(requests.kinds.size).toBeLessThanOrEqual(25);
  expect(requests.all.asked).toBe(5_000);
  expect(requests.kinds.get(OTHERS)!.asked).toBe(4_976);
  for (let i = 0; i < 5_000; i += 1) requests.add(readRequest({ type: 'RESPONSE', latency_ns: '1000000', http: { code: 200, url: '/' } })!, false);
  expect(requests.all.times.all.length).toBe(128);
});

test('a request that was denied is a drop of its own kind', () => {
  const [web, db] = [pod('shop', 'web'), pod('data', 'db')];
  const model = new Model(300_000);
  const denied = { from: web, to: db, port: 80, reason: 'POLICY_DENIED' };
  const request = { http: { method: 'GET', url: 'http://db/admin' } };
  for (const row of rows([flow(denied), flow({ ...denied, l7: request }), flow({ ...denied, l7: request })])) model.add(row);
  const drops = [...model.drops.values()];
  expect(drops.map((drop) => [...drop.requests].join())).toEqual(['', 'GET /admin']);
});

test('times are said shortly', () => {
  expect([0.01, 3.21, 48.6, 1400, 65_000].map(latencyText)).toEqual(['<0.1 ms', '3.2 ms', '49 ms', '1.4 s', '65 s']);
  expect(latencyText(null)).toBe('');
});
