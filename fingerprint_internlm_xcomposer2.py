"""What a model's outputs depend on besides its inputs, as far as it can be seen: weights, numbers, code.

What was computed before is good as long as this is the same, and what cannot be seen is `Unseen`: then nothing is kept.
Weights are compared by content: PyTorch counts no writes through `.data`, nor those of NumPy, so whatever trusts its
counters misses them. Each weight that kept rows depend on is read once a call, at the speed of memory: 0.4 GB take a
CPU 12 ms, the 7B release's 15 GB an H200 about 4 ms and a CPU as long as one generated token. Of the embedding table
only the rows of a prompt's own tokens are read (`rows_of`).
"""

import functools
import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .patches_internlm_xcomposer2 import Unseen, forwards_of

WORD = 8  # bytes
GROUP = 128  # words that are added up to one: a row of a large weight is longer, and fewer cost time
SMALL = 1 << 16  # words
AT_ONCE = 1 << 20  # sums held at once
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device})
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
_ADAPTERS = ("task_A", "task_B")


class Stamp(NamedTuple):
    """What a kept tensor depends on besides its own inputs.

    Attributes:
        circumstances: modes, numbers and code: they may come back, and the tensor is good again.
        contents: for each part of the model, its name and a hash of its weights: what they were is gone.
    """

    circumstances: Hashable
    contents: tuple[tuple[Hashable, bytes], ...]

    def outdates(self, earlier: "Stamp") -> bool:
        """Whether a part that both depend on has other weights now."""
        now = dict(self.contents)
        return any(now.get(part, content) != content for part, content in earlier.contents)


# ------------------------------------------------------------------------------------------------------------- tensors


def _plain_tensors(value: Any) -> Iterator[Tensor | Hashable]:
    """The plain tensors and numbers that a weight is made of: itself, or what a subclass (quantised, sharded) or a
    state of bitsandbytes holds.

    Raises:
        Unseen: a subclass that does not tell.
    """
    if isinstance(value, Tensor):
        data = value.data
        if type(data) is Tensor:
            yield data
        elif (flatten := getattr(data, "__tensor_flatten__", None)) is not None:
            names, context = flatten()
            yield from _plain_tensors(context)
            for name in names:
                yield from _plain_tensors(getattr(data, name))
        else:
            raise Unseen(f"a weight of type {type(data).__name__}")
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) and hasattr(value, "__dict__"):
            yield from _plain_tensors(vars(value))
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield name
            yield from _plain_tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _plain_tensors(entry)
    elif type(value) in _PLAIN:
        yield value
    elif _of_bitsandbytes(value) and not isinstance(value, nn.Module):
        yield from _plain_tensors(vars(value))


