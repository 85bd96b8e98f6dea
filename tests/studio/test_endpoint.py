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
    """Two models; says the words that the test lays out, one a chunk. Has room for so many tokens."""

    models, words, asked, room = ["chat", "web"], ["Hel", "lo"], [], 10**6

    def log_message(self, *_):
        pass

    def do_GET(self):
        data = [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in self.models]
        self._send("application/json", json.dumps({"object": "list", "data": data}))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(asked)
        if asked.get("max_tokens", 0) > self.room:
            error = {"message": f"max_tokens is {asked['max_tokens']}; {self.room} would fit", "code": 400}
            return self._send("application/json", json.dumps({"error": error}), 400)
        chunks = [
            {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": asked["model"],
             "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
            for word in self.words
        ]  # fmt: skip
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self._send("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

    def _send(self, kind, text, status=200):
        self.send_response(status)
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


def test_one_picture_stands_in_the_first_turn(server, tmp_path):
    desk = Desk(Endpoint(server), About("x"))
    list(desk.answer([Turn("What?", [picture(tmp_path)], "A star."), Turn("Where?")], Choices()))
    _, first, _, last = Server.asked[-1]["messages"]
    assert [item["type"] for item in first["content"]] == ["image_url", "text"]
    assert [item["type"] for item in last["content"]] == ["text"]


def test_what_is_not_chosen_is_the_servers_own(server):
    """The page's penalty of 3 is of written tokens; another server's may be of the prompt's, too."""
    desk = Desk(Endpoint(server), About("x"))
    list(desk.page("instruction", "A page.", None, [], Choices()))
    assert not {"temperature", "top_p", "repetition_penalty", "seed"} & set(Server.asked[-1])
    list(desk.page("instruction", "A page.", None, [], Choices(penalty=1.5, temperature=0.5)))
    assert (Server.asked[-1]["repetition_penalty"], Server.asked[-1]["temperature"]) == (1.5, 0.5)


def test_more_tokens_than_there_is_room_for_are_as_many_as_there_is(server, monkeypatch):
    monkeypatch.setattr(Server, "room", 4000)
    desk = Desk(Endpoint(server), About("x"))
    assert list(desk.page("instruction", "A page.", None, [], Choices()))[-1] == "Hello"
    assert [asked.get("max_tokens") for asked in Server.asked] == [4800, None]


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
