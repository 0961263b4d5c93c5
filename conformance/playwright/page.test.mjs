import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { after, before, describe, test } from 'node:test';
import { Session } from './session.mjs';

const DESKTOP = { viewport: { width: 1280, height: 800 } };
const PHONE = { viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true };
const AXE = await readFile(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const WEATHER = {
  name: 'get_weather', description: 'Get the weather of a city',
  parameters: { type: 'object', properties: { city: { type: 'string', description: 'The city' } }, required: ['city'] },
};
const STORY = 'Tell me a story about a fox who finds a lantern.';

let session;
before(async () => (session = await Session.open()));
after(() => session?.close());

/** Runs a test on a page of its own; the page must not have done what it must never do. */
function onPage(name, size, run, options) {
  test(name, async () => {
    session.gate.reset();
    const page = await session.page(size, options);
    try {
      await run(page, session.gate);
      assert.deepEqual(page.faults, []);
    } finally {
      session.gate.release();
      await page.context().close();
    }
  });
}

const field = (page) => page.getByLabel('Message', { exact: true });
const answers = (page) => page.getByRole('article', { name: 'Answer' });
const whole = (page) => page.locator('article.answer[aria-busy=false]');
const button = (page, name) => page.getByRole('button', { name, exact: true });
const proseOf = (answer) => answer.locator(':scope > .prose');

/** Sends a message and waits until its answer is whole. */
async function ask(page, text) {
  const before = await answers(page).count();
  await field(page).fill(text);
  await field(page).press('Enter');
  await whole(page).nth(before).waitFor();
  return answers(page).last();
}

/** Sends a message whose answer is held after a few pieces. */
async function askHeld(page, gate, text, events = 12) {
  gate.hold(events);
  await field(page).fill(text);
  await field(page).press('Enter');
  await page.waitForFunction(() => document.querySelector('article.answer:last-child > .prose')?.textContent.length > 5);
}

async function declareWeather(page) {
  await button(page, 'Settings').click();
  await page.getByLabel('Tool definitions, JSON').fill(JSON.stringify(WEATHER));
  await button(page, 'Done').click();
  await button(page, 'get_weather').waitFor();
}

async function metric(name) {
  const text = await (await fetch(`${session.base}/metrics`)).text();
  return Number(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)$`, 'm').exec(text)[1]);
}

/** Violations of axe's rules, as text. */
async function violations(page) {
  // Evaluated by the debugger, which the page's policy does not bind.
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ['violations'] }));
  return violations.flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.html.slice(0, 160)}`));
}

const overflow = (page) => page.evaluate(() => document.documentElement.scrollWidth - innerWidth);

/** A stream that a server could have sent. */
function stream(deltas, { usage = { prompt_tokens: 1, completion_tokens: deltas.length }, reason = 'stop' } = {}) {
  const choice = (delta, finish_reason = null) => ({ choices: [{ index: 0, delta, finish_reason }] });
  const chunks = [...deltas.map((d) => choice(d)), choice({}, reason), { choices: [], usage }];
  const body = `${chunks.map((c) => `data: ${JSON.stringify(c)}\n\n`).join('')}data: [DONE]\n\n`;
  return { status: 200, headers: { 'content-type': 'text/event-stream' }, body };
}

const refusal = (status, message, headers = {}) => ({
  status, headers: { 'content-type': 'application/json', ...headers }, body: JSON.stringify({ error: { message } }),
});

