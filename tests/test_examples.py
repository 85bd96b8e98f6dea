"""The examples as they are printed, on the demo checkpoint; composing and the browser's desk on a tiny one."""

import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

REPO = Path(__file__).resolve().parents[1]
EXAMPLES = REPO / "examples"
DATA = EXAMPLES / "data"
sys.path.insert(0, str(EXAMPLES))


from xcomposer.checkpoints import tiny  # noqa: E402
from xcomposer.studio import app  # noqa: E402

SHAPES, HOUSE, CLIP = (str(DATA / name) for name in ("shapes.png", "house.png", "rolling_ball.mp4"))
MARK = "<ImageHere>"

# What each script must print on the demo checkpoint, and the files it leaves.
SAYS = {
    "chat": (["yellow", "bottom middle"], []),
    "multi_image": (["picture 1", "picture 2"], []),
    "video": ([], []),
    "high_resolution": (["image tokens): 388"], []),
    "webpages": (
        ["page.html: ", "resume.html: ", "screenshot.html: "],
        ["page.html", "resume.html", "screenshot.html"],
    ),
    "article": ([], []),
    "compose_article": (["article.html"], ["article.html"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("examples") / "IXC-2.5 tiny v1.0")


@pytest.fixture(scope="module")
def model(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model


@pytest.fixture(scope="module")
def answer(model):
    """The greedy answer, straight from `chat`."""

    def answer(query, images=(), history=(), **kwargs):
        settings = dict(do_sample=False, max_new_tokens=12, use_meta=True) | kwargs
        return model.chat(model.tokenizer, query, list(images), history=list(history), **settings)[0]

    return answer


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SAYS)
def test_an_example_says_what_it_should(name, here, monkeypatch, capsys):
    """From a folder that holds links to the clone's, so that what is written is seen."""
    for link in ("demo", "examples"):
        (here / link).symlink_to(REPO / link)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown, wanted = capsys.readouterr().out, SAYS[name]
    assert shown.strip() and all(words in shown for words in wanted[0])
    assert sorted(path.name for path in here.iterdir() if not path.is_symlink()) == wanted[1]


def test_the_examples_are_short():
    """One idea each; a longer one belongs in the package."""
    longest = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {name for name, lines in longest.items() if lines > 40} <= {"sft_trl.py"}


# The demo in a browser: what stands behind its tabs.


def said(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def sent(path):
    return {"type": "file", "file": {"path": path, "mime_type": "image/png"}, "alt_text": None}


def test_messages_become_turns():
    messages = [
        said("user", sent("a.png"), sent("b.mp4"), "And these?"),
        said("assistant", f"Two{MARK}."),
        said("user", sent("broken.png"), "What?"),
        said("assistant", f"{app.FAILED}broken.png is broken"),
        said("user", sent("stopped.png"), "stopped before the first word"),
        {"role": "user", "content": f"Why {MARK}?"},
        {"role": "assistant", "content": "So."},
    ]
    turns = [(f"{MARK}{MARK}And these?", "Two."), ("Why ?", "So.")]
    assert app.read_messages(messages) == (turns, ["a.png", "b.mp4"])
    assert app.read_messages([]) == ([], [])


def test_the_chat_tab_answers_as_chat_does(model, answer):
    desk = app.Desk(model, 12)
    *_, first = desk.chat({"text": "What?", "files": [SHAPES]}, [], greedy=True)
    assert first == answer("What?", [SHAPES])
    messages = [said("user", sent(SHAPES), "What?"), said("assistant", first)]
    steps = list(desk.chat({"text": "Or?", "files": [HOUSE]}, messages, hd_num=2, greedy=True))
    history = [(f"{MARK}What?", first)]
    assert steps[-1] == answer(f"{MARK}Or?", [SHAPES, HOUSE], history, hd_num=2) and len(steps) > 2


def test_the_tabs_show_errors(model, here):
    desk = app.Desk(model, 8)
    (shown,) = desk.chat({"text": "What?", "files": ["nothing.png"]}, [])
    assert shown.startswith(app.FAILED) and "nothing.png" in shown
    for kind in app.KINDS[1:]:
        page, shown = desk.webpage(kind, "", None, 8, 1)
        assert page == "" and "needs the file" in shown
    assert not app.BUSY.locked()


def test_the_other_tabs_write(model, here):
    desk = app.Desk(model, 8)
    for kind, file in zip(app.KINDS, (None, str(DATA / "resume.md"), SHAPES), strict=True):
        page, shown = desk.webpage(kind, "A page", file, 8, 1)
        assert page and not shown.startswith(app.FAILED)
    *_, text = desk.article("Write.", [SHAPES, HOUSE], 8)
    assert text and not text.startswith(app.FAILED)
    assert not list(here.iterdir())


def test_a_page_cannot_leave_its_frame():
    shown = app.preview('</iframe><script>alert("x")</script>')
    assert shown.count("<") == 2 and 'sandbox="allow-scripts"' in shown and shown.count('"') == 8


def test_the_demo_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="pip install"):
        app.main([])
