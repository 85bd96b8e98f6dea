"""What a conversation leaves behind for its next turn: key/value caches and picture embeddings, within byte limits.

A cache is found again by the longest common prefix of token ids and pictures, a picture by its content. Whatever else
the stored tensors depend on (weights, adapter, dtype, device, attention) is part of a stamp: another one finds nothing.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .cache_internlm_xcomposer2 import GrowingCache, cache_bytes, crop, drop_room

Key = Sequence[Hashable]  # a conversation: token ids, and for each token of a picture the picture's digest


class Prefix(NamedTuple):
    """One past conversation: what its rows are, what they depend on, and the rows."""

    key: list[Hashable]
    stamp: Hashable
    cache: GrowingCache


def digest(picture: Any, *settings: Hashable) -> bytes:
    """Content of an opened picture or video (see `load_media`), and the settings that shape its tokens."""
    content = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for part in picture if isinstance(picture, list) else [picture]:
        if isinstance(part, Image.Image):
            pixels: Any = np.ascontiguousarray(np.asarray(part))
        else:
            pixels = part.detach().cpu().contiguous().view(torch.uint8).numpy()
        content.update(f"{isinstance(part, Image.Image)} {pixels.shape} {getattr(part, 'dtype', '')}".encode())
        content.update(pixels.data)
    return content.digest()


@torch.no_grad()
def weights_stamp(module: nn.Module, skip: Callable[[str], bool] = lambda name: False) -> Hashable:
    """Changes when a weight does: each parameter's identity and version, and one number out of each.

    The number catches changes that PyTorch does not count (through `.data`). Adapters of PEFT that are switched on, off
    or merged count too.

    Args:
        skip: tells by its name which parameter does not count.
    """
    identity, samples = [], {}
    for name, parameter in module.named_parameters():
        if skip(name):
            continue
        version = 0 if parameter.is_inference() else parameter._version
        identity.append((parameter.data_ptr(), version, parameter.dtype, parameter.device))
        if type(parameter.data) is Tensor and parameter.numel() and not parameter.is_meta:
            middle = parameter.data[tuple(size // 2 for size in parameter.shape)]
            samples.setdefault(parameter.device, []).append(middle.float())
    values = tuple(tuple(torch.stack(row).tolist()) for row in samples.values())
    tuners = tuple(
        (str(layer.active_adapters), str(getattr(layer, "merged_adapters", "")), layer.disable_adapters)
        for layer in module.modules()
        if isinstance(getattr(type(layer), "disable_adapters", None), property)  # a method of transformers' models
    )
    return hash((tuple(identity), values, tuners))


def common_prefix(one: Key, other: Key) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class ReuseStore:
    """Past conversations and pictures of one model. The oldest goes first when a limit is reached.

    Args:
        prefix_bytes: most bytes of key/value caches; 0 keeps none. The default holds the 7B model's longest default
            conversation (16 k tokens at 128 KiB) beside its weights on a 24 GB card.
        picture_bytes: most bytes of picture embeddings; 0 keeps none.
    """

    def __init__(self, prefix_bytes: int = 2 << 30, picture_bytes: int = 512 << 20):
        self._prefixes: list[Prefix] = []
        self._pictures: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._limits = [prefix_bytes, picture_bytes]

    @property
    def prefix_bytes(self) -> int:
        """Most bytes of key/value caches. A lower limit takes effect at once."""
        return self._limits[0]

    @prefix_bytes.setter
    def prefix_bytes(self, limit: int) -> None:
        self._limits[0] = limit
        self._trim()

    @property
    def picture_bytes(self) -> int:
        """Most bytes of picture embeddings. A lower limit takes effect at once."""
        return self._limits[1]

    @picture_bytes.setter
    def picture_bytes(self, limit: int) -> None:
        self._limits[1] = limit
        self._trim()

    @property
    def enabled(self) -> bool:
        """Whether anything may be kept."""
        return self.prefix_bytes > 0 or self.picture_bytes > 0

    def disable(self) -> None:
        """Keep nothing, from now on."""
        self.prefix_bytes = self.picture_bytes = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything and free its memory."""
        self._prefixes.clear()
        self._pictures.clear()

    def nbytes(self) -> int:
        """Bytes held now."""
        pictures = sum(embeds.nbytes for embeds in self._pictures.values())
        return pictures + sum(cache_bytes(prefix.cache) for prefix in self._prefixes)

    def take(self, key: Key, stamp: Hashable) -> GrowingCache | None:
        """Hand out the cache that shares the longest prefix with `key`, cut to it, one position short of `key` at most.

        It leaves the store: the caller lets it grow, and may `keep` it again.
        """
        found, shared = None, 0
        for prefix in self._prefixes:
            length = min(common_prefix(prefix.key, key), len(key) - 1) if prefix.stamp == stamp else 0
            if length > shared:
                found, shared = prefix, length
        if found is None:
            return None
        self._prefixes = [prefix for prefix in self._prefixes if prefix is not found]
        crop(found.cache, shared)
        return found.cache

    def keep(self, key: list[Hashable], stamp: Hashable, cache: GrowingCache) -> None:
        """Keep a conversation's cache, unless it alone is over the limit."""
        if cache_bytes(cache) > self.prefix_bytes:
            drop_room(cache)
        self._prefixes.append(Prefix(key[: cache.get_seq_length()], stamp, cache))
        self._trim()

    def _trim(self) -> None:
        while self._prefixes and sum(cache_bytes(prefix.cache) for prefix in self._prefixes) > self.prefix_bytes:
            self._prefixes.pop(0)
        while self._pictures and sum(kept.nbytes for kept in self._pictures.values()) > self.picture_bytes:
            self._pictures.popitem(last=False)

    def picture(self, key: Hashable) -> Tensor | None:
        """Embeddings (L, D) of a picture seen before."""
        if key in self._pictures:
            self._pictures.move_to_end(key)
        return self._pictures.get(key)

    def keep_picture(self, key: Hashable, embeds: Tensor) -> None:
        """Keep a picture's embeddings (L, D)."""
        self._pictures[key] = embeds.clone()  # not a view of its whole batch
        self._trim()
