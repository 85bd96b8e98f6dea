"""Rename a LoRA that was trained on the original model, for programs that read an adapter's files themselves.

    xcomposer convert-adapter SRC DST
    python -m xcomposer.checkpoints.convert_adapter SRC DST

The released code lets PEFT wrap `attention.wqkv` and its like whole; here the LoRA sits on their `.linear`, and the
decoder and the tower have other names (`RENAMINGS`). PEFT itself loads SRC onto this model as it is. Weights stay as
they are: the logits are the same.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xcomposer.checkpoints.merge import new_folder, write_json
from xcomposer.model.adapter_names_internlm_xcomposer2 import (
    LORA_NAME,
    PEFT_PREFIX,
    by_module,
    renamed_key,
    renamed_module,
)

CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
NEW_NAMES = (".language_model.", ".linear.lora_", f"{PEFT_PREFIX}model.vision_tower.", ".task_A.", ".task_B.")


def converted_key(key: str) -> str:
    """See `renamed_key`.

    Raises:
        ValueError: the name is this tree's already, or not PEFT's.
    """
    if any(part in key for part in NEW_NAMES):
        raise ValueError(f"{key} is named as here already: the adapter was trained on this code, and loads as it is")
    if not key.startswith(PEFT_PREFIX):
        raise ValueError(f"{key} does not begin with {PEFT_PREFIX}: the file is no adapter that PEFT has saved")
    return renamed_key(key)


def lora_modules(keys: Iterable[str]) -> list[str]:
    """Released names of the modules that carry a LoRA in a file with these names."""
    matches = (LORA_NAME.match(key.removeprefix(PEFT_PREFIX)) for key in keys)
    return sorted({match["module"] for match in matches if match})


def converted_config(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A LoRA's PEFT config for this module tree.

    Targets are written out, as the weights' names say them: patterns and layer numbers of the released tree would
    mean something else here.

    Args:
        keys: names in the adapter's file.

    Raises:
        ValueError: another kind of adapter, or no LoRA among the names.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {kind!r}; only LORA adapters sit on linears and can be renamed")
    modules = lora_modules(keys)
    if not modules:
        raise ValueError("the file holds no lora_A or lora_B; is it an adapter's?")
    to_save = config.get("modules_to_save")
    return {
        **config,
        "target_modules": [renamed_module(module) for module in modules],
        "rank_pattern": by_module(config.get("rank_pattern"), modules),
        "alpha_pattern": by_module(config.get("alpha_pattern"), modules),
        "modules_to_save": to_save and [renamed_module(module) for module in to_save],
        **dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules", "auto_mapping")),
    }


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of an adapter as PEFT saves them.

    Raises:
        FileNotFoundError: one of the two is not there. ValueError: one cannot be read.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}; SRC must be the folder that PEFT saved the LoRA to")
    weights = next((folder / name for name in (WEIGHTS_FILE, OLD_WEIGHTS_FILE) if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS_FILE} nor {OLD_WEIGHTS_FILE}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        is_safe = weights.name == WEIGHTS_FILE
        return config, load_file(weights) if is_safe else torch.load(weights, map_location="cpu", weights_only=True)
    except (json.JSONDecodeError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"an adapter's file in {folder} cannot be read; is the download whole? ({error})") from error


def convert_adapter(source: Path, target: Path) -> Path:
    """Write the LoRA in `source`, trained on the original model, to the new folder `target`; returns it.

    Raises:
        FileNotFoundError: no adapter in `source`. FileExistsError: `target` has files in it.
        ValueError: not a LoRA, or named for this code already; a file that cannot be read.
    """
    config, weights = read_adapter(source)
    converted = {converted_key(name): tensor.contiguous() for name, tensor in weights.items()}
    config = converted_config(config, weights)
    with new_folder(source, target) as part:
        save_file(converted, part / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(part / CONFIG_FILE, config)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: xcomposer convert-adapter lora-of-the-original lora",
        prog="xcomposer convert-adapter",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="folder with adapter_config.json and its weights")
    parser.add_argument("target", metavar="DST", type=Path, help="new or empty folder")
    try:
        print(convert_adapter(**vars(parser.parse_args(arguments))))
    except (OSError, ValueError) as error:
        print(f"convert-adapter: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
