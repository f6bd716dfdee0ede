// Server-sent events over fetch: EventSource would hide why a request was refused.

/** What one request for events ends with. */
export type End = { kind: 'done' } | { kind: 'refused'; status: number; text: string } | { kind: 'broken'; text: string };

/** Cuts a stream of text into events, wherever the network cuts it. */
export class Events {
  #rest = '';
  #data: string[] = [];
  #size = 0;
  #event = '';
  /** The stream has said that it is over: `end`, or why it failed. */
  over: { end: boolean; text: string } | null = null;
  /** The newest `id:`. */
  id = '';

  /** The data of every event that ends within `chunk`. */
  push(chunk: string): string[] {
    const done: string[] = [];
    const lines = (this.#rest + chunk).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop() ?? '';
    // No event of ours is so long: this is not our server.
    if (this.#rest.length > MOST_EVENT) this.#rest = '';
    for (const line of lines) this.#line(line, done);
    return done;
  }

  #line(line: string, done: string[]): void {
    if (line === '') {
      const data = this.#data.join('\n');
      if (this.#event === 'end' || this.#event === 'failed') this.over ??= { end: this.#event === 'end', text: data };
      else if (this.#data.length) done.push(data);
      this.#data = [];
      this.#event = '';
      this.#size = 0;
      return;
    }
    const at = line.indexOf(':');
    const field = at < 0 ? line : line.slice(0, at);
    const value = at < 0 ? '' : line.slice(at + 1).replace(/^ /, '');
    if (field === 'id') this.id = value;
    if (field === 'event') this.#event = value;
    if (field === 'data' && this.#size + value.length <= MOST_EVENT) {
      this.#data.push(value);
      this.#size += value.length;
    }
  }
}

const MOST_EVENT = 1 << 20;

/** The words of a stream that failed: `{"error": WORDS}`. */
function why(data: string): string {
  try {
    return String((JSON.parse(data) as { error?: unknown }).error).slice(0, 500);
  } catch {
    return 'the server ended the stream';
  }
}

/** Asks for events once. `onOpen` gets the server's clock, when it tells. */
export async function request(
  url: string,
  lastId: string,
  signal: AbortSignal,
  onOpen: (serverTime: number | null) => void,
  onEvents: (data: string[], id: string) => void,
): Promise<End> {
  try {
    const headers: Record<string, string> = { accept: 'text/event-stream' };
    if (lastId) headers['last-event-id'] = lastId;
    const response = await fetch(url, { headers, signal, cache: 'no-store', credentials: 'same-origin' });
    if (!response.ok || !response.body) {
      const text = (await response.text()).slice(0, 500);
      return { kind: 'refused', status: response.status, text };
    }
    const date = Date.parse(response.headers.get('date') ?? '');
    onOpen(Number.isFinite(date) ? date : null);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const events = new Events();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return { kind: 'done' };
      const data = events.push(value);
      if (data.length) onEvents(data, events.id);
      if (events.over) {
        void reader.cancel();
        return events.over.end ? { kind: 'done' } : { kind: 'broken', text: why(events.over.text) };
      }
    }
  } catch (error) {
    return { kind: 'broken', text: error instanceof Error ? error.message : String(error) };
  }
}