for (const [device, size] of [['desktop', DESKTOP], ['phone', PHONE]]) {
  describe(device, () => {
    onPage('an answer streams, and is what the API answers', size, async (page, gate) => {
      await askHeld(page, gate, STORY);
      assert.equal(await answers(page).last().getAttribute('aria-busy'), 'true');
      const begun = (await proseOf(answers(page).last()).innerText()).trim();
      await button(page, 'Stop').waitFor();
      gate.release();
      await whole(page).waitFor();
      const text = (await proseOf(answers(page).last()).innerText()).replace(/\s+/g, ' ').trim();
      assert.ok(text.length > begun.length && text.startsWith(begun.replace(/\s+/g, ' ')), `${begun} / ${text}`);

      const { stream: _, stream_options: __, return_progress: ___, ...body } = gate.asked[0].body;
      const direct = await fetch(`${session.base}/v1/chat/completions`, {
        method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body),
      });
      const { choices: [{ message }] } = await direct.json();
      assert.equal(text, message.content.replace(/\s+/g, ' ').trim());
      assert.match(await page.locator('.stats').innerText(), /\d tokens\/s · \d+ tokens · first after .* · prompt \d+/);
      assert.equal(await overflow(page), 0);
    });

    onPage('stop ends the answer, here and in the engine', size, async (page, gate) => {
      for (const [i, end] of [() => button(page, 'Stop').click(), () => page.keyboard.press('Escape')].entries()) {
        const cancelled = await metric('oxseek_requests_cancelled_total');
        await askHeld(page, gate, 'Tell me a long story about the sea.');
        await end();
        await page.getByText('stopped').nth(i).waitFor();
        assert.ok((await proseOf(answers(page).last()).innerText()).length > 5);
        // The engine may have been quicker than the reader: then the answer was whole there.
        assert.ok(await metric('oxseek_requests_cancelled_total') >= cancelled);
        gate.release();
      }
      // What was stopped stays part of the conversation.
      await ask(page, 'Thank you!');
      assert.deepEqual(gate.asked.at(-1).body.messages.map((m) => m.role), ['user', 'assistant', 'user', 'assistant', 'user']);
    });

    onPage('an answer can be had again, a message changed', size, async (page, gate) => {
      await ask(page, 'Hello!');
      await ask(page, STORY);
      const question = gate.asked.at(-1).body;
      await button(page, 'Regenerate').click();
      await page.waitForFunction(() => document.querySelectorAll('article.answer[aria-busy=false]').length === 2);
      assert.deepEqual(gate.asked.at(-1).body, question);
      assert.equal(gate.asked.length, 3);

      await page.getByRole('article', { name: 'You' }).first().hover();
      await button(page, 'Edit message').first().click();
      const editor = page.getByRole('textbox', { name: 'Edit message' });
      assert.equal(await editor.inputValue(), 'Hello!');
      await editor.fill('Good night!');
      await button(page, 'Send again').click();
      await page.waitForFunction(() => document.querySelectorAll('article').length === 2);
      await whole(page).waitFor();
      assert.deepEqual(gate.asked.at(-1).body.messages, [{ role: 'user', content: 'Good night!' }]);
    });

    onPage('thinking is folded and told apart from the answer', size, async (page, gate) => {
      await button(page, 'Think').click();
      const answer = await ask(page, 'Why do birds sing?');
      assert.equal(gate.asked[0].body.chat_template_kwargs.thinking, true);
      const summary = answer.getByText(/^Thought for /);
      const thought = answer.locator('details .prose');
      assert.equal(await thought.isVisible(), false);
      await summary.click();
      const text = await thought.innerText();
      const content = await proseOf(answer).innerText();
      assert.ok(text.trim() && content.trim() && !content.includes(text) && !/<\/?think>/.test(text + content), `${text} / ${content}`);
      await button(page, 'Think').click();
      await ask(page, 'Hello!');
      assert.equal(gate.asked[1].body.chat_template_kwargs?.thinking ?? false, false);
      assert.equal(await answers(page).last().locator('details').isVisible(), false);
    });

    onPage('the model calls a tool, and goes on with what it answered', size, async (page, gate) => {
      await declareWeather(page);
      const answer = await ask(page, 'What is the weather in Paris?');
      const card = answer.getByRole('group', { name: 'Tool call 1: get_weather' });
      assert.deepEqual(JSON.parse(await card.locator('pre').innerText()), { city: 'Paris' });
      assert.equal(await proseOf(answer).innerText(), '');
      await page.getByLabel('Result of get_weather').fill('{"temperature": 21, "sky": "clear"}');
      await button(page, 'Send result').click();
      await whole(page).nth(1).waitFor();
      assert.ok((await proseOf(answers(page).last()).innerText()).trim());
      const [, call, result] = gate.asked[1].body.messages;
      assert.equal(call.tool_calls[0].id, result.tool_call_id);
      await page.reload();
      await page.getByText('answered', { exact: true }).waitFor();
    });

    onPage('several tool calls are shown and answered by hand', size, async (page, gate) => {
      await declareWeather(page);
      gate.next(stream([
        { reasoning_content: 'Two calls.' },
        { content: 'I will look.' },
        { tool_calls: [{ index: 0, id: 'call_1', type: 'function', function: { name: 'get_weather', arguments: '{"city"' } }] },
        { tool_calls: [{ index: 0, function: { arguments: ':"Bern"}' } }] },
        { tool_calls: [{ index: 1, id: 'call_2', type: 'function', function: { name: 'get_weather', arguments: '{"city":"Rom"}' } }] },
      ], { reason: 'tool_calls' }));
      const answer = await ask(page, 'How is the weather in Bern and in Rome?');
      assert.deepEqual(gate.asked[0].body.tools, [{ type: 'function', function: WEATHER }]);
      const cards = page.getByRole('group', { name: /^Tool call \d: get_weather$/ });
      assert.equal(await cards.count(), 2);
      assert.deepEqual(JSON.parse(await cards.first().locator('pre').innerText()), { city: 'Bern' });
      assert.deepEqual(await violations(page), []);
      const results = page.getByLabel('Result of get_weather');
      await results.first().fill('{"sky": "clear"}');
      await results.last().fill('It rains.');
      gate.next(stream([{ content: 'Clear in Bern, rain in Rome.' }]));
      await button(page, 'Send result').click();
      await page.getByText('Clear in Bern, rain in Rome.').waitFor();
      const messages = gate.asked[1].body.messages;
      assert.deepEqual(messages.slice(2), [
        { role: 'tool', content: '{"sky": "clear"}', tool_call_id: 'call_1' },
        { role: 'tool', content: 'It rains.', tool_call_id: 'call_2' },
      ]);
      assert.equal(messages[1].reasoning_content, 'Two calls.');
      assert.deepEqual(messages[1].tool_calls.map((c) => [c.id, c.function.arguments]), [['call_1', '{"city":"Bern"}'], ['call_2', '{"city":"Rom"}']]);
      await cards.last().getByText('Result', { exact: true }).click();
      await cards.last().getByText('It rains.').waitFor();
      assert.equal(await overflow(page), 0);
    });

    onPage('conversations stay, are renamed, deleted, written and read', size, async (page) => {
      await ask(page, 'Hello!');
      await page.keyboard.press('Control+k');
      await page.getByText('What are you looking for?').waitFor();
      await ask(page, STORY);
      const story = await proseOf(answers(page).last()).innerText();
      await page.reload();
      await whole(page).waitFor();
      assert.equal(await proseOf(answers(page).last()).innerText(), story);

      const list = page.getByRole('navigation', { name: 'Conversations' });
      const phone = size === PHONE;
      if (phone) await button(page, 'Conversations').click();
      assert.deepEqual(await list.getByRole('listitem').allInnerTexts(), [STORY, 'Hello!']);
      await list.getByText('Hello!').hover();
      await button(page, 'Rename Hello!').click();
      await page.getByLabel('Title').fill('A greeting');
      await page.getByLabel('Title').press('Enter');
      await button(page, 'A greeting').waitFor();
      const [file] = await Promise.all([page.waitForEvent('download'), button(page, 'Export').click()]);
      await list.getByText('A greeting').hover();
      await button(page, 'Delete A greeting').click();
      await page.getByText('Conversation deleted').waitFor();
      assert.equal(await list.getByRole('listitem').count(), 1);
      await button(page, 'Undo').click();
      await page.getByRole('heading', { name: 'A greeting' }).waitFor();

      const path = await file.path();
      assert.ok(!(await readFile(path, 'utf8')).includes('oxseek.key'));
      await page.locator('input[type=file]').setInputFiles(path);
      await page.getByText('2 conversations imported').waitFor();
      await page.locator('input[type=file]').setInputFiles({ name: 'x.json', mimeType: 'application/json', buffer: Buffer.from('{}') });
      await page.getByText('This is not a file of conversations.').waitFor();
      await page.reload();
      await page.getByRole('heading', { name: 'A greeting' }).waitFor();
      if (phone) await button(page, 'Conversations').click();
      assert.deepEqual((await list.getByRole('listitem').allInnerTexts()).sort(), ['A greeting', 'A greeting', STORY, STORY]);
    });

    onPage('errors say what to do', size, async (page, gate) => {
      gate.next(refusal(429, 'This key may ask 10 times a minute.', { 'retry-after': '1' }));
      let answer = await ask(page, 'Hello!');
      await answer.getByText('This key may ask 10 times a minute.').waitFor();
      await button(page, 'Try again').click();
      await page.waitForFunction(() => document.querySelector('article.answer[aria-busy=false] > .prose')?.textContent);

      gate.next(refusal(401, 'The key is unknown.'));
      answer = await ask(page, 'Hello again!');
      await answer.getByText('This server asks for a key.').waitFor();
      await button(page, 'Enter key').click();
      const key = page.getByLabel('Key', { exact: true });
      await page.waitForFunction(() => document.activeElement.id === 'key');
      await key.fill('sk-canary');
      await button(page, 'Done').click();
      await button(page, 'Try again').click();
      await page.waitForFunction(() => !document.querySelector('.error:not([hidden])') && document.querySelectorAll('article.answer[aria-busy=false]').length === 2);
      assert.equal(gate.asked.at(-1).key, 'Bearer sk-canary');

      await askHeld(page, gate, STORY);
      gate.cut();
      answer = answers(page).last();
      await answer.getByText('The connection was lost before the answer ended.').waitFor();
      assert.ok(await proseOf(answer).innerText());
      await button(page, 'Try again').click();
      await page.waitForFunction(() => !document.querySelector('.error:not([hidden])') && document.querySelectorAll('article.answer[aria-busy=false]').length === 3);
    });

    onPage('a server that is away is waited for', size, async (page) => {
      await page.context().setOffline(true);
      await ask(page, 'Hello!');
      await page.getByText('The server cannot be reached. Trying again…').waitFor();
      assert.equal(await button(page, 'Send').isDisabled(), true);
      await page.context().setOffline(false);
      await button(page, 'Try again').and(page.locator(':enabled')).waitFor();
      await page.getByText('Trying again…').waitFor({ state: 'detached' });
      await button(page, 'Try again').click();
      await page.waitForFunction(() => document.querySelector('article.answer[aria-busy=false] > .prose')?.textContent);
    });

    onPage('light and dark are the system\'s or chosen, and both are readable', size, async (page, gate) => {
      gate.next(stream([{ reasoning_content: 'Short.' }, { content: 'A `word`, [a link](https://example.org/).\n\n```js\nlet a = 1; // one\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n> said' }]));
      await ask(page, 'Show me everything.');
      const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      const light = await paper();
      await page.emulateMedia({ colorScheme: 'dark' });
      const dark = await paper();
      assert.notEqual(light, dark);
      const phone = size === PHONE;
      for (const [label, colour] of [['Light colours', light], ['Dark colours', dark]]) {
        if (phone) await button(page, 'Conversations').click();
        await page.locator('#theme').click();
        await button(page, label).waitFor();
        if (phone) await button(page, 'Close the list').click();
        assert.equal(await paper(), colour);
        await page.reload();
        await whole(page).waitFor();
        await page.getByText('Thought for').click();
        assert.equal(await paper(), colour);
        assert.deepEqual(await violations(page), [], label);
        await button(page, 'Settings').click();
        await page.getByText('More', { exact: true }).click();
        assert.deepEqual(await violations(page), [], `${label}, settings`);
        await page.keyboard.press('Escape');
        if (phone) {
          await button(page, 'Conversations').click();
          assert.deepEqual(await violations(page), [], `${label}, list`);
          await button(page, 'Close the list').click();
        }
      }
      await page.keyboard.press('Control+k');
      await page.getByText('What are you looking for?').waitFor();
      assert.deepEqual(await violations(page), [], 'welcome');
    });
  });
}

