"""One check of generation settings, before anything is computed: `SETTINGS` says what each of them takes.

transformers finds some wrong values itself, late and one by one, some in its inner loops only, and some never. What it
reports well (unknown modes, options that exclude each other) is left to it: `GenerationConfig` is asked early.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any, NamedTuple

from transformers import GenerationConfig, WatermarkingConfig
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from .prompting_internlm_xcomposer2 import short

MOST_TOKENS = 2**20  # ten times what this model is known for; a larger number is a slip, and would run for days
MOST_ROWS = 256  # beams or returned sequences: each is a row of the cache
MOST_TILES = 4096  # of one picture: 1.7 million tokens at 560 pixels a tile
MOST_SEED = 2**63 - 1
COLDEST = 1e-6  # logits divided by less overflow

# What a conversation passes to `generate` itself, and what has no meaning beside it.
OWN_INPUTS = (
    "inputs",
    "guidance_scale",
    "custom_generate",
    "synced_gpus",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)

# Fields of a generation config that are none of the caller's wishes, or the conversation's own.
NOT_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
# Settings that only sampling reads.
OF_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


class Rule(NamedTuple):
    """What one setting takes.

    Args:
        wants: in words, for the error.
        read: a value as `generate` takes it; TypeError, ValueError or OverflowError where it is none.
    """

    wants: str
    read: Callable[[Any], Any]


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def whole(low: int, high: int) -> Rule:
    """A whole number in [low, high], NumPy's too; no bool."""

    def read(value: Any) -> int:
        _require(not isinstance(value, bool))
        number = operator.index(value)
        _require(low <= number <= high)
        return number

    return Rule(f"a whole number from {low} to {high}", read)


def real(low: float, high: float = math.inf) -> Rule:
    """A finite number in [low, high]; no bool, no text."""

    def read(value: Any) -> float:
        _require(not isinstance(value, bool | str | bytes))
        number = float(value)
        _require(math.isfinite(number) and low <= number <= high)
        return number

    return Rule(f"a number of {low:g} or more" if high == math.inf else f"a number from {low:g} to {high:g}", read)


def _read_flag(value: Any) -> bool:
    _require(value in (0, 1))  # NumPy's and Python's
    return bool(value)


def _read_token_ids(value: Any) -> list[int]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    ids = list(value) if isinstance(value, list | tuple | set | range) else [value]
    _require(len(ids) > 0 and all(not isinstance(token, bool) and operator.index(token) >= -1 for token in ids))
    return [operator.index(token) for token in ids]


def _read_words_ids(value: Any) -> list[list[int]]:
    words = [list(word) for word in value]
    _require(bool(words) and all(words))
    _require(all(not isinstance(token, bool) and operator.index(token) >= 0 for word in words for token in word))
    return words


def _read_bias(value: Any) -> Any:
    pairs = value.items() if isinstance(value, dict) else value
    for ids, bias in pairs:
        _require(bool(ids) and all(operator.index(token) >= 0 for token in ids))
        real(-math.inf).read(bias)
    return value


def _read_watermark(value: Any) -> Any:
    value = WatermarkingConfig(**value) if isinstance(value, dict) else value
    value.construct_processor  # noqa: B018 - whatever has it is one
    return value


def _read_early_stopping(value: Any) -> Any:
    return value if isinstance(value, str) and value == "never" else _read_flag(value)


