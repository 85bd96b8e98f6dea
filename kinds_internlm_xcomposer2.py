"""The kinds of checkpoint that share this code: one row each, and nothing else in the code knows their names.

A row says what the kind's `config.json` leaves out. A new kind is a new row and its recorded cases.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A row: what people call the kind, and the fields its releases leave unsaid.

    Args:
        image_size: of the vision tower, and the side of a tile.
        fields: of the top config, where they differ from `COMMON`.
        text: of the decoder, where they differ from `COMMON_TEXT`.
    """

    title: str
    image_size: int
    fields: dict[str, Any]
    text: dict[str, Any]


# InternLM-XComposer-2.5's own.
COMMON: dict[str, Any] = {
    "spatial_merge_size": 2,
    "tiling": "capped",
    "image_separators": True,
    "default_hd_num": 24,
    "many_images_hd_num": 6,
    "bos_on_each_piece": False,
    "text_only_bos": 1,
    "default_system": None,
    "article_style": "guided",
    "head": "vocabulary",
    "max_length": 16384,
}
COMMON_TEXT: dict[str, Any] = {"plora_rank": 256, "plora_alpha": 256, "task_adapter_ranks": {}}

# One picture of one tile, and the prompt of the first generation: a system turn, BOS before each piece of text.
_OLD_PROMPT = {"bos_on_each_piece": True, "text_only_bos": 2, "default_system": "chat"}
_ONE_TILE = {**_OLD_PROMPT, "spatial_merge_size": 1, "tiling": "none", "image_separators": False, "max_length": 4096}

KINDS: dict[str, Kind] = {
    "xcomposer2d5": Kind(
        "InternLM-XComposer-2.5", 560, {}, {"task_adapter_ranks": {"sft": 256, "dpo": 256, "web": 512}}
    ),
    "xcomposer2d5-ol": Kind("InternLM-XComposer-2.5-OmniLive (base)", 560, {}, {}),
    "xcomposer2d5-reward": Kind("InternLM-XComposer-2.5-Reward", 560, {"head": "score"}, {}),
    "xcomposer2": Kind(
        "InternLM-XComposer2",
        224,
        {**_ONE_TILE, "default_system": "write", "article_style": "plain"},
        {"plain_modes": ["write"]},
    ),
    "xcomposer2-vl": Kind("InternLM-XComposer2-VL", 490, _ONE_TILE, {}),
    "xcomposer2-4khd": Kind(
        "InternLM-XComposer2-4KHD",
        336,
        {**_OLD_PROMPT, "tiling": "uncapped", "default_hd_num": 25, "many_images_hd_num": 16},
        {"plora_wqkv_rank": 8, "plora_wqkv_alpha": 16},
    ),
}
DEFAULT_KIND = "xcomposer2d5"
# The heads, and the public methods that need each.
METHODS_OF_HEAD = {
    "vocabulary": (
        "chat", "stream_chat", "batch_chat", "write_artical", "write_webpage", "stream_webpage", "resume_2_webpage",
        "screen_2_webpage",
    ),
    "score": ("get_score", "get_scores", "compare", "rank"),
}  # fmt: skip
HEADS = tuple(METHODS_OF_HEAD)
SYSTEMS = (None, "chat", "write")
ARTICLE_STYLES = ("guided", "plain")  # rows of `xcomposer.article.prompts.STYLES`


class Relative(NamedTuple):
    """A model of the project's zoo, or one often taken for it, that another architecture reads.

    Args:
        title: what it is.
        remedy: where to look.
        classes: parts of the class names in its `config.json`.
        tensors: parts of its weights' names.
    """

    title: str
    remedy: str
    classes: tuple[str, ...]
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.title}, which this code does not run: {self.remedy}"


