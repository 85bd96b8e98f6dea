"""What commands and examples share: their arguments, and the lines that load the model.

A model folder is a release as it was downloaded. Its name stands in one place: `--model`, else the environment variable
IXC_MODEL, else the demo checkpoint of the clone. Nothing is downloaded.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from xcomposer import CHECKOUT
from xcomposer.family import require_family
from xcomposer.machine import free_bytes, quiet_imports

DATA = CHECKOUT / "examples" / "data"
DEFAULT_MODEL = Path(os.environ.get("IXC_MODEL") or (CHECKOUT / "demo" if (CHECKOUT / "demo").is_dir() else "demo"))
EXPECTED = (OSError, ValueError, TypeError, ImportError, RuntimeError)  # bad input, missing decoder, memory full
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SCORES = (
    "it has a score head, which rates conversations and answers none. AutoModel gives it with get_score, "
    "examples/best_of_n.py shows it beside a model that chats, and xcomposer serve on vLLM serves it"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def one_line(error: BaseException) -> str:
    """What an error says, for a screen."""
    return " ".join(str(error).split()) or type(error).__name__


def arguments(
    description: str | None, max_new_tokens: int = 512, command: str | None = None, example: str | None = None
) -> argparse.ArgumentParser:
    """A parser with the arguments that say which model runs where; the caller adds its own.

    Args:
        description: a docstring, of which the first line is shown.
        command: the subcommand of `xcomposer` it is for, with `example` of its arguments.
    """
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n")[0],
        prog=command and f"xcomposer {command}",
        epilog=command and f"example: xcomposer {command} {example}",
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="folder (default: $IXC_MODEL or demo)")
    parser.add_argument("--num_gpus", type=int, help="0: the CPU; N: over N cards (default: one if there is one)")
    parser.add_argument("--device", help="a torch device, say cuda:1 or mps, in place of --num_gpus")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as the weights were saved")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA made with PEFT, put on top of the model")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help="most tokens of an answer")
    return parser


def load(args: argparse.Namespace):
    """(model, tokenizer) as the arguments say; tells in one line on stderr what runs where.

    Raises:
        SystemExit: no such model folder, card or package, or a model that does not chat; says what to do.
    """
    check_folder(args.model)
    devices = pick_devices(args.num_gpus, args.device)
    dtype = DTYPES.get(args.dtype, "auto")
    if dtype == "auto" and not has_bfloat16(devices[0]):
        dtype = torch.float16  # the release is saved in bfloat16
    placing = {"device_map": "balanced", "max_memory": free_memory(devices)} if len(devices) > 1 else {}

    with quiet_imports():
        import xcomposer.model.modeling_internlm_xcomposer2  # noqa: F401
    try:
        require_family(args.model)
        if AutoConfig.from_pretrained(args.model).head == "score":
            raise ValueError(SCORES)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModel.from_pretrained(args.model, dtype=dtype, **placing).eval()
    except (OSError, ValueError) as error:  # no such hub id, or a checkpoint that is not whole
        raise SystemExit(f"{args.model} cannot be loaded: {one_line(error)}") from error
    if not placing:
        model = model.to(devices[0])
    model.tokenizer = tokenizer
    bound_reuse(model)

    where = " and ".join(device_name(device) for device in devices)
    print(f"{args.model} in {str(model.dtype).removeprefix('torch.')} on {where}", file=sys.stderr)
    if args.adapter is not None:
        model = with_adapter(model, args.adapter)
    return model, tokenizer


def bound_reuse(model) -> None:
    """Let what is kept between turns take a quarter of the memory that is free beside the weights, at most; a fifth of
    that for pictures. The model's own limits (see `default_limits`) know its sizes, but not the machine.
    """
    quarter = free_bytes(model.device) // 4
    model.reuse.picture_bytes = min(model.reuse.picture_bytes, quarter // 5)
    model.reuse.prefix_bytes = min(model.reuse.prefix_bytes, quarter - model.reuse.picture_bytes)


def check_folder(folder: Path) -> None:
    """A folder without a model is a newcomer's first stumble: say the way on. A hub id is the library's to judge."""
    if not folder.exists() and HUB_ID.fullmatch(str(folder)):
        return
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        if inside:
            part = folder / ("base" if "base" in inside else inside[0])
            raise SystemExit(f"{folder} {what}; its folders {', '.join(inside)} have one: pass --model {part}")
        raise SystemExit(
            f"{folder} {what}. Pass --model FOLDER, where FOLDER is a downloaded release as it is; the clone's own "
            f"demo folder is a small model to try things with."
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise SystemExit(
            f"{folder} has no weights (*.safetensors or *.bin). The demo's come with the repo, `git checkout {folder}` "
            f"brings them back; a release's are downloaded."
        )


def pick_devices(num_gpus: int | None, device: str | None) -> list[torch.device]:
    """Where to run: `device` if said, else `num_gpus` cards (0: CPU), else the first card, Apple's GPU, the CPU."""
    cards = torch.cuda.device_count()
    if device is not None:
        try:
            return [torch.empty(0, device=device).device]
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            raise SystemExit(f"--device {device} does not work here: {str(error).splitlines()[0]}") from error
    if num_gpus is None:
        if not cards and torch.backends.mps.is_available():
            return [torch.device("mps")]
        num_gpus = min(cards, 1)
    if not 0 <= num_gpus <= cards:
        raise SystemExit(f"--num_gpus {num_gpus}, but torch sees {cards} GPUs here; --num_gpus 0 runs on the CPU")
    return [torch.device("cuda", card) for card in range(num_gpus)] or [torch.device("cpu")]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself: older cards and older macOS do not."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def free_memory(devices: list[torch.device]) -> dict[int | str, int]:
    """Bytes that weights may take on each card (a tenth of what is free stays for activations), none elsewhere."""
    return {device.index: int(0.9 * torch.cuda.mem_get_info(device)[0]) for device in devices} | {"cpu": 0}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"GPU {device.index} ({torch.cuda.get_device_name(device)})"
    found = " (no GPU found)" if device.type == "cpu" and not torch.cuda.is_available() else ""
    return f"the {device.type.upper()}{found}"


def with_adapter(model, folder: Path):
    """`model` with the LoRA in `folder` on. Its methods stay reachable: chat, write_artical and the rest."""
    if not (folder / "adapter_config.json").is_file():
        raise SystemExit(f"{folder} is no adapter folder: it has no adapter_config.json")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise SystemExit(f"--adapter needs peft ({error}): pip install peft") from error
    return PeftModel.from_pretrained(model, folder).eval()
