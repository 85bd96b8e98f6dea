"""What weight files say of themselves: names, shapes and dtypes, read from their headers, never their data."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# What transformers looks for in a folder, in its order, and whether that is an index of several files.
LAYOUTS = {
    "model.safetensors": False,
    "model.safetensors.index.json": True,
    "pytorch_model.bin": False,
    "pytorch_model.bin.index.json": True,
}
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the format's own limit


class Misfit(Exception):
    """The folder cannot be adopted; `lines` say why, one fault each."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclass(frozen=True)
class Stored:
    """One tensor of a weight file, as its header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * getattr(torch, self.dtype).itemsize


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
    if twice:
        raise ValueError(f"{count(len(twice), 'name')} in it twice: {some(twice)}")
    return dict(pairs)


def read_safetensors(path: Path) -> list[Stored]:
    """The tensors of a safetensors file, from its header.

    Raises:
        Misfit: the file is cut short, or it is no safetensors file, or a name stands in it twice.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise Misfit(f"{path.name} is a Git LFS pointer, not the weights; run `git lfs pull` or download it again")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER):
            raise Misfit(f"{path.name} ({size:,} bytes) is cut short or no safetensors file; download it again")
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes, object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        tensors = [
            Stored(name, tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]], path.name)
            for name, entry in header.items()
        ]
        spans = [entry["data_offsets"] for entry in header.values()]
        wrong = [t.name for t, (first, end) in zip(tensors, spans, strict=True) if end - first != t.nbytes]
        ends = max((end for _, end in spans), default=0) + 8 + length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Misfit(f"{path.name} has a broken header ({type(error).__name__}: {error}); download it again") from error
    if wrong:
        raise Misfit(f"{path.name}: data and shape disagree in {count(len(wrong), 'tensor')}: {some(wrong)}")
    if ends != size:
        what = "is cut short" if size < ends else "is longer than its header says"
        raise Misfit(f"{path.name} {what}: {size:,} bytes where {ends:,} are due; download it again")
    return tensors


def read_bin(path: Path) -> list[Stored]:
    """The tensors of a PyTorch file; nothing in it is run and their data is not read.

    Raises:
        Misfit: the file is cut short, or holds something else than named tensors.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start == b"version ":
        raise Misfit(f"{path.name} is a Git LFS pointer, not the weights; run `git lfs pull` or download it again")
    try:  # files older than PyTorch 1.6 are no zip archives, and those cannot be mapped
        content = torch.load(path, weights_only=True, mmap=start.startswith(b"PK"), map_location="meta")
    except Exception as error:  # whatever the unpickler meets in a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise Misfit(f"{path.name} cannot be read ({reason}); download it again") from error
    if not isinstance(content, Mapping):
        raise Misfit(f"{path.name} holds a {type(content).__name__}, not tensors by name")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise Misfit(f"{path.name} holds {count(len(others), 'thing')} that are no tensors: {some(others)}")
    return [
        Stored(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), path.name)
        for name, value in content.items()
    ]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a decoding error is one too
        raise Misfit(f"{path.name} is no JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise Misfit(f"{path.name} holds a {type(content).__name__}, not fields by name")
    return content


def weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the files that transformers would load, and where the index (if any) puts each tensor.

    Raises:
        Misfit: there are none, or the index names files that are not there.
    """
    layout = next((name for name in LAYOUTS if (folder / name).is_file()), None)
    if layout is None:
        loose = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
        if loose:
            raise Misfit(f"{count(len(loose), 'weight file')} ({some(loose)}) but none of {', '.join(LAYOUTS)}")
        here = sorted(path.name for path in folder.iterdir())
        there = f"it has {some(here)}" if here else "it is empty"
        raise Misfit(f"no weights: none of {', '.join(LAYOUTS)} ({there}); download them first")
    if not LAYOUTS[layout]:
        return [layout], {}
    where = read_json(folder / layout).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise Misfit(f"{layout} has no weight_map from tensors to files; download it again")
    files = sorted(set(where.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise Misfit(f"{layout} names files outside the folder: {some(outside)}")
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        lost = sum(file in absent for file in where.values())
        raise Misfit(
            f"{len(absent)} of the {len(files)} files named in {layout} are missing, with {count(lost, 'tensor')}: "
            f"{some(absent)}; download them"
        )
    return files, where


def read_headers(folder: Path) -> tuple[list[str], list[Stored]]:
    """The weight files of `folder` and the tensors in them.

    Raises:
        Misfit: all faults of the files together.
    """
    files, where = weight_files(folder)
    faults: list[str] = []
    stored: list[Stored] = []
    for file in files:
        try:
            stored += (read_safetensors if file.endswith(".safetensors") else read_bin)(folder / file)
        except Misfit as misfit:
            faults += misfit.lines
    if faults:
        raise Misfit(*faults)
    homes = defaultdict(list)
    for tensor in stored:
        homes[tensor.name].append(tensor.file)
    twice = [f"{name} ({', '.join(home)})" for name, home in homes.items() if len(home) > 1]
    if twice:
        faults.append(f"{count(len(twice), 'tensor')} in more than one file: {some(twice)}")
    lost = [f"{name} ({file})" for name, file in where.items() if file not in homes[name]]
    if lost:
        faults.append(f"{count(len(lost), 'tensor')} not in the file the index names: {some(lost)}")
    if faults:
        raise Misfit(*faults)
    return files, stored
