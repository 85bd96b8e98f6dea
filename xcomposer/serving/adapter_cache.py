"""Task adapters of a checkpoint as the PEFT folders that vLLM serves: written once, then found in a cache.

`$XCOMPOSER_CACHE/adapters`, by default `~/.cache/xcomposer/adapters`, holds a folder for each checkpoint and task. Each
time it is used it is compared with the checkpoint, tensor by tensor, and written anew where they differ.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from xcomposer.checkpoints.export import export, lora_tensors
from xcomposer.checkpoints.merge import Checkpoint, Pairs, chosen_pairs
from xcomposer.model.configuration_internlm_xcomposer2 import INFER_MODES


def cache_folder() -> Path:
    """Where the folders are kept; made when the first is written."""
    root = os.environ.get("XCOMPOSER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "xcomposer")
    return Path(root).expanduser() / "adapters"


def tasks_of(pairs: Pairs) -> list[str]:
    """What a checkpoint's adapters can do: the modes of the public methods, then adapters that no mode uses."""
    here = {adapter for of_linear in pairs.values() for adapter in of_linear}
    modes = [mode for mode, adapters in INFER_MODES.items() if adapters and here.issuperset(adapters)]
    used = {adapter for adapters in INFER_MODES.values() for adapter in adapters}
    return [*modes, *sorted(here - used)]


def holds(folder: Path, checkpoint: Checkpoint, task: str) -> bool:
    """Whether a PEFT folder is whole and holds what the checkpoint's adapters of `task` are."""
    chosen = chosen_pairs(task, checkpoint.adapter_pairs())
    if not (folder / "adapter_config.json").is_file():
        return False
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
            names = set(stored.keys())
            for name, tensor in lora_tensors(checkpoint, chosen):
                if name not in names or not torch.equal(stored.get_tensor(name), tensor):
                    return False
                names.remove(name)
            return not names
    except (OSError, SafetensorError):
        return False


def exported(source: Path, task: str, progress: bool = True) -> Path:
    """The PEFT folder of the adapters of `task` in the checkpoint `source`, from the cache or written there.

    Raises:
        ValueError, FileNotFoundError: as `export`. OSError: the cache cannot be written.
    """
    source = source.resolve()
    target = cache_folder() / f"{source.name}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:12]}" / task
    if holds(target, Checkpoint(source), task):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = export(source, Path(scratch, "new"), task, progress=progress)
        if target.exists():  # of other weights; a server that reads it keeps its open files
            target.rename(Path(scratch, "old"))
        try:
            new.rename(target)
        except OSError:  # another server was quicker
            if not holds(target, Checkpoint(source), task):
                raise
    return target
