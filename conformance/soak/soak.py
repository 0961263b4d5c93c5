"""64 streams for a minute with random disconnects: nothing is lost, nothing leaks, nobody reads another's text.
Meanwhile heads that never end and readers that never read are cut.

Standard library only. Usage: soak.py BASE_URL [SECONDS] [STREAMS]
"""

import asyncio
import http.client
import json
import multiprocessing
import random
import socket
import sys
import time
import urllib.parse

HEALTH_P99_MAX = 0.050
HEALTH_INTERVAL = 0.020
TOKENS_MAX = 60
SLOW_PEERS = 4
# The server's bounds (limits.rs) and a little.
HEADER_SECONDS_MAX = 15 + 3
WRITE_SECONDS_MAX = 30 + 8
PAGES = 2000
ABOUT = ["a cat", "a dog", "two frogs", "the sea", "a king", "an old tree", "snow", "a bear", "a boat", "the moon",
         "a girl", "a big fish", "a red ball", "a little bird", "the rain", "a toy car"]


def body(about, tokens):
    return json.dumps({
        "messages": [{"role": "user", "content": f"Tell me a story about {about}."}],
        "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "stream": True,
    }).encode()


def head(host, length):
    return (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {length}\r\n\r\n").encode()


class Counts:
    def __init__(self):
        self.sent = self.finished = self.left = self.refused = self.tokens = 0
        self.wrong = []


async def stream(host, port, about, counts, expected, leave_after):
    """One request; leaves after so many pieces of text, or before the body's end at -1."""
    reader, writer = await asyncio.open_connection(host, port)
    counts.sent += 1
    try:
        payload = body(about, TOKENS_MAX)
        if leave_after == -1:
            writer.write(head(host, len(payload)) + payload[: len(payload) // 2])
            await writer.drain()
            counts.left += 1
            return None
        writer.write(head(host, len(payload)) + payload)
        await writer.drain()
        if leave_after == 0:
            counts.left += 1
            return None
        status = int((await reader.readline()).split()[1])
        if status == 429:
            counts.refused += 1
            await asyncio.sleep(0.05)
            return None
        if status != 200:
            counts.wrong.append(f"status {status}")
            return None
        text, pieces, done, reason = "", 0, False, None
        # A frame is one line here; lines of chunk sizes and empty ones lie between.
        while line := await reader.readline():
            if line == b"data: [DONE]\n":
                done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    counts.wrong.append(event["error"]["message"])
                    return None
                choice = event["choices"][0]
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
                pieces += 1
                counts.tokens += 1
                if expected and not expected[about].startswith(text):
                    counts.wrong.append(f"{about}: {text!r} is not what it is alone, {expected[about]!r}")
                    return None
                if pieces == leave_after:
                    counts.left += 1
                    return None
        if not done or reason is None or (expected and text != expected[about]):
            counts.wrong.append(f"{about}: done {done}, reason {reason}, {text!r}")
        counts.finished += 1
        return text
    finally:
        writer.transport.abort()


async def client(seed, host, port, counts, expected, until):
    rng = random.Random(seed)
    while time.monotonic() < until:
        leave = rng.choice([-1, 0, 1, 2, rng.randrange(3, TOKENS_MAX), None, None, None])
        try:
            await asyncio.wait_for(stream(host, port, rng.choice(ABOUT), counts, expected, leave), 120)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.TimeoutError) as e:
            counts.wrong.append(repr(e))


async def half_head(host, port):
    """Seconds until the server cuts one that never finishes its head."""
    reader, writer = await asyncio.open_connection(host, port)
    began = time.monotonic()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Half: ")
    try:
        await asyncio.wait_for(reader.read(-1), 4 * HEADER_SECONDS_MAX)
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    return time.monotonic() - began


def unread(host, port):
    """How many of its answers one gets that reads nothing while it could be waited for, and whether it was cut."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.settimeout(2)
    peer.connect((host, port))
    try:
        peer.sendall(b"GET /web/app.js HTTP/1.1\r\nHost: x\r\n\r\n" * PAGES)
    except OSError:
        pass  # The server takes no more from it.
    time.sleep(WRITE_SECONDS_MAX)
    got = 0
    try:
        while data := peer.recv(1 << 16):
            got += data.count(b"HTTP/1.1 200")
    except TimeoutError:
        return got, False
    except ConnectionError:
        pass
    finally:
        peer.close()
    return got, got < PAGES


def watch_health(host, port, stop, out):
    """Asks for the health from a process of its own, so that no stream of ours delays it."""
    took, bad = [], 0
    connection = http.client.HTTPConnection(host, port, timeout=10)
    while not stop.is_set():
        began = time.monotonic()
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        took.append(time.monotonic() - began)
        bad += response.status != 200
        time.sleep(HEALTH_INTERVAL)
    out.put((sorted(took), bad))


def metrics(host, port):
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.request("GET", "/metrics")
    rows = [x.rsplit(" ", 1) for x in connection.getresponse().read().decode().splitlines() if not x.startswith("#")]
    return {name.split("{")[0]: float(value) for name, value in rows}


def at_rest(host, port):
    for _ in range(200):
        now = metrics(host, port)
        if now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"] == 0:
            return now
        time.sleep(0.05)
    return now


async def load(host, port, seconds, streams):
    alone = Counts()
    expected = {about: await stream(host, port, about, alone, None, None) for about in ABOUT}
    counts = Counts()
    until = time.monotonic() + seconds
    heads = [asyncio.ensure_future(half_head(host, port)) for _ in range(SLOW_PEERS)]
    readers = [asyncio.ensure_future(asyncio.to_thread(unread, host, port)) for _ in range(SLOW_PEERS)]
    await asyncio.gather(*(client(seed, host, port, counts, expected, until) for seed in range(streams)))
    return counts, alone, await asyncio.gather(*heads), await asyncio.gather(*readers)


def main():
    url = urllib.parse.urlsplit(sys.argv[1])
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60
    streams = int(sys.argv[3]) if len(sys.argv) > 3 else 64
    stop, out = multiprocessing.Event(), multiprocessing.Queue()
    watcher = multiprocessing.Process(target=watch_health, args=(url.hostname, url.port, stop, out))
    watcher.start()
    counts, alone, heads, readers = asyncio.run(load(url.hostname, url.port, seconds, streams))
    stop.set()
    took, bad = out.get()
    watcher.join()
    books = at_rest(url.hostname, url.port)
    accepted = books["oxseek_requests_accepted_total"]
    ended = {how: books[f"oxseek_requests_{how}_total"] for how in ("finished", "cancelled", "failed")}
    p99 = took[len(took) * 99 // 100]
    rows = [
        ("requests sent", counts.sent, ""),
        ("finished", counts.finished, "each as it is alone"),
        ("left on purpose", counts.left, "before the body's end, queued, in the prompt, in the answer"),
        ("refused with 429", counts.refused, ""),
        ("pieces of text", counts.tokens, f"{counts.tokens / seconds:.0f}/s"),
        ("health p50 / p99 / max", f"{took[len(took) // 2] * 1e3:.1f} / {p99 * 1e3:.1f} / {took[-1] * 1e3:.1f} ms",
         f"{len(took)} asked, {bad} not 200"),
        ("accepted by the engine", int(accepted), ", ".join(f"{int(n)} {how}" for how, n in ended.items())),
        ("blocks used at rest", int(books["oxseek_cache_blocks_used"]), ""),
        ("half heads cut after", f"{max(heads):.1f} s", f"{len(heads)} of them"),
        ("slow readers cut", sum(cut for _, cut in readers),
         f"of {len(readers)}; the most that one got is {max(got for got, _ in readers)} of {PAGES} pages"),
        ("panics", int(books["oxseek_panics_total"]), ""),
        ("wrong", len(counts.wrong) + len(alone.wrong), "; ".join(counts.wrong[:3])),
    ]
    for what, value, note in rows:
        print(f"{what:24} {value!s:>22}  {note}")
    held = {
        "every request has one end": accepted == sum(ended.values()),
        "nothing failed": ended["failed"] == 0 and books["oxseek_panics_total"] == 0,
        "blocks used are 0": books["oxseek_cache_blocks_used"] == 0,
        "half heads are cut": max(heads) <= HEADER_SECONDS_MAX,
        "slow readers are cut": all(cut for _, cut in readers),
        "nothing wrong": not counts.wrong and not alone.wrong,
        "what we finished the engine finished": ended["finished"] >= counts.finished + alone.finished,
        f"health p99 under {HEALTH_P99_MAX * 1e3:.0f} ms": p99 < HEALTH_P99_MAX and bad == 0,
    }
    for what, ok in held.items():
        print(f"{'ok  ' if ok else 'FAIL'} {what}")
    sys.exit(not all(held.values()))


if __name__ == "__main__":
    main()
