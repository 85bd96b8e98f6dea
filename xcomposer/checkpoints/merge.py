"""Add a task adapter to the weights: a checkpoint that does one task without an adapter beside each linear.

    xcomposer merge SRC DST --task web
    xcomposer merge SRC DST --task write --dtype bfloat16
    xcomposer merge SRC DST --task base        # adds nothing, only leaves the adapters out

Every linear that carries the adapter becomes W + B A, computed in fp32; `write` adds sft and dpo. No task adapter is
left in DST, partial LoRA stays. The 7B release shrinks from about 22 GB to 17 GB, and `infer_mode="base"` of the result
(so `chat` too) answers as the adapter did.

Shard by shard: memory holds one weight file and the adapter of one linear, whichever files these come from.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from xcomposer.files import code_files
from xcomposer.model.configuration_internlm_xcomposer2 import INFER_MODES
from xcomposer.model.recognition_internlm_xcomposer2 import foreign
from xcomposer.model.weight_files_internlm_xcomposer2 import Misfit, NoWeights, WeightFiles

DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
# `model.layers.0.attention.wqkv.lora_web_A.weight`: the linear, the adapter, the side.
ADAPTER_NAME = re.compile(r"^(?P<linear>.+)\.lora_(?P<adapter>[a-z0-9]+)_(?P<side>[AB])\.weight$")
# `model.layers.0.attention.wqkv.linear.weight_packed`, as `xcomposer quantise` writes it: all after the linear's name.
QUANTISED_NAME = re.compile(r"(\.linear)?\.weight(_packed)?$")

Pairs = dict[str, dict[str, tuple[str, str]]]  # linear -> adapter -> names of its A and B


class Checkpoint(WeightFiles):
    """Weights of a folder by name, those that the model would load, each read from its file when asked for.

    Raises:
        FileNotFoundError: no folder, or no weights in it. ValueError: a file that is missing or cut short.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; SRC must be a downloaded checkpoint")
        try:
            super().__init__(folder)
        except NoWeights as error:
            raise FileNotFoundError(f"{folder} holds no weights: {error}") from error
        except Misfit as misfit:
            raise Misfit(*(f"{folder}: {line}" for line in misfit.lines)) from misfit
        if relative := foreign(self.tensors):
            raise Misfit(f"{folder} is {relative}")

    def shards(self) -> dict[str, list[str]]:
        """Names by file, files in order."""
        names: dict[str, list[str]] = {}
        for name, tensor in self.tensors.items():
            names.setdefault(tensor.file, []).append(name)
        return {file: names[file] for file in sorted(names)}

    def adapter_pairs(self) -> Pairs:
        """The task adapters of every linear.

        Raises:
            ValueError: an A without its B, or the reverse, or without the linear they belong to.
        """
        sides: dict[tuple[str, str], dict[str, str]] = {}
        for name in self.tensors:
            if match := ADAPTER_NAME.match(name):
                sides.setdefault((match["linear"], match["adapter"]), {})[match["side"]] = name
        linears = {QUANTISED_NAME.sub("", name) for name in self.tensors}
        pairs: Pairs = {}
        for (linear, adapter), found in sides.items():
            if len(found) != 2 or linear not in linears:
                here = ", ".join(found.values())
                raise ValueError(f"adapter {adapter!r} of {linear} is incomplete: the checkpoint has {here} alone")
            pairs.setdefault(linear, {})[adapter] = (found["A"], found["B"])
        return pairs


def adapters_of_task(task: str, pairs: Pairs) -> tuple[str, ...]:
    """Adapters that `task` stands for: a mode of the public methods ("web", "write") or an adapter's own name.

    Raises:
        ValueError: the checkpoint lacks one of them; says which it has.
    """
    adapters = INFER_MODES.get(task, (task,))
    here = sorted({adapter for of_linear in pairs.values() for adapter in of_linear})
    missing = [adapter for adapter in adapters if adapter not in here]
    if missing:
        has = f"it has {', '.join(here)}" if here else "it has none (merged already, or released without)"
        raise ValueError(f"task {task!r} needs the adapters {list(adapters)}; the checkpoint lacks {missing}: {has}")
    return adapters


def chosen_pairs(task: str, pairs: Pairs) -> dict[str, list[tuple[str, str]]]:
    """For each linear the A and B names of the adapters that `task` stands for.

    Raises:
        ValueError: the checkpoint lacks one of several adapters, or a linear carries one and not the others.
    """
    adapters = adapters_of_task(task, pairs)
    chosen = {}
    for linear, here in pairs.items():
        found = [here[name] for name in adapters if name in here]
        if found and len(found) < len(adapters):
            lacking = [name for name in adapters if name not in here]
            raise ValueError(f"{linear} lacks the adapters {lacking} of {list(adapters)}; is the checkpoint whole?")
        if found:
            chosen[linear] = found
    return chosen


