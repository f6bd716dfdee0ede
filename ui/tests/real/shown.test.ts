// Requests of a namespace that only asks to see them, on the page of a real relay: tests/it/page.rs starts this.
import type { Browser } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { accessibility, open, shot, start } from '../browser/browser.ts';

const url = process.env.WEIR_PAGE ?? '';
let browser: Browser;

beforeAll(async () => {
  if (!url) throw new Error('WEIR_PAGE is not set: cargo test --test it page:: sets it');
  browser = await start();
});
afterAll(() => browser?.close());

test('requests that are only shown are in the table', async () => {
  const { page, context, faults } = await open(browser, `${url}#/flows?type=l7`);
  const row = page.locator('.flow-space .flow-row').filter({ hasText: '/only-shown' }).first();
  await row.waitFor();
  const text = await row.innerText();
  for (const part of ['shown/client', 'GET']) expect(text).toContain(part);
  await shot(page, 'real-shown');
  expect(await accessibility(page)).toEqual([]);
  expect(faults).toEqual([]);
  await context.close();
});
