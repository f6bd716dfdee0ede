// The page of a real relay, with two agents and the demo's traffic: tests/it/page.rs starts this, and applies
// the rule that is left in WEIR_RULE.
import { writeFileSync } from 'node:fs';
import type { Browser, Page } from 'playwright-core';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { parse } from 'yaml';
import { accessibility, open, shot, start } from '../browser/browser.ts';

const url = process.env.WEIR_PAGE ?? '';
const rule = process.env.WEIR_RULE ?? '';
let browser: Browser;

beforeAll(async () => {
  if (!url || !rule) throw new Error('WEIR_PAGE and WEIR_RULE are not set: cargo test --test it page:: sets them');
  browser = await start();
});
afterAll(() => browser?.close());

async function visit(path: string, look: (page: Page) => Promise<void>): Promise<void> {
  const { page, context, faults } = await open(browser, url + path);
  await look(page);
  expect(await accessibility(page)).toEqual([]);
  expect(faults).toEqual([]);
  await context.close();
}

test('what is dropped, why, and the rule that would allow it', () =>
  visit('', async (page) => {
    const drop = page.locator('.drop.now').filter({ hasText: 'shop/frontend' }).filter({ hasText: 'data/database' }).filter({ hasText: '5432/TCP' });
    await drop.waitFor();
    expect(await drop.innerText()).toContain('No policy allows it');
    await drop.locator('.drop-head').click();
    const yaml = await drop.locator('.copy pre').innerText();
    expect(parse(yaml)).toMatchObject({
      kind: 'NetworkPolicy',
      metadata: { namespace: 'data' },
      spec: { podSelector: { matchLabels: { app: 'database' } }, policyTypes: ['Ingress'] },
    });
    writeFileSync(rule, yaml);
    await shot(page, 'real-drops');
  }));

test('the map has the shop', () =>
  visit('#/map', async (page) => {
    for (const box of ['shop/frontend', 'shop/backend', 'data/database']) await page.locator(`[data-box="${box}"]`).waitFor();
    await page.locator('.line.bad').first().waitFor();
    await shot(page, 'real-map');
  }));

test('flows follow, filter and stop', () =>
  visit('#/flows?to-port=8080&verdict=FORWARDED', async (page) => {
    const row = page.locator('.flow-space .flow-row').first();
    await row.waitFor();
    for (const text of await page.locator('.flow-space .flow-row').allInnerTexts()) expect(text).toContain('8080/TCP');
    const before = Number(await page.locator('main').getAttribute('data-flows'));
    await expect.poll(async () => Number(await page.locator('main').getAttribute('data-flows')), { timeout: 20_000 }).toBeGreaterThan(before);
    await page.getByRole('button', { name: 'Stop', exact: true }).click();
    await page.getByText(/^Stopped at/).waitFor();
    await row.waitFor();
    await row.click();
    await page.getByRole('dialog').waitFor();
    await shot(page, 'real-flow');
  }));

test('a pod, reasons and nodes', async () => {
  await visit('#/pod/data/database', async (page) => {
    await page.getByRole('heading', { name: 'Drops from and to it' }).waitFor();
    await shot(page, 'real-pod');
  });
  await visit('#/reasons', async (page) => {
    await page.getByText('POLICY_DENIED').first().waitFor();
    await page.keyboard.press('n');
    await expect.poll(() => page.getByRole('dialog').getByText('connected').count()).toBe(2);
  });
});

test('a question that the relay refuses is shown in its words', () =>
  visit('#/flows?verdict=perhaps', async (page) => {
    expect(await page.getByRole('alert').innerText()).toMatch(/HTTP 400.*perhaps/i);
  }));
