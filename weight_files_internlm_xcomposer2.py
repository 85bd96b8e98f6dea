"""The weight files of a folder: which of them count, what their headers say, and their tensors one by one.

The one reader for the model, for adopting, merging and inspecting: all look where transformers looks, in its order.
Headers give names, shapes and dtypes; data is mapped into memory and read when a tensor is asked for.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .packed_weights_internlm_xcomposer2 import LAYOUTS as PACKED_LAYOUTS
from .packed_weights_internlm_xcomposer2 import PackedLinear, packed_linears, unpack

# What transformers looks for in a folder, in its order, and whether that is an index of several files.
LAYOUTS = {
    "model.safetensors": False,
    "model.safetensors.index.json": True,
    "pytorch_model.bin": False,
    "pytorch_model.bin.index.json": True,
}
PACKED_SETTINGS = "quantize_config.json"  # stands beside weights that AutoGPTQ wrote
PACKED_FILE = "gptq_model-*.safetensors"  # what it calls them
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the format's own limit


class Misfit(ValueError):
    """The folder cannot be used; `lines` say why, one fault each."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


class NoWeights(Misfit):
    """The folder has no weight file of the names that are looked for."""


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

    @property
    def is_floating(self) -> bool:
        return getattr(torch, self.dtype).is_floating_point


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


def with_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.fp16.safetensors`, `model.safetensors.index.json` -> `...index.fp16.json`."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def names_looked_for(variant: str | None = None, use_safetensors: bool | None = None) -> dict[str, str]:
    """The names that transformers looks for, in its order, and which of `LAYOUTS` each is."""
    layouts = [name for name in LAYOUTS if use_safetensors is None or use_safetensors == (".safetensors" in name)]
    return {with_variant(name, variant): name for name in layouts}


def weight_files(
    folder: Path, variant: str | None = None, use_safetensors: bool | None = None
) -> tuple[list[str], dict[str, str]]:
    """Names of the files that transformers would load, and where the index (if any) puts each tensor.

    Args:
        variant, use_safetensors: as in `from_pretrained`.

    Raises:
        NoWeights: there are none. Misfit: the index names files that are not there.
    """
    names = names_looked_for(variant, use_safetensors)
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None and use_safetensors is not False and (folder / PACKED_SETTINGS).is_file():
        packed = sorted(path.name for path in folder.glob(PACKED_FILE))
        if packed:
            return packed, {}
    if found is None:
        loose = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
        if loose:
            raise NoWeights(f"{count(len(loose), 'weight file')} ({some(loose)}) but none of {', '.join(names)}")
        here = sorted(path.name for path in folder.iterdir())
        there = f"it has {some(here)}" if here else "it is empty"
        raise NoWeights(f"no weights: none of {', '.join(names)} ({there}); download them first")
    layout = found
    if not LAYOUTS[names[layout]]:
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


def read_headers(
    folder: Path, variant: str | None = None, use_safetensors: bool | None = None
) -> tuple[list[str], list[Stored]]:
    """The weight files of `folder` and the tensors in them; arguments as `weight_files`.

    Raises:
        Misfit: all faults of the files together.
    """
    files, where = weight_files(folder, variant, use_safetensors)
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


def packing_of(folder: Path) -> dict[str, Any]:
    """What a folder says of its packed weights: bits, group size, format; empty where it says nothing."""
    own, config = folder / PACKED_SETTINGS, folder / "config.json"
    if own.is_file():
        return read_json(own)
    stated = read_json(config).get("quantization_config") if config.is_file() else None
    return stated if isinstance(stated, dict) else {}


class WeightFiles:
    """The tensors of a folder's weight files by name; arguments as `weight_files`.

    Linears packed in 4 bits (`packed`) appear as the plain weights they stand for, and are read as such.

    A file stays mapped once it is opened, so that it can still be read after its name is gone. A copy or a pickle of
    this object holds names alone and opens the files anew.

    Raises:
        Misfit: no weights, a file that is missing, cut short or no weight file, a name in two files, a packed tensor
            of an impossible shape.
    """

    def __init__(self, folder: Path, variant: str | None = None, use_safetensors: bool | None = None):
        self.folder = folder
        self.files, stored = read_headers(folder, variant, use_safetensors)
        self._stored = {tensor.name: tensor for tensor in stored}
        self.packed: dict[str, PackedLinear] = {}
        if any(name.endswith(".qweight") for name in self._stored):
            self.packed, faults = packed_linears(self._stored, packing_of(folder))
            if faults:
                raise Misfit(*faults[:3], *([f"and {len(faults) - 3:,} more of this sort"] if faults[3:] else ()))
        parts = {name for linear in self.packed.values() for name in linear.parts.values()}
        self.tensors: dict[str, Stored] = {name: tensor for name, tensor in self._stored.items() if name not in parts}
        for name, linear in self.packed.items():
            file = self._stored[linear.parts["qweight"]].file
            self.tensors[name] = Stored(name, linear.shape, linear.dtype, file)
        self._mapped: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def __deepcopy__(self, memo: dict) -> "WeightFiles":
        return self

    def map(self, file: str) -> Any:
        """Map a file into memory, once.

        Raises:
            Misfit: it cannot be opened any more.
        """
        if file not in self._mapped:
            path = self.folder / file
            try:
                if file.endswith(".safetensors"):
                    self._mapped[file] = safe_open(path, framework="pt")
                else:
                    with path.open("rb") as opened:
                        zipped = opened.read(2) == b"PK"  # files older than PyTorch 1.6 cannot be mapped
                    self._mapped[file] = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
            except Exception as error:  # of safetensors, of the unpickler, of the system
                raise Misfit(f"{path} cannot be read ({error}); is it still there, and whole?") from error
        return self._mapped[file]

    def read(self, name: str, unpacked_dtype: torch.dtype | None = None) -> Tensor:
        """The tensor called `name`, in memory of its own.

        Args:
            unpacked_dtype: of a weight that is packed; default: that of its scales.
        """
        if name not in self.packed:
            return self._read(name)
        linear = self.packed[name]
        parts = {part: self._read(stored) for part, stored in linear.parts.items()}
        try:
            return unpack(PACKED_LAYOUTS[linear.layout], **parts, dtype=unpacked_dtype)
        except ValueError as error:
            raise Misfit(f"{name}: {error}") from error

    def _read(self, name: str) -> Tensor:
        source = self.map(self._stored[name].file)
        return (source[name] if isinstance(source, Mapping) else source.get_tensor(name)).clone()

    @property
    def packing(self) -> str | None:
        """What is packed and how, in words; None where nothing is."""
        if not self.packed:
            return None
        layouts = sorted({linear.layout for linear in self.packed.values()})
        sizes = sorted({linear.shape[1] // linear.groups for linear in self.packed.values()})
        groups = " and ".join(f"{size:,}" for size in sizes)
        linears = count(len(self.packed), "linear")
        return f"4 bits ({' and '.join(layouts)}) in groups of {groups}: {linears}, read as full precision"
