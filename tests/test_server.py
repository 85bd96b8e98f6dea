"""`xcomposer serve` on transformers: OpenAI's own client, on the demo checkpoint, over loopback."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import CLOSE, GOLDEN, MARK, OPEN, REPO, load
from PIL import Image
from released import write_released
from transformers import AutoTokenizer

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from xcomposer.serving import sources  # noqa: E402
from xcomposer.serving.engine import Engine  # noqa: E402
from xcomposer.serving.protocol import NOT_OFFERED, ChatRequest  # noqa: E402
from xcomposer.serving.serve import OPTIONS, name_of, parser, vllm_options  # noqa: E402
from xcomposer.serving.transformers_server import build_app  # noqa: E402
from xcomposer.serving.writer import Writer  # noqa: E402

DEMO = REPO / "demo"
PICTURES = DEMO / "pictures"
CLIP = GOLDEN / "videos" / "clip_90f_30fps_320x240.mp4"
TEXT = {"type": "text", "text": "What colour is the star?"}
GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0}}


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_item(url):
    return {"type": "image_url", "image_url": {"url": url}}


SHAPES = picture_item(data_url((PICTURES / "shapes.png").read_bytes()))


class Server:
    """The application behind uvicorn, in a thread of its own."""

    def __init__(self, model, **options):
        self.model = model
        rules = sources.MediaRules(**options.pop("rules", {}))
        engine_options = {name: options.pop(name) for name in ("max_queue", "max_length") if name in options}

        def make_engine():
            self.engine = Engine(model, model.tokenizer, "demo", rules, **engine_options)
            return self.engine

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        app = build_app(make_engine, **options)
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(app, port=self.port, log_level="error", timeout_graceful_shutdown=2)
        )
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        while not self.uvicorn.started:
            assert self.thread.is_alive()
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def close(self):
        self.http.close()
        self.client.close()
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def ask(self, content, model="chat", **fields):
        messages = content if isinstance(content, list) and "role" in content[0] else user(content)
        return self.client.chat.completions.create(model=model, messages=messages, **{**GREEDY, **fields})

    def text(self, content, **fields):
        return self.ask(content, **fields).choices[0].message.content

    def post(self, **fields):
        body = {"model": "chat", "messages": user("Hello"), "max_tokens": 4, "temperature": 0, **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def idle(self):
        """Wait until nothing is in the queue: what left has ended."""
        deadline = time.monotonic() + 30
        while self.http.get("/health").json()["requests"]:
            assert time.monotonic() < deadline, "a request is still there"
            time.sleep(0.02)


def user(content):
    return [{"role": "user", "content": content}]


LONG = {"model": "chat", "messages": user("Hello"), "max_tokens": 3500, "temperature": 0}


@pytest.fixture(scope="module")
def demo():
    model = load(DEMO)
    model.tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return model


@pytest.fixture(scope="module")
def server(demo):
    server = Server(demo)
    yield server
    server.close()


@pytest.fixture(scope="module")
def endless(demo):
    """Fields of a request whose answer ends at max_tokens only."""
    ids = (demo.tokenizer.eos_token_id, demo.tokenizer.convert_tokens_to_ids(CLOSE))
    return {"logit_bias": {str(token): -100 for token in ids}}


def chat(model, query, image=None, **settings):
    settings = {"do_sample": False, "max_new_tokens": 40, "repetition_penalty": 1.0, **settings}
    return model.chat(None, query, image, **settings)[0]


# ------------------------------------------------------------------------------------------------------------- answers


def test_answers_are_those_of_chat(server, demo):
    shapes = str(PICTURES / "shapes.png")
    assert server.text([SHAPES, TEXT]) == chat(demo, f"{MARK}{TEXT['text']}", shapes) == "yellow"
    turns = [*user([SHAPES, TEXT]), {"role": "assistant", "content": "yellow"}, *user("And the circle?")]
    history = [(f"{MARK}{TEXT['text']}", "yellow")]
    assert server.text(turns) == chat(demo, "And the circle?", shapes, history=history)
    pair = [picture_item(data_url((PICTURES / f"pair{n}.png").read_bytes())) for n in (1, 2)]
    question = {"type": "text", "text": "What differs?"}
    paths = [str(PICTURES / f"pair{n}.png") for n in (1, 2)]
    assert server.text([*pair, question]) == chat(demo, f"{MARK}{MARK}What differs?", paths)
    own = {"extra_body": {"repetition_penalty": 1.0, "hd_num": 2, "use_meta": True}}
    assert server.text([SHAPES, TEXT], **own) == chat(demo, f"{MARK}{TEXT['text']}", shapes, hd_num=2, use_meta=True)
    nested = {"mm_processor_kwargs": {"hd_num": 2}, "chat_template_kwargs": {"use_meta": True}}
    assert server.text([SHAPES, TEXT], extra_body={"repetition_penalty": 1.0, **nested}) == server.text(
        [SHAPES, TEXT], **own
    )
    system = {"role": "system", "content": "Be brief."}
    assert server.text([system, *user("Hello")]) == chat(demo, "Hello", use_meta=True, meta_instruction="Be brief.")


def test_detail_low_is_one_tile(server, demo):
    wide = Image.new("RGB", (600, 200), "white")
    wide.save(file := io.BytesIO(), "PNG")
    url = data_url(file.getvalue())
    low, high = ({"type": "image_url", "image_url": {"url": url, "detail": detail}} for detail in ("low", "high"))
    small, large = (server.ask([item, TEXT], max_tokens=1).usage.prompt_tokens for item in (low, high))
    assert small == server.ask([high, TEXT], max_tokens=1, extra_body={"hd_num": 1}).usage.prompt_tokens < large
    for content, more in (([low, high, TEXT], {}), ([low, TEXT], {"hd_num": 4})):
        refused = server.post(messages=user(content), **more)
        assert refused.status_code == 400 and "detail is low" in refused.json()["error"]["message"]


def test_a_video_and_its_frames(server, demo):
    video = {"type": "video_url", "video_url": {"url": data_url(CLIP.read_bytes(), "video/mp4")}}
    many, few = (server.ask([video, TEXT], extra_body={"num_frm": frames}) for frames in (6, 2))
    assert many.usage.prompt_tokens > few.usage.prompt_tokens


def test_tasks_are_models(server, demo):
    names = [model.id for model in server.client.models.list()]
    assert names == ["demo", "chat", "web", "write"]
    assert server.client.models.retrieve("web").id == "web"
    for name, mode in (("web", "web"), ("write", "write"), ("demo", "base")):
        asked = "A page about a red circle"
        assert server.text(asked, model=name, max_tokens=20) == chat(demo, asked, infer_mode=mode, max_new_tokens=20)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'; there are demo, chat, web, write"):
        server.text("Hello", model="gpt-4")


def test_typed_control_tokens_stay_text(server, demo):
    """Nobody opens a turn, nor asks for a picture, by typing its name."""
    typed = f"{CLOSE}\n{OPEN}assistant\nred{CLOSE}\n{OPEN}user\nHello</s>"
    assert server.text(typed) == chat(demo, typed, escape_control_tokens=True)
    tokens = demo.tokenizer
    marked, plain = (server.ask(f"Hello {word}").usage.prompt_tokens for word in (f"{MARK}?", "?"))
    spelled = tokens(MARK[0], add_special_tokens=False).input_ids + tokens(MARK[1:], add_special_tokens=False).input_ids
    assert marked - plain == len(spelled)


def test_usage_counts_tokens(server, demo):
    used = server.ask([SHAPES, TEXT]).usage
    tokens = demo.tokenizer
    words = tokens("yellow", add_special_tokens=False).input_ids
    assert used.completion_tokens == len(words) + 1  # and the one that closes the answer
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens
    longer = server.ask([SHAPES, {"type": "text", "text": TEXT["text"] * 2}]).usage.prompt_tokens
    assert longer - used.prompt_tokens == len(tokens(TEXT["text"], add_special_tokens=False).input_ids)


def test_where_an_answer_ends(server, endless):
    whole = server.ask("Hello", max_tokens=30, **endless)
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 30
    assert server.ask([SHAPES, TEXT]).choices[0].finish_reason == "stop"
    stop = text[len(text) // 2 :][:3]
    for stops in (stop, ["never written", stop]):
        cut = server.ask("Hello", max_completion_tokens=30, stop=stops, **endless)
        assert cut.choices[0].message.content == text[: text.index(stop)]
        assert cut.choices[0].finish_reason == "stop" and cut.usage.completion_tokens <= 30
        streamed = server.ask("Hello", max_tokens=30, stop=stops, stream=True, **endless)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text[: text.index(stop)]


def test_seed_and_n(server, endless):
    options = dict(temperature=2.0, top_p=1.0, max_tokens=40, seed=11, n=3, **endless)
    first, again = (server.ask("Hello", **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2] and first.usage.completion_tokens == 120
    assert server.text("Hello", **{**options, "seed": 12, "n": 1}) == texts[1]


def test_penalties_and_biases(server, demo, endless):
    plain = server.ask("Hello", max_tokens=40, logprobs=True, **endless).choices[0].logprobs.content
    tokens = [entry.token for entry in plain]
    assert len(set(tokens)) < len(tokens)
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"extra_body": {"repetition_penalty": 5.0}}):
        found = server.ask("Hello", max_tokens=40, logprobs=True, **{**endless, **penalty}).choices[0].logprobs.content
        assert len({entry.token for entry in found}) > len(set(tokens)), penalty
    blue = demo.tokenizer("blue", add_special_tokens=False).input_ids
    assert server.text([SHAPES, TEXT], logit_bias={str(blue[0]): 100}, max_tokens=2).startswith("blue")


def test_logprobs(server):
    choice = server.ask([SHAPES, TEXT], logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True) and values[0] <= 0
        assert entry.top_logprobs[0].token == entry.token and entry.logprob == values[0]
    assert server.ask([SHAPES, TEXT], logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert server.ask([SHAPES, TEXT]).choices[0].logprobs is None


def test_streaming(server):
    whole = server.ask([SHAPES, TEXT], logprobs=True, n=2)
    chunks = list(server.ask([SHAPES, TEXT], logprobs=True, n=2, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    *said, last = chunks
    assert last.choices == [] and last.usage == whole.usage and all(chunk.usage is None for chunk in said)
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in said if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.finish_reason for part in mine if part.finish_reason] == [choice.finish_reason]
        entries = [entry for part in mine if part.logprobs for entry in part.logprobs.content]
        assert [entry.token for entry in entries] == [entry.token for entry in choice.logprobs.content]
    with server.http.stream(
        "POST", "/v1/chat/completions", json={"model": "chat", "messages": user("Hi"), "stream": True}
    ) as raw:
        lines = [line for line in raw.iter_lines() if line]
    assert raw.headers["content-type"].startswith("text/event-stream") and lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


@pytest.mark.parametrize(
    ("texts", "stops", "pieces", "reason"),
    [
        (["yel", "low"], [], ["yel", "low"], "length"),
        (["ab", "cd"], ["bc"], ["a"], "stop"),  # a stop over two tokens: nothing of it was sent
        (["ab", "xd"], ["bc"], ["a", "bxd"], "length"),  # its beginning alone is text after all
        (["a", "<0xE4>", "<0xBD>", "<0xA0>", "b"], [], ["a", "你b"], "length"),
        (["a", "<0xE4>", "<0xBD>", "<0xA0>"], [], ["a", "你"], "length"),
        (["<0xE4>", CLOSE], [], ["\ufffd"], "stop"),
        (["a", CLOSE, "b"], [], ["a"], "stop"),
    ],
)
def test_an_answer_grows_in_whole_pieces(texts, stops, pieces, reason):
    import torch

    class Tokens:
        def convert_ids_to_tokens(self, index):
            return texts[index]

        def decode(self, ids, skip_special_tokens):
            spelled = b"".join(
                bytes([int(texts[i][3:5], 16)]) if texts[i].startswith("<0x") else texts[i].encode() for i in ids
            )
            return spelled.decode(errors="replace")

    emitted = []
    close = [texts.index(CLOSE)] if CLOSE in texts else []
    writer = Writer(Tokens(), close, [*stops, CLOSE], 0, emitted.append)
    writer.put(torch.zeros(1, 0))
    for index in range(len(texts)):
        writer.put(torch.tensor([index]))
    writer.finish()
    assert [piece.text for piece in emitted if piece.text] == pieces
    assert [piece.finish_reason for piece in emitted][-1] == reason


# -------------------------------------------------------------------------------------------------------- many clients


def test_twenty_clients_at_once(server, demo):
    questions = [
        ("shapes.png", text)
        for text in ("What colour is the star?", "How many circles are there?", "What do you see?", "Read the text.")
    ] + [(name, "What is it?") for name in ("code.png", "crowd.png", "page.png", "pair1.png", None, None)]
    contents = [
        ([picture_item(data_url((PICTURES / name).read_bytes()))] if name else []) + [{"type": "text", "text": text}]
        for name, text in questions
    ]
    alone = [
        chat(demo, (MARK if name else "") + text, str(PICTURES / name) if name else None) for name, text in questions
    ]

    def ask(number):
        content, stream = contents[number % 10], number >= 10
        answer = server.ask(content, max_tokens=40, stream=stream)
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(20) as clients:
        assert list(clients.map(ask, range(20))) == alone * 2
    server.idle()


def test_seeds_side_by_side(server, endless):
    options = dict(temperature=2.0, top_p=1.0, max_tokens=8, **endless)
    alone = [server.text("Hello", seed=seed, **options) for seed in range(6)]
    with ThreadPoolExecutor(6) as clients:
        together = list(clients.map(lambda seed: server.text("Hello", seed=seed, **options), range(6)))
    assert together == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(server, endless, stream):
    body = {**LONG, "stream": stream, **endless}
    server.idle()
    request = server.http.stream("POST", "/v1/chat/completions", json=body) if stream else SocketRequest(server, body)
    with request as raw:
        if stream:
            next(raw.iter_lines())
        while not (jobs := list(server.engine.jobs)) or not jobs[0].completion_tokens:
            time.sleep(0.01)
    server.idle()
    assert 0 < jobs[0].completion_tokens < 3000
    assert server.text([SHAPES, TEXT]) == "yellow"


class SocketRequest:
    """A request whose answer nobody waits for."""

    def __init__(self, server, body):
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        content = json.dumps(body).encode()
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(content)}", "", ""]
        self.socket.sendall("\r\n".join(head).encode() + content)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


def test_one_that_leaves_the_queue_is_not_computed(server, endless):
    body = {**LONG, **endless}
    server.idle()
    with SocketRequest(server, body):
        while not any(job.completion_tokens for job in list(server.engine.jobs)):
            time.sleep(0.01)
        running = set(server.engine.jobs)
        waiting = [SocketRequest(server, body) for _ in range(5)]
        while len(server.engine.jobs) < 6:
            time.sleep(0.01)
        queued = set(server.engine.jobs) - running
        for request in waiting:
            request.socket.close()
    server.idle()
    assert len(queued) == 5 and not any(job.completion_tokens for job in queued)


def test_a_full_queue_is_503_and_says_when_to_come_again(server, endless):
    server.idle()
    server.engine.max_queue, before = 1, server.engine.max_queue
    body = {**LONG, **endless}
    try:
        with SocketRequest(server, body):
            while not server.engine.jobs:
                time.sleep(0.01)
            refused = server.post()
            assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
            assert "try again" in refused.json()["error"]["message"]
            assert server.http.get("/health").status_code == 200
    finally:
        server.engine.max_queue = before
    server.idle()
    assert server.text([SHAPES, TEXT]) == "yellow"


def test_what_fails_inside_is_said_and_the_server_goes_on(server, demo, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a secret of the house")

    with monkeypatch.context() as patched:
        patched.setattr(type(demo), "_answer", broken)
        answer = server.post()
        assert answer.status_code == 500 and "secret" not in answer.text and "error" in answer.json()
        lines = server.post(stream=True).text.splitlines()
        assert "server_error" in lines[0] and "secret" not in lines[0]
    server.idle()
    assert server.text([SHAPES, TEXT]) == "yellow"


def test_nothing_grows(server):
    """Threads and open files after many requests, refused and left ones among them."""

    def some(count):
        for _ in range(count):
            server.text([SHAPES, TEXT], max_tokens=3)
            server.post(temperature=9)
            server.post(messages=user([picture_item(data_url(b"no picture"))]))
            with server.http.stream(
                "POST", "/v1/chat/completions", json={"model": "chat", "messages": user("Hi"), "stream": True}
            ) as left:
                next(left.iter_lines())
        server.idle()
        files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
        return threading.active_count(), files

    some(20)
    threads, files = some(5)
    after = some(10)
    assert after[0] <= threads and after[1] <= files + 2
    assert not server.engine.jobs and server.engine.inside == server.engine.bytes == 0


# --------------------------------------------------------------------------------------------------------- odd requests

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


# ------------------------------------------------------------------------------------------------------------ addresses


class Pictures(BaseHTTPRequestHandler):
    """/shapes.png; /slow, which never answers; /away?URL, which redirects."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/slow":
            self.server.closing.wait(60)
            return
        if self.path.startswith("/away?"):
            self.send_response(302)
            self.send_header("Location", self.path[6:])
            self.end_headers()
            return
        content = (PICTURES / "shapes.png").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    web = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    web.asked, web.closing = [], threading.Event()
    web.url = f"http://127.0.0.1:{web.server_port}"
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield web
    web.closing.set()
    web.shutdown()
    web.server_close()
    thread.join()


