"""The studio on a model behind a server: what goes over the wire, and what comes back."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

pytest.importorskip("openai")

from xcomposer.article import Composer, finish  # noqa: E402
from xcomposer.studio.conversation import Turn  # noqa: E402
from xcomposer.studio.desk import About, Choices, Desk  # noqa: E402
from xcomposer.studio.endpoint import Endpoint  # noqa: E402
from xcomposer.studio.media import Media  # noqa: E402


class Server(BaseHTTPRequestHandler):
    """Two models; says the words that the test lays out, one a chunk."""

    models, words, asked = ["chat", "web"], ["Hel", "lo"], []

    def log_message(self, *_):
        pass

    def do_GET(self):
        data = [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in self.models]
        self._send("application/json", json.dumps({"object": "list", "data": data}))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(asked)
        chunks = [
            {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": asked["model"],
             "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
            for word in self.words
        ]  # fmt: skip
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self._send("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

    def _send(self, kind, text):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server():
    Server.asked.clear()
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def picture(path, colour="red"):
    return Media("a.png", path, path, Image.new("RGB", (8, 6), colour))


def test_a_chat_goes_over_the_wire_as_the_model_would_have_it(server, tmp_path):
    desk = Desk(Endpoint(server), About("x"))
    first, second = Turn("What?", [picture(tmp_path)], "A star."), Turn("<ImageHere> And?", [picture(tmp_path, "blue")])
    assert list(desk.answer([first, second], Choices(seed=3, hd_num=2)))[-1] == "Hello"
    asked = Server.asked[-1]
    system, question, answer, last = asked["messages"]
    assert [asked["model"], asked["seed"], asked["mm_processor_kwargs"]] == ["chat", 3, {"hd_num": 2}]
    assert system["role"] == "system" and answer["content"] == "A star."
    assert [item["type"] for item in question["content"]] == ["image_url", "text"]
    sent = base64.b64decode(last["content"][0]["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(sent)).getpixel((0, 0)) == (0, 0, 255)


def test_exact_answers_and_one_picture(server, tmp_path):
    desk = Desk(Endpoint(server + "/v1/"), About("x"))
    list(desk.answer([Turn("What?", [picture(tmp_path)])], Choices(exact=True)))
    asked = Server.asked[-1]
    assert asked["temperature"] == 0 and [item["type"] for item in asked["messages"][-1]["content"]] == [
        "image_url",
        "text",
    ]


def test_pages_go_to_the_web_model(server):
    desk = Desk(Endpoint(server), About("x"))
    assert list(desk.page("instruction", "A page.", None, [("q", "<p>")], Choices()))[-1] == "Hello"
    assert Server.asked[-1]["model"] == "web" and Server.asked[-1]["messages"][1]["content"] == "<p>"


def test_an_article_needs_the_write_model_and_begins_its_answers(server, monkeypatch):
    with pytest.raises(ValueError, match="offers no model 'write'"):
        finish(Composer(Endpoint(server)).write("Write."))
    monkeypatch.setattr(Server, "models", ["chat", "web", "write"])
    monkeypatch.setattr(Server, "words", ["<Seg", "1>"])
    composer = Composer(Endpoint(server))
    from xcomposer.article import Article

    article, _ = Article(title="T").with_text("one")
    article = finish(composer.places(article))
    assert [block.kind for block in article.blocks] == ["text", "picture"]
    asked = Server.asked[-1]
    assert asked["messages"][-1]["role"] == "assistant" and asked["continue_final_message"] is True


def test_what_a_server_cannot_do_is_said(server, tmp_path):
    desk = Desk(Endpoint(server), About("x"))
    with pytest.raises(ValueError, match="2 beams, but a server answers with one"):
        list(desk.answer([Turn("What?")], Choices(beams=2)))
    with pytest.raises(ValueError, match="is the server running"):
        Endpoint("http://127.0.0.1:9")