def _read_stop_strings(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else list(value)
    _require(len(strings) > 0 and all(isinstance(string, str) and string for string in strings))
    return strings


def _read_callables(value: Any) -> Any:
    _require(not isinstance(value, str) and all(callable(entry) for entry in value))
    return value


def _read_name(value: Any) -> str:
    _require(isinstance(value, str) and len(value) < 200)
    return value


def _read_decay(value: Any) -> Any:
    start, factor = value
    return whole(0, MOST_TOKENS).read(start), real(0.001, 1000).read(factor)


def having(*methods: str) -> Rule:
    def read(value: Any) -> Any:
        _require(all(callable(getattr(value, name, None)) for name in methods))
        return value

    return Rule(f"an object that has the methods {' and '.join(methods)}", read)


def instance_of(kind: type, remedy: str = "") -> Rule:
    def read(value: Any) -> Any:
        _require(isinstance(value, kind))
        return value

    return Rule(f"an object of transformers' {kind.__name__}{remedy}", read)


def refused(reason: str) -> Rule:
    def read(value: Any) -> Any:
        raise ValueError

    return Rule(f"nothing: {reason}", read)


FLAG = Rule("True or False", _read_flag)
TOKEN_IDS = Rule("a token id, or a list of them", _read_token_ids)
CALLABLES = Rule("a list of callables", _read_callables)
SHARE = real(0.0, 1.0)
COUNT = whole(0, MOST_TOKENS)

SETTINGS: dict[str, Rule] = {
    # How much
    "max_new_tokens": whole(1, MOST_TOKENS),
    "min_new_tokens": COUNT,
    "max_length": whole(1, MOST_TOKENS),
    "min_length": COUNT,
    "max_time": real(0.0),
    "num_return_sequences": whole(1, MOST_ROWS),
    "stop_strings": Rule("a text that is not empty, or a list of such texts", _read_stop_strings),
    "eos_token_id": TOKEN_IDS,
    "stop_token_ids": TOKEN_IDS,
    "pad_token_id": whole(-1, MOST_SEED),
    # How a token is chosen
    "do_sample": FLAG,
    "num_beams": whole(1, MOST_ROWS),
    "num_beam_groups": whole(1, MOST_ROWS),
    "early_stopping": Rule("True, False or 'never'", _read_early_stopping),
    "temperature": real(0.0),
    "top_p": SHARE,
    "top_k": COUNT,
    "min_p": SHARE,
    "top_h": SHARE,
    "typical_p": SHARE,
    "epsilon_cutoff": SHARE,
    "eta_cutoff": SHARE,
    "repetition_penalty": real(0.001, 1000),
    "encoder_repetition_penalty": real(0.001, 1000),
    "length_penalty": real(-100, 100),
    "exponential_decay_length_penalty": Rule("a pair (start, factor from 0.001 to 1000)", _read_decay),
    "no_repeat_ngram_size": COUNT,
    "bad_words_ids": Rule("a list of lists of token ids, none empty", _read_words_ids),
    "suppress_tokens": TOKEN_IDS,
    "begin_suppress_tokens": TOKEN_IDS,
    "forced_bos_token_id": TOKEN_IDS,
    "forced_eos_token_id": TOKEN_IDS,
    "renormalize_logits": FLAG,
    "remove_invalid_values": FLAG,
    "logits_processor": CALLABLES,
    "stopping_criteria": CALLABLES,
    "prefix_allowed_tokens_fn": having("__call__"),
    "sequence_bias": Rule("pairs of token ids and a number, in a dict or a list", _read_bias),
    "watermarking_config": Rule("a WatermarkingConfig, or a dict with its fields", _read_watermark),
    "guidance_scale": real(0.0, 1000),
    "penalty_alpha": real(0.0, 1.0),
    "seed": whole(-1, MOST_SEED),
    # How it is computed
    "use_cache": FLAG,
    "past_key_values": instance_of(Cache),
    "generation_config": instance_of(GenerationConfig),
    "prefill_chunk_size": whole(1, MOST_TOKENS),
    "prompt_lookup_num_tokens": whole(1, 1024),
    "max_matching_ngram_size": whole(1, 1024),
    "num_assistant_tokens": whole(1, 1024),
    "assistant_model": having("generate"),
    "assistant_confidence_threshold": SHARE,
    "assistant_early_exit": refused(
        "this model has not been trained to leave its layers early; use prompt_lookup_num_tokens or assistant_model"
    ),
    "token_healing": FLAG,
    # What comes back
    "streamer": having("put", "end"),
    "return_dict_in_generate": FLAG,
    "output_scores": FLAG,
    "output_logits": FLAG,
    "output_attentions": FLAG,
    "output_hidden_states": FLAG,
    # The conversation's
    "infer_mode": Rule("the name of a mode or of a task adapter, such as 'base'", _read_name),
    "use_meta": FLAG,
    "bos_once": FLAG,
    "escape_control_tokens": FLAG,
    "hd_num": whole(1, MOST_TILES),
    "num_frm": whole(1, 100_000),
    "fps": real(1e-6, 1e6),
    "start": whole(0, MOST_SEED),
    "end": whole(0, MOST_SEED),
}


# Settings of token ids that index the scores.
OF_TOKENS = ("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids")


def check_settings(given: Mapping[str, Any], vocab_size: int | None = None) -> dict[str, Any]:
    """Settings as `generate` takes them; None means that one is not given, and a name without a rule passes.

    Args:
        vocab_size: where it is known, token ids must lie below.

    Raises:
        ValueError: names the setting, its value, and what it takes.
    """
    settings = dict(given)
    for name, value in given.items():
        rule = SETTINGS.get(name)
        if value is None or rule is None:
            continue
        try:
            settings[name] = rule.read(value)
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ValueError(f"{name} is {short(value)}; it takes {rule.wants}") from error
    for name in OF_TOKENS if vocab_size is not None else ():
        ids = [token for entry in settings.get(name) or () for token in (entry if isinstance(entry, list) else [entry])]
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(f"{name} is {short(given[name])}; token ids go from 0 to {vocab_size - 1} here")
    temperature = settings.get("temperature")
    if settings.get("do_sample") and temperature is not None and temperature < COLDEST:
        raise ValueError(
            f"temperature is {temperature}: sampling needs {COLDEST:g} or more; pass do_sample=False for "
            f"the likeliest token at each step"
        )
    return settings


def check_cache(kind: Any, device_type: str) -> None:
    """Raise a ValueError for a `cache_implementation` that would drop inputs, or cannot run on this type of device."""
    if kind == "paged":
        raise ValueError(
            "cache_implementation is 'paged': continuous batching reads token ids alone, no pictures and no "
            "infer_mode; for plain text call generate_batch, for many conversations batch_chat or vLLM"
        )
    if str(kind).startswith("offloaded") and device_type == "cpu":
        raise ValueError(f"cache_implementation is {kind!r}: it is for models on a GPU, this one is on the CPU")


def end_tokens(asked: Any, own: Any) -> Any:
    """The `eos_token_id` of a call, where `asked` was passed and the checkpoint's generation config says `own`.

    Clients that know no model pass the tokenizer's one end token, `</s>`. Answers here end with the token that closes
    a turn, which is another one, and would go on after it. So a number that is among several of the checkpoint's own
    means all of these; `[number]` means that one alone.
    """
    several = isinstance(own, list | tuple) and len(own) > 1
    return list(own) if several and isinstance(asked, Integral) and asked in own else asked


def config_settings(config: GenerationConfig | None) -> dict[str, Any]:
    """What a generation config says: its fields that are not None."""
    fields = {} if config is None else vars(config)
    return {name: value for name, value in fields.items() if value is not None and not name.startswith("_")}


def check_names(names: Iterable[str]) -> None:
    """Raise a ValueError for a name that is no setting of `generate`, or that a conversation sets by itself."""
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    known = {*vars(GenerationConfig()), *arguments, *SETTINGS, "assistant_tokenizer"} - set(OWN_INPUTS)
    for name in names:
        if name not in known:
            near = get_close_matches(name, sorted(known), 1)
            hint = f"did you mean {near[0]}?" if near else "see transformers' GenerationConfig for those there are"
            raise ValueError(f"{short(name)} is no setting of this method; {hint}")


def merged_settings(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a call, checked: what the caller gave, else what its `generation_config` says, else `defaults`.

    None means that a setting is not given. The stops of a generation config join the conversation's own
    (`stop_token_ids`): a copy of the model's config must not lose them.

    Raises:
        ValueError: see `check_names` and `check_settings`; what `GenerationConfig` refuses.
    """
    check_names(given)
    given = {name: value for name, value in check_settings(given).items() if value is not None}
    config = check_settings(config_settings(given.pop("generation_config", None)))
    stops = config.get("eos_token_id")
    config = {name: value for name, value in config.items() if name not in NOT_SETTINGS}
    check_names(config)
    said = {**config, **given}
    if "max_length" in said and "max_new_tokens" not in said:
        defaults = {name: value for name, value in defaults.items() if name != "max_new_tokens"}
    settings = check_settings({name: value for name, value in {**defaults, **said}.items() if value is not None})
    if not settings.get("do_sample"):  # transformers warns about sampling settings that have no effect
        settings = {name: value for name, value in settings.items() if name not in OF_SAMPLING}
    GenerationConfig(**{name: value for name, value in settings.items() if name in vars(GenerationConfig())})
    if stops:
        settings["stop_token_ids"] = [*settings.get("stop_token_ids", ()), *stops]
    return settings


def with_settings(defaults: Mapping[str, Any], after: str, through: Sequence[str] = ()) -> Callable[..., Callable]:
    """Give a method settings with these defaults: parameters of its own, in this order, behind the one named `after`.

    So a list of defaults is written once for all methods that share it. The method finds every setting of the call,
    merged and checked, in its `**settings`.

    Args:
        through: further names that it takes there and passes on unseen.
    """

    def decorate(method: Callable) -> Callable:
        parameters = list(inspect.signature(method).parameters.values())
        at = [parameter.name for parameter in parameters].index(after) + 1
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        added = [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
        signature = inspect.Signature([*parameters[:at], *added, *parameters[at:]])

        @functools.wraps(method)
        def call(*args, **kwargs):
            own = signature.bind(*args, **kwargs).arguments
            given = {**{name: own.pop(name) for name in defaults if name in own}, **own.pop("settings", {})}
            passed = {name: given.pop(name) for name in through if name in given}
            return method(**check_settings(own), **passed, **merged_settings(defaults, given))

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate
