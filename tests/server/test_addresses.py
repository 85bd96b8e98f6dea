"""Which addresses and files `xcomposer serve` opens for clients, and the options it is started with."""

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
from PIL import Image
from released import write_released

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("starlette")

from xcomposer.serving import sources  # noqa: E402
from xcomposer.serving.serve import OPTIONS, name_of, parser, vllm_options  # noqa: E402

from .running import DEMO, PICTURES, SHAPES, TEXT, Server, picture_item, user  # noqa: E402


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
        deadline = time.monotonic() + 300
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
        assert process.wait(120) in (0, 130)
    finally:
        process.kill()
        process.wait()
        log.close()
