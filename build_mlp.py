"""Vision tower, projector, and the linear layer that carries adapters. (The file name is historic.)

Legend: N tiles, P patches along a side of a tile, m patches along a side of a token (2, or 1 in the kinds without
tiles), S = P / m tokens along a side, V vision width, D decoder width, B batch, T tokens, R rows = image tokens of the
whole batch, h x w tiles of one picture. 4 V stands for a token's width before the projector, m * m * V.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPPreTrainedModel, CLIPVisionEmbeddings

from .configuration_internlm_xcomposer2 import InternLM2Config, InternLMXcomposer2Config


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes. Offloaded weights lie on "meta" until accelerate's hook fetches them for a call."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        device = next(module.parameters()).device
    return torch.device("cpu") if torch.device(device).type == "meta" else torch.device(device)


def in_own_type(module: nn.Module) -> AbstractContextManager:
    """Autocast off for a module where it would mix two 16-bit types, which PyTorch neither concatenates nor norms.

    The published model card loads bfloat16 and calls under autocast to float16.
    """
    device, dtype = device_of(module).type, next(module.parameters()).dtype
    mixes = torch.is_autocast_enabled(device) and dtype not in (torch.float32, torch.get_autocast_dtype(device))
    return torch.autocast(device, enabled=False) if mixes else nullcontext()


class VisionTower(CLIPPreTrainedModel):
    """CLIP ViT without its last norm and pooling: transformers' parts, the released names (`pre_layrnorm`)."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutput:
        """Tiles (N, 3, P * 14, P * 14) -> last encoder layer (N, 1 + P * P, V), class token first."""
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        return self.encoder(inputs_embeds=hidden, attention_mask=None)


