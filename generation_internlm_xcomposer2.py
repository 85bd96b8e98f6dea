"""How a prompt is run before the first token: once however many beams follow, in chunks, continuing a cache.

transformers runs a prompt as one forward call on as many copies as there are beams. `PrefillMixin` puts itself at that
one point of `generate` (`_prefill`); decoding stays transformers'.

Legend: B prompts, C copies of each (beams or returned sequences), T prompt tokens, D decoder width.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

# Prompt tokens of one forward call, at most: activations stay bounded however long the prompt is.
PREFILL_CHUNK = 4096
# Elements of the attention mask of one such call: late chunks of very long prompts are shorter.
MASK_ELEMENTS = 2**26
# Prompts of more positions than this are run ahead of `generate`, which would want all their embeddings at once.
EMBEDDED_WHOLE = 16384

# Inputs whose rows are tiles or pictures, not prompts: beams must not copy them.
PICTURE_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


class PromptEmbeddings:
    """Embeddings of ids (B, T) with pictures, looked up where they are read: a long prompt never has them all."""

    def __init__(self, embedding: nn.Module, input_ids: Tensor):
        self.embedding, self.input_ids = embedding, input_ids
        self.features: Tensor | None = None
        self.row_of: Tensor | None = None  # (B, T): the row of `features` that stands here; -1: the id's embedding

    @property
    def shape(self) -> torch.Size:
        """(B, T)"""
        return self.input_ids.shape

    def place(self, slots: Tensor, features: Tensor) -> None:
        """Let features (n, D) stand at the n places of `slots` (B, T), in reading order."""
        if self.row_of is None:
            self.row_of, self.features = torch.full_like(self.input_ids, -1), features[:0]
        features, first = features.to(self.input_ids.device), len(self.features)
        self.row_of[slots] = torch.arange(first, first + len(features), device=slots.device)
        self.features = torch.cat([self.features, features]) if first else features

    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        """Positions [start, end) as a tensor."""
        embeds = self.embedding(self.input_ids[:, start:end])
        if self.row_of is None:
            return embeds
        rows = self.row_of[:, start:end]
        slots = rows >= 0
        return embeds.masked_scatter(slots[..., None], self.features[rows[slots]].to(embeds))

    def repeat(self, copies: int) -> "PromptEmbeddings":
        """Each row so many times, side by side; features are shared."""
        repeated = PromptEmbeddings(self.embedding, self.input_ids.repeat_interleave(copies, dim=0))
        repeated.features = self.features
        repeated.row_of = None if self.row_of is None else self.row_of.repeat_interleave(copies, dim=0)
        return repeated


class PrefillMixin:
    """Prompt handling of `generate`; stands before `GenerationMixin` among the bases."""

    prefill_chunk = PREFILL_CHUNK  # 0: the whole prompt in one call
    embedded_whole = EMBEDDED_WHOLE
    share_prefill = True  # False: every beam runs the prompt for itself, as transformers does

    def _expand_inputs_for_generation(self, *args, **kwargs):
        """transformers repeats every tensor for the beams; pictures are not rows of the batch, and embeddings that are
        one position shown T times (see `_run_ahead`) stay so.
        """
        pictures = {name: kwargs.pop(name) for name in PICTURE_INPUTS if name in kwargs}
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and embeds.stride(1) == 0:
            kwargs["inputs_embeds"] = embeds[:, :1]
        input_ids, expanded = super()._expand_inputs_for_generation(*args, **kwargs)
        if embeds is not None:
            expanded["inputs_embeds"] = expanded["inputs_embeds"].expand(-1, embeds.shape[1], -1)
        return input_ids, {**expanded, **pictures}

    def _get_logits_processor(self, *args, **kwargs):
        """transformers 5.23 spares as many ids as a row has padding from repetition penalties: rightly in token ids,
        but a prompt of embeddings has no ids, and the first generated ones would go unpenalised.
        """
        if kwargs.get("input_ids_seq_length") == 0 and kwargs.get("model_kwargs"):
            kwargs["model_kwargs"] = {name: v for name, v in kwargs["model_kwargs"].items() if name != "attention_mask"}
        return super()._get_logits_processor(*args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """Run what of the prompt is not in the cache yet; returns the last position's logits (B * C, 1, vocabulary)."""
        cache = model_kwargs.get("past_key_values")
        if cache is None or not is_first_iteration:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        # A static cache has a place for each copy from the start, so each copy must run.
        shared = copies if self.share_prefill and isinstance(cache, DynamicCache) else 1
        if isinstance(cache, DynamicCache) and cache.get_seq_length():
            if len(cache.layers[0].keys) == len(input_ids):  # has a row for each copy, as transformers expects it
                shared = 1
            elif shared < copies:
                cache.batch_repeat_interleave(copies)
        inputs = {
            name: value[::shared] if isinstance(value, Tensor) and name not in PICTURE_INPUTS else value
            for name, value in {**model_kwargs, "input_ids": input_ids}.items()
        }
        embeds = self._prompt_embeddings(inputs, repeat=copies // shared)
        output = self._run_prompt(embeds, inputs, cache)
        if shared > 1:
            cache.batch_repeat_interleave(shared)
            output.logits = output.logits.repeat_interleave(shared, dim=0)
        return output

    def _prompt_embeddings(self, inputs: dict, repeat: int) -> PromptEmbeddings | Tensor:
        """Embeddings of a prompt given as ids with pictures, or as embeddings (B, T, D).

        Args:
            repeat: rows of `input_ids` that share one prompt's pictures.
        """
        if inputs.get("inputs_embeds") is not None:
            return inputs["inputs_embeds"]
        input_ids = inputs["input_ids"]
        if all(inputs.get(name) is None for name in PICTURE_INPUTS):
            return PromptEmbeddings(self.get_input_embeddings(), input_ids)
        if inputs.get("mm_token_type_ids") is None:
            inputs["mm_token_type_ids"] = self.model.image_slots(input_ids).long()
        pictures = {name: inputs.get(name) for name in PICTURE_INPUTS}
        return self.model.prompt_embeddings(input_ids[::repeat], **pictures).repeat(repeat)

    def _run_ahead(self, embeds: PromptEmbeddings, inputs: dict, cache) -> Tensor:
        """Run a prompt but for its last position, and show that one T times (B, T, D), which takes no memory:
        `generate` asks for as many embeddings as there are tokens and reads only those that the cache does not hold.
        """
        tokens = embeds.shape[1]
        self._run_prompt(embeds, inputs, cache, stop=tokens - 1)
        return embeds.read(tokens - 1).expand(-1, tokens, -1)

    def _run_prompt(
        self, embeds: PromptEmbeddings | Tensor, inputs: dict, cache, stop: int | None = None
    ) -> CausalLMOutputWithPast | None:
        """Run embeddings of (B, T) positions chunk by chunk into the cache, from where the cache ends.

        Args:
            stop: end after this many positions and read no logits; None: run all, return the last position's.
        """
        seen, total = cache.get_seq_length(), embeds.shape[1]
        stop = total if stop is None else stop
        read = embeds.read if isinstance(embeds, PromptEmbeddings) else lambda start, end: embeds[:, start:end]
        mask, types = inputs.get("attention_mask"), inputs.get("mm_token_type_ids")
        positions = inputs["position_ids"].expand(embeds.shape[0], -1)[:, -total:]
        step = max(1, min(self.prefill_chunk, MASK_ELEMENTS // total)) if self.prefill_chunk else total
        common = {
            "past_key_values": cache,
            "use_cache": True,
            "infer_mode": inputs.get("infer_mode", "base"),
            # Every chunk turns with the whole prompt's angles, as one call would.
            "rope_length": positions[:, -1:] + 1,
            **{name: inputs[name] for name in ("output_attentions", "output_hidden_states") if inputs.get(name)},
        }
        for start in range(seen, stop, step):
            end = min(start + step, stop)
            chunk = {
                "inputs_embeds": read(start, end),
                "position_ids": positions[:, start:end],
                "attention_mask": mask[:, :end] if mask is not None and mask.ndim == 2 else mask,
                "mm_token_type_ids": None if types is None else types[:, start:end],
            }
            if end == total:
                return self(**chunk, **common, logits_to_keep=inputs.get("logits_to_keep", 1), return_dict=True)
            self(**chunk, **common, logits_to_keep=1)
        return None
