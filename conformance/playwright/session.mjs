import { spawn } from 'node:child_process';
import { chromium } from 'playwright-core';
import { Gate } from './gate.mjs';

/** A server with the demo model, the gate before it, and a browser. */
export class Session {
  static async open() {
    const session = new Session();
    session.server = spawn(process.env.OXSEEK, ['serve', '--port', '0', '--parallel', '4'], { stdio: ['ignore', 'ignore', 'pipe'] });
    session.base = await listening(session.server);
    session.gate = await Gate.open(session.base);
    // Chromium's own sandbox needs rights that containers lack; the only page it opens is ours.
    session.browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox'] });
    return session;
  }

  async close() {
    await this.browser?.close();
    await this.gate?.close();
    this.server.kill();
  }

  /**
   * A page with a storage of its own; `settings` are the page's. What it must never do is kept in `page.faults`:
   * errors, warnings of the browser (a broken policy is one), requests to anybody else.
   */
  async page(size, { settings = { temperature: '0', max_tokens: '160' }, ...options } = {}) {
    const context = await this.browser.newContext({ ...size, ...options });
    context.setDefaultTimeout(60_000);
    await context.addInitScript((value) => localStorage['oxseek.settings'] ??= value, JSON.stringify(settings));
    const page = await context.newPage();
    page.faults = [];
    page.on('pageerror', (e) => page.faults.push(e.stack));
    page.on('console', (m) => {
      // The browser itself reports statuses that tests ask for.
      if (['error', 'warning'].includes(m.type()) && !/^Failed to load resource/.test(m.text())) page.faults.push(m.text());
    });
    page.on('request', (r) => {
      if (!r.url().startsWith(this.gate.address) && !r.url().startsWith('blob:')) page.faults.push(`asked ${r.url()}`);
    });
    await page.goto(this.gate.address);
    await page.getByText('tokens of context').waitFor();
    return page;
  }
}

/** The address that the server prints. */
function listening(server) {
  return new Promise((resolve, reject) => {
    let said = '';
    server.stderr.on('data', (data) => {
      said += data;
      const address = /listening on (http:\/\/[^/\s]+)/.exec(said);
      if (address) resolve(address[1]);
    });
    server.on('exit', () => reject(new Error(`the server ended: ${said}`)));
    server.on('error', reject);
  });
}
