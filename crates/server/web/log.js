import { h, iconButton } from './element.js';
import { AnswerView, userNode } from './message.js';

/** The conversation on the page. */
export class Log {
  #node;
  #box;
  #toEnd;

  /** `node` holds the messages, `box` scrolls them, `toEnd` is the button that goes to the end. */
  constructor(node, box, toEnd) {
    this.#node = node;
    this.#box = box;
    this.#toEnd = toEnd;
    box.onscroll = () => this.#mark();
    toEnd.onclick = () => this.toEnd();
    new ResizeObserver(() => this.#mark()).observe(node);
  }

  /** Draws all messages anew; answers the view of the last one where that is an answer. */
  show(messages, actions) {
    this.#node.replaceChildren();
    let view = null;
    messages.forEach((message, i) => {
      view = null;
      if (message.role === 'user') this.#node.append(userNode(message.content, (text) => actions.edit(i, text)));
      else if (message.role === 'assistant') view = this.#append(messages, i, actions);
    });
    this.#mark();
    return view;
  }

  #append(messages, i, actions) {
    const turn = messages[i];
    const results = {};
    for (let k = i + 1; messages[k]?.role === 'tool'; k++) results[messages[k].id] = messages[k].content;
    const last = i === messages.length - 1;
    const view = new AnswerView(turn, results, {
      again: last ? actions.again : null,
      give: last ? actions.give : null,
      askKey: actions.askKey,
      drawn: (change) => this.following(change),
    });
    this.#node.append(view.node);
    return view;
  }

  /** Opens the editor of the user's last message. */
  editLast() {
    [...this.#node.querySelectorAll('.user')].at(-1)?.querySelector('.foot button')?.click();
  }

  /** Changes the page and, where the reader was at its end, keeps the end in sight. */
  following(change) {
    const follow = this.#fromEnd() < 60;
    change();
    if (follow) this.toEnd();
  }

  toEnd() {
    this.#box.scrollTop = this.#box.scrollHeight;
    this.#mark();
  }

  #fromEnd() {
    return this.#box.scrollHeight - this.#box.scrollTop - this.#box.clientHeight;
  }

  #mark() {
    this.#toEnd.hidden = this.#fromEnd() < 120;
  }
}

/** A line at the foot of the page. It goes away by itself, but one with an `undo` waits: nobody should have to hurry. */
export function toast(node, text, undo) {
  const line = h('div', { className: 'toast' }, h('span', {}, text));
  node.replaceChildren(line);
  if (!undo) return void setTimeout(() => line.remove(), 8000);
  line.append(
    h('button', { type: 'button', onclick: () => (line.remove(), undo()) }, 'Undo'),
    iconButton('close', 'Dismiss', () => line.remove()));
}
