import { ask, newAnswer, requestBody } from './answer.js';
import { $, drawIcons, h, icon } from './element.js';
import { Library, exported, imported } from './library.js';
import { Log, toast } from './log.js';
import { Server } from './server.js';
import { fillForm, kept, readForm, toolsOf } from './settings.js';
import { Sidebar } from './sidebar.js';

const SUGGESTIONS = ['Tell me a story about a fox.', 'Why is the sky blue?', 'Hello! What can you do?'];
const THEMES = { auto: 'Colours as the system', light: 'Light colours', dark: 'Dark colours' };
const KEY_WANTED = 'This server asks for a key.';
const SAVE_EVERY_MS = 2000;

const server = new Server();
const library = await Library.open();
const prompt = $('prompt');
const form = $('settings-form');
const log = new Log($('log'), $('scroll'), $('to-end'));
const sidebar = new Sidebar($('conversations'), { open: ({ id }) => visit(id), rename, remove });

const narrow = matchMedia('(max-width: 50rem)');
/** Focus on a field would bring up a keyboard there. */
const touch = matchMedia('(hover: none)');

let model = null;
let capabilities = null;
let conversation = blank();
/** Answers on their way, by conversation: `{ conversation, controller, view }`. */
const running = new Map();

// ---- The conversation ----------------------------------------------------------------------------------------------

function blank() {
  const id = [...crypto.getRandomValues(new Uint32Array(3))].map((n) => n.toString(36)).join('');
  return { id, title: '', updated: 0, settings: kept.get('settings') ?? {}, messages: [] };
}

/** Goes to a conversation by its address; without an id to a new one. */
function visit(id = '') {
  if (narrow.matches) showSidebar(false);
  if (location.hash.slice(1) !== id) location.hash = id;
  else open(id);
  if (!touch.matches) prompt.focus();
}

async function open(id) {
  const found = running.get(id)?.conversation ?? (id ? await library.get(id) : null);
  if (id !== location.hash.slice(1)) return; // somebody was quicker
  conversation = found ?? blank();
  for (const m of conversation.messages) {
    // The page was closed while this answer came.
    if (m.role === 'assistant' && !m.done && !running.has(id)) Object.assign(m, { done: true, note: 'interrupted' });
  }
  fillForm(form, conversation.settings);
  show();
  log.toEnd();
  await list();
}

function show() {
  const answer = running.get(conversation.id);
  for (const other of running.values()) other.view = null;
  const view = log.show(conversation.messages, { again: regenerate, give: giveResults, edit, askKey });
  if (answer) answer.view = view;
  showState();
}

function send(content) {
  if (!content || !model || running.has(conversation.id)) return;
  if (!conversation.title) conversation.title = titleOf(content);
  conversation.messages.push({ role: 'user', content });
  prompt.value = '';
  run();
}

const titleOf = (content) => {
  const line = content.split('\n', 1)[0];
  return line.length > 60 ? `${line.slice(0, 57).replace(/[\s.,;:!?]+$/, '')}…` : line;
};

function edit(at, content) {
  stop();
  if (at === 0 && conversation.title === titleOf(conversation.messages[0].content)) conversation.title = titleOf(content);
  conversation.messages.splice(at, Infinity, { role: 'user', content });
  run();
  prompt.focus();
}

function regenerate() {
  if (!model || running.has(conversation.id)) return;
  if (conversation.messages.at(-1)?.role === 'assistant') conversation.messages.pop();
  run();
  prompt.focus();
}

function giveResults(texts) {
  const { calls } = conversation.messages.at(-1);
  conversation.messages.push(...calls.map((call, i) => ({ role: 'tool', id: call.id, content: texts[i] })));
  run();
  prompt.focus();
}

/** Asks for the next answer of the conversation. */
async function run() {
  const turn = newAnswer();
  const mine = { conversation, controller: new AbortController(), view: null };
  const { id } = conversation;
  try {
    const body = requestBody(model.id, conversation, capabilities);
    conversation.messages.push(turn);
    running.set(id, mine);
    if (location.hash.slice(1) !== id) history.pushState(null, '', `#${id}`);
    show();
    log.toEnd();
    await save(mine.conversation);
    let saved = performance.now();
    await ask(server, body, turn, mine.controller.signal, () => {
      mine.view?.schedule();
      if (performance.now() - saved < SAVE_EVERY_MS) return;
      saved = performance.now();
      save(mine.conversation);
    });
  } catch (e) {
    // A setting that makes no sense, or a mistake of this page: said where the answer would be.
    if (!conversation.messages.includes(turn)) conversation.messages.push(turn);
    Object.assign(turn, { done: true, error: { message: e.message, status: 400, retryAt: 0 } });
    if (!mine.view) show();
  }
  // An edit may have begun another answer meanwhile.
  if (running.get(id) === mine) running.delete(id);
  if (mine.view) log.following(() => mine.view.draw());
  showState();
  if (!mine.removed) await save(mine.conversation);
  if (turn.error && [0, 401, 503].includes(turn.error.status)) watch();
}

