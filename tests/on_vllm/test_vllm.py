"""vLLM gives the tokens that transformers gives: each input, each way of running, each adapter, and over HTTP.

Runs where vLLM is installed (`make test-vllm`), and is skipped elsewhere. (The folder must not be called `vllm`: beside
`tests/`, that would be a package of this name to whoever looks for one.)
"""

import json
import urllib.request
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
import torch
from conftest import CLOSE, REPO
from PIL import Image
from released import write_released
from running import (
    FLAGS,
    IMAGE,
    LENGTH,
    PLAIN,
    SERVE,
    SIZES,
    TOKENS,
    VIDEO,
    ask,
    content_of,
    data_url,
    image_item,
    noise,
    prompt_of,
    run_engine,
    serving,
)
from transformers import AutoModelForImageTextToText, AutoProcessor

from xcomposer.checkpoints.merge import merge
from xcomposer.serving.adapter_cache import exported

pytest.importorskip("vllm", reason="runs in an environment of its own: make test-vllm")
openai = pytest.importorskip("openai")  # vLLM brings it

CLIP = REPO / "examples" / "data" / "rolling_ball.mp4"
BODIES = {
    "text": "Describe this image in detail.",
    "image": f"{IMAGE}What is written on the sign?",
    "panorama": f"What is on the left of {IMAGE}?",
    "two images": f"First {IMAGE}, second {IMAGE}: compare them.",
    "video": f"{VIDEO}What happens?",
}
MODES = ("base", "web", "write")
TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def released(out, length):
    """A folder as it is downloaded: old code that raises, and `</s>` as its only stop."""
    folder = write_released(out, config={**SIZES, "max_position_embeddings": length})
    stops = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(stops), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return released(tmp_path_factory.mktemp("vllm") / "IXC-2.5 served v1.0", LENGTH)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """For each body, its picture files and the file of its video's frames."""
    out = tmp_path_factory.mktemp("media")
    sizes = {"wide": (120, 200), "tall": (160, 90), "panorama": (1340, 56)}
    for seed, (name, size) in enumerate(sizes.items()):
        Image.fromarray(noise(seed, *size, 3)).save(out / f"{name}.png")
    np.save(out / "video.npy", noise(9, 5, 48, 80, 3))
    images = {"image": ["wide"], "panorama": ["panorama"], "two images": ["wide", "tall"]}
    return {
        body: {
            "images": [str(out / f"{name}.png") for name in images.get(body, ())],
            "video": str(out / "video.npy") if body == "video" else None,
        }
        for body in BODIES
    }


class Transformers:
    """What transformers makes of a folder."""

    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, body, images=None, videos=None):
        return self.processor(text=prompt_of(body), images=images, videos=videos, return_tensors="pt")

    def answer(self, inputs, mode="base"):
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "repetition_penalty": 1.0}
        ids = self.model.generate(**inputs, infer_mode=mode, **settings)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def all_inputs(self, media):
        """The inputs of every body."""
        inputs = {}
        for name, body in BODIES.items():
            videos = [np.load(media[name]["video"])] if media[name]["video"] else None
            inputs[name] = self.inputs(body, media[name]["images"] or None, videos)
        return inputs


@pytest.fixture(scope="module")
def transformers_says(checkpoint, media):
    """(mode, body) -> the tokens transformers generates; ("base", "clip"), of a video file, too."""
    transformers = Transformers(checkpoint)
    asked = transformers.all_inputs(media)
    said = {(mode, name): transformers.answer(inputs, mode) for name, inputs in asked.items() for mode in MODES}
    said["base", "clip"] = transformers.answer(transformers.inputs(BODIES["video"], videos=[str(CLIP)]))
    for name, parameter in transformers.model.named_parameters():
        if ".Plora_B." in name:
            torch.nn.init.zeros_(parameter)
    for name, inputs in asked.items():  # the cases tell whether partial LoRA runs
        assert (transformers.answer(inputs) == said["base", name]) == (name == "text")
    return said


