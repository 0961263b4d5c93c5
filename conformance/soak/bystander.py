"""Hostile schemas, expressions and grammars come one after the other: a stream beside them hardly stumbles.

The worst gap between two pieces of each of several answers, by turns without and with them: the one in the middle of
those may at most double. Where clients, server and builds share two cores, a single stream's says little.

Standard library only. Usage: bystander.py BASE_URL [STREAMS]
"""

import http.client
import json
import multiprocessing
import os
import statistics
import sys
import time
import urllib.parse

PATH = "/v1/chat/completions"
TOKENS = 900
RATIO_MAX = 2.0


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def regex(text):
    return {"response_format": {"type": "regex", "regex": text}}


def grammar(text):
    return {"response_format": {"type": "grammar", "grammar": text}}


def hostile():
    fields = {f"f{i}": {"type": "string", "minLength": i % 50} for i in range(500)}
    rules = "".join(f'r{i}: "a" r{i + 1}\n' for i in range(1500))
    return {
        "500 fields": schema({"type": "object", "properties": fields}),
        "9,000 choices": schema({"enum": [str(i) for i in range(9000)]}),
        "60 patterns at once": schema({"allOf": [{"type": "string", "pattern": "a.*b"}] * 60}),
        "nested stars": schema({"type": "string", "pattern": "^(.*a.{20}.*b.{20}.*)+$"}),
        "a schema of itself": schema({"$ref": "#"}),
        "repeats of repeats": regex("((((a{1,100}){1,100}){1,100}){1,100}){1,100}"),
        "3,000 words": regex("|".join(map(str, range(3000)))),
        "large classes": regex("[\\p{L}\\p{N}]{1,2000}[^\\p{L}]{1,2000}"),
        "60,000 brackets": regex("(" * 60_000 + "a" + ")" * 60_000),
        "a chain of 1,500 rules": grammar(f'start: r0\n{rules}r1500: "z"'),
        "new each time": lambda i: schema({
            "type": "object", "properties": {f"p{i}_{j}": {"type": "number"} for j in range(40)},
        }),
    }


def ask(url, body):
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=120)
    connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def worst_gap(url):
    """Milliseconds: the longest between two pieces of one long answer, and the one in the middle."""
    answer = ask(url, {
        "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": TOKENS, "ignore_eos": True,
        "temperature": 0, "stream": True,
    })
    assert answer.status == 200, answer.read()
    times = []
    while line := answer.readline():
        now = time.perf_counter()
        if line.startswith(b"data: {") and any(c["delta"].get("content") for c in json.loads(line[6:])["choices"]):
            times.append(now)
    gaps = [(b - a) * 1e3 for a, b in zip(times, times[1:])]
    assert len(gaps) > TOKENS // 2, f"{len(gaps)} events"
    return max(gaps), statistics.median(gaps)


def come(url, over, pipe):
    """Sends hostile requests until `over`: a process of its own, so that it and the stream's reader share no lock, and
    a patient one, as it would be on another machine."""
    os.nice(10)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    took, wrong, count = {}, [], 0
    while not over.is_set():
        for name, fields in hostile().items():
            count += 1
            request = body | (fields(count) if callable(fields) else fields)
            began = time.perf_counter()
            answer = ask(url, request)
            text = answer.read().decode()
            took.setdefault(name, []).append((time.perf_counter() - began) * 1e3)
            if not 200 <= answer.status < 500:
                wrong.append((name, answer.status, text))
    pipe.send((took, wrong))


def main():
    url = urllib.parse.urlsplit(sys.argv[1])
    streams = int(sys.argv[2]) if len(sys.argv) > 2 else 16
    took, wrong = {}, []
    # What is made once is made before.
    ask(url, hostile()["500 fields"] | {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}).read()
    worst_gap(url)
    # By turns, so that the machine's own troubles come to both.
    quiet, crowded = [], []
    for _ in range(streams):
        quiet.append(worst_gap(url))
        over, (here, there) = multiprocessing.Event(), multiprocessing.Pipe()
        process = multiprocessing.Process(target=come, args=(url, over, there))
        process.start()
        crowded.append(worst_gap(url))
        over.set()
        times, bad = here.recv()
        process.join()
        wrong += bad
        for name, ms in times.items():
            took.setdefault(name, []).extend(ms)
    for name, times in took.items():
        print(f"{name:<24} {len(times):>4} times, {statistics.median(times):>7.1f} ms, at most {max(times):>7.1f}")
    for name, gaps in ("quiet", quiet), ("with hostile grammars", crowded):
        worst = sorted(gap for gap, _ in gaps)
        print(f"{name:<24} worst gaps {worst[0]:.2f} to {worst[-1]:.2f} ms, median of them {statistics.median(worst):.2f};"
              f" gap in the middle {statistics.median(m for _, m in gaps):.2f} ms")
    ratio = statistics.median(g for g, _ in crowded) / statistics.median(g for g, _ in quiet)
    held = {
        "every hostile one was answered": not wrong,
        f"a stream's worst gap is {ratio:.2f} of that without them, at most {RATIO_MAX:.0f}": ratio <= RATIO_MAX,
    }
    for what, ok in held.items():
        print(f"{'ok  ' if ok else 'FAIL'} {what}")
    sys.exit(not all(held.values()))


if __name__ == "__main__":
    main()
