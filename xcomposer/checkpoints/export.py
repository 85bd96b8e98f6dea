"""Write a task adapter as a PEFT LoRA folder: `PeftModel.from_pretrained(model, DST)`, or a LoRA server's file.

    xcomposer export SRC DST --task web
    xcomposer export SRC DST --task write      # sft and dpo side by side: one LoRA of both ranks

The LoRA sits on the `linear` inside wqkv, wo, w1, w2 and w3 of the decoder and scales by 1 (lora_alpha = r), so it adds
to a model in `infer_mode="base"` what the model's own adapter adds. `xcomposer merge --task base` makes the
checkpoint without adapters to go with it. Memory: the adapter (web of the 7B release: 2.4 GB), once.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from xcomposer.checkpoints.merge import (
    Checkpoint,
    chosen_pairs,
    new_folder,
    write_json,
)

# Released name of a decoder linear -> its name in the module tree.
DECODER_LINEAR = re.compile(r"^model\.(?P<path>layers\.\d+\.(?P<block>attention|feed_forward)\.(?P<name>\w+))$")


def module_name(linear: str) -> str:
    """`model.layers.0.attention.wqkv` -> `model.language_model.layers.0.attention.wqkv.linear`.

    Raises:
        ValueError: the name is no decoder linear's.
    """
    match = DECODER_LINEAR.match(linear)
    if match is None:
        raise ValueError(
            f"{linear!r} carries an adapter but is no linear of the decoder; is SRC this model's checkpoint?"
        )
    return f"model.language_model.{match['path']}.linear"


def lora_sides(checkpoint: Checkpoint, pairs: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, in) and B (out, R) of adapters put side by side; R is the sum of their ranks.

    Raises:
        ValueError: an A and a B of different rank.
    """
    lows = [checkpoint.read(low) for low, _ in pairs]
    highs = [checkpoint.read(high) for _, high in pairs]
    for (low, high), a, b in zip(pairs, lows, highs, strict=True):
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"{low} {tuple(a.shape)} and {high} {tuple(b.shape)} differ in rank; is the file whole?")
    return torch.cat(lows), torch.cat(highs, dim=1).contiguous()


def lora_tensors(
    checkpoint: Checkpoint, chosen: Mapping[str, Sequence[tuple[str, str]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the PEFT file, each with its name: A and B of one linear after the other."""
    for linear, names in chosen.items():
        prefix = f"base_model.model.{module_name(linear)}"
        for side, tensor in zip("AB", lora_sides(checkpoint, names), strict=True):
            yield f"{prefix}.lora_{side}.weight", tensor


def target_modules(modules: Sequence[str], layers: int) -> list[str]:
    """What PEFT is told to wrap: endings where each layer has them all, else every module by its name."""
    endings = Counter(".".join(module.rsplit(".", 2)[-2:]) for module in modules)
    return sorted(endings) if set(endings.values()) == {layers} else sorted(modules)


def adapter_config(rank: int, targets: Sequence[str], base: str) -> dict[str, Any]:
    """PEFT's `adapter_config.json` of a LoRA with scale 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


def export(source: Path, target: Path, task: str, base: str | None = None, progress: bool = True) -> Path:
    """Write the adapters of `task` in the checkpoint `source` as a PEFT folder `target`; returns it.

    Args:
        task: "web", "write" (sft and dpo), or an adapter's own name.
        base: what `base_model_name_or_path` says; default: `source` as given.

    Raises:
        ValueError: no such adapter or none at all ("base"); ranks that differ between linears; source and target are
            one folder.
        FileNotFoundError: no weights in `source`. FileExistsError: `target` has files in it.
    """
    checkpoint = Checkpoint(source)  # it may be quantised: adapters are not
    pairs = checkpoint.adapter_pairs()
    layers = len({linear.rsplit(".", 2)[0] for linear in pairs})
    chosen = chosen_pairs(task, pairs)
    if not chosen:
        raise ValueError(f"task {task!r} is the model without adapters: there is nothing to export; use web or write")
    with new_folder(source, target) as part:
        made = lora_tensors(checkpoint, chosen)
        tensors = dict(tqdm(made, f"export {task}", 2 * len(chosen), unit="tensor", disable=not progress))
        ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
        if len(ranks) != 1:
            raise ValueError(f"the linears' ranks differ ({sorted(ranks)}); the model and a PEFT LoRA have one for all")
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = target_modules([module_name(linear) for linear in chosen], layers)
        write_json(part / "adapter_config.json", adapter_config(ranks.pop(), targets, base or str(source)))
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: xcomposer export SRC DST --task web",
        prog="xcomposer export",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of a checkpoint with task adapters")
    parser.add_argument("target", metavar="DST", type=Path, help="new or empty folder")
    parser.add_argument("--task", required=True, help="web, write, or an adapter's name")
    parser.add_argument("--base", help="name of the base model to note in adapter_config.json (default: SRC)")
    try:
        print(export(**vars(parser.parse_args(arguments))))
    except (OSError, ValueError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
