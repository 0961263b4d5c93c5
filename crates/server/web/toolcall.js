import { h, icon } from './element.js';
import { codeNode } from './prose.js';

/** The tool calls of an answer, and fields for the results that the user brings. */
export class CallsView {
  node = h('div', { className: 'calls' });
  #cards = [];
  #form = null;

  /** `results`: texts by call id. `give` takes such an object; null where this answer waits for nothing. */
  draw(turn, results, give) {
    turn.calls.forEach((call, i) => {
      if (!this.#cards[i]) this.node.append((this.#cards[i] = new CallCard(i)).node);
      this.#cards[i].draw(call, results[call.id], turn.done);
    });
    if (give && turn.done && turn.calls.length && !this.#form) this.node.append((this.#form = resultsForm(turn.calls, give)));
  }
}

class CallCard {
  #name = h('strong');
  #state = h('span', { className: 'state' });
  #arguments = h('div');
  #whole = false;
  #number;
  node = h('section', { className: 'call', role: 'group' }, h('header', {}, icon('tool'), this.#name, this.#state), this.#arguments);

  constructor(index) {
    this.#number = index + 1;
  }

  draw(call, result, done) {
    this.#name.textContent = call.name;
    this.node.ariaLabel = `Tool call ${this.#number}: ${call.name}`;
    this.#state.textContent = !done ? 'writing…' : result === undefined ? 'waits for a result' : 'answered';
    if (!done) this.#arguments.replaceChildren(h('pre', {}, h('code', {}, call.arguments)));
    else if (!this.#whole) this.#finish(call, result);
  }

  #finish(call, result) {
    this.#whole = true;
    this.#arguments.replaceChildren(codeNode(indented(call.arguments), 'arguments'));
    if (result !== undefined) {
      this.node.append(h('details', { className: 'result' }, h('summary', {}, icon('chevron'), 'Result'), codeNode(indented(result), 'result')));
    }
  }
}

/** JSON over several lines; what is no JSON as it is. */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function resultsForm(calls, give) {
  const fields = calls.map((call) => h('textarea', { rows: 2, required: true, placeholder: 'JSON or plain text', 'aria-label': `Result of ${call.name}` }));
  const labels = calls.map((call, i) => h('label', {}, `What did ${call.name} answer?`, fields[i]));
  const form = h('form', { className: 'results' }, ...labels,
    h('div', { className: 'row' }, h('button', { type: 'submit', className: 'main' }, 'Send result')));
  form.onsubmit = (e) => {
    e.preventDefault();
    give(fields.map((f) => f.value));
  };
  return form;
}