@contextmanager
def new_folder(source: Path, target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when all went well and vanishes when not.

    Raises:
        FileExistsError: `target` has files in it, or a run before this one was killed.
        ValueError: `source` and `target` are one folder.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"SRC and DST are the same folder, {source}; name a new folder for the result")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there and not an empty folder; name a new folder")
    part = target.with_name(target.name + ".part")
    if part.exists():
        raise FileExistsError(f"{part} is there: another run is busy, or one was killed; remove it if so")
    part.mkdir(parents=True)
    try:
        yield part
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of full-precision weights.

    Raises:
        FileNotFoundError: there is none. ValueError: the weights are quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; SRC must be a whole checkpoint")
    config = json.loads(path.read_text("utf-8"))
    if config.get("quantization_config"):
        raise ValueError(f"{folder} is quantised; take the full-precision checkpoint, and quantise the result")
    return config


def merged_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """`config` of a checkpoint without task adapters, in the released flat layout or the nested one."""
    config = dict(config)
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "task_adapter_ranks": {}}
        config.pop("task_adapter_ranks", None)
    else:
        config["task_adapter_ranks"] = {}
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    return config


def copy_files(source: Path, target: Path) -> None:
    """Code, tokenizer, processor and generation files: everything at the top of the folder but weights and config.

    A release's own code takes every checkpoint to have task adapters, so code that does not know
    `task_adapter_ranks` is replaced by this repo's.
    """
    for path in sorted(source.iterdir()):
        skipped = path.name == "config.json" or path.name.startswith(".") or path.name.endswith(".index.json")
        if path.is_file() and not skipped and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copyfile(path, target / path.name)
    known = target / "configuration_internlm_xcomposer2.py"
    if not known.is_file() or "task_adapter_ranks" not in known.read_text("utf-8"):
        for path in code_files():
            shutil.copyfile(path, target / path.name)


def add_adapters(
    checkpoint: Checkpoint, name: str, weight: torch.Tensor, pairs: Sequence[tuple[str, str]]
) -> torch.Tensor:
    """`weight` (out, in), called `name`, plus B (out, r) A (r, in) of each of `pairs`, in fp32.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    weight = weight.float()
    for low, high in pairs:
        a, b = checkpoint.read(low), checkpoint.read(high)
        if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            shapes = f"{low} {tuple(a.shape)}, {high} {tuple(b.shape)}"
            raise ValueError(f"{shapes} do not fit {name} {tuple(weight.shape)}; is the checkpoint whole?")
        weight.addmm_(b.float(), a.float())
    return weight


def write_shard(
    checkpoint: Checkpoint,
    names: Sequence[str],
    path: Path,
    to_merge: Mapping[str, Sequence[tuple[str, str]]],
    dtype: torch.dtype | None,
    bar: tqdm,
) -> int:
    """Write the tensors called `names` to one file, with the adapters in `to_merge` added; returns their bytes."""
    tensors = {}
    for name in names:
        tensor = checkpoint.read(name)
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        pairs = to_merge.get(name)
        if pairs:
            tensor = add_adapters(checkpoint, name, tensor, pairs)
        tensors[name] = tensor.to(wanted).contiguous()
        bar.update()
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def merge(source: Path, target: Path, task: str, dtype: str | None = None, progress: bool = True) -> Path:
    """Write the checkpoint `source` with the adapters of `task` merged to the new folder `target`; returns it.

    Args:
        task: "web", "write" (sft and dpo), "base" (none), or an adapter's own name.
        dtype: of the result, a name of `DTYPES`; None keeps each tensor's own.

    Raises:
        ValueError: no such adapter, or an incomplete one; a quantised source; source and target are one folder.
        FileNotFoundError: no weights in `source`. FileExistsError: `target` has files in it.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    checkpoint = Checkpoint(source)
    config = read_config(source)
    to_merge = {f"{linear}.weight": pairs for linear, pairs in chosen_pairs(task, checkpoint.adapter_pairs()).items()}
    kept = ([name for name in names if not ADAPTER_NAME.match(name)] for names in checkpoint.shards().values())
    shards = [names for names in kept if names]
    count = len(shards)
    out_dtype = None if dtype is None else getattr(torch, dtype)

    with new_folder(source, target) as part:
        where: dict[str, str] = {}
        total = 0
        with tqdm(total=sum(map(len, shards)), unit="tensor", desc=f"merge {task}", disable=not progress) as bar:
            for number, names in enumerate(shards, start=1):
                file = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
                total += write_shard(checkpoint, names, part / file, to_merge, out_dtype, bar)
                where.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(part / "model.safetensors.index.json", index)
        copy_files(source, part)
        write_json(part / "config.json", merged_config(config, dtype))
    return target


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example: xcomposer merge SRC DST --task web", prog="xcomposer merge"
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of a checkpoint with task adapters")
    parser.add_argument("target", metavar="DST", type=Path, help="new or empty folder")
    parser.add_argument("--task", required=True, help="web, write, base (leave adapters out), or an adapter's name")
    parser.add_argument("--dtype", choices=DTYPES, help="of the result (default: as in SRC)")
    try:
        print(merge(**vars(parser.parse_args(arguments))))
    except (OSError, ValueError) as error:
        print(f"merge: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
