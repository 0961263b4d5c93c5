import { h, iconButton } from './element.js';

/** The list of conversations. */
export class Sidebar {
  #node;
  #actions;
  #drawn = '';
  #renaming = false;

  /** `actions`: `open`, `rename` and `remove`, each given a conversation (and the new title). */
  constructor(node, actions) {
    this.#node = node;
    this.#actions = actions;
  }

  show(conversations, currentId) {
    const groups = Map.groupBy(conversations, (c) => dayOf(c.updated));
    const drawn = JSON.stringify([currentId, ...[...groups].map(([day, list]) => [day, list.map((c) => [c.id, c.title])])]);
    // Drawn only when it changed, so that a focus in it stays.
    if (this.#renaming || drawn === this.#drawn) return;
    this.#drawn = drawn;
    this.#node.replaceChildren(...[...groups].map(([day, list]) => h('section', {},
      h('h2', {}, day), h('ul', {}, ...list.map((c) => this.#item(c, c.id === currentId))))));
    if (!conversations.length) this.#node.append(h('p', { className: 'empty' }, 'Conversations stay in this browser. They will be listed here.'));
  }

  #item(conversation, current) {
    const open = h('button', { type: 'button', className: 'open', title: conversation.title, onclick: () => this.#actions.open(conversation) }, conversation.title);
    if (current) open.setAttribute('aria-current', 'page');
    const item = h('li', {}, open,
      iconButton('pencil', `Rename ${conversation.title}`, () => item.replaceChildren(this.#renamer(conversation))),
      iconButton('trash', `Delete ${conversation.title}`, () => this.#actions.remove(conversation)));
    return item;
  }

  #renamer(conversation) {
    const field = h('input', { value: conversation.title, maxLength: 120, 'aria-label': 'Title' });
    this.#renaming = true;
    const close = (title) => {
      if (!this.#renaming) return;
      this.#renaming = false;
      this.#drawn = '';
      this.#actions.rename(conversation, title.trim() || conversation.title);
    };
    field.onkeydown = (e) => {
      if (e.key === 'Enter' && !e.isComposing) close(field.value);
      if (e.key === 'Escape') close(conversation.title);
      e.stopPropagation();
    };
    field.onblur = () => close(field.value);
    queueMicrotask(() => field.select());
    return field;
  }
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return 'Today';
  if (time >= midnight - 86_400_000) return 'Yesterday';
  return time >= midnight - 7 * 86_400_000 ? 'This week' : 'Earlier';
}
