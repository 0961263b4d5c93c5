"""A pytest plugin between openai-python's own tests and a server of ours.

The tests are written for a mock that takes everything: they name models, ids and values that no real server knows.
Nothing of a test is changed but what goes over the wire:

* names of models and ids of responses become ones that exist here, and a response that is asked for without any input
  gets one;
* a field that not-offered.txt lists for the route is dropped after the server has refused it by name with 400, and the
  request is sent again. A refusal of any other field is a failure;
* a test of a route that not-offered.txt lists must fail (xfail, strict).
"""

import json
import os
import pathlib
import re
import urllib.request

import httpx2
import pytest

BASE = os.environ["TEST_API_BASE_URL"].rstrip("/")
# What the tests' clients present: a server without keys tells clients apart by it.
KEY = "Bearer My API Key"
MODEL = os.environ["OXSEEK_MODEL_NAME"]
LIST = pathlib.Path(__file__).with_name("not-offered.txt")

FIELDS: dict[str, set[str]] = {}
TESTS: list[tuple[re.Pattern, str]] = []
REFUSED: dict[str, set[str]] = {}


def read_list():
    for line in LIST.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        what, name, reason = re.split(r"\s+\|\s+", line, maxsplit=2)
        assert reason, f"no reason: {line}"
        if what == "test":
            TESTS.append((re.compile(name), reason))
        else:
            FIELDS.setdefault(what, set()).add(name)


read_list()


def pytest_collection_modifyitems(items):
    for item in items:
        for pattern, reason in TESTS:
            if pattern.search(item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def route(request):
    path = str(request.url).removeprefix(BASE).split("?")[0]
    path = re.sub(r"^/responses/(?!input_tokens|compact)[^/]+", "/responses/{id}", path)
    return f"{request.method} {path}"


def stored_response():
    """The id of a response that the server keeps, made for one request."""
    body = {"model": MODEL, "input": "Say hello.", "max_output_tokens": 16}
    headers = {"content-type": "application/json", "authorization": KEY}
    request = urllib.request.Request(BASE + "/responses", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["id"]


def known(request, to):
    """The request with names that exist here."""
    url, body = str(request.url), request.content
    if to.startswith(("GET /models/", "DELETE /models/")):
        url = re.sub(r"/models/[^?]+", f"/models/{MODEL}", url)
    if "/responses/{id}" in to:
        url = re.sub(r"/responses/[^/?]+", f"/responses/{stored_response()}", url)
    if body:
        fields = json.loads(body)
        if "model" in fields:
            fields["model"] = MODEL
        if to in ("POST /responses", "POST /responses/input_tokens"):
            fields.setdefault("input", "Say hello.")
        if "previous_response_id" in fields:
            fields["previous_response_id"] = stored_response()
        body = json.dumps(fields).encode()
    return rebuilt(request, url, body)


def rebuilt(request, url, body):
    headers = {k: v for k, v in request.headers.items() if k.lower() not in ("content-length", "host")}
    copy = httpx2.Request(request.method, url, headers=headers, content=body, extensions=request.extensions)
    return copy


def without_refused(request, to, answer):
    """The request without the listed field that the answer refuses; None if it refuses none."""
    if answer.status_code != 400:
        return None
    error = answer.json()["error"]
    param = error["param"] or ""
    assert param in error["message"] or not param, error
    place = re.sub(r"\[\d*\]", "", param)
    for field in sorted(FIELDS.get(to, ()), key=len, reverse=True):
        if place == field or place.startswith(field + "."):
            REFUSED.setdefault(to, set()).add(field)
            return drop(request, field)
    return None


def drop(request, field):
    if request.method == "GET":
        url = httpx2.URL(str(request.url))
        query = [(k, v) for k, v in url.params.multi_items() if k.removesuffix("[]") != field]
        return rebuilt(request, str(url.copy_with(params=query)), b"")
    fields = json.loads(request.content)
    *parents, last = field.split(".")
    place = fields
    for name in parents:
        place = place[name] if not isinstance(place, list) else place[0][name]
    for holder in place if isinstance(place, list) else [place]:
        holder.pop(last)
    return rebuilt(request, str(request.url), json.dumps(fields).encode())


def ours(request):
    return str(request.url).startswith(BASE)


def patch(client_class):
    send = client_class.send

    def patched(self, request, **options):
        if not ours(request):
            return send(self, request, **options)
        to = route(request)
        request = known(request, to)
        while True:
            answer = send(self, request, **options)
            if answer.status_code == 400:
                answer.read()
            again = without_refused(request, to, answer)
            if again is None:
                return answer
            request = again

    client_class.send = patched


def patch_async(client_class):
    send = client_class.send

    async def patched(self, request, **options):
        if not ours(request):
            return await send(self, request, **options)
        to = route(request)
        request = known(request, to)
        while True:
            answer = await send(self, request, **options)
            if answer.status_code == 400:
                await answer.aread()
            again = without_refused(request, to, answer)
            if again is None:
                return answer
            request = again

    client_class.send = patched


patch(httpx2.Client)
patch_async(httpx2.AsyncClient)


def pytest_sessionfinish():
    for to, fields in sorted(REFUSED.items()):
        print(f"\nrefused by name, as listed: {to}: {', '.join(sorted(fields))}")
