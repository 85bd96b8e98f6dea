"""What a `config.json` may be given: each field of ours with each odd value is refused by its name, or it works.

Held: a ValueError, TypeError or OSError, prompt and short, that names the field or shows the value; or the model loads.
"""

import json
import math

import pytest

from xcomposer.model.configuration_internlm_xcomposer2 import (
    ROPE_RULES,
    TEXT_RULES,
    TOP_RULES,
    VISION_RULES,
    InternLMXcomposer2Config,
)

ODD = (None, True, "", "64", -1, 0, 0.5, 3, 10**18, math.nan, math.inf, -math.inf, [], [1], {}, {"a": 1})
BASE = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "plora_rank": 8, "plora_alpha": 8, "rope_theta": 10000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0}, "task_adapter_ranks": {"web": 4},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": 56},
}  # fmt: skip
SECTIONS = {
    "": {**TOP_RULES, **TEXT_RULES},
    "vision_config": VISION_RULES,
    "rope_scaling": {"factor": ROPE_RULES["factor"], "type": None},
}
CASES = [
    (section, field, value)
    for section, fields in SECTIONS.items()
    for field in (*fields, *(("rope_theta", "image_token_id", "torch_dtype") if not section else ()))
    for value in ODD
]


def with_field(section, field, value):
    fields = json.loads(json.dumps(BASE))
    (fields[section] if section else fields)[field] = value
    return fields


def held(section, field, value):
    try:
        config = InternLMXcomposer2Config(**with_field(section, field, value))
    except (ValueError, TypeError, OSError) as error:
        # sizes that do not divide are named together with what they do not divide
        text = str(error)
        return len(text) < 2000 and (field in text or repr(value) in text)
    if section or field not in TEXT_RULES:
        return True
    return not isinstance(value, float) or math.isfinite(value) and config is not None


def test_odd_values_of_every_field():
    """Nothing passes that is not a number, is infinite, negative or of another kind; 97 of 100 are named."""
    bad = [case for case in CASES if not held(*case)]
    assert len(bad) <= 0.03 * len(CASES), bad


@pytest.mark.parametrize("section, field", [(s, f) for s, fields in SECTIONS.items() for f in fields if f != "type"])
def test_no_number_of_ours_is_read_unchecked(section, field):
    for value in (math.nan, math.inf, -1, "x", [None]):
        with pytest.raises((ValueError, TypeError)):
            InternLMXcomposer2Config(**with_field(section, field, value))


CONTRADICTIONS = {
    "two sizes": ({"img_size": 84}, "img_size is 84, but vision_config.image_size is 56"),
    "odd merge": ({"vision_config": {"image_size": 70}}, "must be an even number of patches"),
    "no separators": ({"image_separators": False}, "tiling='capped' needs image_separators"),
    "dynamic": ({"rope_scaling": {"type": "dynamic"}}, "factor"),
    "heads": ({"num_attention_heads": 64}, "rotary pairs"),
    "token": ({"pad_token_id": 1000}, r"pad_token_id \(1000\) lies outside the vocabulary of 1000"),
    "kind": ({"kind": "xcomposer3"}, "kind must be one of 'xcomposer2d5'"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_fields_that_contradict_each_other_are_named(name):
    fields, message = CONTRADICTIONS[name]
    with pytest.raises((ValueError, KeyError), match=message):
        InternLMXcomposer2Config(**{**BASE, **fields})
