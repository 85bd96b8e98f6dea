"""What quantisation costs in accuracy and saves in memory, on your checkpoint and your prompt.

    python -m xcomposer.checkpoints.quantisation_error MODEL --text "What is in the picture?" --image photo.jpg
    python -m xcomposer.checkpoints.quantisation_error MODEL --methods nf4 int8 --steps 64 --infer-mode web

Full precision answers greedily; each method then reads prompt and answer in one pass, and its logits where the answer
is predicted are compared with those of full precision. Weights come through `from_pretrained`, one model at a time. The
last line is JSON. Columns:

    weights    bytes of parameters and buffers as they lie in memory
    prefill    peak bytes that reading the prompt allocates beside the weights
    kept       bytes still allocated afterwards (a method that keeps dequantised weights would show here)
    mean, max  absolute logit error; std is the spread of the logits themselves
    KL         mean over steps of KL(full || method), in nats
    top-1      steps where both would choose the same token
"""

import argparse
import gc
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from xcomposer.model.ixc_utils import load_media, stack_tiles
from xcomposer.model.prompting_internlm_xcomposer2 import (
    IMAGE_MARK,
    chat_prompt,
    place_images,
    tokenize_prompt,
    tokenize_with,
)

DTYPES = ("bfloat16", "float16", "float32")


def _bitsandbytes(**fields: Any) -> Callable[[torch.dtype, str], Any]:
    def config(dtype: torch.dtype, device: str) -> BitsAndBytesConfig:
        extra = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in fields else {}
        return BitsAndBytesConfig(**fields, **extra)

    return config


def _torchao_int8(dtype: torch.dtype, device: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))


def _torchao_int4(dtype: torch.dtype, device: str) -> Any:
    """Packed in tiles for a GPU's int4 kernel; elsewhere the same values, a byte each: right errors, larger weights."""
    from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if device == "cuda":
        kind = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        kind = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    return transformers.TorchAoConfig(kind)


GROUP = 64  # weights that share a scale in torchao's int4; bitsandbytes takes 64 too
# Name -> quantisation config for a compute dtype and a device.
METHODS: dict[str, Callable[[torch.dtype, str], Any]] = {
    "nf4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": _bitsandbytes(load_in_8bit=True),
    "ao-int8": _torchao_int8,
    "ao-int4": _torchao_int4,
}
PACKAGE_OF = {"nf4": "bitsandbytes", "nf4-double": "bitsandbytes", "int8": "bitsandbytes"}  # the others: torchao


def quantisation_config(method: str, dtype: torch.dtype, device: str) -> Any:
    """The config that `from_pretrained` takes.

    Raises:
        ValueError: no such method. ImportError: its package is not installed; names it.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use some of {', '.join(METHODS)}")
    package = PACKAGE_OF.get(method, "torchao")
    try:
        __import__(package)
    except ImportError as error:
        raise ImportError(
            f"method {method!r} needs {package}, which is not installed: pip install {package}"
        ) from error
    return METHODS[method](dtype, device)


def build_inputs(
    config: Any, tokenizer: Any, text: str, images: Sequence[str], hd_num: int | None
) -> dict[str, Tensor]:
    """Model inputs of one user turn: ids (1, T) and, with pictures, tiles and grids.

    Raises:
        ValueError: a picture that cannot be read, or marks in the text that differ from the pictures in number.
    """
    if IMAGE_MARK not in text:
        text = IMAGE_MARK * len(images) + text
    hd_num = hd_num or config.layout.default_hd_num(len(images))
    pixels = [config.layout.pixels(load_media(image), hd_num) for image in images]
    inputs: dict[str, Tensor] = {}
    lengths: list[int] = []
    if pixels:
        inputs["pixel_values"], inputs["image_grid_thw"] = stack_tiles(pixels, config.tile)
        grids = inputs["image_grid_thw"].tolist()
        lengths = [config.layout.tokens(rows, cols) for _, rows, cols in grids]
    pieces = place_images(chat_prompt(text), len(images))
    placeholders = [config.image_token_id] * len(images)
    prompt = tokenize_prompt(
        pieces,
        lengths,
        placeholders,
        tokenize_with(tokenizer),
        bos_on_each_piece=config.bos_on_each_piece,
        text_only_bos=config.text_only_bos,
    )
    return {"input_ids": torch.tensor([prompt.input_ids]), **inputs}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, those inside tensor subclasses and quantisation states included."""
    seen: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            inner = getattr(value, "__tensor_flatten__", None)
            if inner is not None and type(value.data) is not Tensor:
                for name in inner()[0]:
                    add(getattr(value, name))
            else:
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            for name in ("quant_state", "state2"):
                add(getattr(value, name, None))
            for name in ("SCB", "CB"):
                add(getattr(value, name, None))
        elif type(value).__name__ == "QuantState":
            for name in ("absmax", "code", "offset", "state2"):
                add(getattr(value, name, None))

    for tensor in [*model.parameters(), *model.buffers()]:
        add(tensor)
    for module in model.modules():
        add(getattr(module, "state", None) and getattr(module.state, "SCB", None))
    return sum(seen.values())


