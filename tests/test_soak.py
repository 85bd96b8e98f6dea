"""Random conversations in turns, as `benchmarks/soak.py` has them by the hundred."""

import sys

import pytest
from conftest import GOLDEN, REPO, load

sys.path.insert(0, str(REPO / "benchmarks"))

import soak  # noqa: E402


@pytest.mark.parametrize("seed", [1, 2])
def test_random_conversations_equal_recomputation(tiny_checkpoint, tiny_tokenizer, seed):
    model = load(tiny_checkpoint)
    model.tokenizer = tiny_tokenizer
    model.reuse.prefix_bytes, model.reuse.picture_bytes = 1 << 19, 1 << 17
    sources = [str(path) for path in sorted((GOLDEN / "images").glob("small_*.png"))]
    sources.append(str(GOLDEN / "videos" / "clip_90f_30fps_320x240.mp4"))
    result = soak.soak(model, 10, seed, turns=4, sources=sources)
    assert result["different"] == []
    assert sum(result["calls"].values()) >= 15
    first, last = result["held"][len(result["held"]) // 2], result["held"][-1]
    assert last["files"] <= first["files"] and last["threads"] <= first["threads"] + 1
    assert model.reuse.nbytes() <= (1 << 19) + (1 << 17)
