"""Every size and knob of InternLM-XComposer-2.5, read from the released flat `config.json` or from a nested one.

The release writes the decoder's fields at the top level and says nothing of the vision tower or of the adapters; the
defaults below are the 7B release's. Inside, each number lives once, in `text_config` or `vision_config`; the flat
names stay readable and writable on the top config (`config.hidden_size`).
"""

from transformers import CLIPVisionConfig, PretrainedConfig
from transformers.utils import is_flash_attn_2_available, logging

logger = logging.get_logger(__name__)

# Which task adapters each `infer_mode` of the public methods switches on. A further adapter is its own mode.
INFER_MODES: dict[str, tuple[str, ...]] = {"base": (), "web": ("web",), "write": ("sft", "dpo")}


def _require_positive_int(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} ({value}) must be a multiple of {divisor_name} ({divisor})")


class InternLM2Config(PretrainedConfig):
    """The decoder: InternLM2 (GQA, RMSNorm, SwiGLU, rotary positions) whose linears carry adapters.

    Args:
        plora_rank, plora_alpha, plora_dropout: partial LoRA of every linear, applied to image tokens alone
            (InternLM-XComposer2, arXiv:2401.16420, section 3.1).
        task_adapter_ranks: rank of each task adapter the checkpoint carries; `{}` for none.
        rope_parameters: `rope_type` "default" or "dynamic" (with `factor`), and `rope_theta`. The legacy keys
            `rope_theta` and `rope_scaling` are folded in.

    Raises:
        ValueError: sizes that do not divide, ranks that are no positive integers, another `rope_type`.
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
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        **kwargs,
    ):
        _require_positive_int(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            plora_rank=plora_rank,
        )
        _require_multiple("hidden_size", hidden_size, "num_attention_heads", num_attention_heads)
        _require_multiple("num_attention_heads", num_attention_heads, "num_key_value_heads", num_key_value_heads)
        if task_adapter_ranks is None:
            task_adapter_ranks = {"sft": 256, "dpo": 256, "web": 512}
        _require_positive_int(**{f"task_adapter_ranks[{name!r}]": rank for name, rank in task_adapter_ranks.items()})

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
        self.task_adapter_ranks = dict(task_adapter_ranks)
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
        # vLLM hands three rows of positions to a decoder with an mrope_section: the third carries the image mask.
        self.rope_parameters.setdefault("mrope_section", [self.head_dim // 2, 0, 0])

    def adapters_of(self, infer_mode: str) -> tuple[str, ...]:
        """Task adapters that `infer_mode` switches on.

        Raises:
            ValueError: the mode is unknown, or this checkpoint lacks one of its adapters.
        """
        adapters = INFER_MODES.get(infer_mode, (infer_mode,))
        missing = [name for name in adapters if name not in self.task_adapter_ranks]
        if not missing:
            return adapters
        here = sorted(self.task_adapter_ranks) or "none"
        if infer_mode in INFER_MODES:
            raise ValueError(
                f"infer_mode={infer_mode!r} needs the task adapters {list(adapters)}, but this checkpoint lacks "
                f"{missing} (it has {here}); use infer_mode='base' or a checkpoint that carries them"
            )
        modes = sorted({*INFER_MODES, *self.task_adapter_ranks})
        raise ValueError(f"unknown infer_mode {infer_mode!r}; use one of {modes} (task adapters here: {here})")


# Released config.json files keep these at the top level; they live in `text_config`.
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "bias",
    "use_cache", "plora_rank", "plora_alpha", "plora_dropout", "task_adapter_ranks",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
# These too, but only in `text_config`: transformers validates whatever config carries them.
ROPE_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling")

MODEL_TYPE_SPELLINGS = ("internlm2", "internlm", "internlm2_xcomposer")

# CLIP ViT-L/14 at 560 x 560, as in the 7B release.
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 560,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


class InternLMXcomposer2Config(PretrainedConfig):
    """Configuration of the whole model. The class name is spelled as the release's `auto_map` has it.

    Args:
        vision_config: CLIP vision fields; `image_size` is also the side of a tile in pixels.
        text_config: an `InternLM2Config` or its fields; without it they are taken from the top level, as released.
        max_length: longest conversation in tokens, prompt and answer (kept as `context_length`: transformers reserves
            the name `max_length` for generation settings).
        image_token_id, video_token_id: spare vocabulary entries that hold an image's or a video's place in `input_ids`
            (default: `[UNUSED_TOKEN_140]` and `[UNUSED_TOKEN_139]`, counted from the end of the vocabulary).

    Raises:
        ValueError: a vision grid that cannot be merged 2 x 2, a token id outside the vocabulary, or a decoder size
            that `InternLM2Config` refuses.
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
        **kwargs,
    ):
        if isinstance(text_config, InternLM2Config):
            self.text_config = text_config
        else:
            flat = {name: kwargs[name] for name in (*TEXT_FIELDS, *ROPE_FIELDS) if name in kwargs}
            self.text_config = InternLM2Config(**{**flat, **(text_config or {})})
        for name in (*TEXT_FIELDS, *ROPE_FIELDS):
            kwargs.pop(name, None)

        if not isinstance(vision_config, CLIPVisionConfig):
            vision_config = CLIPVisionConfig(**{**VISION_DEFAULTS, **(vision_config or {})})
        self.vision_config = vision_config
        patches = vision_config.image_size // vision_config.patch_size
        if vision_config.image_size % vision_config.patch_size or patches % 2:
            raise ValueError(
                f"vision_config.image_size ({vision_config.image_size}) must be an even number of patches of "
                f"{vision_config.patch_size} pixels: 2 x 2 patches make one image token"
            )

        self.context_length = context_length or max_length or 16384
        vocab_size = self.text_config.vocab_size
        self.image_token_id = vocab_size - 7 if image_token_id is None else image_token_id
        self.video_token_id = vocab_size - 8 if video_token_id is None else video_token_id
        for name in ("image_token_id", "video_token_id"):
            if not 0 <= getattr(self, name) < vocab_size:
                raise ValueError(f"{name} ({getattr(self, name)}) lies outside the vocabulary of {vocab_size}")

        if kwargs.get("attn_implementation") == "flash_attention_2" and not is_flash_attn_2_available():
            logger.info("flash-attn is asked for but not installed: attention runs on PyTorch's SDPA.")
            kwargs["attn_implementation"] = "sdpa"
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """transformers' reader; siblings that name a language model, as type or as class, are this model."""
        fields, kwargs = super().get_config_dict(*args, **kwargs)
        if fields.get("architectures") == ["InternLM2ForCausalLM"]:  # vLLM would build that one
            fields["architectures"] = ["InternLMXComposer2ForCausalLM"]
        if fields.get("model_type") in MODEL_TYPE_SPELLINGS:
            fields["model_type"] = cls.model_type
        return fields, kwargs

    @property
    def tile(self) -> int:
        """Side of a square image tile, in pixels."""
        return self.vision_config.image_size

    @property
    def tokens_per_side(self) -> int:
        """Image tokens along one side of a tile: 2 x 2 patches are merged into one token."""
        return self.vision_config.image_size // self.vision_config.patch_size // 2

    def adapters_of(self, infer_mode: str) -> tuple[str, ...]:
        """See `InternLM2Config.adapters_of`."""
        return self.text_config.adapters_of(infer_mode)


def _in_text_config(name: str) -> property:
    return property(
        lambda self: getattr(self.text_config, name),
        lambda self, value: setattr(self.text_config, name, value),
        doc=f"`text_config.{name}`",
    )


for _name in TEXT_FIELDS:
    setattr(InternLMXcomposer2Config, _name, _in_text_config(_name))

__all__ = ["InternLM2Config", "InternLMXcomposer2Config"]
