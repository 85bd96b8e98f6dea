"""The golden cases and the release's sizes on one card, each figure beside its floor: `make gpu`, within 9 minutes.

    python benchmarks/gpu.py --preset 7b --device cuda
    python benchmarks/gpu.py --preset tiny --device cpu     # the same way through, where there is no card

The golden cases run first, in fp32, under eager attention, SDPA and a static cache (compiled on a card), and under
flash attention in bf16 where it can be loaded. Then one model of the preset's sizes with random weights: first token of
24 tiles and of a video of 32 frames, decoding at batch 1, 4, 16 and with 3 beams, eager and compiled, in bf16 and in
nf4, peak memory, and a prompt of 96,000 tokens. A floor is FLOPs over the matmul rate, or bytes over the bandwidth,
measured in the same run. What does not fit into `--budget` seconds is named as left out.

Exit code 1: a golden case failed. 2: there is no card.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from bench_generate import QUERY, Bench
from common import (
    REPO,
    arguments,
    environment,
    fixed_length,
    in_turns,
    note,
    parsed,
    picture,
    prefill_flops,
    report,
    reset_peak,
    vision_flops,
)
from common import peak as peak_memory
from torch import nn
from transformers import CompileConfig

ATTENTION = ("eager", "sdpa", "flash_attention_2")
LONG_PROMPT = {"tiny": 2_000, "cpu": 8_000, "7b": 96_000}  # tokens; the longest the release is known for
FRAMES, FRAME_SIZE = 32, (1280, 720)
PROMPT, STEPS = 512, 24  # of the decode cases
AIMS = {"decode of the floor, compiled": 0.85, "prefill of the floor": 0.55, "24-tile chat, GB": 20.0}


@dataclass
class Run:
    """What has been measured, and the time that is left."""

    options: Any
    began: float = field(default_factory=time.monotonic)
    rows: list[dict] = field(default_factory=list)

    def left(self) -> float:
        return self.options.budget - (time.monotonic() - self.began)

    def case(self, name: str, measure: Callable[[], dict]) -> None:
        """Measure one case; a failure or a lack of time is a row too."""
        if self.left() <= 0:
            row = {"left out": f"the {self.options.budget} s were over"}
        else:
            try:
                row = measure()
            except Exception as error:  # one case that a card cannot do must not cost the others
                row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        self.rows.append({"case": name, **row})
        note(**self.rows[-1])


def goldens(run: Run) -> bool:
    """Whether the recorded chats give the original's tokens here, under each attention and with a static cache."""
    held = True
    modes = [("eager", []), ("sdpa", []), ("sdpa, static cache", ["--static"]), ("flash_attention_2", [])]
    for name, more in modes:
        attention = name.split(",")[0]
        if attention == "flash_attention_2" and not any(find_spec(p) for p in ("flash_attn", "kernels")):
            run.rows.append({"case": f"golden, {name}", "left out": "neither flash-attn nor kernels is installed"})
            continue
        command = [sys.executable, "-m", "pytest", "tests/test_golden.py", "-k", "test_chat_on_device"]
        command += ["--device", run.options.device, "--attention", attention, *more]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        # Flash attention knows no fp32: its 16-bit tokens may part from the recorded ones, so it is told, not judged.
        judged = attention != "flash_attention_2"
        held &= done.returncode == 0 or not judged
        closing = [
            line for line in done.stdout.splitlines() if "passed" in line or "failed" in line or "skipped" in line
        ]
        row = {"case": f"golden, {name}", "result": closing[-1].strip("= ") if closing else f"exit {done.returncode}"}
        run.rows.append(row)
        note(**row)
        if done.returncode and judged:
            print(done.stdout[-4000:], file=sys.stderr)
    return held


def first_token(bench: Bench, media: Any) -> dict:
    """Seconds to the first token of a chat about `media`, beside the FLOPs of eyes and prompt."""
    model = bench.model
    conversation = model._open(model.tokenizer, QUERY, [media], bench.hd_num)
    tokens = len(conversation.prompt.input_ids)
    pictured = sum(end - start for start, end in conversation.prompt.image_spans)
    side = model.config.tokens_per_side
    tiles = 1 + round((pictured - side * (side + 1) - 1) / (side * side))
    floor = (prefill_flops(model, tokens, pictured) + vision_flops(model, tiles)) / bench.rates["flops"]

    def ask():
        model.chat(query=QUERY, image=[media], hd_num=bench.hd_num, **fixed_length(1))

    reset_peak(bench.device)
    times = in_turns({"": ask}, bench.options.rounds, bench.device)[""]
    return {
        "tokens": tokens,
        "tiles": tiles - 1,
        "s": min(times),
        "floor_s": floor,
        "of_floor": floor / min(times),
        "peak_gb": peak_memory(bench.device) / 1e9,
    }


