"""A beginning of 1,000 tokens that 32 requests share is computed once, and the last of them waits for a tenth.

Whole blocks are shared, and the rows of the block in which the questions begin are copied, unless they are few.

Standard library only. Usage: prefix.py BASE_URL [TOKENS]
"""

import http.client
import json
import sys
import time
import urllib.parse

REQUESTS = 32
TOKENS = 1000  # of the system prompt, or a few more
COPIED_ROWS_MIN = 8  # as in crates/engine/src/scheduler.rs
RATIO_MAX = 0.1


def ask(url, system, question):
    """Seconds to the first text, tokens of the prompt, and those of them that were in the cache."""
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=120)
    body = json.dumps({
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}],
        "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    })
    connection.connect()
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    first, usage = None, None
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
            first = time.perf_counter() - began
        usage = event.get("usage") or usage
    return first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def tokens(url, text):
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
    connection.request("POST", "/tokenize", json.dumps({"prompt": text}), {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())["count"]


def main():
    url = urllib.parse.urlsplit(sys.argv[1])
    wanted = int(sys.argv[2]) if len(sys.argv) > 2 else TOKENS
    rules = [f"Rule {i}: be kind to guest number {i * 37}." for i in range(400)]
    system = rules[0]
    while tokens(url, system) < wanted:
        system += " " + rules[system.count(".")]
    # What is made at the first request of all is not what is measured.
    ask(url, "Hello.", "Hi!")
    answers = [ask(url, system, f"Guest {i} is here.") for i in range(REQUESTS)]
    first, last = answers[0], answers[-1]
    print(f"system prompt            {tokens(url, system):>8} tokens, {first[1]} with the question")
    for n in (1, 2, 3, 16, REQUESTS):
        seconds, prompt, cached = answers[n - 1]
        print(f"request {n:2}               {seconds * 1e3:>8.1f} ms to the first text, {cached} of {prompt} tokens cached")
    held = {
        "the first found nothing": first[2] == 0,
        "each later one found it": all(cached > wanted - COPIED_ROWS_MIN for _, _, cached in answers[1:]),
        f"the last waited {last[0] / first[0]:.3f} of the first's time, at most {RATIO_MAX}":
            last[0] <= RATIO_MAX * first[0],
    }
    for what, ok in held.items():
        print(f"{'ok  ' if ok else 'FAIL'} {what}")
    sys.exit(not all(held.values()))


if __name__ == "__main__":
    main()
