"""A studio on the demo checkpoint in this process, and a browser that looks at it."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "demo"
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",  # a camera without a camera
]  # fmt: skip
WAIT_MS = 30_000  # for anything to appear, on a machine with other work


class Paced:
    """A model that can be made slow: `seconds` for each token; who is at one goes on at once when it is fast again."""

    def __init__(self, model):
        self.model, self.seconds, self.changed = model, 0.0, threading.Condition()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def slow(self, seconds):
        with self.changed:
            self.seconds = seconds
            self.changed.notify_all()

    def pace(self, ids, scores):
        with self.changed:
            self.changed.wait_for(lambda: not self.seconds, self.seconds)
        return scores

    def stream_chat(self, *args, **kwargs):
        return self.model.stream_chat(*args, logits_processor=[self.pace], **kwargs)

    def stream_webpage(self, *args, **kwargs):
        return self.model.stream_webpage(*args, logits_processor=[self.pace], **kwargs)

    def write_webpage(self, *args, **kwargs):
        return self.model.write_webpage(*args, logits_processor=[self.pace], **kwargs)


@pytest.fixture(scope="session")
def demo_model():
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the demo checkpoint has no weights here")
    from transformers import AutoModel, AutoTokenizer

    import xcomposer  # noqa: F401  registers the model

    model = AutoModel.from_pretrained(DEMO).eval()
    model.tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return model


@pytest.fixture(scope="session")
def paced(demo_model):
    return Paced(demo_model)


@pytest.fixture
def slow(paced):
    """Call it with the seconds that a token takes from now on."""
    yield paced.slow
    paced.slow(0.0)


@pytest.fixture(scope="session")
def workspaces():
    from xcomposer.studio.workspace import Workspaces

    made = Workspaces()
    yield made
    made.close_all()


@contextmanager
def opened(model, workspaces, *options):
    """A studio in this process; gives its address."""
    pytest.importorskip("gradio")
    from xcomposer.studio import app
    from xcomposer.studio.desk import About, Desk

    args = app.parse(["--port", "0", "--max_upload", "1", *options])
    studio = app.build(Desk(model, About.of_folder(DEMO)), workspaces, DEMO / "pictures", addresses=False)
    _, url, _ = app.launch(studio, args, prevent_thread_lock=True, quiet=True)
    try:
        yield url
    finally:
        studio.close(verbose=False)


@pytest.fixture(scope="session")
def address(paced, workspaces):
    with opened(paced, workspaces) as url:
        yield url


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The address of `xcomposer serve` on the demo checkpoint, in a process of its own."""
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the demo checkpoint has no weights here")
    for needed in ("starlette", "uvicorn", "openai"):
        pytest.importorskip(needed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "xcomposer", "serve", str(DEMO), "--backend", "transformers", "--port", str(port)]
    with open(log, "w") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=REPO) as server:
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield url
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no browser: install Debian's chromium, or set CHROMIUM to one")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, address):
    """Opens the studio as a new visitor; gives the page."""
    from playwright.sync_api import expect

    expect.set_options(timeout=WAIT_MS)
    contexts = []

    def visited(url=address, signed_in=True, **options):
        usual = {"viewport": {"width": 1440, "height": 900}, "locale": "en-GB", "accept_downloads": True}
        context = browser.new_context(**{**usual, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(url)
        if not signed_in:
            return page
        expect(page.get_by_role("tab").first).to_be_visible()
        page.wait_for_function("sessionStorage.getItem('xcomposer')")  # its workspace is there
        return page

    yield visited
    for context in contexts:
        context.close()
