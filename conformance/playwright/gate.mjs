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
  #opened = Promise.resolve();
  #open = () => {};
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

  /** Streams from now on pause after `events` events, until `release`. */
  hold(events) {
    this.#most = events;
    this.#opened = new Promise((resolve) => (this.#open = resolve));
  }

  release() {
    this.#most = Infinity;
    this.#open();
  }

  /** As at the beginning. */
  reset() {
    this.release();
    this.asked = [];
    this.#next = [];
  }

  /** What becomes of the next request for an answer: `{ status, headers, body }`, or `{ cut: events }`. */
  next(fate) {
    this.#next.push(fate);
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
      const fate = chat ? this.#next.shift() : undefined;
      if (fate?.status) return to.writeHead(fate.status, fate.headers).end(fate.body);
      const request = http.request(target + from.url, { method: from.method, headers: from.headers }, (answer) => {
        to.writeHead(answer.statusCode, answer.headers);
        if (chat) this.#stream(answer, to, fate?.cut ?? Infinity);
        else answer.pipe(to);
      });
      request.on('error', () => to.destroy());
      // A browser that leaves leaves the server too.
      to.on('close', () => request.destroy());
      request.end(body);
    });
  }

  async #stream(answer, to, cut) {
    let rest = '';
    let passed = 0;
    try {
      for await (const part of answer.setEncoding('utf8')) {
        const events = (rest + part).split('\n\n');
        rest = events.pop();
        for (const event of events) {
          if (passed === cut) return to.destroy();
          if (passed >= this.#most) await this.#opened;
          to.write(`${event}\n\n`);
          passed++;
        }
      }
      to.end(rest);
    } catch {
      to.destroy();
    }
  }
}
