// The order of a list that changes by itself: the worst first, and no entry jumps for a small change.
import type { Drop } from './model.ts';

/** What is ordered. */
export interface Ranked {
  drop: Drop;
  now: boolean;
  rate: number;
  count: number;
}

/** Current before ended; then by magnitude of the rate, then by age. Entries of `held` keep their order. */
export function rank<T extends Ranked>(entries: readonly T[], held: readonly string[]): T[] {
  const place = new Map(held.map((key, i) => [key, i]));
  // Rates within a factor of four are alike.
  const magnitude = (value: number) => Math.floor(Math.log2(Math.max(value, 0.01)) / 2);
  return [...entries].sort((a, b) => {
    const [p, q] = [place.get(a.drop.key), place.get(b.drop.key)];
    if (p !== undefined && q !== undefined) return p - q;
    if (held.length && (p === undefined) !== (q === undefined)) return p === undefined ? 1 : -1;
    if (a.now !== b.now) return a.now ? -1 : 1;
    if (!a.now) return b.drop.last - a.drop.last;
    return magnitude(b.rate) - magnitude(a.rate) || a.drop.since - b.drop.since || (a.drop.key < b.drop.key ? -1 : 1);
  });
}
