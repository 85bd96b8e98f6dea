"""How a prompt is run before the first token: once however many beams follow, in chunks, continuing a cache.

transformers runs a prompt as one forward call on as many copies as there are beams. `PrefillMixin` puts itself at that
one point of `generate` (`_prefill`); decoding stays transformers'.

Legend: B prompts, C copies of each (beams or returned sequences), T prompt tokens, D decoder width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator
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


def copies_rows(cache: Cache) -> bool:
    """Whether the rows of a cache can be copied after the prompt has run once: not in a static cache, which has a place
    for each copy from the start, nor where layers are packed or have left for the host.
    """
    return isinstance(cache, DynamicCache) and not cache.offloading


def repeat_rows(value: Any, copies: int) -> Any:
    """A tensor's rows so many times, side by side; of a tuple, each tensor's."""
    if isinstance(value, tuple):
        return tuple(repeat_rows(entry, copies) for entry in value)
    return value.repeat_interleave(copies, dim=0) if isinstance(value, Tensor) else value


class TextDrafts(CandidateGenerator):
    """Drafts of another generator, each cut before its first placeholder: a picture's place is never text to guess.

    Args:
        drafts: transformers' generator, such as prompt lookup.
        placeholders: ids that hold a picture's or a video's place.
    """

    def __init__(self, drafts: CandidateGenerator, placeholders: Sequence[int]):
        self.drafts, self.placeholders = drafts, placeholders

    def __getattr__(self, name: str):
        return getattr(self.drafts, name)

    def get_candidates(self, input_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Ids (1, T) -> ids with a draft behind them (1, T + n), and the draft's logits (1, n, vocabulary) or None."""
        drafted, logits = self.drafts.get_candidates(input_ids, **kwargs)
        first = input_ids.shape[1]
        placeholders = torch.tensor(self.placeholders, device=drafted.device)
        found = torch.isin(drafted[0, first:], placeholders).nonzero()
        length = int(found[0]) if len(found) else drafted.shape[1] - first
        return drafted[:, : first + length], None if logits is None else logits[:, :length]

    def update_candidate_strategy(self, *args, **kwargs) -> None:
        self.drafts.update_candidate_strategy(*args, **kwargs)


class PrefillMixin:
    """Prompt handling of `generate`; stands before `GenerationMixin` among the bases."""

    prefill_chunk = PREFILL_CHUNK  # 0: the whole prompt in one call
    embedded_whole = EMBEDDED_WHOLE
    share_prefill = True  # False: every beam runs the prompt for itself, as transformers does

    def _expand_inputs_for_generation(self, *args, **kwargs):
        """transformers repeats every tensor for the beams; pictures are not rows of the batch."""
        pictures = {name: kwargs.pop(name) for name in PICTURE_INPUTS if name in kwargs}
        input_ids, expanded = super()._expand_inputs_for_generation(*args, **kwargs)
        return input_ids, {**expanded, **pictures}

    def _get_logits_processor(self, *args, **kwargs):
        """transformers 5.23 spares as many ids as a row has padding from repetition penalties: rightly in token ids,
        but a prompt of embeddings has no ids, and the first generated ones would go unpenalised.
        """
        if kwargs.get("input_ids_seq_length") == 0 and kwargs.get("model_kwargs"):
            kwargs["model_kwargs"] = {name: v for name, v in kwargs["model_kwargs"].items() if name != "attention_mask"}
        return super()._get_logits_processor(*args, **kwargs)

    def _get_candidate_generator(self, *args, **kwargs):
        """Prompt lookup drafts what stands in the prompt, a picture's placeholders among it: see `TextDrafts`."""
        drafts = super()._get_candidate_generator(*args, **kwargs)
        if not isinstance(drafts, PromptLookupCandidateGenerator):
            return drafts
        return TextDrafts(drafts, (self.config.image_token_id, self.config.video_token_id))

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """Run what of the prompt is not in the cache yet; returns the last position's logits (B * C, 1, vocabulary)."""
        cache = model_kwargs.get("past_key_values")
        if cache is None or not is_first_iteration:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        rows = copies_rows(cache)
        shared = copies if self.share_prefill and rows else 1
        if rows and cache.get_seq_length():
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
            for name in ("logits", "hidden_states", "attentions"):
                output[name] = repeat_rows(output.get(name), shared)
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
        types = inputs["mm_token_type_ids"][::repeat]
        return self.model.prompt_embeddings(input_ids[::repeat], mm_token_type_ids=types, **pictures).repeat(repeat)

    def _run_ahead(self, embeds: PromptEmbeddings, inputs: dict, cache) -> Tensor:
        """Run a prompt but for its last position and return that one's embedding (B, 1, D): `generate` takes it with
        the cache and an attention mask (B, T), and never needs all embeddings at once.
        """
        last = embeds.shape[1] - 1
        if cache.get_seq_length() < last:
            self._run_prompt(embeds, inputs, cache, end=last)
        return embeds.read(last)

    def _run_prompt(
        self, embeds: PromptEmbeddings | Tensor, inputs: dict, cache, end: int | None = None
    ) -> CausalLMOutputWithPast:
        """Run a prompt of T positions chunk by chunk into the cache, from where the cache ends.

        Args:
            embeds: (B, n) positions, the prompt's last n: whatever the cache does not hold must be among them.
            inputs: what else `generate` has prepared: `position_ids` (B, T) above all, an `attention_mask` (B, T).
            end: stop before this position; None: run all.

        Returns:
            The output of the last chunk.

        Raises:
            ValueError: nothing is left to run, or positions that neither `embeds` nor the cache holds.
        """
        mask, types = inputs.get("attention_mask"), inputs.get("mm_token_type_ids")
        positions = inputs["position_ids"].expand(embeds.shape[0], -1)
        seen, given = cache.get_seq_length(), embeds.shape[1]
        total = max(given, positions.shape[1], mask.shape[1] if mask is not None and mask.ndim == 2 else 0)
        end = total if end is None else end
        if not total - given <= seen < end:
            raise ValueError(
                f"past_key_values hold {seen} positions and the prompt brings the last {given} of {total}: pass the "
                f"ids of the whole conversation, or the new ones with an attention_mask over past and new ones"
            )
        read = embeds.read if isinstance(embeds, PromptEmbeddings) else lambda start, end: embeds[:, start:end]
        extras = {name: True for name in ("output_attentions", "output_hidden_states") if inputs.get(name)}
        step = max(1, min(self.prefill_chunk, MASK_ELEMENTS // total)) if self.prefill_chunk else total
        if extras:  # the caller wants them whole, and one call gives them whole
            step = total
        common = {
            "past_key_values": cache,
            "use_cache": True,
            "infer_mode": inputs.get("infer_mode", "base"),
            # Every chunk turns with the whole prompt's angles, as one call would.
            "rope_length": positions[:, -1:] + 1,
            **extras,
        }

        def chunk_of(tensor: Tensor, start: int, stop: int) -> Tensor:
            """Columns [start, stop) of the prompt, from what may hold its last ones alone."""
            before = total - tensor.shape[1]
            return tensor[:, start - before : stop - before]

        for start in range(seen, end, step):
            stop = min(start + step, end)
            output = self(
                inputs_embeds=read(start - total + given, stop - total + given),
                position_ids=chunk_of(positions, start, stop),
                attention_mask=mask[:, :stop] if mask is not None and mask.ndim == 2 else mask,
                mm_token_type_ids=None if types is None else chunk_of(types, start, stop),
                logits_to_keep=inputs.get("logits_to_keep", 1) if stop == total else 1,
                return_dict=True,
                **common,
            )
        return output
