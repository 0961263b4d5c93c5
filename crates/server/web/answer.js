import { parameters } from './settings.js';

/** An assistant's message before its first token. Times are milliseconds, `tokens` and its neighbours come from usage. */
export const newAnswer = () => ({
  role: 'assistant', content: '', reasoning: '', calls: [], note: '', error: null, done: false,
  times: { first: 0, thought: 0, writing: 0, tokens: 0, prompt: 0, cached: 0 },
});

/** The body of a request for the next answer of a conversation. */
export function requestBody(model, { settings, messages }, capabilities) {
  const asked = messages.findLastIndex((m) => m.role === 'user');
  const list = messages.map((m, i) => ({ ...m, goesOn: i > asked }))
    .filter((m) => m.role !== 'assistant' || m.content || m.calls.length).map(wireMessage);
  if (settings.system?.trim()) list.unshift({ role: 'system', content: settings.system });
  const body = {
    model, messages: list, stream: true, stream_options: { include_usage: true }, return_progress: true, ...parameters(settings),
  };
  if (settings.thinking && capabilities.thinking.switch) body.chat_template_kwargs = { thinking: true };
  return body;
}

function wireMessage({ role, content, reasoning, id, calls = [], goesOn }) {
  if (role === 'tool') return { role, content, tool_call_id: id };
  const message = { role, content };
  // While tools are called, the thinking of this turn goes on; that of earlier turns is over.
  if (goesOn && reasoning) message.reasoning_content = reasoning;
  if (calls.length) {
    message.tool_calls = calls.map((c) => ({ id: c.id, type: 'function', function: { name: c.name, arguments: c.arguments } }));
  }
  return message;
}

/** Streams an answer into `turn`. Never throws: what goes wrong becomes `turn.error`. */
export async function ask(server, body, turn, signal, changed) {
  const asked = performance.now();
  let first = 0;
  let pieces = 0;
  try {
    for await (const chunks of server.chat(body, signal)) {
      for (const chunk of chunks) {
        if (!takeChunk(turn, chunk)) continue;
        const now = performance.now();
        first ||= now;
        pieces++;
        turn.times.first = first - asked;
        turn.times.writing = now - first;
        if (!turn.content && !turn.calls.length) turn.times.thought = now - asked;
        turn.times.tokens = pieces;
      }
      takeUsage(turn, chunks.find((c) => c.usage)?.usage);
      changed();
    }
  } catch (e) {
    if (signal.aborted) turn.note = 'stopped';
    else if (e.status === undefined) throw e;
    else turn.error = { message: e.message, status: e.status, retryAt: e.retrySeconds ? Date.now() + e.retrySeconds * 1000 : 0 };
  } finally {
    delete turn.progress;
    turn.done = true;
  }
}

/** Adds a chunk; answers whether it brought a piece of the model's text. */
function takeChunk(turn, chunk) {
  // The name and the shape are llama.cpp's.
  if (chunk.prompt_progress) turn.progress = { read: chunk.prompt_progress.processed, total: chunk.prompt_progress.total };
  const { delta = {}, finish_reason: reason } = chunk.choices?.[0] ?? {};
  if (reason === 'length') turn.note = 'cut at the token limit';
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? '';
  turn.reasoning += reasoning;
  turn.content += delta.content ?? '';
  for (const call of delta.tool_calls ?? []) {
    const mine = (turn.calls[call.index] ??= { id: '', name: '', arguments: '' });
    mine.id ||= call.id ?? '';
    mine.name += call.function?.name ?? '';
    mine.arguments += call.function?.arguments ?? '';
  }
  const brought = Boolean(reasoning || delta.content || delta.tool_calls?.length);
  if (brought) delete turn.progress;
  return brought;
}

function takeUsage(turn, usage) {
  if (!usage) return;
  turn.times.tokens = usage.completion_tokens;
  turn.times.prompt = usage.prompt_tokens;
  turn.times.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
}

/** The figures under an answer. */
export function statsOf({ times, note }) {
  const parts = [];
  // The first token is not counted: its time is the prompt's. What came at once says nothing of speed.
  if (times.tokens > 1 && times.writing > 20) parts.push(`${rate((times.tokens - 1) / times.writing * 1000)} tokens/s`);
  if (times.tokens) parts.push(`${times.tokens} token${times.tokens === 1 ? '' : 's'}`);
  if (times.first) parts.push(`first after ${duration(times.first)}`);
  if (times.prompt) parts.push(`prompt ${times.prompt}${times.cached ? `, ${times.cached} cached` : ''}`);
  if (note) parts.push(note);
  return parts.join(' · ');
}

const rate = (n) => n.toFixed(n < 100 ? 1 : 0);

export const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : ms < 60_000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(ms / 60_000)} min ${Math.round(ms % 60_000 / 1000)} s`);
