"""What the benchmarks share: presets, a model of random weights, the plain path, clocks, floors, reports.

"Ours" is the code as it runs by default. "Plain" is the same code with every optimisation switched off (`SWITCHES`),
which does the work the original does. Both run in one process, in turns, so that a busy machine hurts both alike; read
the ratios, not the seconds.
"""

import argparse
import gc
import importlib
import json
import os
import platform
import re
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList  # noqa: E402

from xcomposer.machine import processor_name  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results"

OPEN, CLOSE = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
MIB = 2**20


def code(module: str):
    """A module of the model's own."""
    return importlib.import_module(f"xcomposer.model.{module}")


# ------------------------------------------------------------------------------------------------------------- presets

CPU: dict[str, Any] = {
    "vocab_size": 92544,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "plora_rank": 64,
    "plora_alpha": 64,
    "task_adapter_ranks": {"sft": 64, "dpo": 64, "web": 128},
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 560,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    },
}
TINY: dict[str, Any] = {
    **CPU,
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "plora_rank": 8,
    "plora_alpha": 8,
    "task_adapter_ranks": {"sft": 8, "dpo": 8, "web": 16},
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    },
}
PRESETS = ("tiny", "cpu", "7b")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HD_NUM = {"tiny": 9, "cpu": 9, "7b": 24}


def preset_config(preset: str, **changes):
    """The config of a preset; `changes` are fields of it."""
    fields = {"tiny": TINY, "cpu": CPU}.get(preset) or json.loads((REPO / "config.json").read_text("utf-8"))
    fields = {key: value for key, value in fields.items() if key not in ("auto_map", "attn_implementation")}
    config = code("configuration_internlm_xcomposer2").InternLMXcomposer2Config(**{**fields, **changes})
    return config


class StubTokenizer:
    """Words by their hash, and `<17>` for token 17, so that an answer of random tokens reads back as itself."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 2

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.markers = {OPEN: vocab_size - 1, CLOSE: vocab_size - 2, "<s>": 1, "</s>": 2}

    def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None):
        ids = [1] if add_special_tokens else []
        for part in re.findall(r"<\d+>|\[UNUSED_TOKEN_14[56]\]|\w+|[^\w\s]|\s", text):
            if part in self.markers:
                ids.append(self.markers[part])
            elif part[0] == "<" and len(part) > 1:
                ids.append(int(part[1:-1]))
            else:
                ids.append(10 + zlib.crc32(part.encode()) % (self.vocab_size - 20))
        return type("Encoding", (dict,), {"input_ids": ids})(input_ids=ids)

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.markers[token]

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return "".join(CLOSE if int(i) == self.markers[CLOSE] else f"<{int(i)}>" for i in ids if int(i) > 2)

    def batch_decode(self, rows, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row) for row in rows]


@torch.no_grad()
def build_model(config, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0):
    """The model with random weights, made on `device` in `dtype`: there is never a second copy."""
    kind = code("modeling_internlm_xcomposer2").InternLMXComposer2ForCausalLM
    with torch.device("meta"):
        model = kind._from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval()
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            weight.normal_(std=0.02 if "tok_embeddings" in name else (weight[0].numel()) ** -0.5)
    for name, buffer in model.named_buffers():
        if not name.endswith("position_ids"):
            raise RuntimeError(f"the benchmark does not know how to fill the buffer {name}")
        buffer.copy_(torch.arange(buffer.shape[-1], device=device)[None])
    model.tokenizer = StubTokenizer(config.text_config.vocab_size)
    return model


def picture(width: int = 1920, height: int = 1080, seed: int = 0) -> Image.Image:
    """A drawn picture: shapes and text on a gradient."""
    base = Image.radial_gradient("L").resize((width, height))
    img = Image.merge("RGB", (base, base.transpose(Image.Transpose.FLIP_LEFT_RIGHT), base.point(lambda v: 255 - v)))
    draw = ImageDraw.Draw(img)
    for i in range(40):
        x, y = (zlib.crc32(f"{seed} {i} {axis}".encode()) % side for axis, side in (("x", width), ("y", height)))
        draw.rectangle((x, y, x + width // 12, y + height // 15), fill=(x % 256, y % 256, i * 6))
        draw.text((y % width, x % height), f"label {seed}.{i}", fill="black")
    return img


def words(count: int, seed: int = 0) -> str:
    """So many tokens of `StubTokenizer`."""
    parts = [f"w{zlib.crc32(f'{seed} {i}'.encode()) % 5000}" for i in range((count + 1) // 2)]
    return " ".join(parts) + (" " if count % 2 == 0 else "")


# ------------------------------------------------------------------------------------------------------ the plain path


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute and put it back."""
    own = name in vars(target)
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if own:
            setattr(target, name, before)
        else:
            delattr(target, name)


@contextmanager
def without_reuse(model) -> Iterator[None]:
    """Nothing is kept from one call to the next."""
    limits = model.reuse.prefix_bytes, model.reuse.picture_bytes
    model.reuse.disable()
    try:
        yield
    finally:
        model.reuse.prefix_bytes, model.reuse.picture_bytes = limits


