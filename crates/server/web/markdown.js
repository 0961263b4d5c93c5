/**
 * Markdown as models write it, to plain objects. Lenient where people are sloppy, bounded where a text is hostile,
 * and steady while a text still grows: what is open at the end is drawn as if it were closed there.
 */

const DEPTH_MAX = 8;
/** How far a mark may be from the one that closes it, in characters: a text of marks that nobody closes stays cheap. */
const REACH_MAX = 4000;
const FENCE = /^ *(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const COLUMNS = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;
const MATH = { '$$': '$$', '\\[': '\\]' };

/** Blocks: code, heading, rule, quote, list, table, math, p. */
export const parseBlocks = (text) => blocksOf(text.replaceAll('\t', '    ').split('\n'), 0);

function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (line.trim() === '') at++;
    else if (FENCE.test(line)) at = takeCode(lines, at, blocks);
    else if (mathOpens(line)) at = takeMath(lines, at, blocks);
    else if (HEADING.test(line)) blocks.push(headingOf(lines[at++]));
    else if (RULE.test(line)) at += Boolean(blocks.push({ type: 'rule' }));
    else if (depth < DEPTH_MAX && QUOTE.test(line)) at = takeQuote(lines, at, blocks, depth);
    else if (depth < DEPTH_MAX && ITEM.test(line)) at = takeList(lines, at, blocks, depth);
    else if (isTable(lines, at)) at = takeTable(lines, at, blocks);
    else at = takeParagraph(lines, at, blocks);
  }
  return blocks;
}

const indentOf = (line) => line.length - line.trimStart().length;
const mathOpens = (line) => MATH[line.trimStart().slice(0, 2)];
const isTable = (lines, at) => lines[at].includes('|') && at + 1 < lines.length && lines[at + 1].includes('-') && COLUMNS.test(lines[at + 1]);
const startsBlock = (line) => [FENCE, HEADING, RULE, QUOTE].some((r) => r.test(line)) || mathOpens(line);

function headingOf(line) {
  const [, marks, rest] = HEADING.exec(line);
  let text = rest.trimEnd();
  const closing = /^#+$/.test(text.slice(text.lastIndexOf(' ') + 1));
  if (closing) text = text.slice(0, text.lastIndexOf(' ') + 1).trimEnd();
  return { type: 'heading', level: marks.length, text };
}

function takeCode(lines, at, blocks) {
  const [, fence, about] = FENCE.exec(lines[at]);
  const lang = about.trim().split(/[\s{]/, 1)[0];
  const indent = indentOf(lines[at]);
  const closes = (line) => line.trim().length >= fence.length && line.trim() === fence[0].repeat(line.trim().length);
  const code = [];
  while (++at < lines.length && !closes(lines[at])) code.push(lines[at].slice(Math.min(indent, indentOf(lines[at]))));
  blocks.push({ type: 'code', lang, text: code.join('\n') });
  return at + 1;
}

function takeMath(lines, at, blocks) {
  const close = mathOpens(lines[at]);
  const text = [lines[at].trim().slice(2)];
  while (!text.at(-1).includes(close) && ++at < lines.length) text.push(lines[at]);
  blocks.push({ type: 'math', text: text.join('\n').replace(close, '').trim() });
  return at + 1;
}

function takeQuote(lines, at, blocks, depth) {
  const inner = [];
  for (; at < lines.length && QUOTE.test(lines[at]); at++) inner.push(lines[at].replace(QUOTE, ''));
  blocks.push({ type: 'quote', blocks: blocksOf(inner, depth + 1) });
  return at;
}

function takeList(lines, at, blocks, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  for (let m; at < lines.length && (m = ITEM.exec(lines[at])) && /\d/.test(m[2]) === ordered && !RULE.test(lines[at]);) {
    const indent = m[1].length;
    const inside = Math.min(indent + m[2].length + (m[3].length > 4 ? 1 : m[3].length), lines[at].length);
    const inner = [lines[at].slice(inside)];
    for (at++; at < lines.length; at++) {
      const line = lines[at];
      const deeper = indentOf(line) >= indent + 2;
      const blank = line.trim() === '';
      // After an empty line only what is indented goes on; right below, a plain line does too.
      const goesOn = blank || deeper || (inner.at(-1).trim() !== '' && !ITEM.test(line) && !startsBlock(line));
      if (!goesOn) break;
      inner.push(line.slice(Math.min(inside, indentOf(line))));
    }
    const task = /^\[([ xX])\] /.exec(inner[0]);
    if (task) inner[0] = inner[0].slice(4);
    items.push({ task: task && task[1] !== ' ' ? 'done' : task ? 'open' : '', blocks: blocksOf(inner, depth + 1) });
  }
  blocks.push({ type: 'list', ordered, start: ordered ? parseInt(first[2], 10) : 1, items });
  return at;
}

function takeTable(lines, at, blocks) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((c) => (c.endsWith(':') ? (c.startsWith(':') ? 'center' : 'right') : 'left'));
  const rows = [];
  for (at += 2; at < lines.length && lines[at].includes('|'); at++) rows.push(cells(lines[at]).slice(0, head.length));
  blocks.push({ type: 'table', head, align, rows });
  return at;
}

