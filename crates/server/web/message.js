import { duration, statsOf } from './answer.js';
import { copyButton } from './clipboard.js';
import { h, icon, iconButton } from './element.js';
import { Prose } from './prose.js';
import { CallsView } from './toolcall.js';

/** What the user wrote; `edit` takes the new text. */
export function userNode(content, edit) {
  const bubble = h('div', { className: 'bubble' }, content);
  const pencil = iconButton('pencil', 'Edit message', () => node.replaceChildren(...editor()));
  const foot = h('div', { className: 'foot' }, pencil, copyButton('Copy message', () => content));
  const node = h('article', { className: 'user', 'aria-label': 'You' }, bubble, foot);

  function editor() {
    const field = h('textarea', { value: content, rows: Math.min(12, content.split('\n').length + 1), 'aria-label': 'Edit message' });
    const form = h('form', { className: 'editor' }, field, h('div', { className: 'row' },
      h('button', { type: 'button', onclick: close }, 'Cancel'),
      h('button', { type: 'submit', className: 'main' }, 'Send again')));
    form.onsubmit = (e) => {
      e.preventDefault();
      if (field.value.trim()) edit(field.value.trim());
    };
    form.onkeydown = (e) => {
      if (e.key === 'Escape') close(e);
      if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) {
        e.preventDefault();
        form.requestSubmit();
      }
    };
    queueMicrotask(() => field.focus());
    return [form];
  }

  function close(e) {
    e.stopPropagation();
    node.replaceChildren(bubble, foot);
    pencil.focus();
  }

  return node;
}

/** An answer, drawn again while it grows. */
export class AnswerView {
  node;
  #turn;
  #actions;
  #results;
  #prose = new Prose();
  #thought = new Prose();
  #calls = new CallsView();
  #summary = h('span');
  #thinking = h('details', { className: 'thinking', hidden: true }, h('summary', {}, icon('chevron'), this.#summary), this.#thought.node);
  #waiting = h('p', { className: 'waiting' }, h('span', { className: 'pulse' }), h('span'));
  #progress = h('progress', { 'aria-label': 'Prompt read' });
  #error = h('div', { className: 'error', role: 'alert', hidden: true });
  #stats = h('span', { className: 'stats' });
  #copy;
  #foot;
  #touched = false;
  #frame = 0;
  #asked = performance.now();
  #clock = 0;

  /**
   * `results`: texts of tools by call id. `actions`: `again` and `give` where this answer is the last one,
   * `askKey`, and `drawn`, which wraps each change of the page.
   */
  constructor(turn, results, actions) {
    this.#turn = turn;
    this.#results = results;
    this.#actions = actions;
    this.#copy = copyButton('Copy answer', () => turn.content);
    this.#foot = h('div', { className: 'foot' }, this.#copy);
    if (actions.again) this.#foot.append(iconButton('again', 'Regenerate', actions.again));
    this.#foot.append(this.#stats);
    // Once the reader opened or closed the thinking, it stays that way.
    this.#thinking.firstChild.onclick = () => (this.#touched = true);
    // Busy until the answer is whole, so that screen readers read it once and not token by token.
    this.node = h('article', { className: 'answer', 'aria-label': 'Answer', 'aria-busy': 'true' },
      this.#thinking, this.#prose.node, this.#calls.node, this.#waiting, this.#error, this.#foot);
    if (!turn.done) this.#clock = setInterval(() => this.schedule(), 1000);
    this.draw();
  }

  /** Draws at the next frame, however many pieces come before it. */
  schedule() {
    this.#frame ||= requestAnimationFrame(() => this.#actions.drawn(() => this.draw()));
  }

  draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const turn = this.#turn;
    this.#drawThinking();
    this.#prose.draw(turn.content.trim());
    this.#calls.draw(turn, this.#results, this.#actions.give);
    this.#drawWaiting();
    if (turn.error && this.#error.hidden) this.#drawError();
    this.#stats.textContent = statsOf(turn);
    this.#copy.hidden = !turn.content;
    this.#foot.hidden = !turn.done;
    this.node.ariaBusy = String(!turn.done);
    if (turn.done) clearInterval(this.#clock);
  }

  #drawThinking() {
    const { reasoning, content, calls, times, done } = this.#turn;
    const over = done || content || calls.length;
    this.#thinking.hidden = !reasoning;
    if (!reasoning) return;
    this.#thinking.classList.toggle('live', !over);
    if (!this.#touched) this.#thinking.open = !over;
    this.#summary.textContent = over ? `Thought for ${duration(times.thought)}` : 'Thinking…';
    this.#thought.draw(reasoning.trim());
  }

  #drawWaiting() {
    const { content, reasoning, calls, progress, done } = this.#turn;
    this.#waiting.hidden = done || Boolean(content || reasoning || calls.length);
    if (this.#waiting.hidden) return;
    const seconds = Math.floor((performance.now() - this.#asked) / 1000);
    const text = progress ? `Reading the prompt: ${progress.read} of ${progress.total} tokens` : 'Reading the prompt';
    this.#waiting.lastChild.textContent = seconds > 0 ? `${text} · ${seconds} s` : progress ? text : '';
    if (!progress) return;
    this.#progress.max = progress.total;
    this.#progress.value = progress.read;
    if (!this.#progress.parentNode) this.#waiting.firstChild.replaceWith(this.#progress);
  }

  #drawError() {
    const { message, status, retryAt } = this.#turn.error;
    this.#error.hidden = false;
    this.#error.replaceChildren(h('p', {}, status === 401 ? 'This server asks for a key.' : message));
    if (status === 401) this.#error.append(h('button', { type: 'button', onclick: this.#actions.askKey }, 'Enter key'));
    if (!this.#actions.again) return;
    const again = h('button', { type: 'button', onclick: this.#actions.again }, 'Try again');
    this.#error.append(again);
    countDown(again, retryAt);
  }
}

/** Holds a button back until the server wants to be asked again. */
function countDown(button, until) {
  const seconds = Math.ceil((until - Date.now()) / 1000);
  button.disabled = seconds > 0;
  button.textContent = seconds > 0 ? `Try again in ${seconds} s` : 'Try again';
  if (seconds > 0) setTimeout(() => countDown(button, until), 250);
}
