"""`benchmarks/quantisation.py`: its roundings, its figures, its tables."""

import importlib.util
import sys

import pytest
import torch
from conftest import REPO


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("quantisation_bench", REPO / "benchmarks" / "quantisation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quantisation_bench"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quantisation_bench"]


def test_fewer_bits_err_more(bench):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    methods = ["int8", "fp8", "w4a16-rtn"]
    if importlib.util.find_spec("bitsandbytes") is not None:
        methods.insert(2, "nf4")
    sizes = [float((bench.ROUNDINGS[method](weight) - weight).norm() / weight.norm()) for method in methods]
    assert 0 < sizes[0] and sizes == sorted(sizes) and sizes[-1] < 0.2


def test_figures_of_predictions(bench):
    full = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
    same = bench.errors(full, full)
    assert same["kl"] == pytest.approx(0) and same["same_choice"] == 1 and same["error"] == 0
    other = bench.errors(full.flip(1), full)
    assert other["kl"] > 0.5 and other["same_choice"] == 0


def test_rows_are_of_all_kinds_and_answers_are_counted(bench):
    from transformers import AutoTokenizer

    folder = REPO / "demo"
    model, tokenizer = bench.load(folder), AutoTokenizer.from_pretrained(folder)
    rows = bench.fresh_rows(model, tokenizer, 3)
    logits = bench.predictions(model, rows)
    assert logits.shape == (sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows), model.config.vocab_size)
    assert bench.right_answers(model, tokenizer, "shape", 4) > 0.5


def test_tables(bench):
    found = {"kl": 0.0, "same_choice": 1.0, "error": 0.0, "right": {"count": 0.5}, "mean_right": 0.5}
    answers = {"weights_sha256": "0" * 64, "scenes_a_task": 2, "methods": {"full": found}}
    assert "| full | 0.00000 | 100.00 | 0.0000 | 50.0 | 50 |" in bench.answers_table(answers)
    peak = {"anonymous": 1, "resident": 2, "seconds": 3}
    linears = {"model.language_model.layers.0.attention.wo.linear": {"w4a16": 0.1}}
    table = bench.sizes_table({"linears": linears, "memory_mib": {2: peak}})
    assert "| layers.0.attention.wo | 0.1000 |" in table and "| 2 | 1 | 2 | 3 |" in table


def test_memory_of_a_command_is_watched(bench):
    code = "import time; held = bytearray(200 << 20); time.sleep(2)"
    assert bench.watch([sys.executable, "-c", code])["anonymous"] > 190
    with pytest.raises(RuntimeError, match="no such thing"):
        bench.watch([sys.executable, "-c", "raise SystemExit('no such thing')"])