/** Cells of a row; a bar that is escaped or in code divides nothing. */
function cells(line) {
  const found = [''];
  let code = false;
  const row = line.trim().replace(/^\|/, '').replace(/([^\\]|^)\|$/, '$1');
  for (let i = 0; i < row.length; i++) {
    if (row[i] === '\\' && row[i + 1] === '|') found[found.length - 1] += row[++i];
    else if (row[i] === '|' && !code) found.push('');
    else found[found.length - 1] += row[i];
    if (row[i] === '`') code = !code;
  }
  return found.map((c) => c.trim());
}

function takeParagraph(lines, at, blocks) {
  const text = [lines[at]];
  while (++at < lines.length && lines[at].trim() !== '' && !startsBlock(lines[at]) && !ITEM.test(lines[at]) && !isTable(lines, at)) {
    text.push(lines[at]);
  }
  blocks.push({ type: 'p', text: text.join('\n') });
  return at;
}

const WORD = /[\p{L}\p{N}]/u;
const ADDRESS = /^https?:\/\/[^\s<>"'`|]+/;
const LINK = /^!?\[([^[\]\n]*(?:\[[^[\]\n]*\][^[\]\n]*)*)\]\(<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?: +"[^"\n]*")?\)/;
const MARKS = [['**', 'strong'], ['__', 'strong'], ['~~', 'del'], ['*', 'em'], ['_', 'em']];

/** Spans: strings, and `{ tag, spans }` with tag code, math, strong, em, del or a (with `href`). */
export function parseSpans(text, depth = 0) {
  const spans = [];
  let plain = '';
  for (let at = 0; at < text.length;) {
    const found = depth < DEPTH_MAX && spanAt(text, at, depth);
    if (!found) {
      // A backslash before a sign takes its meaning away.
      if (text[at] === '\\' && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? '')) at++;
      plain += text[at++];
      continue;
    }
    if (plain) spans.push(plain);
    plain = '';
    spans.push(found.span);
    at = found.end;
  }
  if (plain) spans.push(plain);
  return spans;
}

function spanAt(text, at, depth) {
  switch (text[at]) {
    case '`': return codeAt(text, at);
    case '\\': return text[at + 1] === '(' ? between(text, at + 2, '\\)', 'math') : null;
    case '$': return text[at + 1] === '$' ? between(text, at + 2, '$$', 'math') : null;
    case '!':
    case '[': return linkAt(text, at, depth);
    case 'h': return addressAt(text, at);
    case '*':
    case '_':
    case '~': return markAt(text, at, depth);
    default: return null;
  }
}

/** Where `what` comes next, -1 where it is not within reach. */
function near(text, what, from) {
  const at = text.slice(from, from + REACH_MAX).indexOf(what);
  return at < 0 ? -1 : from + at;
}

function between(text, from, close, tag) {
  const end = near(text, close, from);
  return end > from ? { span: { tag, spans: [text.slice(from, end).trim()] }, end: end + close.length } : null;
}

function codeAt(text, at) {
  const ticks = /^`+/.exec(text.slice(at, at + 64))[0];
  let end = at + ticks.length;
  for (let run; ; end += run) {
    end = near(text, '`', end);
    if (end < 0) return null;
    run = /^`+/.exec(text.slice(end, end + 64))[0].length;
    if (run === ticks.length) break;
  }
  return { span: { tag: 'code', spans: [text.slice(at + ticks.length, end).trim()] }, end: end + ticks.length };
}

/** A link; a picture becomes a link too, for the page loads nothing from elsewhere. */
function linkAt(text, at, depth) {
  const m = LINK.exec(text.slice(at, at + REACH_MAX));
  if (!m || !ADDRESS.test(m[2])) return null;
  return { span: { tag: 'a', href: m[2], spans: parseSpans(m[1] || m[2], depth + 1) }, end: at + m[0].length };
}

function addressAt(text, at) {
  const m = !WORD.test(text[at - 1] ?? '') && ADDRESS.exec(text.slice(at, at + REACH_MAX));
  if (!m) return null;
  let href = m[0].replace(/[.,;:!?*_~\]]+$/, '');
  if (href.endsWith(')') && !href.includes('(')) href = href.slice(0, -1);
  return { span: { tag: 'a', href, spans: [href] }, end: at + href.length };
}

function markAt(text, at, depth) {
  const [mark, tag] = MARKS.find(([m]) => text.startsWith(m, at)) ?? [];
  if (!mark || /\s/.test(text[at + mark.length] ?? ' ')) return null;
  const inWord = mark[0] === '_' && WORD.test(text[at - 1] ?? '');
  if (inWord) return null;
  const last = Math.min(text.length, at + REACH_MAX);
  for (let end = at + mark.length + 1; (end = text.indexOf(mark, end)) >= 0 && end < last; end++) {
    // `**` inside of `*` is a mark of its own, and of three stars the last two close.
    if (mark.length === 1 && text[end + 1] === mark) {
      end++;
      continue;
    }
    if (mark.length === 2 && text[end + 2] === mark[0]) end++;
    const after = text[end + mark.length] ?? '';
    if (/\s/.test(text[end - 1]) || (mark[0] === '_' && WORD.test(after))) continue;
    return { span: { tag, spans: parseSpans(text.slice(at + mark.length, end), depth + 1) }, end: end + mark.length };
  }
  return null;
}
