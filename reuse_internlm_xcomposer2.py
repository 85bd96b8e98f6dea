"""What a conversation leaves behind for its next turn: key/value caches and picture embeddings, within byte limits.

A cache is found again by the longest common prefix of token ids and pictures, a picture by its content. Whatever else
the stored tensors depend on (weights, adapter, dtype, device, attention) is part of a stamp: another one finds nothing,
and what depends on weights that are gone is freed.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .cache_internlm_xcomposer2 import MIN_ROOM, GrowingCache, cache_bytes, crop, drop_room, row_bytes, row_of
from .fingerprint_internlm_xcomposer2 import Stamp
from .media_internlm_xcomposer2 import KnownSources

Key = Sequence[Hashable]  # a conversation: token ids, and for each token of a picture the picture's digest


CONVERSATIONS = 8  # of the longest kind, in fp32, that a store has room for
MOST_BYTES = {"prefix": 2 << 30, "picture": 512 << 20}
WIDEST = 4  # bytes of a number


class Prefix(NamedTuple):
    """One past conversation: what its rows are, what they depend on, and the rows."""

    key: list[Hashable]
    stamp: Stamp
    cache: GrowingCache


def digest(picture: Any, *settings: Hashable) -> bytes:
    """Content of an opened picture or video (see `load_media`), and the settings that shape its tokens."""
    content = hashlib.sha256(repr(settings).encode())  # the fastest safe one where CPUs have instructions for it
    for part in picture if isinstance(picture, list) else [picture]:
        if isinstance(part, Image.Image):
            pixels: Any = np.ascontiguousarray(np.asarray(part))
        else:
            pixels = part.detach().cpu().contiguous().view(torch.uint8).numpy()
        content.update(f"{isinstance(part, Image.Image)} {pixels.shape} {getattr(part, 'dtype', '')}".encode())
        content.update(pixels.data)
    return content.digest()


def common_prefix(one: Key, other: Key) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:  # a conversation that goes on, compared at the speed of C
        return shorter
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def default_limits(config: Any) -> tuple[int, int]:
    """Most bytes of caches and of picture embeddings where nobody says: `CONVERSATIONS` of a model's longest ones, up
    to `MOST_BYTES`, which hold the 7B release's longest (16 k tokens at 128 KiB) beside its weights on a 24 GB card.

    Args:
        config: of the whole model.
    """
    text, tokens = config.text_config, config.context_length + MIN_ROOM
    row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    wanted = {"prefix": tokens * row, "picture": tokens * text.hidden_size}
    prefix, picture = (min(most, CONVERSATIONS * WIDEST * wanted[name]) for name, most in MOST_BYTES.items())
    return prefix, picture


class ReuseStore:
    """Past conversations and pictures of one model. The oldest goes first when a limit is reached.

    It may be used from several threads. A copy or a pickle of it is empty: prompts and pictures stay in the process.

    Args:
        prefix_bytes: most bytes of key/value caches; 0 keeps none. A model's own store: see `default_limits`.
        picture_bytes: most bytes of picture embeddings; 0 keeps none.
    """

    def __init__(self, prefix_bytes: int = MOST_BYTES["prefix"], picture_bytes: int = MOST_BYTES["picture"]):
        self._prefixes: list[Prefix] = []
        self.sources = KnownSources()  # so that a picture whose embeddings are kept is not read again
        self._pictures: OrderedDict[tuple[Stamp, Hashable], Tensor] = OrderedDict()
        self._rows: dict[int, Hashable] = {}  # content of the embeddings of tokens that were in prefixes
        self._limits = [prefix_bytes, picture_bytes]
        self._lock = threading.RLock()

    def __reduce__(self):
        return type(self), tuple(self._limits)

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
        with self._lock:
            self._prefixes.clear()
            self._rows.clear()
            self._pictures.clear()
        self.sources.clear()

    def nbytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            return self._bytes_of_prefixes() + self._bytes_of_pictures()

    def _bytes_of_prefixes(self) -> int:
        return sum(cache_bytes(prefix.cache) for prefix in self._prefixes)

    def _bytes_of_pictures(self) -> int:
        return sum(embeds.nbytes for embeds in self._pictures.values())

    def drop_outdated(self, stamp: Stamp) -> None:
        """Free what depends on weights that are no more, now that they are as in `stamp`."""
        with self._lock:
            self._prefixes = [prefix for prefix in self._prefixes if not stamp.outdates(prefix.stamp)]
            for key in [key for key in self._pictures if stamp.outdates(key[0])]:
                del self._pictures[key]

    def know_rows(self, rows: dict[int, Hashable]) -> bool:
        """Note the content of tokens' embeddings, as it is now. Where a token had another before, all caches are freed.

        Returns:
            Whether each is new or as it was.
        """
        with self._lock:
            same = all(self._rows.get(token, content) == content for token, content in rows.items())
            if not same:
                self._prefixes.clear()
                self._rows.clear()
            self._rows.update(rows)
            return same

    def take(self, key: Key, stamp: Stamp) -> GrowingCache | None:
        """Hand out a cache of the longest prefix that `key` shares with what is kept, one position short of `key` at
        most. The caller lets it grow, and may `keep` it.

        A conversation that `key` continues leaves the store and is handed out itself. Of one that goes on otherwise,
        the shared rows are copied, so that both can be continued; where there is no room for two, the older ones go.
        """
        with self._lock:
            found, shared = None, 0
            for prefix in self._prefixes:
                length = min(common_prefix(prefix.key, key), len(key) - 1) if prefix.stamp == stamp else 0
                if length > shared or (found and length == shared == len(prefix.key)):
                    found, shared = prefix, length
            if found is None:
                return None
            copied = shared * row_bytes(found.cache)
            if shared < len(found.key) and cache_bytes(found.cache) + copied <= self.prefix_bytes:
                self._trim(copied, spare=found)
                return row_of(found.cache, 0, 0, shared)
            self._prefixes = [prefix for prefix in self._prefixes if prefix is not found]
            crop(found.cache, shared)
            return found.cache

    def keep(self, key: list[Hashable], stamp: Stamp, cache: GrowingCache) -> None:
        """Keep a conversation's cache, unless it alone is over the limit; what it continues need not stay."""
        if cache_bytes(cache) > self.prefix_bytes:
            drop_room(cache)
        key = key[: cache.get_seq_length()]
        with self._lock:
            self._prefixes = [
                kept for kept in self._prefixes if kept.stamp != stamp or kept.key != key[: len(kept.key)]
            ]
            self._prefixes.append(Prefix(key, stamp, cache))
            self._trim()

    def _trim(self, more: int = 0, spare: Prefix | None = None) -> None:
        """Let the oldest go until the limits hold, with room for `more` bytes of caches; `spare` stays."""
        with self._lock:
            excess = self._bytes_of_prefixes() + more - self.prefix_bytes
            kept = []
            for prefix in self._prefixes:
                if excess > 0 and prefix is not spare:
                    excess -= cache_bytes(prefix.cache)
                else:
                    kept.append(prefix)
            self._prefixes = kept
            while self._pictures and self._bytes_of_pictures() > self.picture_bytes:
                self._pictures.popitem(last=False)

    def picture(self, key: tuple[Stamp, Hashable]) -> Tensor | None:
        """Embeddings (L, D) of a picture seen before."""
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
            return self._pictures.get(key)

    def holds_picture(self, content: Hashable) -> bool:
        """Whether embeddings of a picture of that digest are kept, of whatever weights."""
        with self._lock:
            return any(kept == content for _, kept in self._pictures)

    def keep_picture(self, key: tuple[Stamp, Hashable], embeds: Tensor) -> None:
        """Keep a picture's embeddings (L, D)."""
        with torch.inference_mode(False):  # a tensor made in that mode could not be changed in place outside it
            kept = embeds.detach().clone()  # not a view of its whole batch
        with self._lock:
            self._pictures[key] = kept
            self._trim()
