"""The server as its tests run it: on the demo checkpoint, behind uvicorn, over loopback."""

import base64
import socket
import threading
import time

import pytest
from conftest import GOLDEN, REPO

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from xcomposer.serving import sources  # noqa: E402
from xcomposer.serving.engine import Engine  # noqa: E402
from xcomposer.serving.transformers_server import build_app  # noqa: E402

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
        self.thread.join(60)
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
        deadline = time.monotonic() + 120
        while self.http.get("/health").json()["requests"]:
            assert time.monotonic() < deadline, "a request is still there"
            time.sleep(0.02)


def user(content):
    return [{"role": "user", "content": content}]


LONG = {"model": "chat", "messages": user("Hello"), "max_tokens": 3500, "temperature": 0}


def chat(model, query, image=None, **settings):
    settings = {"do_sample": False, "max_new_tokens": 40, "repetition_penalty": 1.0, **settings}
    return model.chat(None, query, image, **settings)[0]
