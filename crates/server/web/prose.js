import { copyButton } from './clipboard.js';
import { h } from './element.js';
import { parseBlocks, parseSpans } from './markdown.js';
import { coloured } from './syntax.js';

/** Model text on the page, drawn again as it grows. */
export class Prose {
  node;
  #shown = [];
  #text = '';

  constructor(className = '') {
    this.node = h('div', { className: `prose ${className}` });
  }

  /** Replaces only blocks that changed: a selection or a focused button in the others survives the next token. */
  draw(text) {
    if (text === this.#text) return;
    this.#text = text;
    const blocks = parseBlocks(text);
    const keys = blocks.map((b) => JSON.stringify(b));
    let same = 0;
    while (same < keys.length && keys[same] === this.#shown[same]) same++;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...blocks.slice(same).map(blockNode));
    this.#shown = keys;
  }
}

function blockNode(block) {
  switch (block.type) {
    case 'code': return codeNode(block.text, block.lang);
    // The page's own headings are h1 and h2.
    case 'heading': return h(`h${Math.min(block.level + 2, 6)}`, {}, ...spans(block.text));
    case 'rule': return h('hr');
    case 'quote': return h('blockquote', {}, ...block.blocks.map(blockNode));
    case 'list': return listNode(block);
    case 'table': return tableNode(block);
    case 'math': return h('div', { className: 'math' }, block.text);
    default: return h('p', {}, ...spans(block.text));
  }
}

const spans = (text) => parseSpans(text).map(spanNode);

function spanNode(span) {
  if (typeof span === 'string') return span;
  const children = span.spans.map(spanNode);
  if (span.tag === 'math') return h('span', { className: 'math' }, ...children);
  if (span.tag !== 'a') return h(span.tag, {}, ...children);
  return h('a', { href: span.href, rel: 'noopener noreferrer', target: '_blank' }, ...children);
}

/** Code with its language and a button that copies it. */
export function codeNode(text, lang) {
  return h('figure', { className: 'code' },
    h('figcaption', {}, h('span', {}, lang || 'code'), copyButton('Copy code', () => text)),
    // Reached by keyboard, since it may scroll.
    h('pre', { tabIndex: 0 }, h('code', {}, ...coloured(text, lang))));
}

function listNode({ ordered, start, items }) {
  const list = ordered ? h('ol', { start }) : h('ul');
  for (const item of items) {
    const nodes = item.blocks.map(blockNode);
    // A paragraph alone, or before a list in the list, is the item's text.
    if (nodes[0]?.tagName === 'P' && (nodes.length === 1 || /^[UO]L$/.test(nodes[1].tagName))) nodes.splice(0, 1, ...nodes[0].childNodes);
    if (item.task) nodes.unshift(h('input', { type: 'checkbox', disabled: true, checked: item.task === 'done', 'aria-label': item.task }));
    list.append(h('li', { className: item.task ? 'task' : '' }, ...nodes));
  }
  return list;
}

function tableNode({ head, align, rows }) {
  const row = (tag, cells) => h('tr', {}, ...head.map((_, i) => h(tag, { className: align[i] ?? 'left' }, ...spans(cells[i] ?? ''))));
  const table = h('table', {}, h('thead', {}, row('th', head)), h('tbody', {}, ...rows.map((r) => row('td', r))));
  return h('div', { className: 'table', tabIndex: 0, role: 'region', 'aria-label': 'Table' }, table);
}