@contextmanager
def all_logits(model) -> Iterator[None]:
    """The logits of the whole prompt."""
    with replaced(model, "generate", partial(model.generate, logits_to_keep=0)):
        yield


@contextmanager
def copying_cache(model) -> Iterator[None]:
    """transformers' DynamicCache, which copies itself in every step."""
    generate = model.generate

    def with_dynamic_cache(*args, **kwargs):
        given = kwargs.get("past_key_values") is not None or kwargs.get("cache_implementation") is not None
        if not given:
            kwargs["past_key_values"] = DynamicCache(config=model.config)
        return generate(*args, **kwargs)

    with replaced(model, "generate", with_dynamic_cache):
        yield


@contextmanager
def eager_attention(model) -> Iterator[None]:
    """Attention with its score matrix in memory, as the original has it where flash-attn is not installed."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def repeated_keys(model) -> Iterator[None]:
    """Masked attention on a copy of the keys for each query head, as transformers has it."""

    def on_copies(query, key, value, mask, scaling):
        key, value = (heads.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for heads in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2)

    with replaced(code("modeling_internlm2"), "grouped_attention", on_copies):
        yield


# Each takes a model and switches one optimisation off.
SWITCHES: dict[str, Callable] = {
    "reuse": without_reuse,
    "shared prefill of beams": lambda model: replaced(model, "share_prefill", False),
    "chunked prefill": lambda model: replaced(model, "prefill_chunk", 0),
    "last logits only": all_logits,
    "partial LoRA on image rows": lambda model: replaced(model.model.language_model, "dense_partial_lora", True),
    "tiles in batches": lambda model: replaced(model.model, "tiles_at_once", 10**9),
    "fused attention": eager_attention,
    "keys as they lie": repeated_keys,
    "cache in place": copying_cache,
    "write adapters as one pair": lambda model: replaced(model, "stack_task_adapters", False),
    "prompts embedded in pieces": lambda model: replaced(model, "embedded_whole", 10**9),
}


@contextmanager
def plain(model, *names: str) -> Iterator[None]:
    """Switch every optimisation off, or only the named ones."""
    with ExitStack() as stack:
        for name, switch in SWITCHES.items():
            if not names or name in names:
                stack.enter_context(switch(model))
        yield


# -------------------------------------------------------------------------------------------------------------- clocks


_clock = time.perf_counter


def now() -> float:
    """Seconds by the chosen clock: the wall's, or CPU time of this process (`--clock cpu`, see `parsed`)."""
    return _clock()


def sync(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: Any = "cpu") -> float:
    sync(device)
    start = now()
    run()
    sync(device)
    return now() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values)}


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int, device: Any = "cpu", warm: int = 1) -> dict[str, list]:
    """Time several things by turns: name -> seconds of each round."""
    times: dict[str, list] = {name: [] for name in runs}
    for number in range(-warm, rounds):
        for name, run in runs.items():
            gc.collect()
            took = seconds(run, device)
            if number >= 0:
                times[name].append(took)
    return times


def ratio(times: dict[str, list], ours: str, other: str) -> dict[str, float]:
    """ours / other, of the fastest rounds and of the median of the pairs."""
    pairs = [a / b for a, b in zip(times[ours], times[other], strict=True)]
    return {"of_min": min(times[ours]) / min(times[other]), "median_of_pairs": statistics.median(pairs)}


class StepClock(StoppingCriteria):
    """Notes the time after each generated token."""

    def __init__(self, device: Any):
        self.device = device
        self.at: list[float] = []

    def __call__(self, input_ids, scores, **kwargs):
        sync(self.device)
        self.at.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def steps(self, skip: int = 1) -> list[float]:
        """Seconds of each decode step, the first `skip` left out (the very first token belongs to the prefill)."""
        return [after - before for before, after in zip(self.at, self.at[1:], strict=False)][skip:]

    @property
    def criteria(self) -> StoppingCriteriaList:
        return StoppingCriteriaList([self])


class FirstToken(BaseStreamer):
    """Notes the time of the first generated token."""

    def __init__(self, device: Any):
        self.device, self.calls, self.at = device, 0, 0.0

    def put(self, value):
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            sync(self.device)
            self.at = now()

    def end(self):
        pass


@contextmanager
def stages(model) -> Iterator[dict[str, float]]:
    """Seconds of the parts of a call: opening and resizing pictures, vision, prompt (decoder and head)."""
    spent = {"preprocessing": 0.0, "vision": 0.0, "prefill": 0.0}
    conversation = code("conversation_internlm_xcomposer2")

    def timed(run: Callable, part: str) -> Callable:
        def call(*args, **kwargs):
            sync(model.device)
            start = now()
            try:
                return run(*args, **kwargs)
            finally:
                sync(model.device)
                spent[part] += now() - start

        return call

    with ExitStack() as stack:
        for target, name, part in (
            (model, "_open", "preprocessing"),
            (model, "_pixels", "preprocessing"),
            (conversation, "to_tiles", "preprocessing"),
            (model, "get_image_features", "vision"),
            (model, "_run_prompt", "prefill"),
        ):
            stack.enter_context(replaced(target, name, timed(getattr(target, name), part)))
        yield spent


