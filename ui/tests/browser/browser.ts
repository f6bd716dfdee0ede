// Debian's Chromium, driven by playwright-core.
import { existsSync, mkdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';
import { type Browser, type BrowserContext, chromium, type Page } from 'playwright-core';
import { expect } from 'vitest';

const EXECUTABLE = [process.env.CHROMIUM ?? '', '/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find((path) => path && existsSync(path));
const SHOTS = new URL('../shots/', import.meta.url).pathname;
const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');

/** Starts Chromium. */
export function start(): Promise<Browser> {
  if (!EXECUTABLE) throw new Error('no Chromium: apt-get install chromium, or set CHROMIUM to one');
  return chromium.launch({
    executablePath: EXECUTABLE,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
}

/** How a page is looked at. */
export interface Look {
  theme?: 'light' | 'dark';
  width?: number;
  height?: number;
  touch?: boolean;
}

/** A page that fails the test when it breaks its content security policy, throws, or loads from elsewhere. */
export async function open(browser: Browser, url: string, look: Look = {}): Promise<{ page: Page; context: BrowserContext; faults: string[] }> {
  const context = await browser.newContext({
    viewport: { width: look.width ?? 1280, height: look.height ?? 800 },
    colorScheme: look.theme ?? 'light',
    hasTouch: look.touch ?? false,
    permissions: ['clipboard-read', 'clipboard-write'],
    locale: 'en-GB',
    timezoneId: 'UTC',
  });
  const page = await context.newPage();
  const faults: string[] = [];
  const origin = new URL(url).origin;
  page.on('console', (message) => {
    if (message.type() === 'error' && !/Failed to load resource|ERR_/.test(message.text())) faults.push(message.text());
  });
  page.on('pageerror', (error) => faults.push(error.message));
  page.on('request', (request) => {
    if (!request.url().startsWith(origin) && !request.url().startsWith('blob:')) faults.push(`loads ${request.url()}`);
  });
  await page.goto(url);
  return { page, context, faults };
}

/** A picture for people, under tests/shots. */
export async function shot(page: Page, name: string): Promise<void> {
  mkdirSync(SHOTS, { recursive: true });
  await page.screenshot({ path: `${SHOTS}${name}.png` });
}

/** What axe-core finds at this moment, as lines. */
export async function accessibility(page: Page): Promise<string[]> {
  // The policy forbids scripts in the page; the debugger's protocol does not run under it.
  const violations = await page.evaluate(`${AXE};axe.run(document,{resultTypes:['violations'],runOnly:['wcag2a','wcag2aa','wcag21a','wcag21aa','wcag22aa','best-practice']}).then(r=>r.violations.map(v=>({id:v.id,help:v.help,nodes:v.nodes.map(n=>n.target.join(' ')+' '+(n.failureSummary||''))})))`);
  return (violations as { id: string; help: string; nodes: string[] }[]).map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.slice(0, 3).join(' | ')}`);
}

/** Nothing is wider than the window. */
export async function fits(page: Page): Promise<void> {
  const [wide, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth] as const);
  expect(wide, 'the page scrolls sideways').toBeLessThanOrEqual(window);
}

/** Waits until the page has taken in what the server has sent: its count stands still. */
export async function loaded(page: Page): Promise<void> {
  await page.waitForFunction(
    () => {
      const main = document.querySelector('main') as (HTMLElement & { since?: number; last?: string }) | null;
      const flows = main?.dataset.flows;
      if (!main || flows !== main.last) Object.assign(main ?? {}, { last: flows, since: Date.now() });
      return main?.since !== undefined && Date.now() - main.since > 700;
    },
    undefined,
    { polling: 100 },
  );
}
