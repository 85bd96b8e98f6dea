"""Clients side by side on `xcomposer serve`: right answers, a queue, those that leave, and nothing that grows."""

import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import MARK

from .running import LONG, PICTURES, SHAPES, TEXT, chat, data_url, picture_item, user


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
