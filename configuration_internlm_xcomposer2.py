"""Every size and knob of the family, read from the released flat `config.json` or from a nested one.

Releases write the decoder's fields at the top level and say nothing of the vision tower or of the adapters; what they
leave out is their kind's (`kinds_internlm_xcomposer2`). Inside, each number lives once, in `text_config` or
`vision_config`; the flat names stay readable and writable on the top config (`config.hidden_size`).
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import CLIPVisionConfig, PretrainedConfig
from transformers.utils import is_flash_attn_2_available, is_kernels_available, logging

from .ixc_utils import TILINGS, PictureLayout
from .kinds_internlm_xcomposer2 import (
    ARTICLE_STYLES,
    COMMON,
    DEFAULT_KIND,
    HEADS,
    KINDS,
    SYSTEMS,
    kind_fields,
    kind_of,
    kind_text_fields,
)
from .recognition_internlm_xcomposer2 import complete_from_weights
from .weight_files_internlm_xcomposer2 import some

logger = logging.get_logger(__name__)

# Which task adapters each `infer_mode` of the public methods switches on. A further adapter is its own mode.
INFER_MODES: dict[str, tuple[str, ...]] = {"base": (), "web": ("web",), "write": ("sft", "dpo")}


MOST = 2**31 - 1  # no count of ours is larger, and tensors of such a size do not exist


class Rule(NamedTuple):
    """What a field may be: a check of its value, and the words for it."""

    holds: Callable[[Any], bool]
    words: str


def _is_int(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_activation(value: Any) -> bool:
    from transformers.activations import ACT2FN  # imports torch

    return isinstance(value, str) and value in ACT2FN


def _is_token(value: Any) -> bool:
    return value is None or _is_int(value, 0)


def _one_of(choices: tuple) -> Rule:
    return Rule(lambda value: value in choices, f"one of {', '.join(map(repr, choices))}")


COUNT = Rule(_is_int, "a positive integer")
POSITIVE = Rule(lambda value: _is_number(value) and value > 0, "a positive number")
FRACTION = Rule(lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 up to 1")
SWITCH = Rule(lambda value: isinstance(value, bool), "true or false")
ACTIVATION = Rule(_is_activation, "the name of an activation that transformers knows")
TOKEN = Rule(_is_token, "a token id or null")
TOKENS = Rule(
    lambda value: _is_token(value) or (isinstance(value, list) and bool(value) and all(_is_int(v, 0) for v in value)),
    "a token id, a list of them, or null",
)
SECTION = Rule(lambda value: value is None or isinstance(value, Mapping | PretrainedConfig), "fields by name")
RANKS = Rule(
    lambda value: (
        value is None
        or (isinstance(value, Mapping) and all(isinstance(n, str) and n.isalnum() and n.islower() for n in value))
        or value == []
    ),  # vLLM's --hf-overrides can say "none" by an empty list alone
    "ranks by adapter name (small letters and digits)",
)


def maybe(rule: Rule) -> Rule:
    """The same, or null: not said."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.words} or null")


PLORA_LINEARS = ("wqkv", "wo", "w1", "w2", "w3")
OWN_PLORA = tuple(f"plora_{linear}_{what}" for linear in PLORA_LINEARS for what in ("rank", "alpha"))

# Every field of ours that is a number, a switch or a choice, and what it may be: checked where it is read.
TEXT_RULES = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings", "plora_rank"), COUNT
    ),
    **dict.fromkeys(("initializer_range", "rms_norm_eps", "plora_alpha"), POSITIVE),
    **{name: maybe(COUNT if name.endswith("rank") else POSITIVE) for name in OWN_PLORA},
    **dict.fromkeys(("bias", "use_cache", "tie_word_embeddings"), SWITCH),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN),
    "plora_dropout": FRACTION,
    "hidden_act": ACTIVATION,
    "eos_token_id": TOKENS,
    "task_adapter_ranks": RANKS,
    "plain_modes": Rule(lambda value: all(mode in INFER_MODES for mode in value), f"a list out of {list(INFER_MODES)}"),
}  # fmt: skip
ROPE_RULES = {
    "rope_theta": POSITIVE,
    "factor": Rule(lambda value: _is_number(value) and value >= 1, "a number of 1 or more"),
}
VISION_RULES = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
        COUNT,
    ),
    "num_channels": Rule(lambda value: value == 3, "3"),
    "layer_norm_eps": POSITIVE,
    "attention_dropout": FRACTION,
    "initializer_range": POSITIVE,
    "hidden_act": ACTIVATION,
}
TOP_RULES = {
    **dict.fromkeys(("default_hd_num", "many_images_hd_num", "context_length"), COUNT),
    **dict.fromkeys(("image_separators", "bos_on_each_piece"), SWITCH),
    **dict.fromkeys(("max_length", "img_size"), maybe(COUNT)),
    **dict.fromkeys(("vision_config", "text_config", "rope_scaling", "rope_parameters"), SECTION),
    "kind": _one_of(tuple(KINDS)),
    "spatial_merge_size": _one_of((1, 2)),
    "tiling": _one_of(TILINGS),
    "text_only_bos": _one_of((1, 2)),
    "default_system": _one_of(SYSTEMS),
    "article_style": _one_of(ARTICLE_STYLES),
    "head": _one_of(HEADS),
}


