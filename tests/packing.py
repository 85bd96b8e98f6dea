"""A packer of 4-bit weights for tests, written from what is known of the two layouts and not from the code that reads.

GPTQ (AutoGPTQ): nibble k of row r of `qweight` is input 8 r + k; zero points lie along the outputs, in order, less one.
AWQ (AutoAWQ, LMDeploy): nibble k of column c is output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[k], of weights and zero points.
w4a16 (compressed-tensors, as `xcomposer quantise` writes it): nibble k of column c of output r is input 8 c + k, plus
8; no zero points.
fp8 (compressed-tensors): E4M3 weights and a scale for each output; activations are rounded as they come.
"""

import json
import re
import shutil

import numpy as np
import torch

from xcomposer.checkpoints.quantise import LINEARS, SPARED
from xcomposer.checkpoints.tiny import write_weights
from xcomposer.model.weight_files_internlm_xcomposer2 import WeightFiles

AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
LINEAR = re.compile(r"^model\.layers\.\d+\.(attention|feed_forward)\.(wqkv|wo|w1|w2|w3)\.weight$")


def rows_to_ints(numbers):
    """(n, m) of 0..15 -> (n / 8, m): nibble k of row r is number 8 r + k."""
    packed = np.zeros((numbers.shape[0] // 8, numbers.shape[1]), dtype=np.uint32)
    for row, values in enumerate(numbers.astype(np.uint32)):
        packed[row // 8] |= values << np.uint32(4 * (row % 8))
    return torch.from_numpy(packed.view(np.int32).copy())


def columns_to_ints(numbers, nibbles=range(8)):
    packed = np.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=np.uint32)
    for column in range(packed.shape[1]):
        for nibble, offset in enumerate(nibbles):
            packed[:, column] |= numbers[:, 8 * column + offset].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(packed.view(np.int32).copy())


def round_to_4_bits(weight, group, symmetric, dtype=torch.float16):
    """(out, in) -> numbers (in, out), zero points and scales (groups, out) in `dtype`, the weight they stand for.

    symmetric: every zero point is 8, as the GPTQ releases have it and vLLM's kernels read them.
    """
    inputs = weight.float().T.numpy()
    grouped = inputs.reshape(-1, group, inputs.shape[1])
    low, high = np.minimum(grouped.min(1), 0), np.maximum(grouped.max(1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    stored = torch.from_numpy((high - low) / 15).to(dtype).contiguous()
    scales = stored.float().numpy()
    zeros = np.clip(np.rint(-low / scales), 1, 15).astype(np.int64)
    zeros = np.full_like(zeros, 8) if symmetric else zeros
    spread = lambda values: np.repeat(values, group, axis=0)  # noqa: E731
    numbers = np.clip(np.rint(inputs / spread(scales)) + spread(zeros), 0, 15).astype(np.int64)
    plain = (numbers - spread(zeros)) * spread(scales.astype(np.float64))
    return numbers, zeros, stored, torch.from_numpy(plain.T.astype(np.float32).copy())


def pack(layout, weight, group, symmetric=False):
    """The parts of a packed linear by their endings, and the plain weight (out, in), fp32."""
    if layout == "w4a16":
        numbers, _, scales, plain = round_to_4_bits(weight, group, True, torch.bfloat16)
        return {
            "weight_packed": rows_to_ints(numbers).T.contiguous(),
            "weight_scale": scales.T.contiguous(),
            "weight_shape": torch.tensor(weight.shape),
        }, plain
    if layout == "fp8":
        scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
        stored = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale": scale}, stored.float() * scale.float()
    numbers, zeros, scales, plain = round_to_4_bits(weight, group, symmetric)
    parts = {"scales": scales}
    if layout == "GPTQ":
        parts["qweight"] = rows_to_ints(numbers)
        parts["qzeros"] = columns_to_ints(zeros - 1)
        parts["g_idx"] = torch.arange(len(numbers), dtype=torch.int32) // group
    else:
        parts["qweight"] = columns_to_ints(numbers, AWQ_NIBBLES)
        parts["qzeros"] = columns_to_ints(zeros, AWQ_NIBBLES)
    return parts, plain


def compressed(layout, group):
    """`quantization_config` of compressed-tensors."""
    if layout == "fp8":
        form, eight = "float-quantized", {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {**eight, "strategy": "channel", "dynamic": False}
        scheme = {"weights": weights, "input_activations": {**eight, "strategy": "token", "dynamic": True}}
    else:
        form = "pack-quantized"
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
        scheme = {"weights": weights}
    said = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": form}
    return {**said, "config_groups": {"group_0": {"format": form, "targets": [LINEARS], **scheme}}, "ignore": SPARED}


def packed_checkpoint(source, out, layout, group=32, symmetric=False):
    """Copies of `source` as released in `layout`, and as plain weights: two folders."""
    weights, packed, plain = WeightFiles(source), {}, {}
    for name in weights.tensors:
        tensor = weights.read(name)
        if not LINEAR.match(name):
            packed[name] = plain[name] = tensor
            continue
        parts, plain[name] = pack(layout, tensor, group, symmetric)
        stem = name.removesuffix(".weight")
        for part, values in parts.items():  # what AWQ names, and a weight, as the linear's own
            packed[f"{stem}.{part}" if layout == "AWQ" or part == "weight" else f"{stem}.linear.{part}"] = values
    folders = out / f"{layout} 4bit", out / f"{layout} plain"
    for folder in folders:
        shutil.copytree(source, folder, symlinks=True, ignore=shutil.ignore_patterns("*.safetensors"))
    write_weights(folders[1], plain)
    config = json.loads((source / "config.json").read_text())
    if layout == "GPTQ":
        write_weights(folders[0], packed)
        (folders[0] / "model.safetensors").rename(folders[0] / f"gptq_model-4bit-{group}g.safetensors")
        said = {"bits": 4, "group_size": group, "damp_percent": 0.01, "desc_act": False, "sym": True}
        (folders[0] / "quantize_config.json").write_text(json.dumps(said))
        config["model_type"] = "internlm"
    elif layout in ("w4a16", "fp8"):
        write_weights(folders[0], packed)
        config["quantization_config"] = compressed(layout, group)
    else:
        write_weights(folders[0], packed, shards=3, fmt="bin")
        said = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True}
        config["quantization_config"] = said
    (folders[0] / "config.json").write_text(json.dumps(config))
    return folders
