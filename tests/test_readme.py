"""The README's Python runs as printed, on the demo checkpoint."""

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
