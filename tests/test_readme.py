"""The Python of both READMEs runs as printed, on the demo checkpoint."""

import re
from importlib.util import find_spec
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def test_every_python_block_runs(monkeypatch, capsys):
    """In one session, in the order they are printed, from the repo's root; nothing is left behind there."""
    monkeypatch.chdir(REPO)
    before = set(REPO.iterdir())
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 8
    names: dict = {}
    for block in blocks:
        optional = [name for name in ("bitsandbytes", "peft") if name in block.lower()]
        if any(find_spec(name) is None for name in optional):
            continue
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()  # the examples print answers
    assert names["history"][0][0] == "Tell me a story"
    assert len(names["answers"]) == 3
    assert set(REPO.iterdir()) == before


def test_the_chinese_one_too(monkeypatch, capsys):
    """Its first block asks in Chinese and is answered so."""
    monkeypatch.chdir(REPO)
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README_CN.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README_CN.md", "exec"), names)
    assert capsys.readouterr().out == "黄色\n"
    assert names["answer"] == "picture 1"
