"""Packed weights on vLLM's own 4-bit kernels give the tokens of their dequantised selves on transformers.

The demo in both released layouts and as `xcomposer quantise` writes it: its answers are sure, where those of random
weights would turn with each rounding. In bf16: vLLM's kernels for few bits take no float32.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO
from packing import packed_checkpoint
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from toyworld import scenes
from xcomposer.serving.adapter_cache import exported

pytest.importorskip("vllm", reason="runs in an environment of its own: make test-vllm")

HERE = Path(__file__).parent
TOKENS = 48
IMAGE = "[UNUSED_TOKEN_140]"
TASKS = ("next", "list", "read35", "html")
OPTIONS = {"dtype": "bfloat16", "max_num_seqs": 8, "gpu_memory_utilization": 0.05, "enforce_eager": True}
LORA = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 2, "lora_target_modules": ["linear"]}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
KERNELS = {"fp8": "ChannelWiseTorchFP8ScaledMMLinearKernel"}  # of the others: 4-bit weights, 16-bit activations


def requests(out):
    """A question of each task; pages are the web adapter's."""
    asked = []
    for task in TASKS:
        scene = scenes.scene(task, scenes.EVAL_SEEDS[0])
        files = [str(out / f"{task}{number}.png") for number in range(len(scene.images))]
        for image, file in zip(scene.images, files, strict=True):
            image.save(file)
        prompt = f"[UNUSED_TOKEN_146]user\n{IMAGE * len(files)}{scene.query}[UNUSED_TOKEN_145]\n"
        prompt += "[UNUSED_TOKEN_146]assistant\n"
        asked.append({"prompt": prompt, "images": files, "mode": scene.mode})
    return asked


def transformers_says(folder, asked):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    processor, said = AutoProcessor.from_pretrained(folder), []
    for request in asked:
        images = [Image.open(file) for file in request["images"]] or None
        inputs = processor(text=request["prompt"], images=images, return_tensors="pt")
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "repetition_penalty": 1.0}
        ids = model.generate(**inputs, infer_mode=request["mode"], **settings)
        said.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return said


@pytest.mark.parametrize("layout", ["GPTQ", "AWQ", "w4a16", "fp8"])
def test_the_tokens_of_the_dequantised(layout, tmp_path):
    """fp8 rounds activations too, and transformers computes that from the same files."""
    packed, plain = packed_checkpoint(REPO / "demo", tmp_path, layout, group=64, symmetric=layout == "GPTQ")
    asked = requests(tmp_path)
    due = transformers_says(packed if layout == "fp8" else plain, asked)
    web = str(exported(packed, "web"))
    for request in asked:
        request["lora"] = ["web", 1, web] if request.pop("mode") == "web" else None
    job, log = tmp_path / "job.json", tmp_path / "log.txt"
    options = {**OPTIONS, **LORA, "model": str(packed), "limit_mm_per_prompt": {"image": 1}}
    job.write_text(json.dumps({"options": options, "requests": asked, "tokens": TOKENS}), encoding="utf-8")
    with log.open("w") as out:
        ran = subprocess.run(
            [sys.executable, str(HERE / "engine.py"), str(job)],
            env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=subprocess.STDOUT, timeout=900,
        )  # fmt: skip
    said = log.read_text("utf-8")
    assert ran.returncode == 0, said[-6000:]
    assert KERNELS.get(layout, "Using CPUWNA16LinearKernel") in said
    assert json.loads(job.read_text("utf-8"))["answers"] == [due, due]


def test_a_format_that_vllm_cannot_run_is_refused_before_it_starts():
    from xcomposer.serving.vllm_server import check_quantisation

    check_quantisation(SimpleNamespace())
    check_quantisation(SimpleNamespace(quantization_config={"quant_method": "awq"}))
    with pytest.raises(ValueError, match="runs no 3bits weights: take --backend transformers, or quantise"):
        check_quantisation(SimpleNamespace(quantization_config={"quant_method": "3bits"}))
