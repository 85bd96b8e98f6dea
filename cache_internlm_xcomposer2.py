"""The key/value cache: as transformers' dynamic one, but a decode step does not copy it.

Legend: B rows, K key/value heads, S positions, E head width. Keys and values are (B, K, S, E).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

MIN_ROOM = 256  # positions of room that a full buffer grows by, at least


class GrowingLayer(DynamicLayer):
    """Keys and values are views of the filled part of larger buffers; new positions are written in place.

    transformers' layer concatenates, which copies the whole cache in every step.
    """

    buffers: tuple[Tensor, Tensor] | None = None
    shared, copies = 0, 1  # the first so many positions are the same in every so many rows side by side

    def _fits(self, positions: int) -> bool:
        """Whether the buffers hold what `keys` shows (nobody has replaced it) and have room for so many positions."""
        if self.buffers is None:
            return False
        room = self.buffers[0]
        same = self.keys.data_ptr() == room.data_ptr() and self.keys.shape[0] == room.shape[0]
        return same and room.shape[-2] >= positions

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, E); returns all keys and values (B, K, S + T, E)."""
        if key_states.requires_grad:  # writing in place would break the graph
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        end = seen + key_states.shape[-2]
        if not self._fits(end):
            capacity = end + max(MIN_ROOM, end // 8)
            kept = (self.keys, self.values) if seen else ()
            rows = (key_states, value_states)
            self.buffers = tuple(t.new_empty(*t.shape[:2], capacity, t.shape[-1]) for t in rows)  # type: ignore[assignment]
            for buffer, old in zip(self.buffers, kept, strict=False):
                buffer[:, :, :seen] = old
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, seen:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copies of each row side by side, room included."""
        seen = self.get_seq_length()
        if seen and self._fits(seen):
            self._place(tuple(buffer.repeat_interleave(repeats, dim=0) for buffer in self.buffers), seen)
        else:
            super().batch_repeat_interleave(repeats)
        self.shared, self.copies = (self.shared, self.copies * repeats) if self.shared else (seen, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, room included."""
        seen = self.get_seq_length()
        if seen and self._fits(seen):
            self._place(tuple(buffer[indices] for buffer in self.buffers), seen)
        else:
            super().batch_select_indices(indices)
        self.shared, self.copies = 0, 1

    def crop(self, *args, **kwargs) -> None:
        """As transformers' (whose argument has changed); what is written from here on is no longer shared."""
        super().crop(*args, **kwargs)
        self.shared = min(self.shared, self.get_seq_length())

    def trade(self, indices: Tensor, shared: int) -> None:
        """Give each row the positions from `shared` on of another row."""
        seen = self.get_seq_length()
        if self._fits(seen):
            for buffer in self.buffers:
                buffer[:, :, shared:seen] = buffer[:, :, shared:seen].index_select(0, indices.to(buffer.device))
        else:
            self.reorder_cache(indices)

    def _place(self, buffers: tuple[Tensor, ...], seen: int) -> None:
        self.buffers = buffers  # type: ignore[assignment]
        self.keys, self.values = (buffer[:, :, :seen] for buffer in buffers)


class GrowingCache(DynamicCache):
    """A dynamic cache of `GrowingLayer`s."""

    def __init__(self, config):
        super().__init__(config=config)
        self.layers = [GrowingLayer() for _ in self.layers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let rows trade places, as beam search does in every step: the prompt that a row's beams share stays."""
        shared, copies = self.layers[0].shared, self.layers[0].copies
        groups = torch.arange(len(beam_idx), device=beam_idx.device) // copies
        if not shared or bool((beam_idx // copies != groups).any()):
            shared = 0
        for layer in self.layers:
            layer.trade(beam_idx, shared)
            layer.shared = shared

    @classmethod
    def of(cls, rows: Sequence[tuple[Tensor, Tensor]]) -> "GrowingCache":
        """A cache with these keys and values, copied, one pair a layer."""
        cache = cls.__new__(cls)
        DynamicCache.__init__(cache)
        cache.layers = [GrowingLayer() for _ in rows]
        for layer, (keys, values) in zip(cache.layers, rows, strict=True):
            layer.update(keys, values)
        return cache


def cache_bytes(cache: GrowingCache) -> int:
    """Bytes that a cache occupies: keys, values, and their room to grow."""
    filled = [layer for layer in cache.layers if layer.is_initialized]
    return sum(t.untyped_storage().nbytes() for layer in filled for t in (layer.keys, layer.values))


def row_bytes(cache: GrowingCache) -> int:
    """Bytes of one position of one row."""
    filled = [layer for layer in cache.layers if layer.is_initialized]
    return sum(t.shape[1] * t.shape[3] * t.element_size() for layer in filled for t in (layer.keys, layer.values))


def drop_room(cache: GrowingCache) -> None:
    """Give back the room to grow, one layer after the other."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.buffers = None
            layer.keys = layer.keys.clone(memory_format=torch.contiguous_format)
            layer.values = layer.values.clone(memory_format=torch.contiguous_format)


def crop(cache: GrowingCache, length: int) -> None:
    """Keep the first `length` positions (the negative form of `crop` is the one all versions know)."""
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        cache.crop(-surplus)
        if surplus > max(MIN_ROOM, length):  # most of the buffers would lie idle
            drop_room(cache)


def row_of(cache: GrowingCache, row: int, start: int, end: int) -> GrowingCache:
    """One row's positions [start, end) of a batch's cache, copied, so that the batch's memory is free to go."""
    at = slice(row, row + 1), slice(None), slice(start, end)
    return GrowingCache.of(
        [(layer.keys[at], layer.values[at]) for layer in cache.layers]
    )  # copies as it fills its layers


def stack(caches: Sequence[GrowingCache]) -> GrowingCache:
    """Caches of one row each -> one batch, filled up with zeros on the left (masked out by the attention mask)."""
    longest = max(cache.get_seq_length() for cache in caches)

    def batch(tensors: list[Tensor]) -> Tensor:
        return torch.cat([nn.functional.pad(t, (0, 0, longest - t.shape[-2], 0)) for t in tensors])

    layers = zip(*(cache.layers for cache in caches), strict=True)
    return GrowingCache.of([(batch([la.keys for la in row]), batch([la.values for la in row])) for row in layers])
