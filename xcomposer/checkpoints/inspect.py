"""Say what a folder of weights holds, whether it is whole, and whether it fits on this machine.

    xcomposer inspect FOLDER
    xcomposer inspect FOLDER --json

Only the headers of the weight files are read. Exit code 1 where the folder cannot be loaded; every fault is named.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xcomposer.checkpoints.adopt import ADAPTER, Findings, describe, examine
from xcomposer.machine import amount, devices, table
from xcomposer.model.weight_files_internlm_xcomposer2 import Misfit

# Beside weights and cache: activations of one chunk of a prompt and of eight tiles, and what the allocator keeps.
WORKING = 1.5e9
# Bytes a parameter takes once the decoder's own linears are quantised to nf4: half a byte, and scales.
NF4_BYTES = 0.53


def requirements(found: Findings) -> dict[str, Any]:
    """Bytes that the checkpoint takes: weights without task adapters, each task adapter, a token of conversation.

    `nf4` is what the weights without adapters take when the decoder's own linears are loaded in 4 bits.
    """
    text = found.config.text_config
    adapters: Counter = Counter()
    base = quantised = itemsize = 0
    for name, tensor in found.tensors.items():
        match = ADAPTER.search(name)
        if match and match[1] != "Plora":
            adapters[match[1].removeprefix("lora_")] += tensor.nbytes
            continue
        base += tensor.nbytes
        is_linear = name.startswith("model.layers.") and match is None and len(tensor.shape) == 2
        quantised += tensor.size * NF4_BYTES if is_linear else tensor.nbytes
        itemsize = max(itemsize, tensor.nbytes // max(tensor.size, 1))
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * min(itemsize, 2)
    return {"weights": base, "nf4": int(quantised), "adapters": dict(adapters), "token": per_token}


def fits(needs: dict[str, Any], context: int) -> list[tuple[str, str]]:
    """A row for each device: whether the model fits there with a whole conversation, and if not, what would."""
    conversation = needs["token"] * context
    rows = []
    for device in devices():
        whole = needs["weights"] + conversation + WORKING
        verdict = f"needs {amount(whole)} of {amount(device.free)} free: "
        if whole <= device.free:
            verdict += "fits"
        elif needs["nf4"] + conversation + WORKING <= device.free:
            verdict += f"does not fit; in 4 bits (nf4) it takes {amount(needs['nf4'])} and does"
        else:
            verdict += "does not fit, nor in 4 bits; share it over several cards or offload it (device_map='auto')"
        rows.append((device.name, f"{verdict} ({device.title})"))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example: xcomposer inspect demo", prog="xcomposer inspect"
    )
    parser.add_argument("folder", type=Path, help="a downloaded checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args(argv)
    try:
        found = examine(options.folder)
    except (Misfit, OSError) as error:
        lines = error.lines if isinstance(error, Misfit) else [str(error)]
        print(f"inspect: {options.folder} cannot be loaded", file=sys.stderr)
        for line in lines:
            print(f"  - {line}", file=sys.stderr)
        return 1
    rows, needs = describe(found), requirements(found)
    verdicts = fits(needs, found.config.context_length)
    if options.json:
        print(json.dumps({"folder": str(options.folder), **dict(rows), "bytes": needs, "fits": dict(verdicts)}))
        return 0
    adapters = ", ".join(f"{name} {amount(size)}" for name, size in needs["adapters"].items())
    memory = f"weights {amount(needs['weights'])}" + (
        f" (adapters while they are used: {adapters})" if adapters else ""
    )
    memory += f"; {amount(needs['token'])} a token of conversation"
    print(f"{options.folder}\n{table([*rows, ('memory', memory), *verdicts])}")
    return 0
