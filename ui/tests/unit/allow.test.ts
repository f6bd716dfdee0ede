import { expect, test } from 'vitest';
import { parse } from 'yaml';
import { allow, selectorOf } from '../../src/lib/allow.ts';
import { read, type Row } from '../../src/lib/flow.ts';
import { flow, pod, type Spec } from '../flows.ts';

const frontend = pod('shop', 'frontend');
const database = pod('data', 'database', 0, { pod: 'database-0' });

function row(spec: Spec, change: (flow: any) => void = () => {}): Row {
  const message = flow(spec) as { flow: any };
  change(message.flow);
  const read_ = read(JSON.stringify(message));
  if (read_?.kind !== 'flow') throw new Error('no flow');
  return read_.row;
}

function yaml(spec: Spec, change?: (flow: any) => void): any {
  const rule = allow(row(spec, change));
  if ('none' in rule) throw new Error(rule.none);
  return parse(rule.yaml);
}

test('into a pod from a pod of another namespace', () => {
  const rule = allow(row({ from: frontend, to: database, port: 5432, reason: 'POLICY_DENIED' }));
  expect(rule).toMatchObject({
    yaml: `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: allow-frontend-to-database-5432
  namespace: data
spec:
  podSelector:
    matchLabels:
      app: database
  policyTypes:
  - Ingress
  ingress:
  - from:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: shop
      podSelector:
        matchLabels:
          app: frontend
    ports:
    - protocol: TCP
      port: 5432
`,
  });
});

test('out of a pod to the world, by address', () => {
  expect(yaml({ from: database, to: 'world', port: 443, reason: 'POLICY_DENIED' }).spec).toEqual({
    podSelector: { matchLabels: { app: 'database' } },
    policyTypes: ['Egress'],
    egress: [{ to: [{ ipBlock: { cidr: '203.0.113.9/32' } }], ports: [{ protocol: 'TCP', port: 443 }] }],
  });
});

test('IPv6, UDP, and a peer without labels', () => {
  const spec = yaml({ from: 'world', to: database, port: 53, protocol: 'UDP', reason: 'POLICY_DENIED' }, (flow) => (flow.IP.source = '2001:db8::9')).spec;
  expect(spec.ingress).toEqual([{ from: [{ ipBlock: { cidr: '2001:db8::9/128' } }], ports: [{ protocol: 'UDP', port: 53 }] }]);
  const bare = allow(row({ from: frontend, to: database, port: 1, reason: 'POLICY_DENIED' }, (flow) => (flow.source.labels = ['k8s:io.kubernetes.pod.namespace=shop'])));
  expect('yaml' in bare && parse(bare.yaml).spec.ingress[0].from).toEqual([{ namespaceSelector: { matchLabels: { 'kubernetes.io/metadata.name': 'shop' } } }]);
  expect('yaml' in bare && bare.notes.join()).toContain('every pod of shop');
});

test('ICMP needs a CiliumNetworkPolicy', () => {
  const policy = yaml({ from: frontend, to: database, port: 0, protocol: 'ICMPv4', reason: 'POLICY_DENIED' });
  expect(policy.kind).toBe('CiliumNetworkPolicy');
  expect(policy.spec.ingress).toEqual([
    { fromEndpoints: [{ matchLabels: { 'k8s:io.kubernetes.pod.namespace': 'shop', app: 'frontend' } }], icmps: [{ fields: [{ family: 'IPv4', type: 8 }] }] },
  ]);
});

test('no rule where none would help', () => {
  for (const [change, words] of [
    [{ reason: 'FIB_LOOKUP_FAILED' }, 'No policy dropped'],
    [{ reason: 'POLICY_DENY', deniedBy: [{ namespace: '', name: 'no-debug' }] }, 'change no-debug'],
    [{ reason: undefined }, 'not dropped'],
  ] as [Partial<Spec>, string][]) {
    const rule = allow(row({ from: frontend, to: database, port: 5432, reason: 'POLICY_DENIED', ...change }));
    expect('none' in rule && rule.none).toContain(words);
  }
  const bare = allow(row({ from: frontend, to: database, port: 1, reason: 'POLICY_DENIED' }, (flow) => (flow.destination.labels = [])));
  expect('none' in bare && bare.none).toContain('no labels');
});

test('labels that a release or a replica changes are left out', () => {
  const labels = ['k8s:app=web', 'k8s:pod-template-hash=1', 'k8s:apps.kubernetes.io/pod-index=0', 'k8s:app.kubernetes.io/version=2', 'k8s:helm.sh/chart=web-1', 'k8s:io.cilium.k8s.policy.serviceaccount=web', 'reserved:world'];
  expect(selectorOf({ labels } as never)).toEqual({ app: 'web' });
});

test('values that YAML would take for something else stay text', () => {
  const hostile = ['true', 'no', '1.0', '007', '', 'a: b', '- x', '{{ x }}', "it's", '"', 'null', '~', '\u202e', 'x\n  evil: yes', '# x', '&a', '*a', '!!str', 'Off', '0x1f', '1e3', '2026-11-30'];
  for (const value of hostile) {
    const policy = yaml({ from: frontend, to: database, port: 5432, reason: 'POLICY_DENIED' }, (flow) => (flow.destination.labels = [`k8s:app=${value}`, 'k8s:io.kubernetes.pod.namespace=data']));
    // Control characters are shown as \\uNNNN: such a label cannot exist, and must not become another one.
    const shown = value.replace('\n', '\\u000a').replace('\u202e', '\\u202e');
    expect(policy.spec.podSelector.matchLabels).toEqual({ app: shown });
    expect(Object.keys(policy)).toEqual(['apiVersion', 'kind', 'metadata', 'spec']);
  }
});

test('the name is a DNS label', () => {
  const policy = yaml({ from: pod('a', 'x'.repeat(200)), to: pod('b', 'Über_Ding!'), port: 65535, reason: 'POLICY_DENIED' });
  expect(policy.metadata.name).toMatch(/^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/);
  expect(policy.metadata.name.length).toBeLessThanOrEqual(63);
});
