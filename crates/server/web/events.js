/** Turns bytes of `text/event-stream`, cut anywhere, into the data of whole events. */
export class EventParser {
  #decoder = new TextDecoder();
  #text = '';
  #data = [];

  push(bytes) {
    this.#text += this.#decoder.decode(bytes, { stream: true });
    const events = [];
    let from = 0;
    for (;;) {
      const end = this.#text.slice(from).search(/[\r\n]/) + from;
      // A CR at the end may be the first half of a CRLF: wait for what follows.
      if (end < from || (this.#text[end] === '\r' && end + 1 === this.#text.length)) break;
      const line = this.#text.slice(from, end);
      from = end + (this.#text.startsWith('\r\n', end) ? 2 : 1);
      if (line.startsWith('data:')) {
        this.#data.push(line.slice(line[5] === ' ' ? 6 : 5));
      } else if (line === '' && this.#data.length) {
        events.push(this.#data.join('\n'));
        this.#data = [];
      }
    }
    this.#text = this.#text.slice(from);
    return events;
  }
}
