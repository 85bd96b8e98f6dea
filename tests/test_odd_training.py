# ruff: noqa: E501 - tables
"""Odd training lists and numbers of a run: each is read, or refused in words that name it."""

import json

import pytest
from odd_cases import assert_held

from xcomposer.finetune.formats import BadRow, read_rows
from xcomposer.finetune.run import Settings


def rows_of_odd_files(folder):
    good = {"query": "q", "response": "r"}
    (folder / "good.json").write_text(json.dumps([good] * 3))
    texts = {
        "empty.json": "", "brackets.json": "[" * 100_000, "cut.json": '[{"query": "q"', "number.json": "[" + "9" * 10_000 + "]", "null.json": "null", "list.json": "[]",
        "words.json": "hello", "lines.jsonl": '{"query": "q", "response": "r"}\n{"query"', "nan.json": '[NaN, {"query": "q", "response": "r"}]',
    }  # fmt: skip
    texts |= {
        f"count{i}.txt": f"good.json {count}"
        for i, count in enumerate(("1e18", "inf", "nan", "-1", "0", "1e-9", "0.002", "x", "1e308", "0x10", "9" * 400))
    }
    texts |= {
        "self.txt": "self.txt",
        "other.txt": "self.txt 1",
        "missing.txt": "no.json 1",
        "nothing.txt": "\n# x\n",
        "nul.txt": "a\0b 1",
        "folder.txt": ". 1",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        yield folder / name
    (folder / "bytes.json").write_bytes(b"\xff\xfe\0x")
    yield from (folder / "bytes.json", folder, folder / "no.json", folder / "good.json")
    odd = (None, 1, "x", [], {}, True, "x" * 10**5, [[]], [None], {"a": 1}, -1, 2.5, 10**18)
    for key in ("query", "response", "history", "system", "hd_num", "image", "images", "video"):
        for number, value in enumerate(odd):
            (folder / f"{key}{number}.json").write_text(json.dumps([{**good, key: value}]))
            yield folder / f"{key}{number}.json"
    for key in ("conversations", "messages"):
        for number, value in enumerate(
            (*odd, [{"from": value} for value in odd], *([{"role": value, "content": "x"}] for value in odd))
        ):
            (folder / f"{key}{number}.json").write_text(json.dumps([{key: value}]))
            yield folder / f"{key}{number}.json"


def test_odd_training_lists(tmp_path):
    def read(path):
        bad = [row.reason for row in read_rows(path) if isinstance(row, BadRow)]
        assert all(0 < len(reason) < 1000 for reason in bad), bad

    cases = [
        (path.name, lambda path=path: read(path), (path.name, "row", "good.json", "no.json", str(tmp_path)))
        for path in rows_of_odd_files(tmp_path)
    ]
    assert len(cases) > 150
    assert_held(cases)


@pytest.mark.parametrize("name", ["hd_num", "num_frm", "max_length", "lora_rank", "lora_alpha", "task_rank"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", float("nan")])
def test_numbers_of_a_run_are_checked_where_they_are_read(name, value):
    with pytest.raises(ValueError, match=f"--{name} is"):
        Settings(model="m", data="d", **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1, 5, float("nan")])
def test_dropout_of_a_run(value):
    with pytest.raises(ValueError, match="--lora_dropout is"):
        Settings(model="m", data="d", lora_dropout=value)