def traced_bytes(call: Callable[[], Any]) -> tuple[int, int]:
    """Peak of what `call` allocates, and what is still allocated when its result is dropped, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
        gc.collect()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


class Measure:
    """Loads the checkpoint in one form after the other, and keeps what full precision answered."""

    def __init__(self, model: str, dtype: torch.dtype, device: str, infer_mode: str, steps: int):
        self.path, self.dtype, self.device, self.infer_mode, self.steps = model, dtype, device, infer_mode, steps
        self.inputs: dict[str, Tensor] = {}
        self.reference: Tensor  # (steps, vocabulary)

    def load(self, config: Any = None) -> Any:
        quantised = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(
            self.path, dtype=self.dtype, device_map=self.device, trust_remote_code=True, **quantised
        )
        return model.eval()

    def full_precision(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Answer greedily, and keep prompt, answer and logits."""
        model = self.load()
        self.inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        lengths = dict(max_new_tokens=self.steps, min_new_tokens=self.steps)
        answer = model.generate(**self.inputs, **lengths, do_sample=False, infer_mode=self.infer_mode)
        self.inputs["input_ids"] = answer[:, :-1]  # each position predicts the next: the last token is read by nobody
        row, self.reference = self.run(model)
        return {"method": "full", "dtype": str(self.dtype).removeprefix("torch."), **row}

    def run(self, model: Any) -> tuple[dict[str, Any], Tensor]:
        """Weights and memory of a model, and its logits (steps, vocabulary) over the answer."""
        kept: list[Tensor] = []
        arguments = dict(infer_mode=self.infer_mode, logits_to_keep=self.steps, use_cache=False)
        with torch.inference_mode():
            kept.append(model(**self.inputs, **arguments).logits[0].float().cpu())  # repacking kernels settle here
            weights = weight_bytes(model)
            prefill, left = traced_bytes(lambda: model(**self.inputs, **arguments))
        return {"weights": weights, "prefill": prefill, "kept": left}, kept[0]

    def quantised(self, method: str) -> dict[str, Any]:
        """The figures of one method beside full precision's."""
        row, logits = self.run(self.load(quantisation_config(method, self.dtype, self.device)))
        error = (logits - self.reference).abs()
        full = F.log_softmax(self.reference.double(), -1)
        divergence = F.kl_div(F.log_softmax(logits.double(), -1), full, log_target=True, reduction="none").sum(-1)
        agreement = (logits.argmax(-1) == self.reference.argmax(-1)).float().mean()
        figures = {
            "mean": error.mean(), "max": error.max(), "std": self.reference.std(), "kl": divergence.mean(),
            "top1": agreement,
        }  # fmt: skip
        return {"method": method, **row, **{name: round(float(value), 6) for name, value in figures.items()}}


def line(row: dict[str, Any]) -> str:
    sizes = " ".join(f"{name} {row[name] / 2**20:9.2f} MiB " for name in ("weights", "prefill", "kept"))
    if "kl" not in row:
        return f"{row['method']:<10} {sizes}"
    errors = f"mean {row['mean']:.4f} max {row['max']:.3f} (std {row['std']:.2f})"
    return f"{row['method']:<10} {sizes} {errors} KL {row['kl']:.5f} top-1 {row['top1']:.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or name")
    parser.add_argument("--text", default="Describe what you see, and explain how you can tell.", help="the question")
    parser.add_argument("--image", nargs="*", default=[], help="pictures (or videos) of the question")
    parser.add_argument("--hd-num", type=int, help="most tiles of a picture (default: as in chat)")
    parser.add_argument("--methods", nargs="+", default=["nf4", "int8", "ao-int8", "ao-int4"], metavar="METHOD")
    parser.add_argument("--steps", type=int, default=32, help="tokens of the greedy answer (default: 32)")
    parser.add_argument("--infer-mode", default="base", help="task adapter that is on: base, web, write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of full precision and of computation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    try:
        if options.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {options.steps}")
        for method in options.methods:  # before any weight is read
            quantisation_config(method, dtype, options.device)
        config = transformers.AutoConfig.from_pretrained(options.model, trust_remote_code=True)
        config.adapters_of(options.infer_mode)
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
        inputs = build_inputs(config, tokenizer, options.text, options.image, options.hd_num)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    except (OSError, ValueError, ImportError) as error:
        print(f"quantisation_error: {error}", file=sys.stderr)
        return 1
    measure = Measure(options.model, dtype, options.device, options.infer_mode, options.steps)
    rows = [measure.full_precision(inputs)]
    print(line(rows[0]), flush=True)
    for method in options.methods:
        gc.collect()
        rows.append(measure.quantised(method))
        print(line(rows[-1]), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "cpu"
    setting = {"prompt_tokens": inputs["input_ids"].shape[1], "steps": options.steps, "device": where, **versions}
    print(json.dumps({**setting, "methods": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