def fixed_length(tokens: int) -> dict[str, Any]:
    """Settings of a greedy call that gives exactly so many tokens."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "repetition_penalty": 1.0}


# -------------------------------------------------------------------------------------------------------------- floors


def measured_rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine can do: bytes/s of reading weights for one row, FLOP/s of a large matmul."""
    big = torch.device(device).type == "cuda"
    n = 8192 if big else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    matmul = min(in_turns({"": lambda: a @ b}, 5, device)[""])
    table = torch.randn(2**15, 2**13 if big else 2**11, device=device, dtype=dtype)
    row = torch.randn(1, table.shape[1], device=device, dtype=dtype)
    flat = table.view(-1)
    reads = in_turns({"matvec": lambda: torch.nn.functional.linear(row, table), "sum": lambda: flat.sum()}, 10, device)
    return {"flops": 2 * n**3 / matmul, "bytes": table.nbytes / min(min(times) for times in reads.values())}


def decode_bytes(model, positions: int, rows: int = 1) -> int:
    """Bytes that one decode step must read: the decoder's plain weights, the head, each row's keys and values."""
    text = model.config.text_config
    weights = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if ("language_model.layers" in name or name.startswith("lm_head")) and not re.search("Plora|task_", name)
    )
    size = next(model.lm_head.parameters()).element_size()
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * size
    return weights + rows * positions * cache


def prefill_flops(model, tokens: int, image_tokens: int = 0) -> float:
    """FLOPs of a prompt: linears, partial LoRA on image tokens, causal attention, one row of logits."""
    text = model.config.text_config
    layers = model.model.language_model.layers
    dense = sum(p.numel() for n, p in layers.named_parameters() if ".linear." in n)
    plora = sum(p.numel() for n, p in layers.named_parameters() if "Plora" in n)
    attention = text.num_hidden_layers * 2.0 * tokens**2 * text.num_attention_heads * text.head_dim
    return 2.0 * dense * tokens + 2.0 * plora * image_tokens + attention + 2.0 * model.lm_head.weight.numel()


def vision_flops(model, tiles: int) -> float:
    """FLOPs of the tower and the projector for so many ViT inputs (a global view is one)."""
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    tower = sum(p.numel() for n, p in model.model.vision_tower.encoder.named_parameters() if p.ndim == 2)
    projector = sum(p.numel() for p in model.model.vision_proj.parameters() if p.ndim == 2)
    attention = vision.num_hidden_layers * 4.0 * patches**2 * vision.hidden_size
    return tiles * (2.0 * tower * patches + attention + 2.0 * projector * patches / 4)


# -------------------------------------------------------------------------------------------------------------- memory


def rss() -> int:
    """Bytes of memory of this process now."""
    return _status("VmRSS")


def reset_peak(device: Any = "cpu") -> int:
    """Start a new peak; returns the bytes in use now."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return rss()


def peak(device: Any = "cpu") -> int:
    """Most bytes in use since `reset_peak`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    (line,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


# ------------------------------------------------------------------------------------------------------------- reports


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--rounds", type=int, default=3, help="times each thing is measured, in turns with the others")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: one thread, CPU seconds; where other programs keep the machine busy and there is no GPU",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and PNG files")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    options.dtype = options.dtype or ("bf16" if torch.device(options.device).type == "cuda" else "fp32")
    if options.clock == "cpu":
        global _clock
        _clock = time.process_time
        torch.set_num_threads(1)
    options.torch_dtype = DTYPES[options.dtype]
    return options


def environment(options) -> dict[str, Any]:
    """Versions, hardware, and how busy the machine is."""
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "load": round(os.getloadavg()[0], 2),
        "preset": options.preset,
        "device": options.device,
        "dtype": options.dtype,
    }
    if torch.device(options.device).type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(options.device)
        about["cuda"] = torch.version.cuda
    print(json.dumps(about))
    return about


def note(**values) -> None:
    """One line of progress."""
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps(shown, default=str), flush=True)


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def report(name: str, options, about: dict, result: dict) -> None:
    """Write the result as JSON, and print it as the last line."""
    result = rounded({"benchmark": name, **about, "load_at_end": os.getloadavg()[0], **result})
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}-{options.preset}-{torch.device(options.device).type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def plot(name: str, options, panels: Sequence[dict[str, Any]]) -> None:
    """Draw line charts side by side: each panel has title, x, y and lines {label: (xs, ys)}; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for (label, (xs, ys)), marker in zip(panel["lines"].items(), "osD^vx+", strict=False):
            axis.plot(xs, ys, marker=marker, markersize=3.5, linewidth=1.4, label=label)
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if len(panel["lines"]) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(f"preset {options.preset}, {options.device}, {options.dtype}", fontsize=9)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / f"{name}-{options.preset}-{torch.device(options.device).type}.png", dpi=110)
    pyplot.close(figure)
