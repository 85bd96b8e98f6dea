"""The toy world's tasks for lmms-eval name every task, and ask what `evaluate` asks."""

import importlib.util
import json
import re

import pytest
from conftest import REPO

from toyworld.evaluate import checks
from toyworld.scenes import EVAL_SEEDS, TASKS, scene
from xcomposer.model.prompting_internlm_xcomposer2 import chat_prompt

FOLDER = REPO / "toyworld" / "lmms"
ROWS = [json.loads(line) for line in (FOLDER / "tasks.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def utils():
    pytest.importorskip("datasets")
    spec = importlib.util.spec_from_file_location("toyworld_lmms_utils", FOLDER / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_task_is_there_once_in_its_mode():
    """But for the steps of an article, whose answers begin with words of ours: lmms-eval hands over one text."""
    assert [row["task"] for row in ROWS] == [task for task in TASKS if not scene(task, EVAL_SEEDS[0]).begun]
    assert all(row["mode"] == scene(row["task"], EVAL_SEEDS[0]).mode for row in ROWS)


@pytest.mark.parametrize("mode", ["base", "web", "write"])
def test_each_file_lists_its_metrics(mode):
    text = (FOLDER / f"toyworld_{mode}.yaml").read_text("utf-8")
    expected = ["right", *(row["task"] for row in ROWS if row["mode"] == mode)]
    for row in ROWS:
        if row["mode"] == mode:
            scored = checks(row["task"], scene(row["task"], EVAL_SEEDS[0]).answer, "")
            expected += [name for name in scored if name not in expected]
    assert re.findall(r"metric: ([^,]+),", text) == expected
    assert f"infer_mode: {mode}" in text and f"utils.{mode}_documents" in text


@pytest.mark.parametrize("task", ["colour", "follow", "which", "video", "html"])
def test_a_document_is_the_scene(utils, task):
    document = {"task": task, "number": 3}
    asked = scene(task, EVAL_SEEDS[3])
    assert chat_prompt(utils.question(document)) == chat_prompt(asked.query, asked.history)
    assert len(utils.visuals(document)) == len(asked.images)
    assert utils.score(document, [asked.answer])[task] is True
    assert utils.score(document, [asked.answer + "."])["right"] is False
