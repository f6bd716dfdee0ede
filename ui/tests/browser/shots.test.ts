// Every page, in both themes and at a phone's width: it fits, axe-core finds nothing, the content
// security policy holds; a picture of each is left under tests/shots for people.
import type { Browser } from 'playwright-core';
import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest';
import { REQUESTS, shop } from '../flows.ts';
import { Relay } from '../server.ts';
import { accessibility, fits, loaded, type Look, open, shot, start } from './browser.ts';

let browser: Browser;
let relay: Relay;

beforeAll(async () => {
  [browser, relay] = await Promise.all([start(), Relay.start()]);
});
beforeEach(() => {
  const now = Date.now();
  relay.history = [...shop(3_000, now - 240_000, now - 200), ...shop(300, now - 20_000, now - 100, 5, REQUESTS)].sort((a, b) => Date.parse(String(a.time)) - Date.parse(String(b.time)));
});
afterAll(async () => {
  await browser?.close();
  await relay?.stop();
});

const looks: [string, Look][] = [
  ['light', { theme: 'light' }],
  ['dark', { theme: 'dark' }],
  ['phone-light', { theme: 'light', width: 390, height: 844, touch: true }],
  ['phone-dark', { theme: 'dark', width: 390, height: 844, touch: true }],
];
const pages: [string, string, string, string?][] = [
  ['drops', '#/drops', '.drop.now'],
  ['drop-open', '#/drops', '.drop.now', '.drop:has-text("No policy") .drop-head'],
  ['map', '#/map', '.canvas .box'],
  ['map-chosen', '#/map', '.canvas .box', '.pairs button'],
  ['map-namespaces', '#/map?level=namespace', '.canvas .box.folded'],
  ['flows', '#/flows', '.flow-space .flow-row'],
  ['flow-open', '#/flows?verdict=DROPPED', '.flow-space .flow-row', '.flow-space .flow-row'],
  ['requests', '#/flows?type=l7', '.flow-space .flow-row'],
  ['request-open', '#/flows?type=l7&verdict=DROPPED', '.flow-space .flow-row', '.flow-space .flow-row'],
  ['map-requests', '#/map?from-namespace=shop&to-namespace=shop', '.canvas .box', '.pairs li:has-text("HTTP") button'],
  ['reasons', '#/reasons', '.card'],
  ['pod', '#/pod/data/database-0', '.pod .drop'],
  ['nothing', '#/drops?namespace=nowhere', '.empty h2'],
];

for (const [look, options] of looks) {
  for (const [name, path, wanted, click] of pages) {
    // What both a phone and the dark theme change.
    if (look === 'phone-dark' && !['drop-open', 'map', 'flows', 'requests', 'map-requests'].includes(name)) continue;
    test(`${name} ${look}`, async () => {
      const { page, context, faults } = await open(browser, relay.url + path, options);
      await page.locator(wanted).first().waitFor();
      await loaded(page);
      if (click) await page.locator(click).first().click();
      if (click && !name.startsWith('map-')) await page.locator('.copy pre').first().waitFor();
      await shot(page, `${name}-${look}`);
      await fits(page);
      expect(await accessibility(page)).toEqual([]);
      expect(faults).toEqual([]);
      await context.close();
    });
  }
}
