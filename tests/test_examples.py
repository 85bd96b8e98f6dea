"""The examples as they are printed, on the demo checkpoint."""

import runpy
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
EXAMPLES = REPO / "examples"
sys.path.insert(0, str(EXAMPLES))

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
    "best_of_n": (["orange cross"], []),
    "compose_article": (["article.html"], ["article.html"]),
}


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
