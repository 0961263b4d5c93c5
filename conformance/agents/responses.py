"""The Responses API over HTTP (openai-python) and over a WebSocket: thinking, a tool, JSON by a schema. usage: BASE"""

import json
import sys

import openai
from websockets.sync.client import connect

BASE = sys.argv[1]
CLIENT = openai.OpenAI(base_url=BASE + "/v1", api_key="none", max_retries=0)
MODEL = "oxseek-demo"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "name": "get_weather", "description": "Get the weather of a city.", "parameters": CITY,
          "strict": False}]
PLACE = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "big"]}, "old": {"type": "boolean"}},
    "required": ["size", "old"],
    "additionalProperties": False,
}
QUESTION = "What is the weather in Paris?"
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def said(response):
    parts = []
    for item in response["output"]:
        if item["type"] == "function_call":
            parts.append(("call", item["name"], item["arguments"]))
        else:
            parts.append((item["type"], item["content"][0]["text"]))
    return parts, response["status"], response["usage"]["output_tokens"]


def over_socket(socket, request):
    socket.send(json.dumps({"type": "response.create", **request}))
    sequence = 0
    while True:
        event = json.loads(socket.recv(timeout=60))
        assert event["type"] != "error", event
        assert event["sequence_number"] == sequence, event
        sequence += 1
        if event["type"] in ("response.completed", "response.incomplete", "response.failed"):
            return event["response"]


def ask(socket, **options):
    """A response, which must say the same whole, as a stream and over a socket. The stored one is returned."""
    request = {"model": MODEL, "temperature": 0, "max_output_tokens": 200, **options}
    whole = CLIENT.responses.create(**request)
    with CLIENT.responses.create(**request, stream=True) as events:
        streamed = [e for e in events][-1].response
    same = over_socket(socket, request)
    assert said(whole.to_dict()) == said(streamed.to_dict()) == said(same), (whole, streamed, same)
    return whole


@check
def thinking(socket):
    response = ask(socket, input="Tell me a story.", reasoning={"effort": "medium"})
    assert response.output[0].type == "reasoning" and response.output[0].content[0].text, response


@check
def a_tool_and_its_result(socket):
    first = ask(socket, input=QUESTION, tools=TOOLS)
    call = next(item for item in first.output if item.type == "function_call")
    assert call.name == "get_weather" and list(json.loads(call.arguments)) == ["city"], call
    result = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 25 degrees"}]
    second = ask(socket, input=result, previous_response_id=first.id, tools=TOOLS)
    assert second.output_text, second
    # Without the server's memory the same: all items sent again.
    items = [{"role": "user", "content": QUESTION}, *[i.to_dict() for i in first.output], *result]
    again = ask(socket, input=items, tools=TOOLS, store=False)
    assert again.output_text == second.output_text, (again, second)
    listed = CLIENT.responses.input_items.list(second.id, order="asc")
    assert [i.type for i in listed] == ["message", *[i.type for i in first.output], "function_call_output"], listed


@check
def json_by_a_schema(socket):
    form = {"format": {"type": "json_schema", "name": "place", "schema": PLACE, "strict": True}}
    response = ask(socket, input="Name a city.", text=form)
    place = json.loads(response.output_text)
    assert place["size"] in ("small", "big") and set(place) == {"size", "old"}, response


@check
def memory_of_a_socket(socket):
    request = {"model": MODEL, "temperature": 0, "max_output_tokens": 20, "store": False}
    first = over_socket(socket, {**request, "input": "Hello!"})
    second = over_socket(socket, {**request, "input": "Tell me more.", "previous_response_id": first["id"]})
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"], (first, second)


@check
def store(socket):
    response = CLIENT.responses.create(model=MODEL, input="Hello!", max_output_tokens=16)
    assert CLIENT.responses.retrieve(response.id).output_text == response.output_text
    CLIENT.responses.delete(response.id)
    try:
        CLIENT.responses.retrieve(response.id)
        raise AssertionError("still there")
    except openai.NotFoundError:
        pass


failed = 0
for function in CHECKS:
    name = function.__name__.replace("_", " ")
    try:
        # Stored responses belong to whoever presents the same key, on a server without keys too.
        headers = {"authorization": f"Bearer {CLIENT.api_key}"}
        with connect(BASE.replace("http", "ws", 1) + "/v1/responses", additional_headers=headers) as opened:
            function(opened)
        print(f"ok    responses: {name}", flush=True)
    except Exception as e:  # whatever it is, it is this check that failed
        failed += 1
        print(f"FAIL  responses: {name}: {type(e).__name__}: {e}", flush=True)
sys.exit(1 if failed else 0)
