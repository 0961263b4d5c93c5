"""Calls tools out of random sets; see README.md. Usage: check.py BASE [SETS] [SEED]"""

import concurrent.futures
import json
import random
import sys
import urllib.request

VALUES = {
    "city": ["Paris", "London", "Rome", "Berlin", "Madrid", "Tokyo", "Oslo", "Lima", "Cairo", "Athens"],
    "animal": ["cat", "dog", "bird", "horse", "rabbit", "lion", "bear", "duck"],
    "color": ["red", "blue", "green", "yellow", "black", "white"],
    "item": ["apple", "hat", "doll", "kite", "shoe", "coat"],
    "name": ["Tom", "Mia", "Anna", "Max", "Sue", "Jack"],
    "number": [2, 3, 4, 5, 6, 7, 8, 9],
}

# The kinds of tools that the demo model has learned: description, parameters, questions.
TOOLS = {
    "get_weather": ("Get the weather in a city", ["city"],
                    ["What is the weather in {city}?", "How is the weather in {city} today?"]),
    "get_time": ("Get the time in a city", ["city"],
                 ["What time is it in {city}?", "Tell me the time in {city}."]),
    "play_sound": ("Play the sound of an animal", ["animal"], ["Play the sound of a {animal}."]),
    "count_animals": ("Count animals", ["animal"], ["How many {animal}s are there?", "Count the {animal}s."]),
    "draw_picture": ("Draw a picture of an animal in a color", ["animal", "color"],
                     ["Draw a {color} {animal}.", "Draw a picture of a {color} {animal}."]),
    "buy_item": ("Buy an item", ["item", "number"], ["Buy {number} {item}s.", "Please buy {number} {item}s."]),
    "set_alarm": ("Set an alarm", ["number"], ["Wake me up at {number}."]),
    "find_person": ("Find a person", ["name"], ["Find {name}.", "Where is {name}?"]),
}


def declared(name, strict):
    description, parameters, _ = TOOLS[name]
    kind = lambda p: {"type": "integer" if p == "number" else "string"}
    schema = {"type": "object", "properties": {p: kind(p) for p in parameters}, "required": parameters}
    function = {"name": name, "description": description, "parameters": schema}
    if strict:
        function["parameters"] = {**schema, "additionalProperties": False}
        function["strict"] = True
    return {"type": "function", "function": function}


def post(base, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(
        base + "/v1/chat/completions", data=data, headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.read().decode()


def whole(base, body):
    message = json.loads(post(base, body))["choices"][0]["message"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []]
    return calls, message.get("content") or ""


def streamed(base, body):
    calls, content = [], ""
    for line in post(base, {**body, "stream": True}).splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            delta = choice["delta"]
            content += delta.get("content") or ""
            for part in delta.get("tool_calls") or []:
                if part["index"] == len(calls):
                    calls.append((part["function"]["name"], ""))
                name, arguments = calls[part["index"]]
                calls[part["index"]] = (name, arguments + part["function"]["arguments"])
    return calls, content


def valid(name, arguments, strict):
    """Whether the arguments are valid for the tool's schema."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return False
    if name not in TOOLS or not isinstance(value, dict):
        return False
    parameters = TOOLS[name][1]
    fits = lambda p: type(value.get(p)) is (int if p == "number" else str)
    return all(fits(p) for p in parameters) and (not strict or set(value) == set(parameters))


def odd(rng):
    """A schema that the model has never seen, with a check of its values."""
    words = ["red", "green", "blue", "round", "tall"]
    choices = rng.sample(words, 3)
    most = rng.randint(2, 50)
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": choices},
            "amount": {"type": "integer", "minimum": 1, "maximum": most},
            "tags": {"type": "array", "items": {"enum": words}, "maxItems": 2},
            "sure": {"type": "boolean"},
        },
        "required": ["kind", "amount", "tags", "sure"],
        "additionalProperties": False,
    }

    def check(arguments):
        try:
            value = json.loads(arguments)
        except ValueError:
            return False
        return (
            set(value) == {"kind", "amount", "tags", "sure"}
            and value["kind"] in choices
            and 1 <= value["amount"] <= most
            and len(value["tags"]) <= 2
            and set(value["tags"]) <= set(words)
            and isinstance(value["sure"], bool)
        )

    return schema, check


def one(base, seed):
    rng = random.Random(seed)
    tools = rng.sample(sorted(TOOLS), rng.randint(1, 4))
    tool = rng.choice(tools)
    values = {p: rng.choice(VALUES[p]) for p in TOOLS[tool][1]}
    question = rng.choice(TOOLS[tool][2]).format(**values)
    found = {}
    for strict in (False, True):
        body = {
            "messages": [{"role": "user", "content": question}],
            "tools": [declared(t, strict) for t in tools],
            "temperature": 0,
            "max_tokens": 200,
        }
        calls, content = whole(base, body)
        found["same", strict] = (calls, content) == streamed(base, body)
        found["valid", strict] = all(n in tools and valid(n, a, strict) for n, a in calls)
        found["called", strict] = bool(calls)
        right = len(calls) == 1 and valid(*calls[0], False) and (calls[0][0], json.loads(calls[0][1])) == (tool, values)
        found["right", strict] = right
        if not right:
            found["shown", strict] = f"{question!r} of {tools}: {calls} {content[:60]!r}"
    schema, check = odd(rng)
    forced = {"type": "function", "function": {"name": "note", "parameters": schema, "strict": True}}
    body = {
        "messages": [{"role": "user", "content": question}],
        "tools": [forced],
        "tool_choice": "required" if seed % 2 else {"type": "function", "function": {"name": "note"}},
        "temperature": 1,
        "seed": seed,
        "max_tokens": 400,
    }
    calls, _ = whole(base, body)
    found["forced"] = bool(calls) and all(n == "note" and check(a) for n, a in calls)
    found["forced same"] = calls == streamed(base, body)[0]
    return found


def main():
    base = sys.argv[1]
    sets = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda s: one(base, s), range(first, first + sets)))
    count = lambda key: sum(r[key] for r in results)
    for strict in (False, True):
        kind = "strict" if strict else "not strict"
        print(f"{kind}: called {count(('called', strict))}, arguments valid {count(('valid', strict))}, "
              f"right {count(('right', strict))}, stream the same {count(('same', strict))}, of {sets}")
    print(f"forced: valid {count('forced')}, stream the same {count('forced same')}, of {sets}")
    for result in [r for r in results if ("shown", False) in r][:10]:
        print("  not right:", result["shown", False])
    every = [("valid", True), ("same", True), ("same", False), "forced", "forced same"]
    ok = all(count(key) == sets for key in every) and count(("right", False)) >= 0.9 * sets
    print("ok" if ok else "FAILED")
    sys.exit(not ok)


main()
