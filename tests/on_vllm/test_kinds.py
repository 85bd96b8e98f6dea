"""Every kind of checkpoint on vLLM: chats with the tokens of `chat`, scores as `get_score`.

A new kind is a row of `tiny.OF_KIND`; whatever is there runs here.
"""

import pytest
import torch
from PIL import Image
from released import write_released
from running import FLAGS, SERVE, SIZES, TOKENS, content_of, noise, post, run_engine, serving
from transformers import AutoModel, AutoTokenizer
from transformers.generation import BaseStreamer

from xcomposer.checkpoints import tiny

pytest.importorskip("vllm", reason="runs in an environment of its own: make test-vllm")

REWARD = "xcomposer2d5-reward"
MARK = "<ImageHere>"
# The default kind has test_vllm.py. The small VL: other sizes, and rope that stretches.
SMALL_VL = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128}
CHATS = {
    **{kind: (kind, {}) for kind in tiny.OF_KIND if kind not in ("xcomposer2d5", REWARD)},
    "xcomposer2-vl-1.8b": ("xcomposer2-vl", {**SMALL_VL, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
}
BODIES = {
    "text": "What is a tile?",
    "one picture": f"{MARK}What is written on the sign?",
    "two pictures": f"First {MARK}, second {MARK}: compare them.",
}


class NewTokens(BaseStreamer):
    """Keeps the ids of an answer."""

    def __init__(self):
        self.steps = []

    def put(self, value):
        self.steps.append(value.flatten().tolist())

    def end(self):
        pass

    def ids(self):
        return [token for step in self.steps[1:] for token in step]  # the first is the prompt


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures")
    paths = [out / "wide.png", out / "tall.png"]
    for seed, (path, size) in enumerate(zip(paths, ((60, 90), (110, 40)), strict=True)):
        Image.fromarray(noise(seed, *size, 3)).save(path)
    return [str(path) for path in paths]


def load(folder):
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    return model


def chat(model, body, pictures):
    said = NewTokens()
    settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": TOKENS}
    model.chat(None, body, pictures[: body.count(MARK)] or None, streamer=said, **settings)
    return said.ids()


def messages_of(body, pictures):
    return [{"role": "user", "content": content_of(body, pictures, MARK)}]


@pytest.mark.parametrize("kind", CHATS)
def test_a_kind_chats_with_the_tokens_of_transformers(tmp_path, pictures, kind):
    release, sizes = CHATS[kind]
    folder = write_released(tmp_path / f"{release} v1.0", kind=release, config={**SIZES, **sizes}, fmt="bin")
    model = load(folder)
    assert model.config.kind == release
    expected = [chat(model, body, pictures) for body in BODIES.values()]
    for name, parameter in model.named_parameters():
        if ".Plora_B." in name:
            torch.nn.init.zeros_(parameter)
    plain = [chat(model, body, pictures) for body in BODIES.values()]
    assert [a == b for a, b in zip(plain, expected, strict=True)] == [True, False, False]  # partial LoRA tells
    requests = [{"messages": messages_of(body, pictures)} for body in BODIES.values()]
    job = run_engine(tmp_path, requests, model=str(folder), limit_mm_per_prompt={"image": 2, "video": 0})
    assert job["answers"] == [expected, expected]


TALKS = {
    name: [{"role": "user", "content": body}, {"role": "assistant", "content": "A square of pixels."}]
    for name, body in BODIES.items()
}


def test_scores_over_http(tmp_path, pictures):
    """`xcomposer serve` on a reward model: `/classify` and `/pooling` read conversations as `get_score` does."""
    folder = write_released(tmp_path / "reward v1.0", kind=REWARD, config=SIZES, fmt="bin")
    model = load(folder)
    images = [pictures[: body.count(MARK)] for body in BODIES.values()]
    expected = model.get_scores(list(TALKS.values()), images)
    assert len({round(score, 3) for score in expected}) == len(expected)
    with serving([*SERVE, str(folder), *FLAGS], tmp_path / "log.txt") as server:
        for body, talk, score in zip(BODIES.values(), TALKS.values(), expected, strict=True):
            messages = [*messages_of(body, pictures), talk[1]]
            for route, value in (
                ("classify", lambda data: data["probs"]),
                ("pooling", lambda data: data["data"]),
            ):
                status, reply = post(f"{server}/{route}", {"model": "score", "messages": messages})
                assert status == 200, reply
                assert value(reply["data"][0]) == pytest.approx([score], abs=1e-4), (route, body)
        status, reply = post(f"{server}/v1/chat/completions", {"model": "score", "messages": messages})
        assert 400 <= status < 500, reply
