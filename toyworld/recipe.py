"""The numbers of the demo's training: sizes, phases, mix. All choices are here."""

from typing import Any

from toyworld.world import TILE

PIECES = 1057  # 1024 of the world's texts, and the stretches of the article prompts
CONFIG: dict[str, Any] = {
    "attn_implementation": "sdpa",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "max_length": 4096,
    "rope_scaling": {"type": "dynamic", "factor": 1.0},
    "rope_theta": 10000,
    "use_cache": True,
    "plora_rank": 16,
    "plora_alpha": 16,
    "plora_dropout": 0.0,
    "task_adapter_ranks": {"sft": 16, "dpo": 16, "web": 16},
    "vision_config": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "image_size": TILE,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}

# Phase -> its share of the budget in minutes.
SHARES = {"look": 0.03, "base": 0.57, "tasks": 0.4}
RATES = {"look": 1.5e-3, "base": 1.2e-3, "tasks": 1.1e-3}
ADAPTER_RATE = 1.5  # times the rate of `tasks`: what the task adapters learn at
PENALTY = 3.0  # `repetition_penalty` of the webpage methods: their pages are learned with it and without
SLOW = 0.25  # of the rate: vision tower and projector once the decoder trains
DENSE = 0.3  # weight of the dense loss once the decoder trains
NAMED = 0.5  # weight of the names of image tokens within the dense loss
COLLAGES = 8  # tiles a step that carry dense labels alone
LENGTH_POWER = -0.5  # an answer of n tokens weighs n ** 0.5: neither drowned nor drowning
# What an answer weighs beside that; 1 where nothing is said. One token says it all here, and it is learned last.
WORTH = dict.fromkeys((
    "exists", "exists_shape", "exists_colour", "which", "which_shape", "which_colour", "more", "article_letter",
    "article_index",
), 3.0)  # fmt: skip
PARTS = 3  # kinds in one step
QUESTIONS = 4  # of a picture, at most
MORE_QUESTIONS = {
    "presence": 10, "several2": 6, "several3": 6, "article_choice": 8, "article_choice_few": 5,
    "article_choice_many": 6,
}  # fmt: skip
MARKED = 0.15  # of the batches of one picture: it stands at a mark, not in front
SYSTEM = 0.08  # of the batches: under the released system prompt, as `use_meta=True` puts it

# Kind -> rows in its part of a step.
ROWS = {
    "shapes": 5, "presence": 5, "crowd": 5, "read1": 8, "read2": 8, "read3": 8, "read4": 8, "read5": 8, "code2x1": 6,
    "code3x2": 4, "code2x3": 4, "several2": 4, "several3": 3, "video3": 4, "video4": 3, "video5": 3, "video6": 3,
    "talk": 3, "echo": 4, "web": 6, "screen": 8, "write": 6,
    "story": 6, "article_places": 4, "article_captions": 5, "article_choice": 6, "article_choice_few": 8,
    "article_choice_many": 4, "article_index": 24, "edits": 6,
}  # fmt: skip
# What a question weighs against the others of its view when some are drawn; 1 where nothing is said.
PICKED = {
    **dict.fromkeys(("position", "position.zh", "exists", "exists.zh"), 2.0),
    **dict.fromkeys(("exists_shape", "exists_shape.zh", "exists_colour", "exists_colour.zh"), 1.5),
    **dict.fromkeys(("which", "which.zh", "which_shape", "which_colour", "video", "more"), 2.0),
    **dict.fromkeys(("list", "list.zh"), 4.0), "follow": 1.5, "article_choice": 3.0, "article_index": 3.0,
    **dict.fromkeys(("count_of", "count_of.zh", "places", "places.zh"), 0.5),
}  # fmt: skip
# Every picture of the base phase's first part is described as well, in one of these ways. A description is one look-up
# after another ("a red star at the top left": place, then colour, then shape), and the questions that take two steps
# ("what colour is the star?") grow on it, but only in the directions in which descriptions go.
DESCRIBED = tuple(f"{task}{end}" for task in ("caption", "list", "places", "list_of") for end in ("", ".zh"))
DESCRIBED_UNTIL = 0.8


def mix(progress: float) -> dict[str, float]:
    """Weights of the kinds in the base phase, by how much of it is over (0 to 1)."""
    reads = ((1.5, 0, 0, 0, 0), (0.8, 1.2, 0, 0, 0), (0.4, 0.8, 0.7, 0.3, 0.1), (0.3, 0.6, 0.5, 0.5, 0.5))
    stage = sum(progress >= border for border in (0.08, 0.2, 0.4))
    codes = ((1.0, 0, 0), (0.7, 0.3, 0.3), (0.2, 0.6, 0.6), (0.1, 0.7, 0.7))[stage]
    return {
        "shapes": 4.5,
        "presence": 1.2,
        "crowd": 3.5,
        **{f"read{n}": weight for n, weight in enumerate(reads[stage], start=1)},
        **dict(zip(("code2x1", "code3x2", "code2x3"), codes, strict=True)),
        "several2": 2.0,
        "several3": 1.5 if stage else 0.2,
        **{f"video{n}": 0.3 for n in range(3, 7)},
        "talk": 0.4,
        "echo": 0.7,
    }


# A step of the last phase takes a part of what the base weights know (every other time: of what is new), one of what is
# new, and, every third time, one of what an adapter writes; else another of what is new.
# The steps of an article teach the write adapter and the base weights at once; texts and pages teach an adapter alone.
NEW_MIX = {
    "edits": 0.4, "article_places": 0.8, "article_captions": 0.4, "article_choice": 2.0, "article_choice_few": 0.2,
    "article_choice_many": 0.1, "article_index": 0.8,
}  # fmt: skip
ADAPTER_MIX = {"web": 0.5, "screen": 0.3, "write": 0.8, "story": 1.0}
