import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { keyText, namespaceOf, partyText, policyText, read, type Row } from '../../src/lib/flow.ts';
import { reason, reasonNames } from '../../src/lib/reasons.ts';
import { plain } from '../../src/lib/text.ts';
import { flow, pod } from '../flows.ts';

function rowOf(message: object): Row {
  const got = read(JSON.stringify(message));
  if (got?.kind !== 'flow') throw new Error('no flow');
  return got.row;
}

test('a dropped flow', () => {
  const row = rowOf(flow({ from: pod('shop', 'web'), to: pod('data', 'db'), port: 5432, reason: 'POLICY_DENY', deniedBy: [{ kind: 'NetworkPolicy', namespace: 'data', name: 'closed' }], service: { namespace: 'data', name: 'db' } }));
  expect(row).toMatchObject({ verdict: 'DROPPED', reason: 'POLICY_DENY', direction: 'INGRESS', protocol: 'TCP', type: 'drop', service: 'data/db', node: 'node1' });
  expect(row.source.key).toBe('shop/web');
  expect(row.destination).toMatchObject({ key: 'data/db', port: 5432, kind: 'Deployment' });
  expect(row.deniedBy.map(policyText)).toEqual(['data/closed']);
});

test('a reply is seen from who began', () => {
  const message = flow({ from: pod('data', 'db'), to: pod('shop', 'web'), port: 40_000, reply: true }) as { flow: any };
  message.flow.l4.TCP.source_port = 5432;
  const row = rowOf(message);
  expect([row.source.key, row.destination.key, row.destination.port]).toEqual(['shop/web', 'data/db', 5432]);
});

test('who a party is', () => {
  const of = (end: object, names: string[] = []) => rowOf({ flow: { verdict: 'FORWARDED', IP: { source: '198.51.100.7' }, source: end, source_names: names, destination: {} } }).source;
  expect(of({ labels: ['reserved:world'] }).key).toBe('reserved:world');
  expect(of({ labels: ['reserved:world'] }, ['api.example.com']).key).toBe('name:api.example.com');
  expect(of({ labels: ['reserved:host'] }).key).toBe('reserved:host');
  expect(of({}).key).toBe('ip:198.51.100.7');
  expect(of({ namespace: 'a', pod_name: 'web-6d5f9c7b8-x2x4z' }).key).toBe('a/web');
  expect(of({ namespace: 'a', pod_name: 'web-0' }).key).toBe('a/web');
  expect(of({ namespace: 'a', pod_name: 'web-x2x4z', labels: ['k8s:app=front'] }).key).toBe('a/front');
  expect(of({ namespace: 'a', pod_name: 'p', workloads: [{ name: 'w', kind: 'Job' }] }).key).toBe('a/w');
  expect(keyText('reserved:world')).toBe('outside the cluster');
  expect([namespaceOf('a/b'), namespaceOf('name:a/b'), namespaceOf('reserved:host')]).toEqual(['a', '', '']);
});

test('what Weir adds: the policies that isolate, counters, one connection for several records', () => {
  const row = rowOf(flow({ from: pod('shop', 'web'), to: pod('data', 'db'), port: 5432, reason: 'POLICY_DENIED', isolatedBy: [{ kind: 'NetworkPolicy', namespace: 'data', name: 'closed' }] }));
  expect([row.event, row.isolatedBy.map(policyText)]).toEqual(['drop', ['data/closed']]);
  const end = rowOf(flow({ from: pod('shop', 'web'), to: pod('data', 'db'), port: 5432, event: 'CONNECTION_END' }));
  expect(end).toMatchObject({ event: 'end', bytes: 85_410, packets: 11 });
  expect(rowOf({ flow: { verdict: 'FORWARDED' } })).toMatchObject({ event: 'new', roundTrip: 0 });
  expect(rowOf({ flow: { weir: { round_trip_ns: '1500000' } } }).roundTrip).toBe(1.5);
});

test('losses and nodes', () => {
  expect(read('{"lost_events":{"source":"HUBBLE_RING_BUFFER","num_events_lost":"12"},"node_name":"n1","time":"2026-11-30T00:00:00Z"}')).toMatchObject({ kind: 'loss', loss: { node: 'n1', count: 12, first: Date.parse('2026-11-30T00:00:00Z') } });
  expect(read('{"node_status":{"state_change":"NODE_UNAVAILABLE","node_names":["n2"],"message":"gone"}}')).toMatchObject({ kind: 'nodes', news: { state: 'NODE_UNAVAILABLE', nodes: ['n2'], message: 'gone' } });
});

test('nothing that is sent breaks the page', () => {
  for (const text of ['', 'x', 'null', '[]', '7', '{"flow":7}', '{"flow":[]}', '{"lost_events":{}}']) expect(() => read(text)).not.toThrow();
  const odd = { flow: { verdict: 7, IP: 'x', l4: { TCP: 'x' }, source: [], destination: { labels: 'x', workloads: 7, namespace: { a: 1 } }, egress_denied_by: [null, 7, {}], time: 'never', drop_reason_desc: {} } };
  expect(rowOf(odd)).toMatchObject({ verdict: '7', protocol: 'TCP', deniedBy: [] });
  expect(rowOf({ flow: { l4: { __proto__: null }, source: { labels: new Array(10_000).fill('k8s:a=b') } } }).source.labels).toHaveLength(64);
});

test('hidden characters are shown, and long text ends', () => {
  expect(plain('a\u202eb\u0000\u200b\n')).toBe('a\\u202eb\\u0000\\u200b\\u000a');
  expect(plain('<img src=x onerror=alert(1)>')).toBe('<img src=x onerror=alert(1)>');
  expect(plain('x'.repeat(1000))).toHaveLength(254);
  expect(plain({})).toBe('');
  const row = rowOf(flow({ from: pod('shop', 'web', 0, { pod: 'web\u202egnp' }), to: pod('a', 'b'), port: 1 }));
  expect(partyText(row.source)).toBe('shop/web\\u202egnp');
});

test('every reason of the agent has words here', () => {
  const source = readFileSync(new URL('../../../src/flow/reason.rs', import.meta.url), 'utf8');
  const names = [...source.matchAll(/\(\d+, "([A-Z0-9_]+)",/g)].map(([, name]) => name);
  expect(names.length).toBeGreaterThan(20);
  expect(names.filter((name) => !reasonNames.includes(name!))).toEqual([]);
  expect(reason('SOMETHING_NEW').text).toBe('Something new');
  expect(reason('constructor').text).toBe('Constructor');
});
