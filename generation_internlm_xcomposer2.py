"""How a prompt is run before the first token: once however many beams follow, in chunks, continuing a cache.

transformers runs a prompt as one forward call on as many copies as there are beams. `PrefillMixin` puts itself at that
one point of `generate` (`_prefill`); decoding stays transformers'.

Legend: B prompts, C copies of each (beams or returned sequences), T prompt tokens, D decoder width.
"""

from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

# Prompt tokens of one forward call, at most: activations stay bounded however long the prompt is.
PREFILL_CHUNK = 4096
# Elements of the attention mask of one such call: late chunks of very long prompts are shorter.
MASK_ELEMENTS = 2**26

# Inputs whose rows are tiles or pictures, not prompts: beams must not copy them.
PICTURE_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


class PrefillMixin:
    """Prompt handling of `generate`; stands before `GenerationMixin` among the bases."""

    prefill_chunk = PREFILL_CHUNK  # 0: the whole prompt in one call
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

    def _prompt_embeddings(self, inputs: dict, repeat: int) -> Tensor:
        """Embeddings (B, T, D) of a prompt given as ids with pictures, or as embeddings.

        Args:
            repeat: rows of `input_ids` that share one prompt's pictures.
        """
        if inputs.get("inputs_embeds") is not None:
            return inputs["inputs_embeds"]
        input_ids = inputs["input_ids"]
        if all(inputs.get(name) is None for name in PICTURE_INPUTS):
            return self.get_input_embeddings()(input_ids)
        if inputs.get("mm_token_type_ids") is None:
            inputs["mm_token_type_ids"] = self.model.image_slots(input_ids).long()
        pictures = {name: inputs.get(name) for name in PICTURE_INPUTS}
        return self.model.embed(input_ids[::repeat], **pictures).repeat_interleave(repeat, dim=0)

    def _run_prompt(
        self, embeds: Tensor, inputs: dict, cache, stop: int | None = None
    ) -> CausalLMOutputWithPast | None:
        """Run embeddings (B, T, D) chunk by chunk into the cache, from where the cache ends.

        Args:
            stop: end after this many positions and read no logits; None: run all, return the last position's.
        """
        seen, total = cache.get_seq_length(), embeds.shape[1]
        stop = total if stop is None else stop
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
                "inputs_embeds": embeds[:, start:end],
                "position_ids": positions[:, start:end],
                "attention_mask": mask[:, :end] if mask is not None and mask.ndim == 2 else mask,
                "mm_token_type_ids": None if types is None else types[:, start:end],
            }
            if end == total:
                return self(**chunk, **common, logits_to_keep=inputs.get("logits_to_keep", 1), return_dict=True)
            self(**chunk, **common, logits_to_keep=1)
        return None