def generate(tmp_path, media, model, loras=(None,), environment=None, **options):
    """What one engine answers to every body with every adapter: two rounds of token ids; its adapters, its log."""
    requests = [
        {"prompt": prompt_of(body), **media[name], "lora": lora} for lora in loras for name, body in BODIES.items()
    ]
    options = {"model": str(model), "limit_mm_per_prompt": {"image": 2, "video": 1}, **options}
    return run_engine(tmp_path, requests, environment, **options)


def expected(transformers_says, *modes):
    answers = [transformers_says[mode, name] for mode in modes for name in BODIES]
    return [answers, answers]


def test_beyond_max_position_embeddings_in_chunks(tmp_path, checkpoint, media, transformers_says):
    """A text that crosses the limit while it is answered, pictures that begin beyond it; cut every 16 tokens."""
    ids = Transformers(checkpoint).inputs(BODIES["text"])["input_ids"]
    limit = ids.shape[1] + TOKENS // 2
    folder = released(tmp_path / "short", limit)
    transformers = Transformers(folder)
    answers = [transformers.answer(inputs) for inputs in transformers.all_inputs(media).values()]
    assert all(new != transformers_says["base", name] for name, new in zip(BODIES, answers, strict=True))
    job = generate(tmp_path, media, folder, max_model_len=LENGTH, max_num_batched_tokens=16)
    assert job["answers"] == [answers, answers]
    assert f"Prefix caching is off: beyond max_position_embeddings ({limit})" in job["log"]


def test_adapters_side_by_side_on_two_tensor_parallel_processes(tmp_path, checkpoint, media, transformers_says):
    """Chat, web and write in one batch; the checkpoint's own adapters are not loaded."""
    loras = [None, *([task, number, str(exported(checkpoint, task))] for number, task in enumerate(MODES[1:], start=1))]
    lora_options = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 3, "lora_target_modules": ["linear"]}
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 64, **lora_options}
    job = generate(tmp_path, media, checkpoint, loras, TWO_PROCESSES, **options)
    assert job["answers"] == expected(transformers_says, *MODES)
    assert job["adapters"] == []


def test_merged_write_compiled_on_two_stages(tmp_path, checkpoint, media, transformers_says):
    """(vLLM's CPU build runs stages only where it compiles.)"""
    merged = merge(checkpoint, tmp_path / "write", "write", progress=False)
    options = {"pipeline_parallel_size": 2, "enforce_eager": False, "max_model_len": LENGTH}
    job = generate(tmp_path, media, merged, environment=TWO_PROCESSES, **options)
    assert job["answers"] == expected(transformers_says, "write")
    assert "Prefix caching is off" not in job["log"]


# ------------------------------------------------------------------------------------------------------------ over HTTP