describe('any size', () => {
  onPage('text of the model is text', DESKTOP, async (page, gate) => {
    const hostile = [
      '<script>window.owned = 1</script><img src=x onerror="window.owned = 1">',
      '[a](javascript:window.owned=1) [b](data:text/html,x) ![c](https://example.org/c.png) [d](//example.org) <https://example.org/e>',
      '```html\n<iframe srcdoc="<script>parent.owned=1</script>"></iframe>\n```',
      `${'> '.repeat(3000)}deep`,
      `${'*a '.repeat(8000)}`,
      `${'['.repeat(8000)}`,
      `${'`'.repeat(5000)} ${'|'.repeat(5000)}`,
      Array.from({ length: 400 }, (_, i) => `${' '.repeat(2 * i)}- item`).join('\n'),
    ].join('\n\n');
    gate.next(stream([{ content: hostile }]));
    const answer = await ask(page, 'Break the page.');
    assert.equal(await page.evaluate(() => window.owned), undefined);
    assert.equal(await answer.locator('script, img, iframe, .prose style').count(), 0);
    const links = await answer.locator('a').evaluateAll((list) => list.map((a) => [a.href, a.rel, a.target]));
    assert.deepEqual(links, ['https://example.org/c.png', 'https://example.org/e'].map((href) => [href, 'noopener noreferrer', '_blank']));
    assert.ok((await answer.innerText()).includes('<script>window.owned = 1</script>'));
    await ask(page, 'Hello!');
  });

  onPage('the message field is left and found by keyboard', DESKTOP, async (page, gate) => {
    await page.waitForFunction(() => document.activeElement.id === 'prompt');
    await page.keyboard.type('one');
    await page.keyboard.press('Shift+Enter');
    await page.keyboard.type('two');
    await page.keyboard.press('Enter');
    await whole(page).waitFor();
    assert.equal(gate.asked[0].body.messages[0].content, 'one\ntwo');
    await page.waitForFunction(() => document.activeElement.id === 'prompt');
    await page.keyboard.press('ArrowUp');
    await page.waitForFunction(() => document.activeElement.getAttribute('aria-label') === 'Edit message');
    await page.keyboard.press('Escape');
    await page.waitForFunction(() => document.activeElement.title === 'Edit message');
    await button(page, 'Regenerate').focus();
    await page.keyboard.press('Enter');
    await page.waitForFunction(() => document.activeElement.id === 'prompt');
  });

  onPage('settings are sent, and each conversation keeps its own', DESKTOP, async (page, gate) => {
    await button(page, 'Settings').click();
    await page.getByLabel('System prompt').fill('You are a pirate.');
    for (const [label, value] of [['Temperature', '0.5'], ['Top p', '0.9'], ['Max tokens', '7'], ['Seed', '11']]) await page.getByLabel(label).fill(value);
    await page.getByText('More', { exact: true }).click();
    await page.getByLabel('Stop, one text a line').fill('END\nSTOP');
    await button(page, 'Done').click();
    await ask(page, 'Hello!');
    const { model, ...body } = gate.asked[0].body;
    assert.deepEqual(body, {
      messages: [{ role: 'system', content: 'You are a pirate.' }, { role: 'user', content: 'Hello!' }],
      stream: true, stream_options: { include_usage: true }, return_progress: true, temperature: 0.5, top_p: 0.9, max_tokens: 7, seed: 11, stop: ['END', 'STOP'],
    });
    await page.getByText(/7 tokens .* cut at the token limit/).waitFor();
    await button(page, 'New chat').click();
    await button(page, 'Settings').click();
    await button(page, 'Reset').click();
    await page.getByLabel('Tool definitions, JSON').fill('[{');
    await button(page, 'Done').click();
    const answer = await ask(page, 'Hello!');
    await answer.getByText(/^The tool definitions in the settings: /).waitFor();
    assert.equal(gate.asked.length, 1);
    await page.getByRole('navigation').getByText('Hello!').last().click();
    await button(page, 'Settings').click();
    assert.equal(await page.getByLabel('System prompt').inputValue(), 'You are a pirate.');
  });

  onPage('a long prompt shows how far it is', DESKTOP, async (page, gate) => {
    const progress = (processed) => `data: ${JSON.stringify({ choices: [], prompt_progress: { total: 900, cache: 0, processed } })}\n\n`;
    const answer = stream([{ content: 'Read.' }]);
    gate.next({ ...answer, body: progress(300) + progress(600) + answer.body, heldAfter: 2 });
    await field(page).fill('Read this.');
    await field(page).press('Enter');
    await page.getByText(/^Reading the prompt: 600 of 900 tokens/).waitFor();
    const bar = page.getByRole('progressbar', { name: 'Prompt read' });
    assert.deepEqual(await bar.evaluate((b) => [b.value, b.max]), [600, 900]);
    gate.release();
    await whole(page).waitFor();
    assert.equal(await bar.isVisible(), false);
    // The server's own: a prompt of several steps.
    const { body } = gate.asked[0];
    const told = await fetch(`${session.base}/v1/chat/completions`, {
      method: 'POST', headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ ...body, max_tokens: 1, messages: [{ role: 'user', content: 'cat '.repeat(2500) }] }),
    });
    assert.match(await told.text(), /"prompt_progress":\{[^}]*"total":/);
  });

  onPage('an answer goes on while another conversation is looked at', DESKTOP, async (page, gate) => {
    await askHeld(page, gate, STORY);
    await button(page, 'New chat').click();
    gate.release();
    await page.getByRole('navigation').getByText(STORY).click();
    await whole(page).waitFor();
    await page.waitForFunction(() => /tokens/.test(document.querySelector('.stats')?.textContent));
    assert.equal(await page.getByText('stopped').count(), 0);
    assert.equal(gate.asked.length, 1);
  });

  onPage('everything fits 360 pixels', { ...PHONE, viewport: { width: 360, height: 640 } }, async (page, gate) => {
    const wide = 'w'.repeat(300);
    gate.next(stream([{ content: `${wide}\n\n\`\`\`\n${wide}\n\`\`\`\n\n| ${'head | '.repeat(12)}\n|${'-|'.repeat(12)}\n| ${'cell | '.repeat(12)}\n\n- ${wide}` }]));
    await ask(page, wide);
    assert.equal(await overflow(page), 0);
    for (const label of ['Settings', 'Conversations']) {
      await button(page, label).click();
      assert.equal(await overflow(page), 0, label);
      await page.keyboard.press('Escape');
    }
  });
});

if (process.env.SCREENSHOTS) {
  describe('screenshots', () => {
    const [desktop, phone] = [{ width: 1000, height: 600 }, { width: 360, height: 600 }];
    const shots = [
      ['desktop-light', { viewport: desktop }, 'light'], ['desktop-dark', { viewport: desktop }, 'dark'], ['phone', { ...PHONE, viewport: phone }, 'light'],
    ];
    for (const [name, size, colorScheme] of shots) {
      onPage(name, size, async (page) => {
        await button(page, 'Think').click();
        await ask(page, 'Why do birds sing?');
        await page.getByText('Thought for').click();
        if (name === 'phone') {
          await button(page, 'Think').click();
          await declareWeather(page);
          await ask(page, 'What is the weather in Paris?');
        }
        await page.screenshot({ path: `${process.env.SCREENSHOTS}/${name}.png`, animations: 'disabled', caret: 'initial' });
      }, { colorScheme });
    }
  });
}
