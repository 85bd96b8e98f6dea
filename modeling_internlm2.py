"""InternLM2, the decoder: it knows which rows are image tokens and which adapters are on, not what an image is.

Legend: B batch, T tokens of this call, S tokens in the cache after it, D width, H query heads, K key/value heads,
G = H / K query heads that share a key, E = D / H head width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .build_mlp import AdaptedProjection
from .configuration_internlm_xcomposer2 import InternLM2Config


class RMSNorm(nn.Module):
    """Root mean square norm with fp32 statistics (arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary positions with dynamic NTK scaling beyond `max_position_embeddings` (P).

    A sequence of length L > P turns with base' = base * (f L / P - (f - 1)) ** (E / (E - 2)). L is each row's own
    length and nothing is remembered, so that neither a longer neighbour nor an earlier call changes a row; keys in
    the cache keep the angles they were made with. Frequencies are computed per call (E / 2 numbers a row): there is
    no buffer to lose in loading. Source: arXiv:2104.09864; dynamic NTK as in transformers' `rope_type="dynamic"`.
    """

    def __init__(self, config: InternLM2Config):
        super().__init__()
        rope = config.rope_parameters
        self.head_dim = config.head_dim
        self.base = rope["rope_theta"]
        self.factor = rope["factor"] if rope["rope_type"] == "dynamic" else None
        self.max_position = config.max_position_embeddings

    def inverse_frequencies(self, position_ids: Tensor, length: Tensor | None) -> Tensor:
        """(B, T) positions, and the length of each row (B, 1) or token (B, T) -> (B or 1, T or 1, E / 2), fp32."""
        exponents = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32) / self.head_dim
        base = torch.full((1, 1), self.base, device=position_ids.device, dtype=torch.float32)
        if self.factor is not None:
            length = position_ids.amax(-1, keepdim=True) + 1 if length is None else length
            stretch = self.factor * length.clamp(min=self.max_position) / self.max_position - (self.factor - 1)
            base = base * stretch ** (self.head_dim / (self.head_dim - 2))
        return base[..., None] ** -exponents

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T) positions -> cos, sin (B, 1, T, E): angles in fp32, returned in `dtype`.

        Args:
            length: each row's length (B, 1), where this call holds only a part, or each token's (B, T), where rows are
                several requests in one; default: the row's last position + 1.
        """
        angles = position_ids[..., None].float() * self.inverse_frequencies(position_ids, length)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads (B, H, T, E): the first half of a head pairs with the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# Devices whose fused attention takes `enable_gqa` together with a mask.
SHARES_KEYS_UNDER_A_MASK = ("cpu",)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention: queries (B, H, T, E), keys, values (B, K, S, E) -> (B, T, H, E) and weights (B, H, T, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Masked attention of H queries on K heads, (B, H, T, E) and (B, K, S, E) -> (B, T, H, E).

    The queries that share a head meet its keys as they lie in the cache. transformers copies keys and values for each
    query under a mask, since on most devices PyTorch would then leave its fused kernels.
    """
    attend = partial(F.scaled_dot_product_attention, attn_mask=mask, scale=scaling)
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] == 1:  # the queries of a head are rows of one
        out = attend(query.unflatten(1, (-1, groups)).squeeze(3), key, value).flatten(1, 2)[:, :, None]
    elif query.device.type in SHARES_KEYS_UNDER_A_MASK:
        out = attend(query, key, value, enable_gqa=True)
    else:
        out = torch.stack([attend(query[:, g::groups], key, value) for g in range(groups)], dim=2).flatten(1, 2)
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention. `wqkv` gives, for each key/value head, its G queries, then its key, then its value."""

    is_causal = True

    def __init__(self, config: InternLM2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.wqkv = AdaptedProjection(config, "wqkv", config.hidden_size, heads * config.head_dim)
        self.wo = AdaptedProjection(config, "wo", config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        image_tokens: Tensor | None,
        adapters: tuple[str, ...],
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D)."""
        batch, tokens, _ = hidden_states.shape
        qkv = self.wqkv(hidden_states, image_tokens, adapters)
        qkv = qkv.view(batch, tokens, -1, self.num_key_value_groups + 2, self.head_dim)  # (B, T, K, G + 2, E)
        query, key, value = qkv.split([self.num_key_value_groups, 1, 1], dim=3)
        query, key, value = (heads.flatten(2, 3).transpose(1, 2) for heads in (query, key, value))  # (B, heads, T, E)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        kind = self.config._attn_implementation
        if kind == "sdpa" and attention_mask is not None and attention_mask.shape[1] == 1:
            out, weights = grouped_attention(query, key, value, attention_mask, self.scaling), None
        else:
            attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention)
            out, weights = attention(
                self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
            )
        return self.wo(out.reshape(batch, tokens, -1), image_tokens, adapters), weights


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv:2002.05202)."""

    def __init__(self, config: InternLM2Config):
        super().__init__()
        self.w1 = AdaptedProjection(config, "w1", config.hidden_size, config.intermediate_size)
        self.w3 = AdaptedProjection(config, "w3", config.hidden_size, config.intermediate_size)
        self.w2 = AdaptedProjection(config, "w2", config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, image_tokens: Tensor | None, adapters: tuple[str, ...]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate = self.act(self.w1(x, image_tokens, adapters))
        return self.w2(gate * self.w3(x, image_tokens, adapters), image_tokens, adapters)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: InternLM2Config, layer_idx: int):
        super().__init__()
        self.attention = Attention(config, layer_idx)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        image_tokens: Tensor | None = None,
        adapters: tuple[str, ...] = (),
        **kwargs,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        attended, _ = self.attention(
            self.attention_norm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            image_tokens=image_tokens,
            adapters=adapters,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states), image_tokens, adapters)


class InternLM2PreTrainedModel(PreTrainedModel):
    """What transformers may do with the decoder."""

    config_class = InternLM2Config
    base_model_prefix = "model"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": Attention}


def route_image_tokens(mask: Tensor, dense: bool, dtype: torch.dtype) -> Tensor | None:
    """The form of a boolean image mask (B, T) that `AdaptedProjection` takes.

    `dense` gives a mask (B, T, 1) in `dtype`; otherwise the integer rows (R,) of the flattened batch, found here once
    a call (the one point where a GPU waits for the host), or None where there are none, as in a later turn's question.
    """
    if dense:
        return mask[..., None].to(dtype)
    rows = mask.flatten().nonzero().squeeze(1)
    return rows if len(rows) else None


def tensors_to(device: torch.device, *values):
    """`values` with the tensors among them on `device`."""
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


class InternLM2Model(InternLM2PreTrainedModel):
    """Token embeddings, decoder layers, final norm."""

    _input_embed_layer = "tok_embeddings"
    dense_partial_lora = False  # True: compute partial LoRA for every token and mask it

    def __init__(self, config: InternLM2Config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _check_task_adapters(self, adapters: tuple[str, ...], infer_mode: str) -> None:
        """Raise a ValueError for adapters that are not in memory: only the model with the head can load them."""
        if not adapters:  # a stage of a pipeline may lack the first layer, and is asked for none
            return
        resident = self.layers[0].attention.wqkv.task_A
        missing = [name for name in adapters if name not in resident]
        if missing:
            raise ValueError(
                f"infer_mode={infer_mode!r} needs the task adapters {missing}, which are not in memory, and the part "
                f"without the head cannot load them; call load_task_adapters({missing}) of the whole model first, or "
                f"load it with task_adapters='all'"
            )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_mask: Tensor | None = None,
        infer_mode: str = "base",
        rope_length: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Ids (B, T) or embeddings (B, T, D) -> hidden states (B, T, D).

        Args:
            position_ids: (B, T); or (3, B, T) as vLLM passes them, see `InternLMXComposer2Model.get_rope_index`: the
                second row is each token's rope length less one, the third is the first plus the image mask.
            image_mask: (B, T) bool, True at image tokens. None: no image token in this call.
            infer_mode: which task adapters are on, see `InternLM2Config.adapters_of`.
            rope_length: (B, 1) or (B, T), the length that dynamic rope goes by for each row or token, where this call
                is one chunk of a prompt.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds: got both or neither")
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        attention_mask, position_ids, image_mask, rope_length = tensors_to(
            inputs_embeds.device, attention_mask, position_ids, image_mask, rope_length
        )
        if image_mask is None and self.training:  # data-parallel training waits for a gradient on every parameter
            image_mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        dense = self.dense_partial_lora or self.training or torch.compiler.is_compiling()
        if position_ids.ndim == 3:
            position_ids, last_ids, marked_ids = position_ids.unbind()
            image_mask, rope_length, dense = marked_ids != position_ids, last_ids + 1, True
        image_tokens = None if image_mask is None else route_image_tokens(image_mask, dense, inputs_embeds.dtype)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(position_ids, inputs_embeds.dtype, rope_length)
        adapters = self.config.adapters_of(infer_mode)
        self._check_task_adapters(adapters, infer_mode)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                image_tokens=image_tokens,
                adapters=adapters,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


__all__ = ["InternLM2Model", "InternLM2PreTrainedModel"]
