// Counts over a window of time, in buckets: a fixed amount of memory however much is counted.

/** How many buckets a window has. */
export const BUCKETS = 60;

/** Counts in the newest 60 buckets. */
export class Series {
  readonly #counts = new Uint32Array(BUCKETS);
  #head = Number.NEGATIVE_INFINITY;

  /** Counts `n` in a bucket; what is older than the window is not counted. */
  add(bucket: number, n = 1): void {
    if (bucket > this.#head) this.#advance(bucket);
    if (bucket <= this.#head - BUCKETS) return;
    this.#counts[bucket % BUCKETS]! += n;
  }

  /** The counts of the window that ends with `now`, the oldest first. */
  window(now: number): number[] {
    const counts = new Array<number>(BUCKETS);
    for (let i = 0; i < BUCKETS; i += 1) counts[i] = this.#at(now - BUCKETS + 1 + i);
    return counts;
  }

  /** The sum of the newest `buckets` of the window that ends with `now`. */
  sum(now: number, buckets = BUCKETS): number {
    let total = 0;
    for (let i = 0; i < buckets; i += 1) total += this.#at(now - i);
    return total;
  }

  #at(bucket: number): number {
    const known = bucket <= this.#head && bucket > this.#head - BUCKETS && bucket >= 0;
    return known ? this.#counts[bucket % BUCKETS]! : 0;
  }

  #advance(bucket: number): void {
    const from = Math.max(this.#head + 1, bucket - BUCKETS + 1);
    for (let i = from; i <= bucket; i += 1) this.#counts[i % BUCKETS] = 0;
    this.#head = bucket;
  }
}
