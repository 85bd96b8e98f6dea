"""`make gpu` where there is no card: one clear line; its parts on the CPU at the tiny preset."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

import gpu  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("gpu: ")]) == 1
    assert "CUDA" in done.stderr and "--device cpu --preset tiny" in done.stderr


def options(**changes):
    fields = dict(preset="tiny", device="cpu", dtype="fp32", torch_dtype=torch.float32, rounds=1, budget=100)
    return SimpleNamespace(**(fields | changes))


def test_every_case_is_measured_beside_its_floor():
    run = gpu.Run(options())
    gpu.speed(run)
    assert len(run.rows) == 11
    for row in run.rows:
        packed_without_library = "nf4" in row["case"] and "ModuleNotFoundError" in row.get("error", "")
        assert packed_without_library or 0 < row["of_floor"], row
    lines = gpu.table(run.rows).splitlines()
    assert len(lines) == 2 + len(run.rows) and all(line.count("|") == 6 for line in lines)


def test_what_the_time_does_not_allow_is_named():
    run = gpu.Run(options(budget=-1))
    run.case("late", lambda: pytest.fail("measured"))
    assert "left out" in run.rows[0]


def test_a_golden_that_fails_is_told(monkeypatch, capsys):
    """The exit code and the reason: a card that gives other tokens must not look well."""
    broken = SimpleNamespace(returncode=1, stdout="E  assert [1] == [2]\n1 failed, 15 passed in 3s\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: broken)
    run = gpu.Run(options())
    assert gpu.goldens(run) is False
    assert run.rows[0]["result"] == "1 failed, 15 passed in 3s"
    assert "assert [1] == [2]" in capsys.readouterr().err
