"""Random conversations through the demo model's template, by Jinja2 and by oxseek: the same token ids.

Usage: check.py BASE_URL [CONVERSATIONS] [SEED]
"""

import http.client
import json
import pathlib
import random
import sys
import urllib.parse

from jinja2.sandbox import ImmutableSandboxedEnvironment

CONFIG = pathlib.Path(__file__).parents[2] / "models/oxseek-demo/tokenizer_config.json"
WORDS = ["cat", "the sea", "2 + 2", "é", "好", "🙂", "{{ x }}", "<b>", "\"quoted\"", "a\nb", "  ", "\\n", "None", ""]


def template():
    def raise_exception(message):
        raise ValueError(message)

    def tojson(value, indent=None, **_):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # As Hugging Face transformers sets it up.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(json.loads(CONFIG.read_text())["chat_template"])


def text(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 8)))


def conversation(rng):
    """Messages of a chat, with thinking and calls, and the tools."""
    messages = [{"role": "system", "content": text(rng)}] if rng.random() < 0.5 else []
    tools = [{"type": "function", "function": {
        "name": f"tool_{i}", "description": text(rng), "parameters": {
            "type": "object", "properties": {"x": {"type": "string", "description": text(rng)}}, "required": ["x"]},
    }} for i in range(rng.randrange(1, 4))] if rng.random() < 0.5 else None
    for turn in range(rng.randrange(1, 6)):
        messages.append({"role": "user", "content": text(rng)})
        if tools and rng.random() < 0.5:
            calls = [{"id": f"call_{turn}_{i}", "type": "function", "function": {
                "name": rng.choice(tools)["function"]["name"], "arguments": json.dumps({"x": text(rng)}),
            }} for i in range(rng.randrange(1, 3))]
            messages.append({"role": "assistant", "content": rng.choice([None, text(rng)]), "tool_calls": calls})
            messages += [{"role": "tool", "tool_call_id": c["id"], "content": text(rng)} for c in calls]
        messages.append({"role": "assistant", "content": rng.choice(["", f"<think>{text(rng)}</think>"]) + text(rng)})
    if rng.random() < 0.8:
        messages.append({"role": "user", "content": text(rng)})
    return messages, tools


def main():
    url = urllib.parse.urlsplit(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 500
    rng = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)

    def ids(body):
        connection.request("POST", "/tokenize", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        return answer.get("tokens"), answer

    oracle = template()
    wrong = longest = 0
    for _ in range(count):
        messages, tools = conversation(rng)
        thinking = rng.random() < 0.5
        prompt = oracle.render(messages=messages, tools=tools, thinking=thinking, add_generation_prompt=True,
                               bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>")
        want, _ = ids({"prompt": prompt, "add_special_tokens": False})
        body = {"messages": messages, "chat_template_kwargs": {"thinking": thinking}}
        found, answer = ids(body | ({"tools": tools} if tools else {}))
        longest = max(longest, len(want))
        if found != want:
            wrong += 1
            if wrong <= 3:
                print(f"{messages}\n  Jinja2: {want}\n  oxseek: {found or answer}")
    print(f"{count} conversations of at most {longest} tokens, {wrong} differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
