"""Odd requests to `xcomposer serve`: each is refused in OpenAI's form, by name, and the server goes on."""

import io
import json

import pytest
from PIL import Image

pytest.importorskip("starlette")

from xcomposer.serving.protocol import NOT_OFFERED, ChatRequest  # noqa: E402

from .running import CLIP, PICTURES, SHAPES, TEXT, Server, data_url, picture_item, user  # noqa: E402

INTEGERS = ["3", "", 1.5, True, [1], {"a": 1}, -1, 10**30]
NUMBERS = ["0.5", True, [0.5], {}, float("nan"), float("inf"), -3, 10**30]
FLAGS = ["true", 0, 1, [], {}]
TEXTS = [5, True, ["x"], {}, "x" * 600]
OBJECTS = ["x", 5, True, [1]]
ADDRESS = {"model": "chat", "messages": user("Hello")}

# A field, and values that it does not take.
BAD_FIELDS = {
    "max_tokens": [*INTEGERS, 0, 4096, 2**20],
    "max_completion_tokens": [*INTEGERS, 0, 5000],
    "n": [*INTEGERS, 0, 17],
    "top_k": INTEGERS,
    "seed": [value for value in INTEGERS if value != -1],
    "top_logprobs": [*INTEGERS, 21, 3],
    "hd_num": [*INTEGERS, 0, 97, 10**16],
    "num_frm": [*INTEGERS, 0, 129],
    "temperature": [*NUMBERS, 2.1, -0.1],
    "top_p": [*NUMBERS, 1.1],
    "min_p": [*NUMBERS, 1.1],
    "repetition_penalty": [*NUMBERS, 0, 11],
    "presence_penalty": [*NUMBERS, 2.1],
    "frequency_penalty": [*NUMBERS, 2.1],
    "stream": FLAGS,
    "logprobs": FLAGS,
    "use_meta": FLAGS,
    "continue_final_message": [*FLAGS, True],  # the last message is not the assistant's
    "add_generation_prompt": [*FLAGS, False],
    "user": TEXTS,
    "safety_identifier": TEXTS,
    "prompt_cache_key": TEXTS,
    "model": [5, True, ["chat"], {}, None],
    "metadata": [*OBJECTS, {"a": 5}],
    "service_tier": [5, "gold", []],
    "stop": [5, True, {}, [5], [""], "", "x" * 300, ["x"] * 17, [["x"]]],
    "logit_bias": [*OBJECTS, {"x": 1}, {"5": "1"}, {"5": 101}, {"-5": 1}, {"5": None}, {"999999": 1},
                   {str(i): 1 for i in range(301)}],
    "stream_options": [*OBJECTS, {}, {"include_usage": 1}, {"x": True}],
    "response_format": [*OBJECTS, {}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, {"type": 5}],
    "chat_template_kwargs": [*OBJECTS, {"font": "/etc/passwd"}, {"hd_num": 10**16}, {"chat_template": "{{1}}"}],
    "mm_processor_kwargs": [*OBJECTS, {"max_pixels": 5}, {"hd_num": 0}],
    "messages": [None, "Hello", 5, {}, [], [5], ["Hello"], [[]], [None]],
}  # fmt: skip

UNKNOWN = [
    "generation_config", "trust_remote_code", "cache_implementation", "assistant_model", "past_key_values", "streamer",
    "infer_mode", "history", "query", "image", "do_sample", "max_length", "__class__", "hd-num", "Temperature", "",
    "x" * 5000, "\u202e", "echo", "prompt", "suffix", "meta_instruction", "output_path", "stopping_criteria",
]  # fmt: skip


def message(**fields):
    return [{"role": "user", "content": "Hello", **fields}]


