import http from 'node:http';

/**
 * A door between browser and server. Everything passes as it is, but a test may hold an answer in its middle, cut it,
 * or answer itself: so what depends on time does not depend on luck.
 */
export class Gate {
  /** Requests for answers that came by, the newest last: `{ body, key }`. */
  asked = [];
  /** How many events of a stream may pass before it is held. */
  #most = Infinity;
  #fate = Promise.resolve('go');
  #decide = () => {};
  #next = [];
  #server;

  /** `target`: where requests go. */
  static async open(target) {
    const gate = new Gate();
    gate.#server = http.createServer((from, to) => gate.#pass(target, from, to));
    await new Promise((resolve) => gate.#server.listen(0, '127.0.0.1', resolve));
    gate.address = `http://127.0.0.1:${gate.#server.address().port}`;
    return gate;
  }

  /** Streams from now on pause after `events` events, until `release` or `cut`. */
  hold(events) {
    this.#most = events;
    this.#fate = new Promise((resolve) => (this.#decide = resolve));
  }

  /** What is held goes on. */
  release() {
    this.#most = Infinity;
    this.#decide('go');
  }

  /** What is held ends in its middle, as when a network breaks. */
  cut() {
    this.#decide('cut');
  }

  /** As at the beginning. */
  reset() {
    this.release();
    this.asked = [];
    this.#next = [];
  }

  /** Answers the next request for an answer: `{ status, headers, body }`; held after `heldAfter` events, if said. */
  next(answer) {
    this.#next.push(answer);
    if (answer.heldAfter) this.hold(answer.heldAfter);
  }

  close() {
    this.release();
    this.#server.closeAllConnections();
    return new Promise((resolve) => this.#server.close(resolve));
  }

  #pass(target, from, to) {
    const chat = from.url === '/v1/chat/completions';
    const parts = [];
    from.on('data', (part) => parts.push(part));
    from.on('end', () => {
      const body = Buffer.concat(parts);
      if (chat) this.asked.push({ body: JSON.parse(body), key: from.headers.authorization });
      const own = chat && this.#next.shift();
      if (own) {
        to.writeHead(own.status, own.headers);
        return own.heldAfter ? this.#stream([own.body], to) : to.end(own.body);
      }
      const request = http.request(target + from.url, { method: from.method, headers: from.headers }, (answer) => {
        to.writeHead(answer.statusCode, answer.headers);
        if (chat) this.#stream(answer.setEncoding('utf8'), to);
        else answer.pipe(to);
      });
      request.on('error', () => to.destroy());
      // A browser that leaves leaves the server too.
      to.on('close', () => request.destroy());
      request.end(body);
    });
  }

  /** Passes the events of a stream's parts on, or holds them. */
  async #stream(parts, to) {
    let rest = '';
    let passed = 0;
    try {
      for await (const part of parts) {
        const events = (rest + part).split('\n\n');
        rest = events.pop();
        for (const event of events) {
          if (passed++ >= this.#most && await this.#fate === 'cut') {
            this.#most = Infinity;
            return to.destroy();
          }
          to.write(`${event}\n\n`);
        }
      }
      to.end(rest);
    } catch {
      to.destroy();
    }
  }
}
