// The rule that would allow a denied flow: the server makes it, by the code of `weir policy suggest`.
import { plain } from './text.ts';

/** A policy, with what to know before applying it; or why there is none. */
export type Rule = { yaml: string; notes: string[] } | { none: string };

const PATIENCE_MS = 5_000;

/** Asks for the rule that allows the flow of `message`, as the stream had it. */
export async function askForRule(message: string): Promise<Rule> {
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const response = await fetch('api/allow', { method: 'POST', body: message, headers: { 'content-type': 'application/json' }, cache: 'no-store', credentials: 'same-origin', signal });
    if (!response.ok) return { none: `The server makes no rule (HTTP ${response.status}): ${plain(await response.text(), 500)}` };
    return readRule(await response.json());
  } catch (error) {
    return { none: `The server makes no rule: ${error instanceof Error ? error.message : String(error)}` };
  }
}

function readRule(json: unknown): Rule {
  const rule = (typeof json === 'object' && json !== null ? json : {}) as Record<string, unknown>;
  if (typeof rule.yaml !== 'string') return { none: plain(rule.none, 500) || 'The server gave no rule.' };
  const notes = Array.isArray(rule.notes) ? rule.notes.slice(0, 16).map((note) => plain(note, 500)) : [];
  // Line by line: a control character in a label must not hide what is applied.
  const yaml = rule.yaml.split('\n').map((line) => plain(line, 10_000)).join('\n');
  return { yaml, notes: [...new Set(notes)] };
}