BAD_MESSAGES = {
    "no role": [{"content": "Hello"}],
    "no content": [{"role": "user"}],
    "null content": message(content=None),
    "number": message(content=5),
    "object": message(content={"type": "text", "text": "Hello"}),
    "nothing in it": message(content=[]),
    "text in a list": message(content=["Hello"]),
    "role bot": message(role="bot"),
    "role tool": message(role="tool", tool_call_id="1"),
    "role 5": message(role=5),
    "role null": message(role=None),
    "name": message(name="Ann"),
    "own field": message(extra=1),
    "tool calls": [*message(), {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, *message()],
    "ends with the assistant": [*message(), {"role": "assistant", "content": "Hi"}],
    "system alone": [{"role": "system", "content": "Be kind"}],
    "system later": [*message(), {"role": "system", "content": "Be kind"}, *message()],
    "two systems": [{"role": "system", "content": "Be kind"}, {"role": "developer", "content": "Be brief"}, *message()],
    "picture of the system": [{"role": "system", "content": [SHAPES]}, *message()],
    "picture of the assistant": [*message(), {"role": "assistant", "content": [SHAPES]}, *message()],
    "too many": message() * 2049,
    "too long": message(content="word " * 9000),
    "8 MB": message(content="word " * 1_600_000),
    "item without type": message(content=[{"text": "Hello"}]),
    "item of another type": message(content=[{"type": "smell"}]),
    "item of audio": message(content=[{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]),
    "item of a file": message(content=[{"type": "file", "file": {"file_id": "1"}}]),
    "text item without text": message(content=[{"type": "text"}]),
    "text item of a number": message(content=[{"type": "text", "text": 5}]),
    "text item with more": message(content=[{"type": "text", "text": "x", "cache": 1}]),
    "address as text": message(content=[{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]),
    "address of a number": message(content=[picture_item(5)]),
    "address null": message(content=[picture_item(None)]),
    "address empty": message(content=[picture_item("")]),
    "detail": message(content=[{"type": "image_url", "image_url": {"url": SHAPES["image_url"]["url"], "detail": "x"}}]),
    "video as a picture": message(content=[{"type": "video_url", "image_url": {"url": "data:,"}}]),
    "17 pictures": message(content=[SHAPES] * 17),
    "deep": message(content=[[[[[[[[[[]]]]]]]]]]),
}  # fmt: skip


def png(width, height, cut=None):
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()[:cut]


BAD_ADDRESSES = {
    "path": str(PICTURES / "shapes.png"),
    "file": (PICTURES / "shapes.png").as_uri(),
    "passwd": "file:///etc/passwd",
    "http": "http://example.org/a.png",
    "https": "https://example.org/a.png",
    "metadata": "http://169.254.169.254/latest/meta-data",
    "HTTP": "HTTP://localhost:22",
    "ftp": "ftp://example.org/a.png",
    "gopher": "gopher://localhost:70/_x",
    "javascript": "javascript:alert(1)",
    "jar": "jar:file:///a.zip!/b.png",
    "NUL": "file:///etc/pass\0wd",
    "no scheme": "//example.org/a.png",
    "word": "picture",
    "long": "x" * 100_000,
    "data without comma": "data:image/png;base64",
    "data without data": "data:image/png;base64,",
    "no base64": "data:image/png;base64,!!!!",
    "text": "data:text/plain,hello",
    "html": data_url(b"<html></html>", "text/html"),
    "no picture": data_url(b"no picture"),
    "cut": data_url((PICTURES / "shapes.png").read_bytes()[:300]),
    "header alone": data_url(png(10, 10, 20)),
    "no video": data_url(b"\0\0\0\x18ftypmp42", "video/mp4"),
    "video cut": data_url(CLIP.read_bytes()[:2000], "video/mp4"),
    "gif cut": data_url(b"GIF89a\xff\xff\xff\xff"),
    "postscript": data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    "svg": data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    "bomb": data_url(png(30_000, 30_000)),
    "many pixels": data_url(png(15_000, 14_000)),
}  # fmt: skip

BAD_BODIES = {
    "empty": b"", "no JSON": b"Hello", "half": b'{"model": "chat"', "list": b"[]", "null": b"null", "number": b"5",
    "text": b'"x"', "not UTF-8": b'{"model": "\xff"}', "surrogate": b'{"model": "\\ud800", "messages": []}',
    "nested": b"[" * 100_000, "deep": b'{"a":' * 50_000, "empty object": b"{}", "two": b"{}{}", "NUL": b"\0" * 100,
    "form": b"model=chat", "trailing": b'{"model": "chat",}', "utf-16": '{"model": "chat"}'.encode("utf-16"),
}  # fmt: skip

JSON = {"Content-Type": "application/json"}
BAD_HEADERS = {
    "no type": ({}, 415),
    "text": ({"Content-Type": "text/plain"}, 415),
    "form": ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "multipart": ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
    "odd": ({"Content-Type": "x" * 3000}, 415),
    "gzip": ({**JSON, "Content-Encoding": "gzip"}, 415),
}  # fmt: skip

BAD_ROUTES = [
    ("GET", "/", 404), ("GET", "/nowhere", 404), ("POST", "/load_model", 404), ("POST", "/reset", 404),
    ("POST", "/v1/responses", 404), ("POST", "/v1/completions", 404), ("POST", "/v1/embeddings", 404),
    ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/v1/models/nowhere", 404),
    ("GET", "/v1/models/a/b", 404),
    ("GET", "/v1/models/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/v1/chat/completions", 405),
    ("PUT", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405),
    ("PATCH", "/v1/models/chat", 405), ("POST", "/v1/chat/completions/", 404), ("TRACE", "/v1/models", 405),
]  # fmt: skip


def fields_case(name, value):
    extra = {"max_tokens": 4} if name not in ("max_tokens", "max_completion_tokens", "model", "messages") else {}
    return json.dumps({**ADDRESS, **extra, name: value}).encode()


def odd_bodies():
    """(name of the case, body, the field that the answer must name or None)."""
    for name, values in BAD_FIELDS.items():
        for value in values:
            yield f"{name}={json.dumps(value)[:40]}", fields_case(name, value), name
    for name in UNKNOWN:
        yield f"unknown {name[:20]}", fields_case(name, 1), name[:200] or None
    for name in NOT_OFFERED:
        yield f"not offered {name}", fields_case(name, [1]), name
    for name, messages in BAD_MESSAGES.items():
        yield f"messages: {name}", json.dumps({**ADDRESS, "messages": messages}).encode(), "messages"
    for name, url in BAD_ADDRESSES.items():
        content = [picture_item(url), TEXT]
        yield f"address: {name}", json.dumps({**ADDRESS, "messages": user(content)}).encode(), "messages[0].content[0]"
    for name, body in BAD_BODIES.items():
        yield f"body: {name}", body, None
    for pair in (
        {"max_tokens": 3, "max_completion_tokens": 3},
        {"top_logprobs": 2},
        {"hd_num": 3, "mm_processor_kwargs": {"hd_num": 4}},
    ):
        yield f"together: {pair}", json.dumps({**ADDRESS, **pair}).encode(), next(iter(pair))


def trouble_of(answer, status, named):
    """What is wrong with a refusal; None: nothing."""
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} without an error in OpenAI's form: {answer.text[:200]}"
    if answer.status_code != status:
        return f"{answer.status_code}, not {status}: {error['message'][:200]}"
    if set(error) != {"message", "type", "param", "code"} or error["type"] != "invalid_request_error":
        return f"not OpenAI's form: {error}"
    if not error["message"] or len(error["message"]) > 2000:
        return f"a message of {len(error['message'])} characters"
    if named is not None and named not in str(error["param"]) and named not in error["message"]:
        return f"does not name {named}: {error}"
    return None


def test_odd_requests_are_refused_by_name(server):
    answer = server.text([SHAPES, TEXT])
    cases = list(odd_bodies())
    troubles = {}
    for name, body, named in cases:
        found = server.http.post("/v1/chat/completions", content=body, headers=JSON)
        if trouble := trouble_of(found, 404 if name == "model=" else 400, named):
            troubles[name] = trouble
    for name, (headers, status) in BAD_HEADERS.items():
        found = server.http.post("/v1/chat/completions", content=json.dumps(ADDRESS).encode(), headers=headers)
        if trouble := trouble_of(found, status, None):
            troubles[f"headers: {name}"] = trouble
    for method, path, status in BAD_ROUTES:
        found = server.http.request(method, path)
        if trouble := trouble_of(found, status, None):
            troubles[f"{method} {path}"] = trouble
    total = len(cases) + len(BAD_HEADERS) + len(BAD_ROUTES)
    assert total >= 300
    assert not troubles, f"{len(troubles)} of {total}: {json.dumps(troubles, indent=1)}"
    server.idle()
    assert server.text([SHAPES, TEXT]) == answer


def test_every_field_is_in_the_corpus():
    assert set(BAD_FIELDS) == set(ChatRequest.model_fields)


def test_null_is_absent(server):
    """As clients send what they have not set, and messages that they got."""
    fields = {name: None for name in (*ChatRequest.model_fields, *NOT_OFFERED) if name not in ("model", "messages")}
    received = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "audio": None}
    body = {**fields, "model": "chat", "messages": [*user("Hello"), received, *user("Hello")], "max_tokens": 3}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_bodies_have_a_limit(server, demo):
    small = Server(demo, max_body=1000)
    try:
        too_large = json.dumps({**ADDRESS, "messages": user("x" * 2000)}).encode()
        assert small.http.post("/v1/chat/completions", content=too_large, headers=JSON).status_code == 413
        chunked = small.http.post(
            "/v1/chat/completions", content=iter([too_large[:900], too_large[900:]]), headers=JSON
        )
        assert chunked.status_code == 413 and "1000 bytes" in chunked.json()["error"]["message"]
        assert small.post().status_code == 200
        small.engine.bytes = 8 * 1000 - 50  # as if others' requests were there
        crowded = small.post()
        assert crowded.status_code == 503 and crowded.headers["retry-after"]
        small.engine.bytes = 0
        list(small.ask("Hello", max_tokens=3, stream=True))
        assert small.post(stream=True).status_code == small.post().status_code == 200
        small.idle()
        assert small.engine.bytes == 0
    finally:
        small.close()


def test_the_key(server, demo):
    locked = Server(demo, api_key="open sesame")
    try:
        assert locked.http.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "open"}, {"Authorization": "Bearer é"}):
            headers = {name: value.encode() for name, value in headers.items()}
            assert locked.http.get("/v1/models", headers=headers).status_code == 401
            refused = locked.http.post("/v1/chat/completions", json=ADDRESS, headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        client = locked.client.with_options(api_key="open sesame")
        assert client.chat.completions.create(model="chat", messages=user("Hello"), max_tokens=3)
    finally:
        locked.close()
