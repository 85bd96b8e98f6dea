"""`transformers serve` after the opt-in of xcomposer.serving.transformers_server, over HTTP on loopback."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import GOLDEN, MARK
from transformers import AutoModel, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

pytestmark = pytest.mark.skipif(not is_serve_available(), reason='needs pip install "transformers[serving]"')

PICTURE = GOLDEN / "images" / "small_150x100.png"
CLIP = GOLDEN / "videos" / "clip_90f_30fps_320x240.mp4"
TEXT = {"type": "text", "text": "Describe it"}


def item(data, kind="image", mime="image/png"):
    code = base64.b64encode(data).decode()
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{code}"}}


class Server:
    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "xcomposer.serving.transformers_server", folder, "--trust-remote-code"]
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        self.folder, self.log = str(folder), log
        self.process = subprocess.Popen(
            [*command, *options], stdout=log.open("wb"), stderr=subprocess.STDOUT, env=os.environ
        )

    def send(self, path, body=None):
        """Status and text of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait(self):
        deadline = time.monotonic() + 90
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                return self.send("/health")
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def ask(self, *content, **options):
        turn = {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}
        body = {"model": self.folder, "messages": [turn], "max_tokens": 8, "temperature": 0, **options}
        return self.send("/v1/chat/completions", body)

    def answer(self, *content, **options):
        status, text = self.ask(*content, **options)
        assert status == 200, text
        return json.loads(text)["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    server = Server(tiny_checkpoint, tmp_path_factory.mktemp("serve") / "log.txt")
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.process.kill()


@pytest.fixture(scope="module")
def chat(tiny_checkpoint):
    """`chat` on the same checkpoint."""
    model = AutoModel.from_pretrained(tiny_checkpoint, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint, trust_remote_code=True)

    def ask(query, image=None, **kwargs):
        settings = dict(do_sample=False, max_new_tokens=8, repetition_penalty=1.0)
        return model.chat(tokenizer, query, image, **settings, **kwargs)[0]

    return ask


def test_answers_equal_those_of_chat(server, chat):
    picture = item(PICTURE.read_bytes())
    assert server.answer("Hello") == chat("Hello")
    assert server.answer(picture, TEXT) == chat(f"{MARK}Describe it", str(PICTURE))
    options = {"chat_template_kwargs": {"hd_num": 2, "use_meta": True}}
    assert server.answer(picture, TEXT, **options) == chat(f"{MARK}Describe it", str(PICTURE), hd_num=2, use_meta=True)
    assert server.answer(picture, picture, TEXT) == chat(f"{MARK}{MARK}Describe it", [str(PICTURE)] * 2)


def test_a_video(server):
    assert server.answer(item(CLIP.read_bytes(), "video", "video/mp4"), TEXT)


def test_streaming(server):
    picture = item(PICTURE.read_bytes())
    status, text = server.ask(picture, TEXT, stream=True)
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert status == 200 and len(chunks) > 2
    assert "".join(deltas).rstrip("\ufffd") == server.answer(picture, TEXT).rstrip(
        "\ufffd"
    )  # a reply cut inside a character


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([item(PICTURE.read_bytes()[:300]), TEXT], "broken or cut short"),
        ([item(b"no picture at all"), TEXT], "neither a picture nor a video"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}, TEXT], "not valid base64"),
        ([{"type": "image_url", "image_url": {"url": str(PICTURE)}}, TEXT], "no http(s) or data: address"),
        ([item(PICTURE.read_bytes()), {"type": "text", "text": f"{MARK} what?"}], "item at once"),
        ([{"type": "smell", "smell": "rose"}, TEXT], "unknown type 'smell'"),
    ],
    ids=["cut", "other", "base64", "file", "twice", "type"],
)
def test_what_is_refused_is_a_400_and_the_server_lives_on(content, words, stream, server):
    status, text = server.ask(*content, stream=stream)
    assert status == 400
    assert words in json.loads(text)["error"]["message"]
    assert server.send("/health")[0] == 200
    assert server.answer("Hello")
