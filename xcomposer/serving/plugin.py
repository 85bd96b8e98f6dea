"""vLLM's plug-in (entry point `vllm.general_plugins`): `vllm serve FOLDER` on a released folder as it is.

vLLM calls `register` in each of its processes. After it, a checkpoint of this family needs neither remote code nor
options: the Auto classes know it (`import xcomposer`), its architecture has a class, its turns end where a turn ends,
videos give the frames that `chat` takes, and prompts beyond `max_position_embeddings` give the tokens that transformers
gives. A checkpoint with a score head is a classifier: `/classify` and `/pooling` give the scores of `get_score`. Models
of other families are left alone.
"""

import functools
import json
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

import xcomposer  # noqa: F401  (registers the Auto classes)
from xcomposer.family import MODEL_TYPE

logger = logging.getLogger("vllm.xcomposer")  # below vLLM's own logger, whose handler prints it

# Architecture -> its class, by name: importing it may start CUDA.
MODEL_CLASSES = {
    "InternLMXComposer2ForCausalLM": "xcomposer.serving.vllm_model:XComposerForCausalLM",
    "InternLMXComposer2ForSequenceClassification": "xcomposer.serving.vllm_model:XComposerForSequenceClassification",
}
VIDEO_BACKEND = "internlm_xcomposer2"
TURN_END = "[UNUSED_TOKEN_145]"


def stretches(model_config: Any) -> bool:
    """Whether dynamic rope stretches beyond `max_position_embeddings`, so that no length is the longest."""
    return model_config.hf_text_config.rope_parameters["rope_type"] == "dynamic"


def allow_any_length(self: Any, library: Callable, max_model_len: int | None) -> int:
    """`--max-model-len` as asked for, where vLLM would stop at `factor` times `max_position_embeddings`."""
    if stretches(self) and max_model_len is not None and max_model_len > 0:
        return max_model_len
    return library(self, max_model_len)


def end_turns(self: Any, library: Callable) -> dict[str, Any]:
    """The folder's generation settings, with the end of a turn among its stops: releases name `</s>` alone."""
    from vllm.tokenizers import cached_tokenizer_from_config

    fields = library(self)
    tokenizer = cached_tokenizer_from_config(self)
    if tokenizer is None:  # --skip-tokenizer-init: stops are the caller's
        return fields
    named = fields.get("eos_token_id", tokenizer.eos_token_id)
    stops = [*(named if isinstance(named, list) else [named]), tokenizer.convert_tokens_to_ids(TURN_END)]
    return {**fields, "eos_token_id": list(dict.fromkeys(stops))}


def begin_text(self: Any, library: Callable, prompt: Any, params: Any) -> Any:
    """A text's tokens; one without pictures begins with as many BOS as the chat of its kind has there."""
    tokens = library(self, prompt, params)
    ids, bos = tokens["prompt_token_ids"], self.get_bos_token_id()
    media = (prompt.get("multi_modal_data") or {}).values()
    has_media = any(value is not None and not (isinstance(value, list) and not value) for value in media)
    if has_media or ids[:1] != [bos]:
        return tokens
    begun = next((at for at, token in enumerate(ids) if token != bos), len(ids))
    missing = self.model_config.hf_config.text_only_bos - begun
    return {**tokens, "prompt_token_ids": [bos] * max(missing, 0) + ids}


# What vLLM must know of a release in 4 bits and the release does not say, by `quant_method`: which linears are packed.
PACKED: dict[str, dict[str, Any]] = {
    "gptq": {
        "desc_act": False,
        "sym": True,
        "modules_in_block_to_quantize": [f"{name}.linear" for name in ("wqkv", "wo", "w1", "w2", "w3")],
    },
    "awq": {"modules_to_not_convert": ["vision_tower", "vision_proj", "Plora_", "task_", "lm_head"]},
}


