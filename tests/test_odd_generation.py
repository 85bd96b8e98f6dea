"""Odd generation settings: each works, or is refused by a short message that names it; the model answers as before.

One table of values for each kind of setting; every public method meets a share of them.
"""

import re

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from transformers import DynamicCache, GenerationConfig, StaticCache

PICTURE = str(GOLDEN / "images" / "small_56x56.png")
HUGE, TINY, NAN, INF = 10**18, 1e-300, float("nan"), float("inf")

NO_NUMBER = ["8", "", b"8", [], [1], {}, object(), 1j, torch.zeros(2), print]
COUNTS = [*NO_NUMBER, 0, -1, -HUGE, HUGE, 2**63, 2**64, 10**40, 1.5, 1e18, NAN, INF, -INF, True, np.float32(2), (3,)]
REALS = [*NO_NUMBER, 0, 0.0, -0.0, -1, -1e-9, TINY, 1e-30, 1e-7, 1, 1.0, 2, 1e18, 1e300, HUGE, 10**400, NAN, INF, -INF,
         True, np.float64("nan"), np.float16(0.5), torch.tensor(0.5), torch.tensor(float("nan"))]  # fmt: skip
FLAGS = ["yes", "", 2, -1, 0.5, NAN, [], [True], {}, object(), 0, 1, np.bool_(True), torch.tensor(True), print]
TOKEN_IDS = ["</s>", "", [], [[]], [2, "x"], -2, [-5], HUGE, [HUGE], 2**31, 1.5, NAN, True, [None], {}, object(), [2],
             torch.tensor([2]), np.array([2]), np.int64(2), {2}, range(3), 10**6]  # fmt: skip
LISTS = ["x", b"x", 1, NAN, [], [1], [None], ["a"], {}, {"a": 1}, object(), (), [[]], [[[]]], [{}], [2, 3]]

COUNT_FIELDS = ["max_new_tokens", "num_beams", "num_return_sequences", "max_length", "seed", "hd_num", "num_frm"]
COUNT_FIELDS += ["top_k", "min_new_tokens", "min_length", "no_repeat_ngram_size", "prompt_lookup_num_tokens", "start"]
COUNT_FIELDS += ["max_matching_ngram_size", "num_assistant_tokens", "pad_token_id", "prefill_chunk_size", "end"]
REAL_FIELDS = ["temperature", "top_p", "repetition_penalty", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]
REAL_FIELDS += ["length_penalty", "max_time", "fps", "encoder_repetition_penalty", "guidance_scale", "top_h"]
FLAG_FIELDS = ["do_sample", "use_meta", "use_cache", "return_dict_in_generate", "output_scores", "output_logits"]
FLAG_FIELDS += ["output_hidden_states", "renormalize_logits", "remove_invalid_values", "escape_control_tokens"]
ID_FIELDS = ["eos_token_id", "stop_token_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"]
ID_FIELDS += ["forced_bos_token_id"]
LIST_FIELDS = ["stop_strings", "logits_processor", "stopping_criteria", "streamer", "bad_words_ids", "sequence_bias"]
LIST_FIELDS += ["generation_config", "past_key_values", "cache_implementation", "exponential_decay_length_penalty"]
LIST_FIELDS += ["infer_mode", "assistant_model", "prefix_allowed_tokens_fn", "watermarking_config", "cache_config"]
LIST_FIELDS += ["custom_generate", "compile_config", "early_stopping", "token_healing", "assistant_early_exit"]
LIST_FIELDS += ["constraints", "force_words_ids", "num_beam_groups", "penalty_alpha", "dola_layers"]

FIELDS = {
    field: values
    for fields, values in (
        (COUNT_FIELDS, COUNTS),
        (REAL_FIELDS, REALS),
        (FLAG_FIELDS, FLAGS),
        (ID_FIELDS, TOKEN_IDS),
        (LIST_FIELDS, LISTS),
    )
    for field in fields
}

