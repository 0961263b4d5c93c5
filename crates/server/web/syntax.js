import { h } from './element.js';

/** Colours for code: one set of rules for most languages, which knows comments, strings, numbers and common words. */

const LENGTH_MAX = 20_000;
const HASH = /^(py|python|sh|bash|shell|zsh|console|rb|ruby|ya?ml|toml|ini|conf|make|makefile|dockerfile|r|perl|pl|elixir|nix)$/i;
const DASH = /^(sql|lua|haskell|hs|ada|elm)$/i;
const PLAIN = /^(|text|txt|plain|plaintext|output|log|md|markdown|diff|csv)$/i;

const STRING = '"(?:\\\\.|[^"\\\\\\n])*"|\'(?:\\\\.|[^\'\\\\\\n])*\'|`(?:\\\\.|[^`\\\\])*`';
const NUMBER = '\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b';
const KEYWORD = '\\b(?:' + (
  'abstract|and|as|assert|async|await|begin|break|case|catch|class|const|continue|crate|def|default|defer|del|delete|do|done|elif|else|elsif|end|enum|' +
  'esac|except|export|extends|extern|fi|final|finally|fn|for|foreach|from|func|function|go|goto|if|impl|implements|import|in|instanceof|interface|is|' +
  'lambda|let|local|loop|match|mod|module|move|mut|namespace|new|not|null|nil|None|of|or|package|pass|private|protected|pub|public|raise|ref|return|' +
  'self|static|struct|super|switch|then|this|throw|throws|trait|True|False|true|false|try|type|typedef|typeof|union|unless|unsafe|until|use|using|val|' +
  'var|void|when|where|while|with|yield|bool|char|double|float|int|long|short|string|unsigned|' +
  'SELECT|FROM|WHERE|INSERT|INTO|VALUES|UPDATE|SET|DELETE|CREATE|TABLE|JOIN|LEFT|ON|GROUP|ORDER|BY|HAVING|LIMIT|AND|OR|NOT|NULL|AS'
) + ')\\b';

const rulesOf = (comment) => new RegExp(`(${comment})|("""[\\s\\S]*?"""|${STRING})|(${NUMBER})|(${KEYWORD})`, 'g');
const RULES = {
  hash: rulesOf('(?<![\\w$])#[^\\n]*'),
  dash: rulesOf('--[^\\n]*'),
  slash: rulesOf('\\/\\/[^\\n]*|\\/\\*[\\s\\S]*?\\*\\/|<!--[\\s\\S]*?-->'),
};
const KINDS = ['comment', 'string', 'number', 'keyword'];

/** Nodes of a piece of code. */
export function coloured(code, lang) {
  if (PLAIN.test(lang) || code.length > LENGTH_MAX) return [code];
  const rules = RULES[HASH.test(lang) ? 'hash' : DASH.test(lang) ? 'dash' : 'slash'];
  const nodes = [];
  let end = 0;
  for (const m of code.matchAll(rules)) {
    if (m.index > end) nodes.push(code.slice(end, m.index));
    nodes.push(h('span', { className: `code-${KINDS[m.slice(1).findIndex((g) => g !== undefined)]}` }, m[0]));
    end = m.index + m[0].length;
  }
  nodes.push(code.slice(end));
  return nodes;
}