def name_packed_linears(self: Any, library: Callable) -> Any:
    """vLLM's facts of a model, after `quantization_config` tells its GPTQ or AWQ reader where the packed linears are.

    Releases in GPTQ say what they are in `quantize_config.json` alone.
    """
    from xcomposer.model.recognition_internlm_xcomposer2 import PACKED_SETTINGS, hub_file

    config = self.hf_config
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        beside = hub_file(self.model, PACKED_SETTINGS, {"revision": self.revision})
        settings = None if beside is None else {"quant_method": "gptq", **json.loads(beside.read_text("utf-8"))}
    if isinstance(settings, dict) and settings.get("quant_method") in PACKED:
        stated = {name: value for name, value in settings.items() if value is not None}
        config.quantization_config = {**PACKED[stated["quant_method"]], **stated}
    return library(self)


# Methods of vLLM's classes, and what they do for this family; vLLM has no hook where these are decided.
METHODS: dict[str, dict[str, Callable]] = {
    "vllm.config:ModelConfig": {
        "get_and_verify_max_len": allow_any_length,
        "try_get_generation_config": end_turns,
        "get_model_arch_config": name_packed_linears,
    },
    "vllm.renderers:BaseRenderer": {"_tokenize_prompt": begin_text},
}


def extend(cls: type, name: str, ours: Callable) -> None:
    """Let a method do `ours(self, library's method, ...)` for models of this family; once."""
    library = getattr(cls, name)
    if getattr(library, "extended_by", None) == __name__:
        return

    @functools.wraps(library)
    def method(self, *args, **kwargs):
        hf_config = self.hf_config if hasattr(self, "hf_config") else self.model_config.hf_config
        if hf_config.model_type == MODEL_TYPE:
            return ours(self, library, *args, **kwargs)
        return library(self, *args, **kwargs)

    method.extended_by = __name__  # type: ignore[attr-defined]
    setattr(cls, name, method)


class ConfigUpdates:
    """What vLLM's configuration takes from this family's models (an entry of its `MODELS_CONFIG_MAP`)."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Frames as `chat` chooses them, unless `--media-io-kwargs` names another backend."""
        video = model_config.multimodal_config.media_io_kwargs.setdefault("video", {})
        video.setdefault("video_backend", VIDEO_BACKEND)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """No prefix caching where prompts of different lengths have different keys for the same beginning."""
        model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
        limit = model_config.hf_text_config.max_position_embeddings
        if cache_config.enable_prefix_caching and stretches(model_config) and model_config.max_model_len > limit:
            logger.warning(
                "Prefix caching is off: beyond max_position_embeddings (%d) dynamic rope turns a prompt's keys by the "
                "prompt's length, so prompts of different lengths cannot share them, and max_model_len is %d. "
                "--max-model-len %d keeps it on.",
                limit, model_config.max_model_len, limit,
            )  # fmt: skip
            cache_config.enable_prefix_caching = False


def register_video_backend() -> None:
    """A decoder for vLLM's server that keeps the frames that `chat` would keep."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoBackend

    @VIDEO_LOADER_REGISTRY.register(VIDEO_BACKEND)
    class ChatFrames(VideoBackend):
        @classmethod
        def compute_frames_index_to_sample(cls, source, target, **kwargs):
            from xcomposer.model.ixc_utils import choose_frames

            most = target.num_frames if target.num_frames > 0 else source.total_frames_num
            fps = target.fps if target.fps > 0 else 1.0
            return choose_frames(source.total_frames_num, source.original_fps, most, None, None, fps)


def register() -> None:
    """Make vLLM run this family's models; called by vLLM in each of its processes, and harmless when called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for architecture, model_class in MODEL_CLASSES.items():
        ModelRegistry.register_model(architecture, model_class)
        MODELS_CONFIG_MAP[architecture] = ConfigUpdates
    for place, methods in METHODS.items():
        for name, ours in methods.items():
            extend(pkgutil.resolve_name(place), name, ours)
    register_video_backend()