def test_http_plain_vllm(tmp_path, checkpoint, media, transformers_says):
    """`vllm serve FOLDER` on a released folder: no remote code, no overrides, no option of ours."""
    with serving([*PLAIN, str(checkpoint), *FLAGS], tmp_path / "log.txt") as server:
        client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
        (model,) = (model.id for model in client.models.list().data)
        assert model == str(checkpoint)
        for name in (name for name in BODIES if name != "video"):
            content = content_of(BODIES[name], media[name]["images"])
            assert ask(server, content, model) == (200, transformers_says["base", name])
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=TOKENS
            )
            assert reply.usage.completion_tokens == TOKENS and reply.choices[0].message.content
        video = {"type": "video_url", "video_url": {"url": data_url(CLIP.read_bytes(), "video/mp4")}}
        question = {"type": "text", "text": "What happens?"}
        assert ask(server, [video, question], model) == (200, transformers_says["base", "clip"])
        end = AutoProcessor.from_pretrained(checkpoint).tokenizer.convert_tokens_to_ids(CLOSE)
        assert ask(server, "Hello", model, logit_bias={str(end): 100}) == (200, [end])


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """Address of `xcomposer serve`, which offers the checkpoint's task adapters."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving([*SERVE, str(checkpoint), *FLAGS, "--trust-request-mm-kwargs"], log) as address:
        yield address


def test_http_chat_web_and_write_from_one_server(server, checkpoint, media, transformers_says):
    with urllib.request.urlopen(f"{server}/v1/models", timeout=60) as reply:
        offered = {model["id"] for model in json.load(reply)["data"]}
    assert offered == {"chat", "web", "write", str(checkpoint)}
    for name in ("text", "two images"):
        content = content_of(BODIES[name], media[name]["images"])
        for mode in MODES:
            assert ask(server, content, "chat" if mode == "base" else mode) == (200, transformers_says[mode, name])


def test_http_refuses_and_lives_on(server, media, transformers_says):
    whole = Path(media["image"]["images"][0]).read_bytes()
    text = {"type": "text", "text": "What is it?"}
    for broken in (data_url(b"no picture", "image/png"), data_url(whole[:500], "image/png"), "data:image/png;base64,@"):
        status, message = ask(server, [{"type": "image_url", "image_url": {"url": broken}}, text])
        assert 400 <= status < 500, message
    video = {"type": "video_url", "video_url": {"url": data_url(b"no video", "video/mp4")}}
    status, message = ask(server, [video, text])
    assert 400 <= status < 500, message
    status, message = ask(server, [image_item(media["image"]["images"][0]), text], mm_processor_kwargs={"hd_num": 0})
    assert 400 <= status < 500 and "hd_num" in message
    status, message = ask(server, "word " * 6 * LENGTH)
    assert status == 400 and str(2 * LENGTH) in message  # vLLM's own limit: as far as the factor of the rope says
    assert ask(server, text["text"], model=quote("no such model"))[0] == 404
    content = content_of(BODIES["image"], media["image"]["images"])
    assert ask(server, content) == (200, transformers_says["base", "image"])


# ------------------------------------------------------------------------------------------------------------- plug-in


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([1, 5, 90, 6], [1, 5, 90, 1, 6]),
        ([1, 90, 91, 6, 90], [1, 90, 91, 1, 6, 90]),
        ([90, 1, 6], [90, 1, 6]),
        ([1, 5], [1, 5]),
        ([], []),
    ],
)
def test_bos_of_the_older_kinds(ids, expected):
    from xcomposer.serving.vllm_model import begin_pieces

    assert begin_pieces(ids, (90, 91), 1) == expected


@pytest.mark.parametrize(
    "ids, media, wanted, expected",
    [
        ([1, 5], {}, 2, [1, 1, 5]),
        ([1, 1, 5], {}, 2, [1, 1, 5]),
        ([1, 5], {"image": [object()]}, 2, [1, 5]),
        ([1, 5], {"image": []}, 2, [1, 1, 5]),
        ([5, 1], {}, 2, [5, 1]),
        ([1, 5], {}, 1, [1, 5]),
        ([1], {}, 2, [1, 1]),
    ],
)
def test_bos_of_texts_without_pictures(ids, media, wanted, expected):
    from xcomposer.serving.plugin import begin_text

    config = SimpleNamespace(hf_config=SimpleNamespace(text_only_bos=wanted))
    renderer = SimpleNamespace(model_config=config, get_bos_token_id=lambda: 1)
    prompt = {"prompt": "x", "multi_modal_data": media}
    tokens = begin_text(renderer, lambda *_: {**prompt, "prompt_token_ids": ids}, prompt, None)
    assert tokens == {**prompt, "prompt_token_ids": expected}


def test_the_plug_in_may_be_called_again_and_leaves_other_models_alone():
    from vllm import ModelRegistry

    from xcomposer.serving import plugin

    plugin.register()

    def extended():
        return [getattr(resolve_name(place), name) for place, names in plugin.METHODS.items() for name in names]

    methods = extended()
    plugin.register()
    assert methods == extended() and all(not hasattr(method.__wrapped__, "__wrapped__") for method in methods)
    assert set(plugin.MODEL_CLASSES) <= set(ModelRegistry.get_supported_archs())
    seen = []

    class Config:
        hf_config = SimpleNamespace(model_type="llama")

        def library(self, length):
            seen.append(length)
            return length

    plugin.extend(Config, "library", lambda *_: pytest.fail("ours was asked about another family's model"))
    assert Config().library(7) == 7 and seen == [7]
