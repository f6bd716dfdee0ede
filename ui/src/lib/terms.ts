// Filters that lead from something shown to the flows behind it.
import type { Term } from './filters.ts';
import { label, type Party } from './flow.ts';
import type { Drop } from './model.ts';

const term = (key: string, value: string): Term => ({ key, value, not: false });

/** The filters that a party's flows have in common. */
export function partyTerms(party: Party, side: 'from' | 'to'): Term[] {
  if (party.namespace) {
    const app = ['app.kubernetes.io/name', 'app', 'k8s-app'].find((key) => label(party.labels, key));
    if (app) return [term(`${side}-namespace`, party.namespace), term(`${side}-label`, `${app}=${label(party.labels, app)}`)];
    return party.workload ? [term(`${side}-pod`, `${party.namespace}/${party.workload}`)] : [term(`${side}-namespace`, party.namespace)];
  }
  if (party.reserved && party.reserved !== 'world') return [term(`${side}-label`, `reserved:${party.reserved}`)];
  if (party.key === 'reserved:world') return [term(`${side}-label`, 'reserved:world')];
  return party.ip ? [term(`${side}-ip`, party.ip)] : [];
}

/** The filters for the flows of one kind of drop. */
export function dropTerms(drop: Drop): Term[] {
  const terms = [...partyTerms(drop.source, 'from'), ...partyTerms(drop.destination, 'to'), term('verdict', 'DROPPED')];
  if (drop.destination.port) terms.push(term('to-port', String(drop.destination.port)));
  terms.push(term('drop-reason', drop.reason));
  return terms;
}