def _of_bitsandbytes(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "bitsandbytes"


def _words(tensor: Tensor) -> Iterator[Tensor]:
    """A plain tensor's bytes as 64-bit words (n,), and those after the last whole word."""
    raw = tensor.contiguous().view(-1)
    whole = raw.nbytes // WORD * WORD
    misplaced = (raw.storage_offset() * raw.element_size() | raw.data_ptr()) % WORD
    if whole < raw.nbytes or misplaced:
        raw = raw.view(torch.uint8)
        yield raw[whole:].long()
        raw = raw[:whole].clone() if misplaced else raw[:whole]
    yield raw.view(torch.int64)


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """A plain tensor's words, added up exactly in groups: another value of any one element gives another sum, and so
    do groups that change places (see `_fold`). Where a tensor is small, elements of a group may not change places
    either; of a large one, all would have to be multiplied for that, at three times the price.
    """
    for words in _words(tensor):
        whole = len(words) // GROUP * GROUP
        if whole:
            groups = words[:whole].view(-1, GROUP)
            yield (groups * _odd_numbers(GROUP, groups.device) if whole <= SMALL else groups).sum(1)
        if whole < len(words):
            yield words[whole:]


@functools.lru_cache(maxsize=8)
def _some_odd_numbers(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count, device=device) * 2 + 1


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return _some_odd_numbers(1 << max(count - 1, 1).bit_length(), device)[:count]


def _fold(sums: list[Tensor]) -> Tensor:
    """Sums -> one word (1,): each by another odd factor, so that a change of places counts, and none is lost."""
    row = sums[0] if len(sums) == 1 else torch.cat(sums)
    return (row * _odd_numbers(len(row), row.device)).sum(0, keepdim=True)


class _Content:
    """Tensors of one device, read into one word, and few of their sums held on the way."""

    def __init__(self):
        self.sums: list[Tensor] = []
        self.held = 0

    def add(self, tensor: Tensor) -> None:
        for sums in _sums(tensor):
            self.sums.append(sums)
            self.held += len(sums)
        if self.held > AT_ONCE:
            self.sums, self.held = [_fold(self.sums)], 1


@torch.no_grad()
def content_of(values: Iterable[Any]) -> bytes:
    """Hash of the values, types and places of tensors, and of the plain values among them.

    Raises:
        Unseen: a tensor that cannot be read, see `_plain_tensors`; one without data ("meta").
    """
    about: list[Hashable] = []
    contents: dict[torch.device, _Content] = {}
    for value in values:
        for plain in _plain_tensors(value):
            if not isinstance(plain, Tensor):
                about.append(_number(plain))
                continue
            about += (plain.dtype, plain.device, plain.shape)
            if plain.is_meta:
                raise Unseen("a weight that is elsewhere (meta)")
            try:
                contents.setdefault(plain.device, _Content()).add(plain)
            except (RuntimeError, TypeError) as error:  # bits that PyTorch does not show
                raise Unseen(f"a weight of type {plain.dtype}") from error
    found = [int(_fold(content.sums)) if content.sums else 0 for content in contents.values()]
    return hashlib.blake2b(repr((hash(tuple(about)), found)).encode(), digest_size=16).digest()


@torch.no_grad()
def rows_of(embedding: nn.Module, ids: Iterable[Hashable]) -> dict[int, Hashable]:
    """The content of an embedding's rows, by token id (what is no id is left out); none of one that is `kept_whole`."""
    wanted = sorted({token for token in ids if isinstance(token, int)})
    if kept_whole(embedding) or not wanted:
        return {}
    weight = embedding.weight.data
    rows = weight[torch.tensor(wanted, device=weight.device)]
    if rows.shape[1] * rows.element_size() % WORD:
        words = rows.view(torch.uint8).long()
    else:
        words = rows.view(torch.int64)
    sums = (words * _odd_numbers(words.shape[1], weight.device)).sum(1)
    return dict(zip(wanted, sums.tolist(), strict=True))


def kept_whole(embedding: nn.Module) -> bool:
    """Whether an embedding is more than a plain table whose rows speak for themselves."""
    weight = getattr(embedding, "weight", None)
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and type(weight) is nn.Parameter
    return not plain or type(weight.data) is not Tensor or weight.is_meta


# --------------------------------------------------------------------------------------------------- parts of a model


class Part:
    """Some modules of a model, their plain attributes, and the tensors that they hold, registered or not."""

    def __init__(self):
        self.modules: list[nn.Module] = []
        self.numbers: list[Hashable] = []
        self.tensors: list[Any] = []

    def add(self, module: nn.Module, skipped: Tensor | None) -> None:
        """Look through a module's own attributes: its scales, rope numbers, the state of PEFT's adapters, training."""
        fields = vars(module)
        self.modules.append(module)
        held = [*fields["_parameters"].items(), *fields["_buffers"].items()]
        for name, value in fields.items():
            if name in _BOOKKEEPING:
                continue
            if type(value) in _PLAIN:
                self.numbers.append((name, _number(value)))
            elif isinstance(value, Tensor) or _of_bitsandbytes(value):
                held.append((name, value))
            elif (number := _number(value)) is not None:
                self.numbers.append((name, number))
        for name, value in held:
            if value is None:
                continue
            if value is skipped:
                self.numbers.append((value.dtype, value.device))
            else:
                away = isinstance(value, Tensor) and value.is_meta
                self.tensors.append(_offloaded(module, name) if away else value)


def _number(value: Any) -> Hashable:
    """A plain value, or a collection of plain values; anything else counts as nothing."""
    if type(value) in _PLAIN:
        return value if value != -1 else "-1"  # Python's hash of -1 is that of -2
    if isinstance(value, dict):
        return tuple((_number(name), _number(entry)) for name, entry in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_number(entry) for entry in value)
    return None


def _offloaded(module: nn.Module, name: str) -> Tensor:
    """A weight that accelerate fetches for each call, from where it lies."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    raise Unseen(f"the weight {name} of {type(module).__name__}, which is elsewhere (meta)")


def parts_of(model: nn.Module) -> dict[str, Part]:
    """A base model's parts: "vision", "decoder", and each task adapter by its name.

    Raises:
        Unseen: a weight on "meta" that nothing tells where to find.
    """
    embedding = model.get_input_embeddings()
    by_rows = None if kept_whole(embedding) else embedding.weight
    parts: dict[str, Part] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, part: str) -> None:
        if module in seen:
            return
        seen.add(module)
        parts.setdefault(part, Part()).add(module, by_rows)
        for name, child in module._modules.items():
            if name in _ADAPTERS:
                for adapter, linear in child._modules.items():
                    visit(linear, adapter)
            elif child is not None:
                visit(child, "decoder" if name == "language_model" else part)

    visit(model, "vision")
    return parts


def stamp_of(parts: dict[str, Part], names: Sequence[str], circumstances: tuple) -> Stamp:
    """A stamp of these parts.

    Raises:
        Unseen: see `content_of` and `forwards_of`.
    """
    chosen = [parts[name] for name in names if name in parts]
    code = frozenset(forwards_of(module for part in chosen for module in part.modules))
    numbers = hash(tuple(number for part in chosen for number in part.numbers))
    contents = tuple((name, content_of(parts[name].tensors)) for name in names if name in parts)
    return Stamp((*circumstances, numbers, code), contents)
