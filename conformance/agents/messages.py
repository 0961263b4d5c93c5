"""The Anthropic SDK: thinking, a tool call and its result, JSON by a schema; whole and streamed. usage: BASE"""

import json
import sys

import anthropic

CLIENT = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
MODEL = "oxseek-demo"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"name": "get_weather", "description": "Get the weather of a city.", "input_schema": CITY}]
PLACE = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "big"]}, "old": {"type": "boolean"}},
    "required": ["size", "old"],
    "additionalProperties": False,
}
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def said(message):
    parts = []
    for block in message.content:
        what = {"thinking": "thinking", "text": "text", "tool_use": "input"}[block.type]
        parts.append((block.type, getattr(block, what)))
    return parts, message.stop_reason, message.usage.output_tokens


def ask(**options):
    """A message, which must say the same when it is streamed."""
    # The SDK has no argument for the temperature any more, the API has.
    extra = {"temperature": 0, **options.pop("extra_body", {})}
    request = {"model": MODEL, "max_tokens": 200, "extra_body": extra, **options}
    whole = CLIENT.messages.create(**request)
    with CLIENT.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    assert said(whole) == said(streamed), (said(whole), said(streamed))
    return whole


@check
def thinking():
    message = ask(messages=[{"role": "user", "content": "Tell me a story."}],
                  extra_body={"thinking": {"type": "enabled"}})
    assert message.content[0].type == "thinking" and message.content[0].thinking, message


@check
def a_tool_and_its_result():
    first = ask(messages=[QUESTION], tools=TOOLS)
    assert first.stop_reason == "tool_use", first
    use = next(b for b in first.content if b.type == "tool_use")
    assert use.name == "get_weather" and list(use.input) == ["city"], use
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny, 25 degrees"}
    turns = [QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = ask(messages=turns, tools=TOOLS)
    assert second.stop_reason == "end_turn" and second.content[0].text, second
    count = CLIENT.messages.count_tokens(model=MODEL, messages=turns, tools=TOOLS)
    usage = second.usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens, (count, usage)


@check
def json_by_a_schema():
    config = {"format": {"type": "json_schema", "schema": PLACE}}
    message = ask(messages=[{"role": "user", "content": "Name a city."}], extra_body={"output_config": config})
    place = json.loads(message.content[0].text)
    assert place["size"] in ("small", "big") and set(place) == {"size", "old"}, message


@check
def errors():
    try:
        CLIENT.messages.create(model=MODEL, max_tokens=1, messages=[QUESTION], extra_body={"container": "c"})
        raise AssertionError("accepted")
    except anthropic.BadRequestError as e:
        assert e.body["error"]["type"] == "invalid_request_error" and "container" in e.body["error"]["message"], e.body


failed = 0
for function in CHECKS:
    name = function.__name__.replace("_", " ")
    try:
        function()
        print(f"ok    anthropic: {name}", flush=True)
    except Exception as e:  # whatever it is, it is this check that failed
        failed += 1
        print(f"FAIL  anthropic: {name}: {type(e).__name__}: {e}", flush=True)
sys.exit(1 if failed else 0)
