"""Linears packed in 4 bits, as AutoGPTQ and AWQ (AutoAWQ, LMDeploy) write them, and their plain weights.

A linear's `weight` (out, in) lies on disk as `qweight` (eight numbers to an int32), `qzeros` (a zero point for each
group of inputs and each output, packed alike), `scales` (groups, out) and, of GPTQ, `g_idx` (the group of each input).
The two layouts are rows of `LAYOUTS`; a tensor's shape tells which it is. Formats after AutoGPTQ's QuantLinear and
AutoAWQ's WQLinear_GEMM.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

BITS = 4
PER_INT = 32 // BITS
PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What is never packed: patterns that match from a module name's start, as transformers' quantisers read them.
FULL_PRECISION = ("lm_head", "score", ".*vision_tower", ".*vision_proj", ".*Plora_[AB]", ".*task_[AB]")


class Layout(NamedTuple):
    """How numbers of 4 bits lie in int32s."""

    order: tuple[int, ...]  # the k-th nibble, from the lowest, is number order[k] of its eight
    axis: int  # of `qweight`, inputs x outputs, along which eight numbers share an int32
    zero_offset: int  # what is added to a stored zero point


LAYOUTS = {
    "GPTQ": Layout(order=(0, 1, 2, 3, 4, 5, 6, 7), axis=0, zero_offset=1),
    "AWQ": Layout(order=(0, 2, 4, 6, 1, 3, 5, 7), axis=1, zero_offset=0),
}


class PackedLinear(NamedTuple):
    """A linear whose weight is packed: what its parts are called, and the weight's own shape and dtype."""

    layout: str  # a key of `LAYOUTS`
    parts: dict[str, str]  # "qweight", "qzeros", "scales", perhaps "g_idx" -> the tensor's name
    shape: tuple[int, int]  # out, in
    dtype: str  # of the scales
    groups: int


def unpack_nibbles(packed: Tensor, order: tuple[int, ...], axis: int) -> Tensor:
    """The numbers 0..15 in an int32 matrix, eight times as long along `axis` (0 or 1)."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=packed.device)
    nibbles = (packed.unsqueeze(axis + 1) >> (shifts[:, None] if axis == 0 else shifts)) & 15
    places = torch.tensor(order, device=packed.device).argsort()  # where each number's nibble is
    return nibbles.index_select(axis + 1, places).flatten(axis, axis + 1)


def unpack(
    layout: Layout,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The plain weight (out, in): (number - zero point) x scale of its group, in float32, rounded to `dtype` once.

    Args:
        qweight: int32 (in / 8, out) or (in, out / 8), by `layout`.
        qzeros: int32 (groups, out / 8).
        scales: (groups, out).
        g_idx: (in,), the group of each input; None: equal groups in order.
        dtype: of the result; None: that of `scales`.

    Raises:
        ValueError: `g_idx` names a group that is not there.
    """
    numbers = unpack_nibbles(qweight, layout.order, layout.axis)
    zeros = unpack_nibbles(qzeros, layout.order, 1) + layout.zero_offset
    groups = len(scales)
    if g_idx is None:
        g_idx = torch.arange(len(numbers), device=numbers.device) // (len(numbers) // groups)
    elif int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(f"g_idx names groups {int(g_idx.min())} to {int(g_idx.max())}, of {groups}")
    g_idx = g_idx.long()
    weight = (numbers - zeros[g_idx]).float().mul_(scales.float()[g_idx])
    return weight.to(dtype or scales.dtype).T.contiguous()


def _shapes_due(out: int, inputs: int, groups: int, axis: int) -> dict[str, tuple[int, ...]]:
    qweight = (inputs // PER_INT, out) if axis == 0 else (inputs, out // PER_INT)
    return {"qweight": qweight, "qzeros": (groups, out // PER_INT), "scales": (groups, out), "g_idx": (inputs,)}


def _linear(stem: str, tensors: Mapping[str, Any], group_size: int | None) -> PackedLinear | str:
    """The packed linear called `stem`, or what is wrong with it."""
    parts = {part: f"{stem}.{part}" for part in PARTS if f"{stem}.{part}" in tensors}
    absent = [f"{stem}.{part}" for part in ("qzeros", "scales") if part not in parts]
    if absent:
        return f"{parts['qweight']} is packed, but the checkpoint lacks {' and '.join(absent)}"
    shapes = {part: tuple(tensors[name].shape) for part, name in parts.items()}
    flat = [f"{parts[part]} is {shapes[part]}, not a matrix" for part in PARTS[:3] if len(shapes[part]) != 2]
    if flat:
        return flat[0]
    (rows, columns), (groups, out) = shapes["qweight"], shapes["scales"]
    inputs = {0: rows * PER_INT, 1: rows}
    layout = next((name for name, row in LAYOUTS.items() if (columns, columns * PER_INT)[row.axis] == out), None)
    if layout is None or out % PER_INT:
        due = f"(inputs / 8, {out}) of GPTQ or (inputs, {out / PER_INT:g}) of AWQ"
        return f"{parts['qweight']} is {shapes['qweight']}; by {parts['scales']} {shapes['scales']} it must be {due}"
    width = inputs[LAYOUTS[layout].axis]
    if group_size and group_size > 0:
        groups = -(-width // group_size)
    elif not groups or (width % groups and "g_idx" not in parts):
        return f"{parts['scales']} is {shapes['scales']}: {width} inputs do not split into {groups} groups"
    for part, due in _shapes_due(out, width, groups, LAYOUTS[layout].axis).items():
        if part in parts and shapes[part] != due:
            return f"{parts[part]} is {shapes[part]}, not {due} ({layout}, {width} inputs, {out} outputs)"
    for part, name in parts.items():
        if tensors[name].is_floating != (part == "scales"):
            return f"{name} is {tensors[name].dtype}, not {'floating' if part == 'scales' else 'int32'}"
    return PackedLinear(layout, parts, (out, width), tensors[parts["scales"]].dtype, groups)


def other_packing(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with a checkpoint's packing, by what it says of it, before any weight is seen."""
    bits = settings.get("bits", settings.get("w_bit", BITS))
    version = settings.get("checkpoint_format") or settings.get("version") or "gptq"
    if bits == BITS and version in ("gptq", "gemm"):
        return []
    return [f"the weights are packed in {bits} bits ({version}); this code reads 4 bits of gptq and gemm"]


def packed_linears(
    tensors: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, PackedLinear], list[str]]:
    """The packed linears among a checkpoint's tensors, by the name of their plain weight, and what is wrong with them.

    Args:
        tensors: what a header says of each tensor: `shape`, `dtype`, `is_floating`.
        settings: what the checkpoint says of its packing (`quantize_config.json` or `quantization_config`).
    """
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not stems:
        return {}, []
    if faults := other_packing(settings):
        return {}, faults
    group_size = settings.get("group_size", settings.get("q_group_size"))
    found = {f"{stem}.weight": _linear(stem, tensors, group_size) for stem in stems}
    linears = {name: linear for name, linear in found.items() if isinstance(linear, PackedLinear)}
    return linears, [fault for fault in found.values() if isinstance(fault, str)]
