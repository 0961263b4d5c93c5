import { EventParser } from './events.js';

/** What the server, or the way to it, refused: a sentence for people, the HTTP status (0: none), seconds to wait. */
export class ServerError extends Error {
  constructor(message, status = 0, retrySeconds = 0) {
    super(message);
    this.status = status;
    this.retrySeconds = retrySeconds;
  }
}

/** The server that this page came from. */
export class Server {
  key = '';

  /** Why requests are not answered, in words for people; nothing where they are. */
  async trouble() {
    let response;
    try {
      response = await fetch('/health', { cache: 'no-store' });
    } catch {
      return 'The server cannot be reached. Trying again…';
    }
    if (response.ok) return '';
    const { message } = await refusal(response);
    return message === 'the model is loading' ? 'Loading the model…' : message;
  }

  /** The model: `{ id, max_model_len }`. */
  async model() {
    return (await (await this.#fetch('/v1/models')).json()).data[0];
  }

  /** What the server offers with this model. */
  async capabilities() {
    return (await this.#fetch('/v1/capabilities')).json();
  }

  /** Chunks of an answer as they come, several at a time. */
  async *chat(body, signal) {
    const response = await this.#fetch('/v1/chat/completions', {
      method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), signal,
    });
    const parser = new EventParser();
    const reader = response.body.getReader();
    let whole = false;
    for (;;) {
      const { done, value } = await reader.read().catch((e) => { throw lost(e, 'The connection was lost before the answer ended.'); });
      if (done) break;
      const events = parser.push(value);
      whole ||= events.includes('[DONE]');
      const chunks = events.filter((e) => e !== '[DONE]').map((e) => JSON.parse(e));
      const failed = chunks.find((c) => c.error);
      yield chunks.filter((c) => !c.error);
      if (failed) throw new ServerError(failed.error.message, 200);
    }
    if (!whole) throw new ServerError('The connection ended before the answer did.');
  }

  async #fetch(path, init = {}) {
    const headers = { ...init.headers };
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    const response = await fetch(path, { ...init, headers }).catch((e) => { throw lost(e, 'The server cannot be reached.'); });
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

const lost = (e, message) => (e.name === 'AbortError' ? e : new ServerError(message));

async function refusal(response) {
  const text = await response.text().catch(() => '');
  let message = `The server answered ${response.status} ${response.statusText}`;
  try {
    message = JSON.parse(text).error.message;
  } catch { /* not from our server: the status says enough */ }
  return new ServerError(message, response.status, retrySeconds(response.headers.get('retry-after')));
}

/** `Retry-After`: seconds, or a date. */
function retrySeconds(value) {
  if (!value) return 0;
  const seconds = /^\d+$/.test(value) ? +value : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : 0;
}