def decode(bench: Bench, rows: int, compiled: bool, beams: int = 1) -> dict:
    """Milliseconds of a decode step, beside the bytes it must read."""
    settings: dict[str, Any] = {"num_beams": beams}
    if compiled:
        settings |= {"cache_implementation": "static", "compile_config": CompileConfig(mode="reduce-overhead")}
    steps = bench.steps(bench.prompt(PROMPT, rows), STEPS, skip=6, **settings)
    step, floor = statistics.median(steps), bench.step_floor(PROMPT, rows * beams)
    return {"ms": 1e3 * step, "floor_ms": 1e3 * floor, "of_floor": floor / step, "tokens_per_s": rows / step}


def long_prompt(bench: Bench, tokens: int) -> dict:
    """Seconds and memory of a prompt as long as the model is known for, embedded and run chunk by chunk."""
    model = bench.model
    weights = sum(p.nbytes for p in model.parameters())
    ids = torch.randint(10, model.config.vocab_size - 10, (1, tokens), device=bench.device)
    floor = prefill_flops(model, tokens) / bench.rates["flops"]
    reset_peak(bench.device)
    started = time.perf_counter()
    model.generate(input_ids=ids, **{**fixed_length(1), "use_cache": True})
    taken = time.perf_counter() - started
    above = peak_memory(bench.device) - weights
    return {"tokens": tokens, "s": taken, "floor_s": floor, "of_floor": floor / taken, "above_weights_gb": above / 1e9}


def to_nf4(model: nn.Module) -> None:
    """Quantise the decoder's own linears in place, as `BitsAndBytesConfig(load_in_4bit=True)` does on loading."""
    import bitsandbytes

    for module in list(model.model.language_model.modules()):
        linear = getattr(module, "linear", None)
        if not isinstance(linear, nn.Linear):
            continue
        device = linear.weight.device
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
        packed.weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        module.linear = packed.to(device)


def speed(run: Run) -> None:
    """Every case of the preset's sizes."""
    bench = Bench(run.options)
    height = 560 * (4 if run.options.preset == "7b" else 1)
    scan = picture(height * 3 // 2, height)  # 6 x 4 tiles of 560 at the release's sizes
    frames = [picture(*FRAME_SIZE, seed=number) for number in range(FRAMES)]
    run.case("first token, 24 tiles", lambda: first_token(bench, scan))
    run.case("first token, video of 32 frames", lambda: first_token(bench, frames))
    for compiled in (False, True):
        kind = "compiled" if compiled else "eager"
        for rows in (1, 4, 16):
            run.case(f"decode, batch {rows}, {kind}", lambda r=rows, c=compiled: decode(bench, r, c))
    run.case("decode, 3 beams, eager", lambda: decode(bench, 1, compiled=False, beams=3))
    tokens = LONG_PROMPT[run.options.preset]
    run.case(f"prompt of {tokens:,} tokens", lambda: long_prompt(bench, tokens))

    def packed() -> dict:
        to_nf4(bench.model)
        size = sum(p.nbytes for p in bench.model.parameters()) / 1e9
        return {"weights_gb": size, **decode(bench, 1, compiled=False)}

    run.case("decode, batch 1, eager, nf4", packed)


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| case | measured | floor | of the floor | peak, GB |", "|---|---|---|---|---|"]
    for row in rows:
        said = next((str(row[key]) for key in ("result", "error", "left out") if key in row), None)
        measured = said or (f"{row['s']:.3g} s" if "s" in row else f"{row['ms']:.3g} ms")
        floor = (
            f"{row['floor_s']:.3g} s" if "floor_s" in row else f"{row['floor_ms']:.3g} ms" if "floor_ms" in row else ""
        )
        share = f"{100 * row['of_floor']:.0f} %" if "of_floor" in row else ""
        memory = next((f"{row[key]:.3g}" for key in ("peak_gb", "above_weights_gb", "weights_gb") if key in row), "")
        lines.append(f"| {row['case']} | {measured} | {floor} | {share} | {memory} |")
    return "\n".join(lines)


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(device="cuda", preset="7b")
    parser.add_argument("--budget", type=float, default=480, help="seconds; cases that begin later are left out")
    options = parsed(parser)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA card"
        print(f"gpu: {why} ({torch.__version__}); `--device cpu --preset tiny` goes the same way here", file=sys.stderr)
        return 2
    about = environment(options)
    run = Run(options)
    held = goldens(run)
    speed(run)
    print(table(run.rows))
    report("gpu", options, about, {"goldens_held": held, "aims": AIMS, "rows": run.rows})
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
