/**
 * Conversations, kept in this browser and nowhere else.
 * One is `{ id, title, updated, settings, messages }`; times are milliseconds since 1970.
 */
export class Library {
  /** False where the browser keeps nothing, as some private windows do: then conversations last as long as the page. */
  kept = true;
  /** Called when another tab changed something. */
  onchange = () => {};
  #database;
  #memory = new Map();
  #channel;
  /** Of every conversation what a list shows, by id; nothing until it was read. */
  #heads = null;

  static async open() {
    const library = new Library();
    try {
      const asked = indexedDB.open('oxseek', 1);
      asked.onupgradeneeded = () => asked.result.createObjectStore('conversations', { keyPath: 'id' });
      library.#database = await settled(asked);
      library.#channel = new BroadcastChannel('oxseek.library');
      library.#channel.onmessage = () => {
        library.#heads = null;
        library.onchange();
      };
    } catch {
      library.kept = false;
    }
    return library;
  }

  /** Everything, the newest first. */
  async all() {
    const list = this.kept ? await settled(this.#store('readonly').getAll()) : [...this.#memory.values()];
    return list.sort((a, b) => b.updated - a.updated);
  }

  /** `{ id, title, updated }` of everything, the newest first. */
  async heads() {
    this.#heads ??= new Map((await this.all()).map((c) => [c.id, headOf(c)]));
    return [...this.#heads.values()].sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return this.kept ? settled(this.#store('readonly').get(id)) : this.#memory.get(id);
  }

  async put(conversation) {
    this.#heads?.set(conversation.id, headOf(conversation));
    if (!this.kept) return void this.#memory.set(conversation.id, conversation);
    await settled(this.#store('readwrite').put(conversation));
    this.#channel.postMessage('changed');
  }

  async remove(id) {
    this.#heads?.delete(id);
    if (!this.kept) return void this.#memory.delete(id);
    await settled(this.#store('readwrite').delete(id));
    this.#channel.postMessage('changed');
  }

  #store(mode) {
    return this.#database.transaction('conversations', mode).objectStore('conversations');
  }
}

const headOf = ({ id, title, updated }) => ({ id, title, updated });

const settled = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
  request.onblocked = () => reject(new Error('another tab holds an older library'));
});

const FORMAT = 'oxseek-conversations';

/** Conversations as a file's text. */
export const exported = (conversations) => JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);

/** Conversations from a file's text, each checked and under a new id. Throws a sentence for people. */
export function imported(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error('This file is not JSON.');
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) throw new Error('This is not a file of conversations.');
  return file.conversations.map((c) => {
    if (!Array.isArray(c?.messages) || !c.messages.every(isMessage)) throw new Error('A conversation in this file is broken.');
    const settings = Object.fromEntries(Object.entries(c.settings ?? {}).filter(([, v]) => typeof v !== 'object'));
    const updated = Number.isFinite(c.updated) ? c.updated : Date.now();
    return { id: crypto.getRandomValues(new Uint32Array(2)).join('-'), title: String(c.title ?? ''), updated, settings, messages: c.messages.map(cleaned) };
  });
}

const isMessage = (m) => ['user', 'assistant', 'tool'].includes(m?.role) && typeof m.content === 'string'
  && (m.calls === undefined || (Array.isArray(m.calls) && m.calls.every((c) => ['id', 'name', 'arguments'].every((k) => typeof c?.[k] === 'string'))));

const text = (v) => (typeof v === 'string' ? v : '');
const number = (v) => (Number.isFinite(v) ? v : 0);

/** Only what the page reads, each of its type: a file is not to be trusted. */
function cleaned(m) {
  if (m.role === 'user') return { role: m.role, content: m.content };
  if (m.role === 'tool') return { role: m.role, content: m.content, id: text(m.id) };
  const calls = (m.calls ?? []).map(({ id, name, arguments: args }) => ({ id, name, arguments: args }));
  const times = Object.fromEntries(['first', 'thought', 'writing', 'tokens', 'prompt', 'cached'].map((k) => [k, number(m.times?.[k])]));
  return { role: m.role, content: m.content, reasoning: text(m.reasoning), calls, times, note: text(m.note), error: null, done: true };
}