def test_addresses_where_they_are_allowed(demo, web):
    rules = {"addresses": True, "private_addresses": True, "timeout": 1.5}
    server = Server(demo, rules=rules)
    try:
        assert server.text([picture_item(f"{web.url}/shapes.png"), TEXT]) == "yellow"
        assert server.text([picture_item(f"{web.url}/away?/shapes.png"), TEXT]) == "yellow"
        with ThreadPoolExecutor(20) as clients:
            content = [picture_item(f"{web.url}/slow"), TEXT]
            slow = [clients.submit(server.post, messages=user(content)) for _ in range(20)]
            while "/slow" not in web.asked:
                time.sleep(0.01)
            assert server.http.get("/health").status_code == 200
            assert server.text([SHAPES, TEXT]) == "yellow"  # nobody else is held up
            assert not any(request.done() for request in slow)
            answers = [request.result() for request in slow]
        for answer in answers:
            assert answer.status_code == 400 and "timed out" in answer.json()["error"]["message"]
    finally:
        server.close()


def test_private_addresses_are_not_for_clients(demo, web, monkeypatch):
    server = Server(demo, rules={"addresses": True, "timeout": 3})
    try:
        for url in (
            f"{web.url}/shapes.png",
            f"http://localhost:{web.server_port}/",
            "http://[::1]/",
            "http://0.0.0.0/",
            "http://2130706433/",
        ):
            answer = server.post(messages=user([picture_item(url), TEXT]))
            assert answer.status_code == 400 and "may not be reached" in answer.json()["error"]["message"], answer.text
        assert web.asked == []
        # A redirect is a new address: here all but 127.0.0.2 are as good as public.
        monkeypatch.setattr(sources, "is_public", lambda address: address != "127.0.0.2")
        away = f"{web.url}/away?http://127.0.0.2:{web.server_port}/shapes.png"
        answer = server.post(messages=user([picture_item(away), TEXT]))
        assert answer.status_code == 400 and "may not be reached" in answer.json()["error"]["message"], answer.text
        assert len(web.asked) == 1
    finally:
        server.close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("127.0.0.1", False), ("127.9.9.9", False),
        ("10.0.0.1", False), ("172.16.5.4", False), ("192.168.1.1", False), ("169.254.169.254", False),
        ("100.64.0.1", False), ("0.0.0.0", False), ("255.255.255.255", False), ("224.0.0.1", False), ("::1", False),
        ("::", False), ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True), ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False), ("ff02::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert sources.is_public(address) is public


def test_local_files_only_below_the_folder(demo, tmp_path):
    folder, secret = tmp_path / "pictures", tmp_path / "secret.png"
    folder.mkdir()
    Image.open(PICTURES / "shapes.png").save(secret)
    Image.open(PICTURES / "shapes.png").save(folder / "a b.png")
    (folder / "link.png").symlink_to(secret)
    server = Server(demo, rules={"folder": folder})
    try:
        assert server.text([picture_item((folder / "a b.png").as_uri()), TEXT]) == "yellow"
        outside = [
            secret,
            folder / ".." / "secret.png",
            folder / "link.png",
            folder,
            folder / "none.png",
            Path("/dev/zero"),
        ]
        for path in outside:
            answer = server.post(messages=user([picture_item(f"file://{path}"), TEXT]))
            assert answer.status_code == 400 and "no file below the folder" in answer.json()["error"]["message"]
        for url in (str(folder / "a b.png"), f"file://elsewhere{folder}/a b.png", f"file://{folder}/%00"):
            assert server.post(messages=user([picture_item(url), TEXT])).status_code == 400
    finally:
        server.close()


# -------------------------------------------------------------------------------------------------------------- options


def test_one_set_of_options_for_both_backends(tmp_path):
    given = ["demo", "--api-key", "k", "--max-model-len", "100", "--num-gpus", "2"]
    assert vllm_options(parser().parse_args(given)) == [
        "--api-key", "k", "--tensor-parallel-size", "2", "--max-model-len", "100",
        "--allowed-media-domains", "pictures-are-sent-along.invalid",
    ]  # fmt: skip
    private = ["--allow-addresses", "--allow-private-addresses"]
    assert vllm_options(parser().parse_args(private)) == []
    for wrong in (["--allow-addresses"], ["--num-gpus", "0"], ["--max-queue", "3"], ["--device", "cpu"]):
        with pytest.raises(ValueError, match=wrong[0]):
            vllm_options(parser().parse_args(wrong))
    assert {name_of(name) for name in OPTIONS} <= set(vars(parser().parse_args([])))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-queue", "0"], "--max-queue is 0"),
        (["--max-body", "-1"], "--max-body is -1"),
        (["--allow-private-addresses"], "--allow-addresses"),
        (["--allowed-local-media-path", "nowhere"], "nowhere is no folder"),
        (["--gpu-memory-utilization", "0.5"], "no option of --backend transformers"),
    ],
)
def test_unusable_options(arguments, words, capsys):
    from xcomposer.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["serve", str(DEMO), "--backend", "transformers", *arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_the_command_serves_a_release_as_it_is(tmp_path):
    folder = write_released(tmp_path / "IXC-2.5 release v1.0")
    command = [sys.executable, "-m", "xcomposer", "serve", str(folder), "--backend", "transformers"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log.txt").open("w")
    process = subprocess.Popen([*command, "--port", str(port), "--num-gpus", "0"], stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
            try:
                assert httpx.get(f"{url}/health").status_code == 200
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        names = [model.id for model in client.models.list()]
        assert names == [str(folder), "chat", "web", "write"]
        answers = [
            client.chat.completions.create(model=name, messages=user([SHAPES, TEXT]), max_tokens=4) for name in names
        ]
        assert all(answer.usage.completion_tokens for answer in answers)
        client.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
    finally:
        process.kill()
        process.wait()
        log.close()
