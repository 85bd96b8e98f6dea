"""What fewer bits cost: errors and answers of a toy-world checkpoint; errors and memory at the 7B's sizes.

    python benchmarks/quantisation.py answers --model demo       # results/quantisation-answers.json and .md
    python benchmarks/quantisation.py sizes --layers 1 2         # results/quantisation-sizes.json and .md

`answers` quantises the checkpoint by every scheme of `xcomposer quantise` (w4a16 calibrated on its own default rows),
and by bitsandbytes' int8. On fresh rows it compares logits where answers are predicted with those of full precision
(KL in nats, same first choice, mean error over the logits' spread), then counts right answers as `toyworld.evaluate`.

`sizes` writes a checkpoint of random weights of the 7B's widths and some layers, quantises it in a process of its own
whose memory is watched, and says for each linear |X (W - Q)| / |X W| on rows that were not calibrated on. Memory is
counted twice: anonymous (must fit) and resident (with mapped weight files, which the system may drop and read again).

Needs llm-compressor and bitsandbytes.
"""

import argparse
import gc
import hashlib
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

import xcomposer  # noqa: F401  (registers the Auto classes)
from toyworld import calibration, evaluate, scenes
from xcomposer.checkpoints import tiny
from xcomposer.checkpoints.quantise import DEFAULT_CALIBRATION, SCHEMES, is_quantised, quantise
from xcomposer.finetune.data import Collator, Encoder
from xcomposer.finetune.formats import row_of
from xcomposer.model.packed_weights_internlm_xcomposer2 import unpack_nibbles
from xcomposer.model.prompting_internlm_xcomposer2 import IGNORE_INDEX
from xcomposer.model.weight_files_internlm_xcomposer2 import WeightFiles

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results"
TASKS = ("caption", "list", "places", "read35", "count", "which", "what_of")
WIDTHS = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 24576, "plora_rank": 256, "plora_alpha": 256, "task_adapter_ranks": {},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 560, "patch_size": 14,
    },
}  # fmt: skip
VOCABULARY = 92544
GROUP = 128
MIB = 2**20


def fresh_rows(model: Any, tokenizer: Any, count: int) -> list[dict[str, Tensor]]:
    """Batches of one row each, of all kinds, that no calibration has seen."""
    rng, encoder = random.Random("measured"), Encoder(model.config, tokenizer)
    kinds = [kind for kind in scenes.KINDS if not kind.startswith("video")]
    collate = Collator(encoder)
    return [collate([encoder(row_of(calibration.row(kinds[n % len(kinds)], rng)))]) for n in range(count)]


# ------------------------------------------------------------------------------------------------------------- answers


def load(folder: Path, **options: Any) -> Any:
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, task_adapters="all", **options).eval()
    model.reuse.disable()
    return model


