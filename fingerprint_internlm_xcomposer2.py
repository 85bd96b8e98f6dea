"""What a model's outputs depend on besides its inputs, as far as it can be seen: weights, numbers, hooks.

What was computed before is good as long as this is the same. Weights are compared by content: PyTorch does not count
writes through `.data`, so nothing less would see them. It reads each weight once a call, about what one generated token
reads.
"""

import dis
import hashlib
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

BLOCKS = 64  # sums of a tensor's bits, so that parts which change places do not go unseen
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device})
_TASK_ADAPTER = re.compile(r"\.task_[AB]\.(\w+)")
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}


class Stamp(NamedTuple):
    """What a kept tensor depends on besides its own inputs.

    Attributes:
        circumstances: modes, numbers and hooks: they may come back, and the tensor is good again.
        contents: for each part of the model, its name and a hash of its weights: what they were is gone.
    """

    circumstances: Hashable
    contents: tuple[tuple[Hashable, bytes], ...]

    def outdates(self, earlier: "Stamp") -> bool:
        """Whether a part that both depend on has other weights now."""
        now = dict(self.contents)
        return any(now.get(part, content) != content for part, content in earlier.contents)


class UnreadableWeight(Exception):
    """A weight whose content cannot be read from here."""


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: itself, or what a subclass (quantised, sharded) says it holds."""
    tensor = tensor.data
    if type(tensor) is Tensor:
        yield tensor
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        raise UnreadableWeight(type(tensor).__name__)
    for name in flatten()[0]:
        yield from _plain_tensors(getattr(tensor, name))


def _sums(tensor: Tensor) -> Tensor:
    """A plain tensor's bits, added up exactly in blocks: another value of any one element gives another sum."""
    flat = tensor.contiguous().view(-1)
    fits = (word for word in _WORDS if not (flat.nbytes | flat.data_ptr()) % word.itemsize)
    words = flat.view(next(fits))
    return words.view(math.gcd(len(words), BLOCKS), -1).sum(1)


@torch.no_grad()
def content_of(tensors: Iterable[Tensor]) -> bytes:
    """Hash of the values, types and places of tensors. Offloaded ones ("meta") count by shape.

    Raises:
        UnreadableWeight: a tensor of a subclass that does not tell what it holds.
    """
    content = hashlib.blake2b(digest_size=16)
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        for plain in _plain_tensors(tensor):
            content.update(f"{plain.dtype} {plain.device} {plain.shape}".encode())
            if plain.numel() and not plain.is_meta:
                sums.setdefault(plain.device, []).append(_sums(plain))
    for rows in sums.values():
        content.update(torch.cat(rows).cpu().numpy())
    return content.digest()


def _number(value: Any) -> Hashable:
    """A plain value, or a collection of plain values; anything else counts as nothing."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        return tuple((_number(name), _number(entry)) for name, entry in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_number(entry) for entry in value)
    return None


def _only_looks(hook: Any) -> bool:
    """Whether a hook is a Python function without a value to return: PyTorch takes what a hook returns."""
    code = getattr(hook, "__code__", None)
    if code is None:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "CACHE", "NOP")]
    values = [
        before.argval if before.opname == "LOAD_CONST" else before.opname
        for before, step in pairwise(steps)
        if step.opname == "RETURN_VALUE"
    ]
    values += [step.argval for step in steps if step.opname == "RETURN_CONST"]
    in_place = any(name.endswith("_") and not name.endswith("__") for name in code.co_names)
    return not in_place and all(value is None for value in values)


def hooks_of(module: nn.Module) -> Hashable:
    """Numbers of the forward hooks that may change what a module takes or gives; PyTorch gives no number twice."""
    return _numbers(module._forward_hooks, module._forward_pre_hooks)


def _numbers(after: dict, before: dict) -> Hashable:
    return (*after, *(number for number, hook in before.items() if not _only_looks(hook)))


def behaviour_of(modules: Iterable[nn.Module]) -> Hashable:
    """What modules do besides their weights: their plain attributes (scales, rope numbers, the state of PEFT's
    adapters, training), forward hooks, and a `forward` put in the place of their class's.

    A hook that runs before a module and returns nothing only looks on, and does not count.
    """
    seen: list[Hashable] = [_numbers(torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)]
    for module in modules:
        fields = vars(module)
        numbers = [(name, _number(value)) for name, value in fields.items() if name not in _BOOKKEEPING]
        seen.append(tuple(pair for pair in numbers if pair[1] is not None))
        hooks = fields["_forward_hooks"] or fields["_forward_pre_hooks"]
        seen.append((hooks_of(module) if hooks else (), id(fields["forward"]) if "forward" in fields else 0))
    return hash(tuple(seen))


class Part(NamedTuple):
    """Some modules of a model, and the tensors that they hold, registered or not."""

    modules: list[nn.Module]
    tensors: list[Tensor]


def part_of(name: str) -> str:
    """What part of the base model a module of this name belongs to: "vision", "decoder", or a task adapter's name."""
    if not name.startswith("language_model"):
        return "vision"
    adapter = _TASK_ADAPTER.search(name)
    return adapter[1] if adapter else "decoder"


def parts_of(model: nn.Module, part_of: Callable[[str], str]) -> dict[str, Part]:
    """A model's modules and tensors by part."""
    parts: dict[str, Part] = {}
    for name, module in model.named_modules():
        part = parts.setdefault(part_of(name), Part([], []))
        part.modules.append(module)
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        part.tensors.extend(value for value in held if isinstance(value, Tensor))
    return parts


def stamp_of(parts: dict[str, Part], names: Sequence[str], circumstances: tuple) -> Stamp:
    """A stamp of these parts.

    Raises:
        UnreadableWeight: see `content_of`.
    """
    modules = [module for name in names for module in parts[name].modules]
    contents = tuple((name, content_of(parts[name].tensors)) for name in names)
    return Stamp((*circumstances, behaviour_of(modules)), contents)
