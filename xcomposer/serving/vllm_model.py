"""The model as vLLM runs it: its Transformers backend over `InternLMXComposer2Model`, with what this family adds.

vLLM builds the decoder's attention and the head itself, and replaces every `nn.Linear`; partial LoRA reaches the
decoder through M-RoPE positions (`InternLMXComposer2Model.get_rope_index`). Registered by `xcomposer.serving.plugin`.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest

from transformers import AutoModel
from vllm.inputs import MultiModalInput
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.models.transformers import (
    CausalMixin,
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    SequenceClassificationMixin,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from xcomposer.model.configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from xcomposer.model.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Model
from xcomposer.model.processing_internlm_xcomposer2 import hd_num_of
from xcomposer.register import register_classes

UNUSED = {re.compile(r"\.g_idx$"): None}  # of GPTQ releases: vLLM's kernels take groups in order alone
LARGEST_FRAME = 1120  # side of a square frame: no other shape gives a video more tiles


@contextmanager
def auto_model_without_head() -> Iterator[None]:
    """Let `AutoModel.from_config` build the model below the head: vLLM asks for it by that name, and adds a head."""
    register_classes()
    AutoModel.register(InternLMXcomposer2Config, InternLMXComposer2Model, exist_ok=True)
    try:
        yield
    finally:
        AutoModel.register(InternLMXcomposer2Config, InternLMXComposer2ForCausalLM, exist_ok=True)


class ProcessingInfo(MultiModalProcessingInfo):
    """vLLM's, with room for the longest video: its own search for it ends at 16 frames."""

    @cached_property
    def _is_video_model(self) -> bool:
        """Whether videos are taken: they become pictures of several tiles, which some kinds have not."""
        return self.get_hf_processor().video_processor.layout.tiling != "none" and super()._is_video_model

    def get_num_frames_with_most_features(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Most frames a video keeps, or as many as a sequence has room for."""
        videos = max(mm_counts.get("video", 0), 1)
        most = self.get_hf_processor().video_processor.num_frames
        fitting = (n for n in range(most, 1, -1) if self._get_max_video_tokens_for_frames(n) * videos <= seq_len)
        return next(fitting, 1)

    def get_video_size_with_most_features(self, num_frames: int) -> ImageSize:
        return ImageSize(width=LARGEST_FRAME, height=LARGEST_FRAME)


def begin_pieces(ids: Sequence[int], slots: Collection[int], bos: int) -> list[int]:
    """Token ids with BOS after each picture's place that text follows, as the chat of the older kinds has it."""
    pieces = []
    for token, following in zip_longest(ids, ids[1:]):
        pieces.append(token)
        if token in slots and following is not None and following not in (*slots, bos):
            pieces.append(bos)
    return pieces


class Processor(MultiModalProcessor):
    """vLLM's, with what depends on the whole prompt: it tokenises the prompt, and processes one picture at a time.

    That is the tiles that `chat` gives each of several pictures, and the BOS of the older kinds.
    """

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        processor = self.info.get_hf_processor()
        if processor.bos_on_each_piece:
            slots = (processor.image_token_id, processor.video_token_id)
            inputs = replace(inputs, prompt=begin_pieces(inputs.prompt, slots, processor.tokenizer.bos_token_id))
        pictures = sum(items.get_count() for items in inputs.mm_data_items.values())
        told = self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs)
        image_processor = processor.image_processor
        if pictures > 1 and hd_num_of(told) is None and image_processor.hd_num is None:
            hd_num = image_processor.layout.default_hd_num(pictures)
            inputs = replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, "hd_num": hd_num})
        return super().apply(inputs, timing_ctx)


class XComposerMixin:
    """What both classes below share: how vLLM builds the model under the head."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        with auto_model_without_head():
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _create_hf_to_vllm_mapper(self) -> None:
        super()._create_hf_to_vllm_mapper()
        self.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_regex=UNUSED)

    def _patch_config(self) -> None:
        """vLLM's changes to the config, and none of the checkpoint's task adapters, which it could not switch."""
        super()._patch_config()
        self.text_config.task_adapter_ranks = {}


with_processor = MULTIMODAL_REGISTRY.register_processor(
    Processor, info=ProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)


@with_processor
class XComposerForCausalLM(XComposerMixin, MultiModalMixin, CausalMixin):
    """Text, pictures and videos in, text out; task adapters are served beside it, as LoRA modules."""


@with_processor
class XComposerForSequenceClassification(XComposerMixin, SequenceClassificationMixin, MultiModalMixin):
    """A conversation in, its score out: read at the last token, as it is, without a sigmoid."""

    default_seq_pooling_type = "LAST"

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # vLLM's classifier expects tokens (B, 1, D), as heads of encoders do; `score` has one number a row.
        pooler_config = vllm_config.model_config.pooler_config
        self.pooler = DispatchPooler.for_seq_cls(pooler_config, classifier=lambda rows: self.classifier(rows)[:, 0])
        self.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_prefix={"score.": "classifier."})
