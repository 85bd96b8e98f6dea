"""`pipeline("image-text-to-text")`: a chat, a list of chats, a batch, and a picture by its address."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import CLOSE, GOLDEN, MARK
from transformers import pipeline

WIDE, SMALL = "small_150x100.png", "small_56x56.png"
SETTINGS = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 8}}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """The golden pictures over HTTP on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=GOLDEN / "images")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return pipeline("image-text-to-text", model=str(tiny_checkpoint), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def answers(pipe):
    """What `chat` says about each picture."""
    ask = partial(pipe.model.chat, pipe.tokenizer, do_sample=False, max_new_tokens=8, repetition_penalty=1.0)
    return {name: ask(f"{MARK}Describe it", str(GOLDEN / "images" / name))[0] for name in (WIDE, SMALL)}


def chat(picture):
    return [{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": "Describe it"}]}]


def test_one_chat(pipe, answers):
    (record,) = pipe(text=chat(str(GOLDEN / "images" / WIDE)), return_full_text=False, **SETTINGS)
    assert record["generated_text"] == answers[WIDE]
    (record,) = pipe(text=chat(str(GOLDEN / "images" / WIDE)), **SETTINGS)
    assert record["generated_text"][-1] == {"role": "assistant", "content": answers[WIDE]}
    assert CLOSE not in answers[WIDE]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_list_of_chats(batch_size, pipe, answers):
    chats = [chat(str(GOLDEN / "images" / name)) for name in (WIDE, SMALL, WIDE)]
    records = pipe(text=chats, return_full_text=False, batch_size=batch_size, **SETTINGS)
    assert [record["generated_text"] for (record,) in records] == [answers[WIDE], answers[SMALL], answers[WIDE]]


def test_a_picture_by_its_address(pipe, answers, address):
    (record,) = pipe(text=chat(f"{address}/{WIDE}"), return_full_text=False, **SETTINGS)
    assert record["generated_text"] == answers[WIDE]
    with pytest.raises(ValueError, match="answered 404"):
        pipe(text=chat(f"{address}/none.png"), **SETTINGS)


def test_pictures_beside_texts(pipe, address):
    text = f"[UNUSED_TOKEN_146]user\n{MARK}Describe it{CLOSE}\n[UNUSED_TOKEN_146]assistant\n"
    (alone,) = pipe(images=f"{address}/{SMALL}", text=text, return_full_text=False, **SETTINGS)
    both = pipe(
        images=[f"{address}/{WIDE}", f"{address}/{SMALL}"], text=[text, text], return_full_text=False, **SETTINGS
    )
    assert both[1]["generated_text"] == alone["generated_text"]