def check_fields(fields: Mapping[str, Any], rules: Mapping[str, Rule], section: str = "") -> None:
    """Raise a ValueError that names the first field whose value its rule refuses. Fields without a rule pass."""
    for name, value in fields.items():
        if name in rules and not rules[name].holds(value):
            raise ValueError(f"{section}{name} must be {rules[name].words}, got {value!r}")


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} ({value}) must be a multiple of {divisor_name} ({divisor})")


class InternLM2Config(PretrainedConfig):
    """The decoder: InternLM2 (GQA, RMSNorm, SwiGLU, rotary positions) whose linears carry adapters.

    Args:
        plora_rank, plora_alpha, plora_dropout: partial LoRA of every linear, applied to image tokens alone
            (InternLM-XComposer2, arXiv:2401.16420, section 3.1). `plora_wqkv_rank`, `plora_wqkv_alpha` and their like
            for wo, w1, w2, w3 are a linear's own.
        task_adapter_ranks: rank of each task adapter the checkpoint carries; `{}` for none.
        plain_modes: modes that the weights know without an adapter.
        rope_parameters: `rope_type` "default" or "dynamic" (with `factor`), and `rope_theta`. The legacy keys
            `rope_theta` and `rope_scaling` are folded in.

    Raises:
        ValueError: a field that `TEXT_RULES` or `ROPE_RULES` refuses, sizes that do not divide, another `rope_type`.
    """

    model_type = "internlmxcomposer2_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]
    ignore_keys_at_rope_validation = {"mrope_section"}
    # Tensor parallelism splits each linear and the side of its adapters that has its width; the low side is replicated.
    base_model_tp_plan = {
        f"layers.*.{linear}.{part}": style
        for style, linears, parts in (
            ("colwise", ("attention.wqkv", "feed_forward.w1", "feed_forward.w3"), ("linear", "Plora_B", "task_B.*")),
            ("rowwise", ("attention.wo", "feed_forward.w2"), ("linear", "Plora_A", "task_A.*")),
        )
        for linear in linears
        for part in parts
    }
    base_model_pp_plan = {
        "tok_embeddings": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size=92544,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_act="silu",
        max_position_embeddings=32768,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
        bias=False,
        use_cache=True,
        rope_parameters=None,
        plora_rank=256,
        plora_alpha=256,
        plora_dropout=0.05,
        task_adapter_ranks=None,
        plain_modes=(),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        **kwargs,
    ):
        own_plora = {name: kwargs.pop(name, None) for name in OWN_PLORA}
        given = {name: value for name, value in locals().items() if name in TEXT_RULES}
        check_fields({**given, **own_plora}, TEXT_RULES)
        check_fields(kwargs, {"rope_scaling": SECTION, "rope_theta": ROPE_RULES["rope_theta"]})
        check_fields({"rope_parameters": rope_parameters}, {"rope_parameters": SECTION})
        _require_multiple("hidden_size", hidden_size, "num_attention_heads", num_attention_heads)
        _require_multiple("num_attention_heads", num_attention_heads, "num_key_value_heads", num_key_value_heads)
        _require_multiple("hidden_size / num_attention_heads", hidden_size // num_attention_heads, "rotary pairs", 2)
        if task_adapter_ranks is None:
            task_adapter_ranks = kind_text_fields(DEFAULT_KIND)["task_adapter_ranks"]
        ranks = {f"task_adapter_ranks[{name!r}]": rank for name, rank in dict(task_adapter_ranks).items()}
        check_fields(ranks, dict.fromkeys(ranks, COUNT))
        tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        for name, value in tokens.items():
            for token in value if isinstance(value, list) else [value]:
                if token is not None and token >= vocab_size:
                    raise ValueError(f"{name} ({token}) lies outside the vocabulary of {vocab_size}")

        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.bias = bias
        self.use_cache = use_cache
        self.plora_rank = plora_rank
        self.plora_alpha = plora_alpha
        self.plora_dropout = plora_dropout
        for name, value in own_plora.items():
            setattr(self, name, value)
        self.task_adapter_ranks = dict(task_adapter_ranks)
        self.plain_modes = list(plain_modes)
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        kwargs.pop("head_dim", None)  # derived above

        self.rope_parameters = dict(rope_parameters) if rope_parameters else None
        if rope_parameters is None:
            kwargs.setdefault("rope_theta", 1e6)
        if kwargs.get("rope_scaling"):
            kwargs["rope_scaling"] = dict(kwargs["rope_scaling"])  # transformers fills it in, and it is the caller's
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ("default", "dynamic"):
            raise ValueError(f"rope type {rope_type!r} is unknown here; use 'default' or 'dynamic'")
        if rope_type == "dynamic" and "factor" not in self.rope_parameters:
            raise ValueError("rope type 'dynamic' needs a factor (1.0 and 2.0 are the releases')")
        check_fields(self.rope_parameters, ROPE_RULES, "rope_parameters: ")
        # vLLM hands three rows of positions to a decoder with an mrope_section: the third carries the image mask.
        self.rope_parameters.setdefault("mrope_section", [self.head_dim // 2, 0, 0])

    def plora_of(self, linear: str) -> tuple[int, float]:
        """Rank and alpha of partial LoRA in a linear of `PLORA_LINEARS`."""
        rank, alpha = (getattr(self, f"plora_{linear}_{what}") for what in ("rank", "alpha"))
        return self.plora_rank if rank is None else rank, self.plora_alpha if alpha is None else alpha

    def adapters_of(self, infer_mode: str) -> tuple[str, ...]:
        """Task adapters that `infer_mode` switches on.

        Raises:
            ValueError: the mode is unknown, or this checkpoint lacks one of its adapters.
        """
        adapters = () if infer_mode in self.plain_modes else INFER_MODES.get(infer_mode, (infer_mode,))
        missing = [name for name in adapters if name not in self.task_adapter_ranks]
        if not missing:
            return adapters
        here = sorted(self.task_adapter_ranks) or "none"
        if infer_mode in INFER_MODES:
            raise ValueError(
                f"infer_mode={infer_mode!r} needs the task adapters {list(adapters)}, but this checkpoint lacks "
                f"{missing} (it has {here}); use infer_mode='base' or a checkpoint that carries them, as "
                f"{KINDS[DEFAULT_KIND].title} does"
            )
        modes = sorted({*INFER_MODES, *self.task_adapter_ranks})
        raise ValueError(f"unknown infer_mode {infer_mode!r}; use one of {modes} (task adapters here: {here})")


# Released config.json files keep these at the top level; they live in `text_config`.
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "bias",
    "use_cache", "plora_rank", "plora_alpha", "plora_dropout", "task_adapter_ranks", "plain_modes",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", *OWN_PLORA,
)  # fmt: skip
# These too, but only in `text_config`: transformers validates whatever config carries them.
ROPE_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling")

MODEL_TYPE_SPELLINGS = ("internlm2", "internlm", "internlm2_xcomposer")
# The classes that releases name, whatever their head, and the class of each head.
ARCHITECTURE_SPELLINGS = ("InternLM2ForCausalLM", "InternLMXComposer2ForCausalLM")
ARCHITECTURES = {
    "vocabulary": "InternLMXComposer2ForCausalLM",
    "score": "InternLMXComposer2ForSequenceClassification",
}

# CLIP ViT-L/14, the tower of every release; its `image_size` is the kind's.
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": KINDS[DEFAULT_KIND].image_size,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


# Fields of the top config in which the kinds differ (`max_length` is kept as `context_length`).
KIND_FIELDS = tuple(name for name in COMMON if name != "max_length")
DTYPES = ("float16", "bfloat16", "float32", "float64", "auto")


class InternLMXcomposer2Config(PretrainedConfig):
    """Configuration of the whole model. The class name is spelled as the release's `auto_map` has it.

    Args:
        kind: a row of `KINDS`, which gives what is left out; None: recognised by the other fields.
        vision_config: CLIP vision fields; `image_size` is also the side of a tile in pixels.
        text_config: an `InternLM2Config` or its fields; without it they are taken from the top level, as released.
        max_length: longest conversation in tokens, prompt and answer (kept as `context_length`: transformers reserves
            the name `max_length` for generation settings).
        image_token_id, video_token_id: spare vocabulary entries that hold an image's or a video's place in `input_ids`
            (default: `[UNUSED_TOKEN_140]` and `[UNUSED_TOKEN_139]`, counted from the end of the vocabulary).
        img_size: the released name of `vision_config.image_size` where a picture is one tile.
        spatial_merge_size: patches along a side of an image token.
        tiling: how a picture becomes tiles, one of `ixc_utils.TILINGS`.
        image_separators: whether the weights hold row ends and the vector between global view and tiles.
        default_hd_num, many_images_hd_num: most tiles of the only picture of a conversation, of each of several.
        bos_on_each_piece, text_only_bos: BOS before every piece of text in a chat; how many where there is no picture.
        default_system: the system turn of a chat that names none: "chat", "write" (the released texts), or None.
        article_style: how illustrated articles are asked for, see `xcomposer.article.prompts.STYLES`.
        head: "vocabulary", or "score" for one number a conversation.

    Raises:
        ValueError: a field that `TOP_RULES` or `VISION_RULES` refuses, a vision grid that cannot be merged, a token id
            outside the vocabulary, or a decoder size that `InternLM2Config` refuses.
    """

    model_type = "internlmxcomposer2"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": InternLM2Config}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        max_length=None,
        context_length=None,
        image_token_id=None,
        video_token_id=None,
        kind=None,
        **kwargs,
    ):
        stated = {"vision_config": vision_config, "text_config": text_config, "max_length": max_length}
        if kind is not None:
            kwargs["kind"] = kind
        if context_length is not None:
            stated["context_length"] = context_length
        check_fields({**stated, **kwargs}, TOP_RULES)
        _check_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
        nested = text_config.to_dict() if isinstance(text_config, PretrainedConfig) else dict(text_config or {})
        self.kind = kind_of({**kwargs, **nested})
        kwargs.pop("kind", None)
        defaults = kind_fields(self.kind)
        for name in KIND_FIELDS:
            setattr(self, name, kwargs.pop(name, defaults[name]))

        if isinstance(text_config, InternLM2Config):
            self.text_config = text_config
        else:
            flat = {name: kwargs[name] for name in (*TEXT_FIELDS, *ROPE_FIELDS) if name in kwargs}
            if flat.get("task_adapter_ranks", "") is None:
                flat.pop("task_adapter_ranks")
            self.text_config = InternLM2Config(**{**kind_text_fields(self.kind), **flat, **nested})
        for name in (*TEXT_FIELDS, *ROPE_FIELDS):
            kwargs.pop(name, None)

        self._set_vision(vision_config, kwargs.get("img_size"))
        self.context_length = context_length or max_length or defaults["max_length"]
        vocab_size = self.text_config.vocab_size
        self.image_token_id = vocab_size - 7 if image_token_id is None else image_token_id
        self.video_token_id = vocab_size - 8 if video_token_id is None else video_token_id
        for name in ("image_token_id", "video_token_id"):
            if not _is_int(getattr(self, name), 0) or getattr(self, name) >= vocab_size:
                raise ValueError(f"{name} ({getattr(self, name)}) lies outside the vocabulary of {vocab_size}")

        if self.head == "score":  # one number, as it is: trainers and servers go by these two names
            kwargs = {"num_labels": 1, "problem_type": "regression", **kwargs}
        flash = is_flash_attn_2_available() or is_kernels_available()  # the model sees whether a kernel can be loaded
        if kwargs.get("attn_implementation") == "flash_attention_2" and not flash:
            # Every release asks for it; a newcomer has nothing to do about it, and the tokens are the same.
            logger.info("flash-attn is asked for but not installed: attention runs on PyTorch's SDPA.")
            kwargs["attn_implementation"] = "sdpa"
        super().__init__(**kwargs)

    def _set_vision(self, vision_config: Any, img_size: int | None) -> None:
        """The tower's config from the fields given, and what the kind says of it."""
        if not isinstance(vision_config, CLIPVisionConfig):
            fields = {**VISION_DEFAULTS, "image_size": img_size or KINDS[self.kind].image_size, **(vision_config or {})}
            check_fields(fields, VISION_RULES, "vision_config.")
            width, heads = fields["hidden_size"], fields["num_attention_heads"]
            _require_multiple("vision_config.hidden_size", width, "vision_config.num_attention_heads", heads)
            numbers = [name for name, rule in VISION_RULES.items() if rule in (POSITIVE, FRACTION) and name in fields]
            vision_config = CLIPVisionConfig(**fields | {name: float(fields[name]) for name in numbers})
        self.vision_config = vision_config
        size, patch, merge = vision_config.image_size, vision_config.patch_size, self.spatial_merge_size
        if img_size not in (None, size):
            raise ValueError(f"img_size is {img_size}, but vision_config.image_size is {size}; drop one of them")
        if size % patch or size // patch % merge:
            grid, token = ("a whole", "one patch") if merge == 1 else ("an even", "2 x 2 patches")
            raise ValueError(
                f"vision_config.image_size ({size}) must be {grid} number of patches of {patch} pixels: {token} make "
                f"one image token"
            )
        if self.tiling != "none" and not self.image_separators:
            raise ValueError(f"tiling={self.tiling!r} needs image_separators: tiles are joined row by row with them")

    def to_diff_dict(self) -> dict[str, Any]:
        """transformers', and always the fields of the kind: they are defaults of one kind, not of the class."""
        return {**super().to_diff_dict(), "kind": self.kind, **{name: getattr(self, name) for name in KIND_FIELDS}}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """transformers' reader, and what the weights beside the file say that it leaves out.

        Siblings that name a language model, as type or as class, are this model.
        """
        hub = dict(kwargs)
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if fields and hub.get("gguf_file") is None:
            fields, faults = complete_from_weights(fields, pretrained_model_name_or_path, hub)
            if faults:
                try:
                    cls(**copy.deepcopy(fields))
                except ValueError as error:  # the weights tell more than the config's own check
                    raise ValueError(f"{error}; config.json contradicts the weights: {some(faults, 8)}") from error
        named = fields.get("architectures") or []
        if len(named) == 1 and named[0] in ARCHITECTURE_SPELLINGS:  # vLLM builds what stands here
            head = fields.get("head", kind_fields(kind_of(fields))["head"])
            fields["architectures"] = [ARCHITECTURES.get(head, named[0])]
        if fields.get("model_type") in MODEL_TYPE_SPELLINGS:
            fields["model_type"] = cls.model_type
        return fields, kwargs

    @property
    def tile(self) -> int:
        """Side of a square image tile, in pixels."""
        return self.vision_config.image_size

    @property
    def tokens_per_side(self) -> int:
        """Image tokens along one side of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size // self.spatial_merge_size

    @property
    def merged_width(self) -> int:
        """Width of an image token before the projector: that of its patches side by side."""
        return self.spatial_merge_size**2 * self.vision_config.hidden_size

    @property
    def layout(self) -> PictureLayout:
        """What becomes of pictures."""
        return PictureLayout.of(self)

    def adapters_of(self, infer_mode: str) -> tuple[str, ...]:
        """See `InternLM2Config.adapters_of`."""
        return self.text_config.adapters_of(infer_mode)


def _check_dtype(dtype: Any) -> None:
    if isinstance(dtype, str) and dtype.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"torch_dtype is {dtype!r}; use one of {', '.join(DTYPES)}")


def _in_text_config(name: str) -> property:
    return property(
        lambda self: getattr(self.text_config, name),
        lambda self, value: setattr(self.text_config, name, value),
        doc=f"`text_config.{name}`",
    )


for _name in TEXT_FIELDS:
    setattr(InternLMXcomposer2Config, _name, _in_text_config(_name))

__all__ = ["InternLM2Config", "InternLMXcomposer2Config"]
