// Keys that work anywhere but where text is typed; listed under `?`.
import { app } from './app.svelte.ts';
import type { View } from './lib/route.ts';

/** The keys and what they do, for the help. */
export const KEYS: readonly (readonly [string, string])[] = [
  ['1 2 3 4', 'drops, map, flows, reasons'],
  ['/', 'type a filter'],
  ['j k', 'next and previous entry; Enter opens it'],
  ['Space', 'stop time, and go on'],
  ['[ ]', 'half a window back and forward'],
  ['Arrows', 'move between the boxes of the map'],
  ['+ − 0', 'zoom the map in and out, show all of it'],
  ['t', 'theme: system, light, dark'],
  ['n', 'nodes'],
  ['?', 'this list'],
  ['Esc', 'close'],
];

const VIEWS: Record<string, View> = { 1: 'drops', 2: 'map', 3: 'flows', 4: 'reasons' };

/** Handles a key of the whole page. */
export function keys(event: KeyboardEvent): void {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target instanceof Element ? event.target : null;
  if (target?.closest('input, textarea, select, dialog[open]')) return;
  const view = VIEWS[event.key];
  if (view) app.go({ view, pod: '' });
  else if (event.key === '/') document.getElementById('filter')?.focus();
  else if (event.key === ' ' && !target?.closest('button, a, summary, [role="button"]')) toggleTime();
  else if (event.key === '[') app.step(-0.5);
  else if (event.key === ']') app.step(0.5);
  else if (event.key === 't') app.setTheme(app.theme === 'auto' ? 'light' : app.theme === 'light' ? 'dark' : 'auto');
  else if (event.key === 'n') app.nodesOpen = true;
  else if (event.key === '?') app.help = true;
  else if (event.key === 'j' || event.key === 'k') move(event.key === 'j' ? 1 : -1);
  else return;
  event.preventDefault();
}

function toggleTime(): void {
  if (app.route.until === null) app.stop();
  else app.resume();
}

/** Moves the focus along the entries of the view. */
function move(by: number): void {
  const items = [...document.querySelectorAll<HTMLElement>('main [data-item]')];
  const at = items.findIndex((item) => item.contains(document.activeElement));
  const next = at < 0 ? items[0] : items[Math.min(Math.max(at + by, 0), items.length - 1)];
  next?.focus();
  next?.scrollIntoView({ block: 'nearest' });
}