function stop() {
  running.get(conversation.id)?.controller.abort();
}

async function save(what) {
  what.updated = Date.now();
  try {
    await library.put(what);
  } catch (e) {
    toast($('toasts'), `This browser could not keep the conversation: ${e.message}`);
  }
  await list();
}

// ---- The list ------------------------------------------------------------------------------------------------------

async function list() {
  sidebar.show(await library.heads(), conversation.id);
}

async function rename({ id }, title) {
  // What is open or still being answered is newer than what is kept.
  const which = [conversation, running.get(id)?.conversation].find((c) => c?.id === id) ?? await library.get(id);
  which.title = title;
  await library.put(which);
  await list();
  showState();
}

async function remove({ id }) {
  const which = running.get(id)?.conversation ?? await library.get(id);
  const answer = running.get(id);
  if (answer) answer.removed = true;
  answer?.controller.abort();
  await library.remove(id);
  if (id === conversation.id) visit();
  else await list();
  toast($('toasts'), 'Conversation deleted', async () => {
    await library.put(which);
    visit(id);
  });
}

$('export').onclick = async () => {
  const url = URL.createObjectURL(new Blob([exported(await library.all())], { type: 'application/json' }));
  h('a', { href: url, download: `oxseek-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
};
$('import').onclick = () => $('import-file').click();
$('import-file').onchange = async ({ target }) => {
  try {
    const conversations = imported(await target.files[0].text());
    for (const c of conversations) await library.put(c);
    toast($('toasts'), `${conversations.length} conversation${conversations.length === 1 ? '' : 's'} imported`);
    await list();
  } catch (e) {
    toast($('toasts'), e.message);
  }
  target.value = '';
};
library.onchange = async () => {
  await list();
  // Another tab went on with what is open here.
  const stored = !running.has(conversation.id) && await library.get(conversation.id);
  if (stored && stored.updated > conversation.updated && stored.messages.every((m) => m.role !== 'assistant' || m.done)) await open(stored.id);
};

// ---- The server's state --------------------------------------------------------------------------------------------

let watching = false;

/** Waits until the server answers, and says meanwhile why it does not. */
async function watch() {
  if (watching) return;
  watching = true;
  while (!await meet()) await new Promise((resume) => setTimeout(resume, 1000));
  watching = false;
}

/** Learns what is served; false where asking again may help. */
async function meet() {
  let found = null;
  let refused = false;
  let trouble = await server.trouble();
  try {
    if (!trouble) [found, capabilities] = [await server.model(), await server.capabilities()];
  } catch (e) {
    refused = [401, 403].includes(e.status);
    trouble = e.status === 401 ? KEY_WANTED : e.message;
  }
  model = found;
  if (model) $('about').textContent = `${model.id} · ${model.max_model_len.toLocaleString('en')} tokens of context`;
  say(trouble || (library.kept ? '' : 'This browser keeps nothing: conversations last as long as this page.'));
  showState();
  return Boolean(found) || refused;
}

/** Says something above the message field, once. */
function say(text) {
  if ($('status').dataset.said === text) return;
  $('status').dataset.said = text;
  $('status').replaceChildren(text);
  if (text === KEY_WANTED) $('status').append(h('button', { type: 'button', onclick: askKey }, 'Enter key'));
}

function askKey() {
  openSettings();
  $('key').focus();
}

// ---- The page ------------------------------------------------------------------------------------------------------

function showState() {
  const busy = running.has(conversation.id);
  const empty = !conversation.messages.length;
  const send = $('send');
  send.replaceChildren(icon(busy ? 'stop' : 'send'));
  send.ariaLabel = busy ? 'Stop' : 'Send';
  send.title = busy ? 'Stop (Esc)' : 'Send (Enter)';
  send.disabled = !busy && (!model || !prompt.value.trim());
  prompt.style.height = 'auto';
  prompt.style.height = `${prompt.scrollHeight}px`;
  $('welcome').hidden = !empty;
  for (const button of $('suggestions').children) button.disabled = !model;
  $('title').textContent = conversation.title || 'New chat';
  document.title = conversation.title ? `${conversation.title} · Oxseek` : 'Oxseek';
  $('model').textContent = empty ? '' : model?.id ?? '';
  $('thinking').hidden = capabilities?.thinking.switch === false;
  $('thinking').ariaPressed = String(Boolean(conversation.settings.thinking));
  $('schema').hidden = conversation.settings.format !== 'schema';
  showTools();
}

function showTools() {
  let text = '';
  try {
    const tools = toolsOf(conversation.settings);
    if (tools.length) text = tools.length === 1 ? tools[0].function.name : `${tools.length} tools`;
  } catch {
    text = 'Broken tools';
  }
  $('declared').hidden = !text;
  $('declared').replaceChildren(icon('tool'), text);
}

function showSidebar(open) {
  document.body.dataset.sidebar = open ? 'open' : 'closed';
  $('toggle-sidebar').ariaExpanded = String(open);
  const over = open && narrow.matches;
  $('shade').hidden = !over;
  $('main').inert = over;
  if (over) $('close-sidebar').focus();
}

function showTheme() {
  const theme = kept.get('theme') ?? 'auto';
  document.documentElement.dataset.theme = theme;
  $('theme').replaceChildren(icon(theme));
  $('theme').ariaLabel = $('theme').title = THEMES[theme];
}

function changeSettings(settings) {
  const { thinking } = conversation.settings;
  conversation.settings = thinking ? { ...settings, thinking } : settings;
  keepSettings();
}

function keepSettings() {
  kept.set('settings', conversation.settings);
  if (conversation.messages.length) library.put(conversation);
  showState();
}

function openSettings() {
  fillForm(form, conversation.settings);
  $('settings').showModal();
}

$('composer').onsubmit = (e) => {
  e.preventDefault();
  if (running.has(conversation.id)) stop();
  else send(prompt.value.trim());
};
prompt.oninput = showState;
prompt.onkeydown = (e) => {
  if (e.key === 'ArrowUp' && !prompt.value && !running.has(conversation.id)) {
    e.preventDefault();
    log.editLast();
  }
  // Enter that ends an input method's composition is not meant for us.
  if (e.key !== 'Enter' || e.shiftKey || e.isComposing) return;
  e.preventDefault();
  send(prompt.value.trim());
};
document.onkeydown = (e) => {
  if (e.key === 'k' && (e.ctrlKey || e.metaKey)) {
    e.preventDefault();
    $('settings').close();
    visit();
  }
  if (e.key !== 'Escape' || $('settings').open) return;
  if (!$('shade').hidden) showSidebar(false), $('toggle-sidebar').focus();
  else stop();
};
$('skip').onclick = (e) => (e.preventDefault(), prompt.focus());
$('new').onclick = () => visit();
$('thinking').onclick = () => {
  conversation.settings.thinking = conversation.settings.thinking ? '' : 'on';
  keepSettings();
};
$('declared').onclick = () => (openSettings(), form.elements.tools.focus());
$('open-settings').onclick = openSettings;
form.oninput = () => changeSettings(readForm(form));
$('reset').onclick = () => (fillForm(form, {}), changeSettings({}));
$('settings').onclick = (e) => {
  if (e.target === $('settings')) $('settings').close();
};
$('settings').onclose = () => {
  if (!model) watch();
};
$('key').oninput = () => kept.set('key', (server.key = $('key').value.trim()));
$('toggle-sidebar').onclick = () => {
  const open = document.body.dataset.sidebar !== 'open';
  showSidebar(open);
  if (!narrow.matches) kept.set('sidebar', open);
};
$('close-sidebar').onclick = $('shade').onclick = () => (showSidebar(false), $('toggle-sidebar').focus());
$('theme').onclick = () => {
  const names = Object.keys(THEMES);
  kept.set('theme', names[(names.indexOf(kept.get('theme') ?? 'auto') + 1) % names.length]);
  showTheme();
};
narrow.onchange = () => showSidebar(!narrow.matches && kept.get('sidebar') !== false);
addEventListener('hashchange', () => open(location.hash.slice(1)));
document.addEventListener('visibilitychange', () => {
  for (const { conversation: open } of running.values()) if (document.hidden) library.put(open);
});

drawIcons(document);
for (const text of SUGGESTIONS) $('suggestions').append(h('button', { type: 'button', onclick: () => (send(text), prompt.focus()) }, text));
$('key').value = server.key = kept.get('key') ?? '';
showTheme();
narrow.onchange();
open(location.hash.slice(1));
if (!touch.matches) prompt.focus();
watch();
