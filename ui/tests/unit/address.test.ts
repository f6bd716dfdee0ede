import { expect, test } from 'vitest';
import { commandLine, parseTerm, readTerms, withTerm, writeTerms } from '../../src/lib/filters.ts';
import { flowsQuery, readRoute, START, writeRoute, type Route } from '../../src/lib/route.ts';
import { Events } from '../../src/lib/stream.ts';
import { bytes, duration, number, rate } from '../../src/lib/text.ts';

test('filters as people type them', () => {
  expect(parseTerm('pod=shop/web')).toEqual({ key: 'pod', value: 'shop/web', not: false });
  expect(parseTerm('!--Drop_Reason: policy_denied')).toEqual({ key: 'drop-reason', value: 'policy_denied', not: true });
  expect(parseTerm('not label=app in (a,b)')).toEqual({ key: 'label', value: 'app in (a,b)', not: true });
  expect(parseTerm('label=k8s:app=web')).toMatchObject({ value: 'k8s:app=web' });
  for (const text of ['', 'x', '=x', 'nothing=1', 'pod=', 'constructor=1']) expect(typeof parseTerm(text)).toBe('string');
});

test('a filter and its opposite are not both there', () => {
  const one = { key: 'port', value: '53', not: false };
  expect(withTerm([one], one)).toEqual([one]);
  expect(withTerm([one], { ...one, not: true })).toEqual([{ ...one, not: true }]);
  let terms = [one];
  for (let i = 0; i < 100; i += 1) terms = withTerm(terms, { ...one, value: String(i) });
  expect(terms).toHaveLength(32);
});

test('filters survive the way through an address', () => {
  const terms = [
    { key: 'label', value: 'app in (a, b)', not: false },
    { key: 'pod', value: 'shop/wéb&x=y#z', not: true },
    { key: 'port', value: '80', not: false },
    { key: 'port', value: '443', not: false },
  ];
  const parameters = new URLSearchParams();
  writeTerms(terms, parameters);
  expect(readTerms(new URLSearchParams(parameters.toString()))).toEqual(terms);
  expect(parameters.getAll('port')).toEqual(['80', '443']);
  expect(parameters.get('not.pod')).toBe('shop/wéb&x=y#z');
});

test('the same on a command line', () => {
  const terms = [{ key: 'label', value: "app in (a,b)'; rm -rf /", not: false }, { key: 'pod', value: 'shop/web', not: true }];
  expect(commandLine(terms, ['--follow'])).toBe(`weir observe --label 'app in (a,b)'\\''; rm -rf /' --not pod=shop/web --follow`);
});

test('a route survives the way through an address', () => {
  const route: Route = { view: 'pod', pod: 'shop/web 1', terms: [{ key: 'verdict', value: 'dropped', not: false }], text: 'a&b', windowMs: 900_000, until: Date.parse('2026-11-30T12:00:00.123Z'), level: 'namespace', toggled: ['a', 'b'] };
  expect(readRoute(writeRoute(route))).toEqual(route);
  expect(writeRoute(START)).toBe('#/drops');
});

test('an address that nobody made is the first screen', () => {
  for (const hash of ['', '#', '#/', '#/nowhere', '#/pod', '#/pod/a', '#/pod/%E0%A4%A/x', '#/drops?window=9y&until=never&level=x&port=', '#//?', '#/drops?constructor=1&__proto__=2']) {
    expect(readRoute(hash)).toEqual(START);
  }
  expect(readRoute(`#/flows?${'port=1&'.repeat(1000)}`).terms.length).toBeLessThanOrEqual(32);
});

test('what the server is asked', () => {
  const now = Date.parse('2026-11-30T12:00:00Z');
  const asked = (part: Partial<Route>, nodes?: number) => Object.fromEntries(flowsQuery({ ...START, ...part }, nodes));
  expect(asked({})).toEqual({ verdict: 'DROPPED', follow: '1', last: '20000' });
  expect(asked({}, 50).last).toBe('400');
  expect(asked({}, 5_000).last).toBe('100');
  expect(asked({ view: 'flows' }).verdict).toBeUndefined();
  expect(asked({ view: 'pod', pod: 'a/b', until: now - 1000 })).toEqual({ pod: 'a/b', since: '2026-11-30T11:54:59.000Z', until: '2026-11-30T11:59:59.000Z', first: '50000' });
  expect(flowsQuery({ ...START, terms: [{ key: 'verdict', value: 'forwarded', not: false }] }).getAll('verdict')).toEqual(['forwarded']);
});

test('events, wherever the network cuts them', () => {
  const text = 'id: 7\ndata: {"a":1}\n\n: a comment\r\ndata: x\r\ndata: y\r\n\r\nevent: z\ndata:q\n\n';
  const whole = new Events().push(text);
  expect(whole).toEqual(['{"a":1}', 'x\ny', 'q']);
  const over = new Events();
  expect(over.push('event: failed\ndata: {"error":"x"}\n\n')).toEqual([]);
  expect(over.over).toEqual({ end: false, text: '{"error":"x"}' });
  for (let cut = 0; cut <= text.length; cut += 1) {
    const events = new Events();
    expect([...events.push(text.slice(0, cut)), ...events.push(text.slice(cut))]).toEqual(whole);
    expect(events.id).toBe('7');
  }
});

test('a stream without an end does not fill the memory', () => {
  const events = new Events();
  for (let i = 0; i < 50; i += 1) events.push('x'.repeat(100_000));
  for (let i = 0; i < 50; i += 1) events.push(`data: ${'x'.repeat(100_000)}\n`);
  const [data] = events.push('\n');
  expect(data!.length).toBeLessThanOrEqual(1 << 21);
});

test('numbers for people', () => {
  expect([number(999), number(1234567)]).toEqual(['999', '1\u202f234\u202f567']);
  expect([rate(0), rate(0.004), rate(0.05), rate(1.23), rate(1234)]).toEqual(['0/s', 'under 0.01/s', '0.05/s', '1.2/s', '1\u202f234/s']);
  expect([duration(5_400), duration(65_000), duration(3_660_000), duration(300_000)]).toEqual(['5 s', '1 min 5 s', '1 h 1 min', '5 min']);
  expect([bytes(999), bytes(1_500), bytes(25_000_000)]).toEqual(['999 B', '1.5 kB', '25 MB']);
});
