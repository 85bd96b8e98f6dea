"""lmms-eval's command finds this package's model and gives the toy world the marks that `toyworld.evaluate` gives.

Runs where lmms-eval is installed (`make test-lmms`), and is skipped elsewhere.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPO

pytest.importorskip("lmms_eval", reason="runs in an environment of its own: make test-lmms")

from toyworld.evaluate import Way, evaluate  # noqa: E402

SCENES = 2  # of each task
MODES = ("base", "web", "write")


@pytest.mark.parametrize("mode", MODES)
def test_the_command_scores_what_evaluate_scores(tmp_path, mode):
    name = f"toyworld_{mode}"
    rows = [json.loads(line) for line in (REPO / "toyworld" / "lmms" / "tasks.jsonl").read_text("utf-8").splitlines()]
    tasks = [row["task"] for row in rows if row["mode"] == mode]
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "xcomposer2d5", "--model_args", "pretrained=demo,use_meta=False",
        "--include_path", "toyworld/lmms", "--tasks", name, "--batch_size", "8", "--limit", str(SCENES * len(tasks)),
        "--output_path", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPO, env=os.environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    [results] = tmp_path.rglob("*results.json")
    scored = json.loads(results.read_text("utf-8"))["results"][name]
    expected: dict[str, list[int]] = {}
    for task in tasks:
        for metric, (right, asked) in evaluate(REPO / "demo", Way(), task, SCENES, 0).items():
            pair = expected.setdefault(metric, [0, 0])
            pair[0], pair[1] = pair[0] + right, pair[1] + asked
    means = {f"{metric},none": right / asked for metric, (right, asked) in expected.items()}
    assert {metric: scored[metric] for metric in means} == pytest.approx(means)


def test_settings_of_a_task_reach_the_model():
    from lmms_eval.models import get_model

    model = get_model("xcomposer2d5")
    assert model.__module__ == "xcomposer.lmms_model"
    from xcomposer.lmms_model import cut, generation_settings, mark_images

    assert mark_images("What?", 1) == "What?"
    assert mark_images("What?", 2) == "Image1 <ImageHere>; Image2 <ImageHere>; What?"
    assert mark_images("<ImageHere> and <ImageHere>?", 2) == "<ImageHere> and <ImageHere>?"
    assert cut("yes\n\nno", ["\n\n"]) == "yes"
    assert cut("yes", []) == "yes"
    greedy = generation_settings({"max_new_tokens": 16, "temperature": 0, "do_sample": True, "num_beams": 3})
    assert (greedy["do_sample"], greedy["num_beams"], greedy["max_new_tokens"]) == (False, 3, 16)
    sampled = generation_settings({"temperature": 0.5, "do_sample": True})
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_p"]) == (True, 0.5, 1.0)