def model_of(method: str, source: Path, scratch: Path) -> Any:
    """The checkpoint `source` in one form; what is written for it goes to `scratch`."""
    if method == "full":
        return load(source)
    if method == "int8":
        return load(source, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    return load(quantise(source, scratch / method, method))


@torch.no_grad()
def predictions(model: Any, rows: Sequence[dict[str, Tensor]]) -> Tensor:
    """Logits (N, vocabulary), fp32, where the rows' answers are predicted."""
    seen = []
    for row in rows:
        inputs = {name: values for name, values in row.items() if name != "labels"}
        predicts = row["labels"][0, 1:] != IGNORE_INDEX
        seen.append(model(**inputs).logits[0, :-1][predicts].float())
    return torch.cat(seen)


def errors(logits: Tensor, full: Tensor) -> dict[str, float]:
    """Of predictions beside those of full precision."""
    theirs, ours = (F.log_softmax(values.double(), -1) for values in (full, logits))
    return {
        "kl": float(F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean()),
        "same_choice": float((logits.argmax(-1) == full.argmax(-1)).double().mean()),
        "error": float((logits - full).abs().mean() / full.std()),
    }


def right_answers(model: Any, tokenizer: Any, task: str, count: int) -> float:
    """Share of a task's scenes that are answered as expected, greedily."""
    asked = [scenes.scene(task, scenes.EVAL_SEEDS[number]) for number in range(count)]
    said = evaluate.answer_all(model, tokenizer, asked, evaluate.Way())
    return sum(answer == scene.answer for answer, scene in zip(said, asked, strict=True)) / count


def answers(options: argparse.Namespace) -> dict[str, Any]:
    """A row of figures for each method."""
    found: dict[str, dict[str, Any]] = {}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        for method in ("full", *SCHEMES, "int8"):
            model = model_of(method, options.model, Path(scratch))
            rows = fresh_rows(model, tokenizer, options.rows)
            logits = predictions(model, rows)
            if method == "full":
                full = logits
            right = {task: right_answers(model, tokenizer, task, options.count) for task in options.tasks}
            found[method] = {**errors(logits, full), "right": right, "mean_right": sum(right.values()) / len(right)}
            print(method, json.dumps(found[method]), file=sys.stderr, flush=True)
            del model
            gc.collect()
    digest = hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest()
    return {"weights_sha256": digest, "rows": options.rows, "scenes_a_task": options.count, "methods": found}


def answers_table(result: dict[str, Any]) -> str:
    tasks = list(next(iter(result["methods"].values()))["right"])
    head = ["", "KL", "same first choice, %", "logit error / spread", "right, %", *tasks]
    lines = [f"Weights {result['weights_sha256'][:12]}, {result['scenes_a_task']} scenes a task.", "", row(head)]
    lines.append("|---" * len(head) + "|")
    for method, found in result["methods"].items():
        right = [f"{100 * found['right'][task]:.0f}" for task in tasks]
        figures = [f"{found['kl']:.5f}", f"{100 * found['same_choice']:.2f}", f"{found['error']:.4f}"]
        lines.append(row([method, *figures, f"{100 * found['mean_right']:.1f}", *right]))
    return "\n".join(lines) + "\n"


def row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


# --------------------------------------------------------------------------------------------------------------- sizes


def nearest(weight: Tensor) -> Tensor:
    """Symmetric 4 bits in groups, as w4a16-rtn."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)


def fp8(weight: Tensor) -> Tensor:
    """E4M3 with a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def int8(weight: Tensor) -> Tensor:
    """bitsandbytes' int8: a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def nf4(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4")).float()


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"w4a16-rtn": nearest, "fp8": fp8, "nf4": nf4, "int8": int8}


def calibrated(packed: WeightFiles, name: str) -> Tensor:
    """The weight of a linear of the written w4a16 checkpoint."""
    stem = name.replace("model.language_model.", "model.")
    numbers = unpack_nibbles(packed.read(f"{stem}.weight_packed"), tuple(range(8)), 1) - 8
    return numbers.float() * packed.read(f"{stem}.weight_scale").float().repeat_interleave(GROUP, 1)


def watch(command: list[str]) -> dict[str, float]:
    """Peaks of a command's memory in MiB, and its seconds.

    Raises:
        RuntimeError: it failed.
    """
    started, peaks = time.monotonic(), {"RssAnon": 0.0, "VmRSS": 0.0}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024 / MIB)
        time.sleep(0.1)
    said = process.communicate()[1].decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{said[-2000:]}")
    seconds = round(time.monotonic() - started)
    return {"anonymous": round(peaks["RssAnon"]), "resident": round(peaks["VmRSS"]), "seconds": seconds}


def inputs_of_linears(model: Any, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What each quantised linear of the decoder reads, (tokens, in)."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if is_quantised(name):

            def note(_: nn.Module, inputs: tuple, name: str = name) -> None:
                seen.setdefault(name, []).append(inputs[0].flatten(0, -2)[-64:])

            hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        for one in rows:
            model(**{name: values for name, values in one.items() if name != "labels"}, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).float() for name, parts in seen.items()}


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory by number of layers, and the error of each linear of the last of them."""
    memory: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for layers in options.layers:
            source, out = (Path(scratch, f"{name}{layers}") for name in ("source", "out"))
            config = {**WIDTHS, "num_hidden_layers": layers}
            tiny.write_checkpoint(source, config, vocab_size=VOCABULARY, dtype="bfloat16", code="link")
            data = ["--scheme", "w4a16", "--rows", str(options.rows), "--calibration", str(DEFAULT_CALIBRATION)]
            memory[layers] = watch([sys.executable, "-m", "xcomposer", "quantise", str(source), str(out), *data])
            print(layers, json.dumps(memory[layers]), file=sys.stderr, flush=True)
        packed = WeightFiles(out)
        model = load(source)
        rows = fresh_rows(model, AutoTokenizer.from_pretrained(source), options.rows)
        linears: dict[str, dict[str, float]] = {}
        for name, inputs in inputs_of_linears(model, rows).items():
            weight = model.get_submodule(name).weight.detach().float()
            due = inputs @ weight.T
            linears[name] = {}
            for method, rounded in {**ROUNDINGS, "w4a16": lambda _, name=name: calibrated(packed, name)}.items():
                linears[name][method] = float((inputs @ (weight - rounded(weight)).T).norm() / due.norm())
            print(name, json.dumps(linears[name]), file=sys.stderr, flush=True)
    return {"memory_mib": memory, "calibration_rows": options.rows, "linears": linears}


def sizes_table(result: dict[str, Any]) -> str:
    methods = list(next(iter(result["linears"].values())))
    lines = [row(["", *methods]), "|---" * (len(methods) + 1) + "|"]
    for name, found in result["linears"].items():
        short = name.removeprefix("model.language_model.").removesuffix(".linear")
        lines.append(row([short, *(f"{found[method]:.4f}" for method in methods)]))
    lines += ["", row(["layers", "anonymous, MiB", "resident, MiB", "seconds"]), "|---|---|---|---|"]
    for layers, peak in result["memory_mib"].items():
        lines.append(row([layers, peak["anonymous"], peak["resident"], peak["seconds"]]))
    return "\n".join(lines) + "\n"


PARTS = {"answers": (answers, answers_table), "sizes": (sizes, sizes_table)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", type=Path, default=REPO / "demo", help="of answers")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(scenes.TASKS), metavar="TASK")
    parser.add_argument("--count", type=int, default=100, help="scenes a task")
    parser.add_argument("--rows", type=int, help="fresh rows (default 64); of sizes, of calibration too (default 8)")
    parser.add_argument("--layers", type=int, nargs="+", default=[1], help="of sizes: decoder layers, one run each")
    parser.add_argument("--scratch", type=Path, help="of sizes: where some 5 GB may lie (default: the system's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the .json and .md")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (64 if options.part == "answers" else 8)
    measure, table = PARTS[options.part]
    result = measure(options)
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.processor()}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"quantisation-{options.part}"
    path.with_suffix(".json").write_text(json.dumps({**about, **result}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