RELATIVES = (
    Relative(
        "InternLM-XComposer 1.0 or ShareCaptioner (EVA-CLIP, a Q-Former or resampler, InternLM1)",
        "its own code runs it on transformers 4.33 (InternLM-XComposer-1.0 in the InternLM-XComposer repository)",
        ("InternLMXComposerForCausalLM", "ShareCaptioner"),
        ("Qformer.", "ln_vision."),
    ),
    Relative(
        "ShareGPT4V or another LLaVA model",
        "LlavaForConditionalGeneration of transformers loads it once converted, the ShareGPT4V repository as it is",
        ("Share4V", "LlavaLlama"),
        ("model.mm_projector.",),
    ),
    Relative(
        "OmniLive's audio part",
        "Qwen2AudioForConditionalGeneration of transformers loads it; pictures and text are in the folder base",
        ("Qwen2AudioForConditionalGeneration",),
        ("audio_tower.",),
    ),
    Relative(
        "OmniLive's memory part",
        "the InternLM-XComposer-2.5-OmniLive repository runs it; pictures and text are in the folder base",
        ("GroundQwen",),
        ("compressor.",),
    ),
)


def kind_fields(kind: str) -> dict[str, Any]:
    """The top config's fields of a kind."""
    return {**COMMON, **KINDS[kind].fields}


def kind_text_fields(kind: str) -> dict[str, Any]:
    """The decoder's fields of a kind."""
    return {**COMMON_TEXT, **KINDS[kind].text}


def signs_of_kind(kind: str) -> dict[str, Any]:
    """What of a kind shows in its weights."""
    fields, text = kind_fields(kind), kind_text_fields(kind)
    return {
        "spatial_merge_size": fields["spatial_merge_size"],
        "head": fields["head"],
        "own rank in wqkv": "plora_wqkv_rank" in text,
        "task adapters": bool(text["task_adapter_ranks"]),
    }


def kind_of(fields: Mapping[str, Any], signs: Mapping[str, Any] | None = None) -> str:
    """The kind that a `config.json` is of.

    Args:
        fields: of the `config.json`. `kind` names it; a release has none, and then `img_size` (one tile a picture) or
            an architecture of the plain language model without rope scaling (4KHD) tell.
        signs: what is known from the weights besides, as in `signs_of_kind`, and the tower's `image_size`; they
            outweigh the two hints.

    Raises:
        ValueError: a `kind` that is not in the table.
    """
    kind = fields.get("kind")
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; use one of {', '.join(KINDS)}")
        return kind
    hint = DEFAULT_KIND
    if fields.get("img_size") is not None:
        hint = "xcomposer2" if fields["img_size"] == KINDS["xcomposer2"].image_size else "xcomposer2-vl"
    elif fields.get("architectures") == ["InternLM2ForCausalLM"] and fields.get("rope_scaling", "") is None:
        hint = "xcomposer2-4khd"
    known = dict(signs or {})
    image_size = known.pop("image_size", None)
    stated = {name: fields[name] for name in ("spatial_merge_size", "head") if name in fields}
    if fields.get("task_adapter_ranks") is not None:
        stated["task adapters"] = bool(fields["task_adapter_ranks"])
    if fields.get("plora_wqkv_rank") is not None:
        stated["own rank in wqkv"] = True
    known = {**stated, **known}
    ordered = [hint, *(name for name in KINDS if name != hint)]

    def misses(name: str) -> tuple[int, bool]:
        of_kind = signs_of_kind(name)
        wrong = sum(of_kind[sign] != value for sign, value in known.items())
        return wrong, image_size not in (None, KINDS[name].image_size)

    return min(ordered, key=misses)  # the first of the nearest: what weights say stands in fields of its own


def refuse_methods_of_other_heads(head: str) -> Callable[[type], type]:
    """A decorator of model classes: the public methods of other heads raise a ValueError that says whose they are."""

    def refusal(name: str, other: str) -> Callable:
        bearer = next(kind.title for kind in KINDS.values() if {**COMMON, **kind.fields}["head"] == other)

        def refuse(self, *args, **kwargs):
            raise ValueError(
                f"{name} needs a checkpoint with a {other} head, as {bearer} has; this one has a {head} head"
            )

        refuse.__name__ = name
        return refuse

    def decorate(cls: type) -> type:
        for other, names in METHODS_OF_HEAD.items():
            for name in names if other != head else ():
                setattr(cls, name, refusal(name, other))
        return cls

    return decorate