def merge_patches(features: Tensor, merge: int = 2) -> Tensor:
    """Concatenate m x m neighbouring patches: (N, P * P, V) -> (N, S, S, m * m * V).

    Order within a token, for m = 2: top-left, top-right, bottom-left, bottom-right.
    """
    n, patches, width = features.shape
    s = math.isqrt(patches) // merge
    grid = features.view(n, s, merge, s, merge, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(n, s, s, -1)  # (N, S, m, S, m, V) -> (N, S, S, m, m, V)


def join_tiles(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """Token maps of a picture's tiles (h * w, S, S, 4 V) -> one map (h * S, w * S, 4 V)."""
    side, width = tokens.shape[1], tokens.shape[-1]
    grid = tokens.view(rows, cols, side, side, width)
    return grid.permute(0, 2, 1, 3, 4).reshape(rows * side, cols * side, width)  # (h, w, S, S) -> (h, S, w, S)


def end_rows(token_map: Tensor, newline: Tensor) -> Tensor:
    """Close each row of a token map with the newline vector: (rows, cols, 4 V) -> (rows * (cols + 1), 4 V)."""
    ends = newline.view(1, 1, -1).expand(token_map.shape[0], 1, -1)
    return torch.cat([token_map, ends], dim=1).flatten(0, 1)


def build_projector(config: InternLMXcomposer2Config) -> nn.Sequential:
    """Merged patches (.., 4 V) -> decoder width (.., D). Linear layers sit at 0 and 2, as released."""
    width = config.text_config.hidden_size
    return nn.Sequential(nn.Linear(config.merged_width, width), nn.GELU(), nn.Linear(width, width))


# Names of the task adapters that linears are built with; None: all of the config's.
_RESIDENT: ContextVar[tuple[str, ...] | None] = ContextVar("resident task adapters", default=None)


@contextmanager
def resident_task_adapters(names: tuple[str, ...] | None) -> Iterator[None]:
    """Build linears with these task adapters only; the others join later (see `TaskAdapterMixin`)."""
    token = _RESIDENT.set(names)
    try:
        yield
    finally:
        _RESIDENT.reset(token)


# (id of a model, its infer_mode) whose joint adapters have been checked for the calls inside; None: check each time.
CHECKED_ADAPTERS: ContextVar[tuple[int, str] | None] = ContextVar("checked task adapters", default=None)


class JointAdapter(NamedTuple):
    """Task adapters that are active together as one pair: A (sum of ranks, in) and B (out, sum of ranks).

    A and B are None where the weights cannot be stacked (quantised, offloaded, wrapped).
    """

    names: tuple[str, ...]
    A: Tensor | None
    B: Tensor | None


class AdaptedProjection(nn.Module):
    """A linear with partial LoRA for image tokens and task adapters for every token.

    y = W x + (alpha / r) B(A(x)) [image tokens] + sum of B_t(A_t(x)) over the active task adapters t

    The parts are siblings, so that vLLM, PEFT and quantisers may replace `linear` alone; the class's name has no
    "linear" in it, by which some trainers (ms-swift) look for layers to put a LoRA on. Source: partial LoRA of
    InternLM-XComposer2 (arXiv:2401.16420, section 3.1).
    """

    def __init__(self, config: InternLM2Config, name: str, in_features: int, out_features: int):
        super().__init__()
        rank, alpha = config.plora_of(name)
        self.linear = nn.Linear(in_features, out_features, bias=config.bias)
        self.Plora_A = nn.Linear(in_features, rank, bias=False)
        self.Plora_B = nn.Linear(rank, out_features, bias=False)
        self.plora_scale = alpha / rank
        self.plora_dropout = config.plora_dropout
        resident = _RESIDENT.get()
        ranks = config.task_adapter_ranks
        ranks = {name: rank for name, rank in ranks.items() if resident is None or name in resident}
        self.task_A = nn.ModuleDict({name: nn.Linear(in_features, rank, bias=False) for name, rank in ranks.items()})
        self.task_B = nn.ModuleDict({name: nn.Linear(rank, out_features, bias=False) for name, rank in ranks.items()})
        self.joint: JointAdapter | None = None
        self.register_state_dict_pre_hook(AdaptedProjection.part)  # tensors that share memory are no good to a file

    def _apply(self, *args, **kwargs):
        self.part()  # `.to(..)` moves each weight by itself, or none
        return super()._apply(*args, **kwargs)

    def is_joint(self, names: tuple[str, ...]) -> bool:
        """Whether `stack(names)` was done and still holds: nobody has given a weight other memory since."""
        if self.joint is None or self.joint.names != names:
            return False
        if self.joint.A is None or torch.compiler.is_compiling() or CHECKED_ADAPTERS.get() is not None:
            return True
        return all(
            pairs[name].weight.untyped_storage().data_ptr() == joint.untyped_storage().data_ptr()
            for pairs, joint in ((self.task_A, self.joint.A), (self.task_B, self.joint.B))
            for name in names
        )

    @torch.inference_mode(False)  # weights of that mode could not be trained later
    @torch.no_grad()
    def stack(self, names: tuple[str, ...]) -> None:
        """Let these task adapters run as one pair of matmuls where no gradient is asked for.

        Their weights become views of the joint ones: nothing is stored twice, and a change of one is a change of both.
        """
        self.part()
        pairs = [(self.task_A[name], self.task_B[name]) for name in names]
        linears = [linear for pair in pairs for linear in pair]
        plain = all(type(linear) is nn.Linear and type(linear.weight) is nn.Parameter for linear in linears)
        if not plain or any(linear.weight.is_meta for linear in linears):
            self.joint = JointAdapter(names, None, None)
            return
        low, high = torch.cat([a.weight for a, _ in pairs]), torch.cat([b.weight for _, b in pairs], dim=1)
        ranks = [a.out_features for a, _ in pairs]
        for (a, b), rows, columns in zip(pairs, low.split(ranks), high.split(ranks, dim=1), strict=True):
            a.weight.data, b.weight.data = rows, columns
        self.joint = JointAdapter(names, low, high)

    @torch.inference_mode(False)
    @torch.no_grad()
    def part(self, *_) -> None:
        """Undo `stack`: every weight has memory of its own again."""
        joint, self.joint = self.joint, None
        if joint is not None and joint.A is not None:
            for linear in (pair[name] for name in joint.names for pair in (self.task_A, self.task_B) if name in pair):
                linear.weight.data = linear.weight.data.clone(memory_format=torch.contiguous_format)

    def partial_lora(self, x: Tensor) -> Tensor:
        """(.., in) -> (.., out), dropout while training."""
        low = self.Plora_A(F.dropout(x, self.plora_dropout, self.training))
        return self.Plora_B(low) * self.plora_scale

    def forward(self, x: Tensor, image_tokens: Tensor | None = None, adapters: tuple[str, ...] = ()) -> Tensor:
        """(B, T, in) -> (B, T, out).

        Args:
            image_tokens: where partial LoRA applies. None: nowhere. Integers (R,): rows of the flattened batch, and
                only those are computed. A mask (B, T, 1) in x's dtype: everything is computed and masked, which
                needs no known count and keeps the adapter in the graph of a text-only training batch.
            adapters: names of the active task adapters.
        """
        out = self.linear(x)
        if image_tokens is not None:
            if image_tokens.is_floating_point():
                out = out + self.partial_lora(x) * image_tokens.to(out.dtype)  # autocast may have changed it
            else:
                delta = self.partial_lora(x.flatten(0, 1)[image_tokens])
                out.view(-1, out.shape[-1]).index_add_(0, image_tokens, delta.to(out.dtype))
        if not torch.is_grad_enabled() and self.is_joint(adapters) and self.joint.A is not None:
            return out + F.linear(F.linear(x, self.joint.A), self.joint.B)
        for name in adapters:
            out = out + self.task_B[name](self.task_A[name](x))
        return out
