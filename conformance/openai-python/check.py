"""Checks a running `oxseek serve` with the real openai client. Usage: check.py http://127.0.0.1:PORT

The expectations fit the built-in demo model: it tells stories, so a few dozen tokens are always there to be had.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai

BASE = sys.argv[1].rstrip("/")
# No retries: they would hide errors that the server should not make.
client = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0, timeout=120)
MODEL = client.models.list().data[0].id
TOKENIZER = Path(__file__).parents[2] / "models/oxseek-demo/tokenizer.json"
VOCAB = json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
BOS = 0

STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
BEGINNING = "Once upon a time"

# After the client has closed its connection, the engine may finish the step it is in and one that was already
# prepared. Before that, the close has to travel: our read of the counter and the close itself, the kernel's notice and
# the server's event loop take some milliseconds on a busy machine, at up to 1000 steps a second.
STEPS_AFTER_CLOSE = 2
STEPS_OF_NOTICE = 16

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def equal(got, want, what):
    assert got == want, f"{what}: got {got!r}, want {want!r}"


def chat(messages=None, **options):
    options = {"temperature": 0, "max_tokens": 60, **options}
    return client.chat.completions.create(model=MODEL, messages=messages or STORY, **options)


def complete(prompt=BEGINNING, **options):
    options = {"temperature": 0, "max_tokens": 40, **options}
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def text_of(answer):
    choice = answer.choices[0]
    return choice.message.content if hasattr(choice, "message") else choice.text


def collect(stream):
    """Texts, thoughts, roles and finish reasons of a stream, by choice index; its usage; its chunks."""
    got = SimpleNamespace(text={}, reasoning={}, first_delta={}, finish={}, usage=None, chunks=[])
    for chunk in stream:
        got.chunks.append(chunk)
        got.usage = chunk.usage or got.usage
        for choice in chunk.choices:
            i, delta = choice.index, getattr(choice, "delta", None)
            got.first_delta.setdefault(i, delta)
            piece = delta.content if delta else getattr(choice, "text", None)
            thought = getattr(delta, "reasoning_content", None)
            got.text[i] = got.text.get(i, "") + (piece or "")
            got.reasoning[i] = got.reasoning.get(i, "") + (thought or "")
            if choice.finish_reason:
                assert i not in got.finish, f"choice {i} finished twice"
                got.finish[i] = choice.finish_reason
    return got


def usage_adds_up(usage):
    assert usage.prompt_tokens > 0 and usage.completion_tokens > 0, usage
    equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")


# ---- What every answer has ----------------------------------------------------------------------------------------


@check
def models():
    model = client.models.retrieve(MODEL)
    equal((model.id, model.object), (MODEL, "model"), "model")
    equal(client.models.list().object, "list", "object")


@check
def chat_fields():
    answer = chat()
    equal((answer.object, answer.model), ("chat.completion", MODEL), "object and model")
    assert answer.id and answer.created > 1_600_000_000, (answer.id, answer.created)
    equal(len(answer.choices), 1, "choices")
    choice = answer.choices[0]
    equal((choice.index, choice.message.role), (0, "assistant"), "index and role")
    assert choice.message.content and choice.finish_reason in ("stop", "length"), choice
    usage_adds_up(answer.usage)


@check
def chat_stream():
    whole = chat()
    got = collect(chat(stream=True, stream_options={"include_usage": True}))
    equal(got.first_delta[0].role, "assistant", "role in the first delta")
    equal(got.text, {0: text_of(whole)}, "text")
    equal(got.finish, {0: whole.choices[0].finish_reason}, "finish reason")
    last = got.chunks[-1]
    equal(last.choices, [], "choices of the last chunk")
    equal(last.usage.model_dump(), whole.usage.model_dump(), "usage")
    equal([c for c in got.chunks[:-1] if c.usage], [], "usage before the last chunk")
    equal({(c.id, c.object) for c in got.chunks}, {(last.id, "chat.completion.chunk")}, "ids and objects")


@check
def chat_stream_without_usage():
    got = collect(chat(stream=True))
    assert got.usage is None and all(c.choices for c in got.chunks), "usage that nobody asked for"


@check
def thinking():
    options = {"max_tokens": 200, "extra_body": {"chat_template_kwargs": {"thinking": True}}}
    message = chat(**options).choices[0].message
    assert message.reasoning_content, "no reasoning_content"
    assert "think>" not in (message.content or "") + message.reasoning_content, "think tags in the text"
    got = collect(chat(stream=True, **options))
    equal(got.reasoning[0], message.reasoning_content, "reasoning")
    equal(got.text[0], message.content or "", "text")


@check
def completions_and_stream():
    whole = complete()
    equal((whole.object, whole.choices[0].index), ("text_completion", 0), "object and index")
    usage_adds_up(whole.usage)
    got = collect(complete(stream=True, stream_options={"include_usage": True}))
    equal(got.text, {0: text_of(whole)}, "text")
    equal(got.finish, {0: whole.choices[0].finish_reason}, "finish reason")
    equal(got.usage.model_dump(), whole.usage.model_dump(), "usage")


# ---- What can be asked for ----------------------------------------------------------------------------------------


@check
def chat_logprobs():
    choice = chat(logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    equal(b"".join(bytes(t.bytes) for t in tokens).decode(), choice.message.content, "joined bytes")
    for t in tokens:
        tops = [top.logprob for top in t.top_logprobs]
        assert t.logprob <= 0 and len(tops) == 3 and tops == sorted(tops, reverse=True), t
        # At temperature 0 the most likely token is the chosen one.
        equal((t.token, t.logprob), (t.top_logprobs[0].token, tops[0]), "chosen token")


@check
def chat_logprobs_stream():
    whole = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    chunks = collect(chat(stream=True, logprobs=True, top_logprobs=3)).chunks
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    equal([t.token for part in parts for t in part or []], [t.token for t in whole], "tokens")


@check
def completion_logprobs():
    choice = complete(logprobs=2).choices[0]
    logprobs, text = choice.logprobs, choice.text
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    equal({len(x) for x in lists}, {len(logprobs.tokens)}, "lengths")
    equal("".join(logprobs.tokens), text, "joined tokens")
    start = logprobs.text_offset[0]
    assert start in (0, len(BEGINNING)), f"offsets start at {start}: neither the answer's nor the prompt's beginning"
    for token, logprob, tops, offset in zip(*lists):
        assert text[offset - start :].startswith(token), f"{token!r} is not at offset {offset}"
        assert logprob <= 0 and 2 <= len(tops) <= 3 and tops[token] == logprob, (token, logprob, tops)


@check
def two_choices():
    first, again = (chat(n=2, temperature=1, seed=7) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    equal([c.index for c in first.choices], [0, 1], "indexes")
    assert texts[0] != texts[1], "both choices are the same"
    equal([c.message.content for c in again.choices], texts, "texts with the same seed")
    got = collect(chat(n=2, temperature=1, seed=7, stream=True))
    equal(got.text, dict(enumerate(texts)), "streamed texts")
    equal(sorted(got.finish), [0, 1], "choices that finished")


@check
def seed():
    texts = [text_of(chat(temperature=1, seed=s)) for s in (1, 1, 2)]
    equal(texts[0], texts[1], "same seed")
    assert texts[0] != texts[2], "another seed, same text"


@check
def stop_string():
    greedy = text_of(chat())
    middle = len(greedy) // 2
    stop = greedy[middle : middle + 7]
    want = greedy[: greedy.index(stop)]
    answer = chat(stop=[stop]).choices[0]
    equal((answer.message.content, answer.finish_reason), (want, "stop"), f"with stop {stop!r}")
    got = collect(chat(stop=[stop], stream=True))
    equal((got.text[0], got.finish), (want, {0: "stop"}), f"streamed with stop {stop!r}")
    equal(text_of(chat(stop=stop)), want, "stop as a string")


@check
def max_tokens():
    for name in ("max_tokens", "max_completion_tokens"):
        options = {"max_tokens": openai.omit, name: 7}
        answer = chat(**options)
        equal((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 7), name)
    answer = complete(max_tokens=7)
    equal((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 7), "completions")


@check
def many_turns():
    first = text_of(chat())
    messages = [{"role": "system", "content": "You tell short stories."}, *STORY]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "What did the fox do next?"}]
    answer = chat(messages)
    assert text_of(answer), "no text"
    assert answer.usage.prompt_tokens > chat().usage.prompt_tokens + 20, "earlier turns are not in the prompt"


@check
def content_parts():
    part = {"type": "text", "text": STORY[0]["content"]}
    equal(text_of(chat([{"role": "user", "content": [part]}])), text_of(chat()), "one part")
    two = chat([{"role": "user", "content": [part, {"type": "text", "text": " Make it short."}]}])
    assert two.usage.prompt_tokens > chat().usage.prompt_tokens, "the second part is not in the prompt"


@check
def echo():
    plain, echoed = text_of(complete()), complete(echo=True)
    equal(text_of(echoed), BEGINNING + plain, "text")
    equal(collect(complete(echo=True, stream=True)).text, {0: BEGINNING + plain}, "streamed text")


@check
def prompt_list():
    prompts = [BEGINNING, "The little dog", "One day"]
    choices = complete(prompts).choices
    equal([c.index for c in choices], [0, 1, 2], "indexes")
    equal([c.text for c in choices], [text_of(complete(p)) for p in prompts], "texts")


@check
def prompt_as_token_ids():
    ids = [BOS] + [VOCAB[t] for t in ("Once", "Ġupon", "Ġa", "Ġtime")]
    answer = complete(ids)
    equal(answer.usage.prompt_tokens, len(ids), "prompt tokens")
    equal(text_of(answer), text_of(complete()), "text")
    equal([c.text for c in complete([ids, ids]).choices], [text_of(answer)] * 2, "texts of two prompts")


@check
def logit_bias():
    def tokens(**options):
        return [t.token for t in chat(logprobs=True, **options).choices[0].logprobs.content]

    free = tokens()
    # The vocabulary writes a space as Ġ; a token it cannot be found by that way is left alone.
    banned = next(t for t in free if t.replace(" ", "Ġ") in VOCAB)
    token_id = VOCAB[banned.replace(" ", "Ġ")]
    biased = tokens(logit_bias={str(token_id): -100})
    assert banned not in biased, f"{banned!r} is in {biased}"
    at = free.index(banned)
    equal(biased[:at], free[:at], "tokens before the banned one")


# ---- Errors -------------------------------------------------------------------------------------------------------


@check
def bad_requests():
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    cases = {
        "temperature of the wrong type": ("temperature", {"temperature": "hot"}),
        "temperature 3": ("temperature", {"temperature": 3}),
        "n 0": ("n", {"n": 0}),
        "unknown role": ("role", {"messages": [{"role": "wizard", "content": "Hello"}]}),
        "no messages": ("messages", {"messages": []}),
        "an image": ("image", {"messages": [{"role": "user", "content": image}]}),
        "top_logprobs 21": ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        "max_tokens -1": ("max_tokens", {"max_tokens": -1}),
    }
    for name, (word, options) in cases.items():
        request = {"model": MODEL, "messages": STORY, "max_tokens": 5, **options}
        try:
            # Streamed, a bad request must be refused just the same, before the stream begins.
            for stream in (False, True):
                client.chat.completions.create(**request, stream=stream)
            raise AssertionError(f"{name}: accepted")
        except openai.BadRequestError as e:
            missing = {"message", "type", "param", "code"} - set(e.body)
            assert not missing, f"{name}: no {missing} in {e.body}"
            assert word in f"{e.body['param']} {e.body['message']}", f"{name}: {word!r} is not named in {e.body}"


@check
def unknown_model():
    try:
        client.chat.completions.create(model="no-such-model", messages=STORY, max_tokens=1)
    except openai.NotFoundError as e:
        equal(e.body["code"], "model_not_found", "code")  # a server that takes any name is fine too


# ---- Many at once, and one that leaves ----------------------------------------------------------------------------


@check
def concurrent_streams():
    heroes = ("a fox", "a cat", "a big red ball", "a girl named Lily", "two dogs", "the moon", "a frog", "a lost key")

    def ask(hero):
        messages = [{"role": "user", "content": f"Tell me a story about {hero}."}]
        got = collect(chat(messages, stream=True, max_tokens=120))
        assert got.finish.get(0), f"the stream about {hero} did not finish"
        return got.text[0]

    before = [ask(hero) for hero in heroes]
    with ThreadPoolExecutor(len(heroes)) as pool:
        together = list(pool.map(ask, heroes))
    equal(together, before, "together, and alone before")
    equal([ask(hero) for hero in heroes], together, "alone after, and together")


def metrics(http):
    lines = http.get("/metrics").raise_for_status().text.splitlines()
    rows = (x.rsplit(" ", 1) for x in lines if x and not x.startswith("#"))
    return {name.split("{")[0]: float(value) for name, value in rows}


@check
def client_leaves():
    body = {"model": MODEL, "messages": STORY, "stream": True, "max_tokens": 3000, "ignore_eos": True}
    with httpx.Client(base_url=BASE, timeout=60) as http, httpx.Client(base_url=BASE, timeout=60) as leaver:
        with leaver.stream("POST", "/v1/chat/completions", json=body) as response:
            equal(response.status_code, 200, "status")
            lines = (x for x in response.iter_lines() if x.startswith("data: {"))
            for _ in range(5):
                next(lines)
            at_close = metrics(http)
            equal(at_close["vllm:num_requests_running"], 1, "requests running")
            assert at_close["oxseek_cache_blocks_used"] > 0, "no cache blocks in use"
        closed = time.monotonic()
        while True:
            now = metrics(http)
            waited = time.monotonic() - closed
            if now["oxseek_cache_blocks_used"] == 0 and now["vllm:num_requests_running"] == 0:
                break
            assert waited < 10, f"not released after {waited:.0f} s: {now}"
            time.sleep(0.002)
        steps = int(now["oxseek_steps_total"] - at_close["oxseek_steps_total"])
        most = STEPS_AFTER_CLOSE + STEPS_OF_NOTICE
        assert steps <= most, f"{steps} steps after the close, at most {most} are fine"
        return f"released after {waited * 1000:.0f} ms and {steps} steps"


def main():
    failed = 0
    for function in CHECKS:
        name = function.__name__.replace("_", " ")
        try:
            note = function()
            print(f"ok    {name}" + (f": {note}" if note else ""), flush=True)
        except Exception as e:  # whatever it is, it is this check that failed
            failed += 1
            print(f"FAIL  {name}: {type(e).__name__}: {e}", flush=True)
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