# Several settings at once, some of which exclude each other.
TOGETHER = [
    {"num_beams": 2, "num_return_sequences": 3},
    {"num_beams": 1, "num_return_sequences": 3},
    {"num_beams": 4, "do_sample": True, "temperature": 1e-6},
    {"do_sample": True, "temperature": 0},
    {"do_sample": False, "temperature": 0},
    {"do_sample": True, "top_p": 0.0, "top_k": 0},
    {"do_sample": True, "top_k": 1, "temperature": 1e18},
    {"do_sample": True, "top_p": 1e-9, "min_p": 1.0},
    {"do_sample": True, "repetition_penalty": 1000.0, "max_new_tokens": 6},
    {"repetition_penalty": 0.001, "max_new_tokens": 6},
    {"max_new_tokens": 3, "max_length": 5},
    {"min_new_tokens": 9, "max_new_tokens": 2},
    {"min_length": 90, "max_new_tokens": 2},
    {"max_length": 90, "min_length": 91, "max_new_tokens": 2},
    {"num_beams": 3, "prompt_lookup_num_tokens": 2},
    {"prompt_lookup_num_tokens": 2, "cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 2, "use_cache": False},
    {"prompt_lookup_num_tokens": 2, "num_return_sequences": 2, "do_sample": True},
    {"cache_implementation": "static", "use_cache": False},
    {"cache_implementation": "static", "num_beams": 3},
    {"cache_implementation": "paged"},
    {"cache_implementation": "hybrid"},
    {"past_key_values": DynamicCache(), "cache_implementation": "static"},
    {"past_key_values": (), "num_beams": 2},
    {"suppress_tokens": [2], "forced_eos_token_id": 2},
    {"suppress_tokens": list(range(90000)), "do_sample": True},
    {"bad_words_ids": [[i] for i in range(2000)], "do_sample": True},
    {"stop_strings": ["a"] * 300},
    {"stop_strings": "x" * 5000},
    {"guidance_scale": 2.0, "num_beams": 2},
    {"token_healing": True},
    {"output_attentions": True, "return_dict_in_generate": True},
    {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2},
    {"streamer": type("S", (), {"put": print, "end": print})(), "num_beams": 2},
    {"early_stopping": "never", "num_beams": 2},
    {"early_stopping": True, "num_beams": 2, "length_penalty": -100},
    {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"length_penalty": 100, "num_beams": 2},
    {"logits_processor": [lambda ids, scores: scores * NAN], "do_sample": False},
    {"max_time": 0.0},
    {"generation_config": GenerationConfig(temperature=NAN, do_sample=True)},
    {"generation_config": GenerationConfig(max_length=3)},
    {"generation_config": GenerationConfig(num_beams=10**6)},
    {"max_new_tokens": None, "max_length": None, "temperature": None, "top_p": None, "do_sample": None},
]
UNKNOWN = [
    "max_tokens",
    "temp",
    "num_beam",
    "n",
    "stop",
    "x" * 3000,
    "image_grid_thw",
    "pixel_values",
    "labels",
    "self",
]

METHODS = {
    "chat": lambda model, **kw: model.chat(None, "hi", PICTURE, **kw),
    "stream_chat": lambda model, **kw: list(model.stream_chat(None, "hi", PICTURE, **kw)),
    "batch_chat": lambda model, **kw: model.batch_chat(None, ["hi", "you"], [PICTURE, None], **kw),
    "write_artical": lambda model, **kw: model.write_artical("hi", **kw),
    "write_webpage": lambda model, **kw: model.write_webpage("hi", output_path=None, **kw),
    "generate": lambda model, **kw: model.generate(torch.ones(1, 4, dtype=torch.long), **kw),
}
# How transformers' own messages call what they refuse.
OF_MODES = "(Generation|Search) requires `trust|assisted|static cache|beam|stop strings|token healing|CB generation"
OF_CHAT = {
    "seed", "bos_once", "hd_num", "num_frm", "start", "end", "fps", "use_meta", "escape_control_tokens",
    "stop_token_ids",
}  # fmt: skip
SHORT = {"max_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module")
def before():
    """What the model answers before any odd input: filled by the first test."""
    return {}


@pytest.fixture
def model(tiny_model, before):
    def usual():
        return tiny_model.chat(None, "hi", PICTURE, **SHORT), tiny_model.config.to_dict()

    before.setdefault("answer", usual())
    yield tiny_model
    assert usual() == before["answer"]


def complaint(run, names):
    """None if `run()` works or raises a short error of the right kind that names one of `names`; else what is wrong."""
    try:
        run()
    except (ValueError, TypeError, OSError) as error:
        said = str(error)
        # transformers names a few modes of generation by what they are called
        named = any(name in said for name in names) or re.search(OF_MODES, said)
        return None if named and len(said) < 2000 else f"{type(error).__name__}: {said[:200]}"
    except Exception as error:  # whatever else it is, it is wrong
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


@pytest.mark.parametrize("field", FIELDS)
def test_one_setting(model, field):
    methods = [name for name in METHODS if name != "generate" or field not in OF_CHAT]
    wrong = {}
    for number, value in enumerate(FIELDS[field]):
        run = METHODS[methods[number % len(methods)]]
        said = complaint(lambda: run(model, **{**SHORT, field: value}), [field])  # noqa: B023
        if said:
            wrong[methods[number % len(methods)], str(value)[:40]] = said
    assert not wrong


@pytest.mark.parametrize("settings", TOGETHER, ids=lambda settings: "-".join(settings))
def test_several_settings(model, settings):
    wrong = {}
    for method, run in METHODS.items():
        given = dict(settings)
        if "past_key_values" in given and given["past_key_values"] != ():
            given["past_key_values"] = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
        names = [*settings, *vars(settings.get("generation_config", GenerationConfig()))]
        said = complaint(lambda: run(model, **{**SHORT, **given}), names)  # noqa: B023
        if said:
            wrong[method] = said
    assert not wrong


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_settings(model, name):
    for method, run in METHODS.items():
        if method == "generate":
            continue
        with pytest.raises((ValueError, TypeError)) as error:
            run(model, **{name: 1})
        assert name[:60] in str(error.value) and len(str(error.value)) < 2000


def test_the_corpus_is_broad():
    assert sum(map(len, FIELDS.values())) + len(TOGETHER) + len(UNKNOWN) >= 900
