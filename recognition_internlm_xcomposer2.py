"""What the weights of a folder say of its config: sizes, ranks, heads, and so the kind of checkpoint.

Releases leave much out of `config.json`, and some kinds differ in their weights alone. What both say must agree.
"""

import copy
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file
from transformers.utils.hub import cached_files

from .kinds_internlm_xcomposer2 import RELATIVES, Relative, kind_of, kind_text_fields
from .packed_weights_internlm_xcomposer2 import BITS, FULL_PRECISION, other_packing
from .weight_files_internlm_xcomposer2 import (
    LAYOUTS,
    PACKED_SETTINGS,
    Misfit,
    NoWeights,
    Stored,
    WeightFiles,
    count,
    names_looked_for,
    packing_of,
    read_json,
    some,
)

# Released name -> name in the module tree, applied in this order when loading and backwards when saving.
RENAMINGS = [
    *(
        (rf"\.(wqkv|wo|w1|w2|w3)\.{part}", rf".\1.linear.{part}")
        for part in ("weight", "bias", "qweight", "qzeros", "scales")  # the last three of AWQ releases
    ),
    (r"\.lora_([a-z0-9]+)_A\.weight", r".task_A.\1.weight"),
    (r"\.lora_([a-z0-9]+)_B\.weight", r".task_B.\1.weight"),
    (r"^output\.weight", r"lm_head.weight"),
    (r"^model\.(tok_embeddings|layers|norm)\.", r"model.language_model.\1."),
    (r"^vit\.vision_tower\.vision_model\.", r"model.vision_tower."),
    (r"^vision_proj\.", r"model.vision_proj."),
    (r"^plora_(glb|sub)_GN", r"model.plora_\1_GN"),
]
HUB = ("cache_dir", "revision", "token", "subfolder", "local_files_only", "force_download")

ADAPTER = re.compile(r"\.(Plora|lora_[a-z0-9]+)_([AB])\.weight$")
VIT = "vit.vision_tower.vision_model."
POSITIONS = VIT + "embeddings.position_embedding.weight"
HEADS = {"output.weight": "vocabulary", "score.weight": "score"}
Tensors = Mapping[str, Stored]


class Fact(NamedTuple):
    """A field's value as the weights have it, and the tensor that says so."""

    section: str  # "", "text" or "vision"
    field: str
    value: Any
    source: str


def foreign(names: Any) -> Relative | None:
    """The relative of another architecture whose tensors these are; None for this family, and for strangers."""
    if any(".Plora_" in name or name.startswith("vit.vision_tower.") for name in names):
        return None
    fitting = (it for it in RELATIVES if any(part in name for part in it.tensors for name in names))
    return next(fitting, None)


def layer_count(tensors: Tensors, prefix: str) -> int:
    numbers = [name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def _shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...] | None:
    shape = tensors[name].shape if name in tensors else ()
    return shape if len(shape) == ndim else None


def decoder_facts(tensors: Tensors, heads: Any) -> list[Fact]:
    """Sizes of the decoder. The number of attention heads is in no tensor; key/value heads follow from it."""
    facts = []
    name = "model.tok_embeddings.weight"
    if shape := _shape(tensors, name, 2):
        facts += [Fact("text", "vocab_size", shape[0], name), Fact("text", "hidden_size", shape[1], name)]
    name = "model.layers.0.feed_forward.w1.weight"
    if shape := _shape(tensors, name, 2):
        facts.append(Fact("text", "intermediate_size", shape[0], name))
    if layers := layer_count(tensors, "model.layers."):
        facts.append(Fact("text", "num_hidden_layers", layers, "model.layers.*"))
    name = "model.layers.0.attention.wqkv.weight"
    shape = _shape(tensors, name, 2)
    if shape and isinstance(heads, int) and heads > 0 and shape[1] % heads == 0:
        pairs, rest = divmod(shape[0] - shape[1], 2 * (shape[1] // heads))
        if pairs > 0 and not rest:
            facts.append(Fact("text", "num_key_value_heads", pairs, name))
    return facts


def vision_facts(tensors: Tensors) -> list[Fact]:
    """Sizes of the vision tower and of what follows it."""
    facts = []
    name = VIT + "embeddings.patch_embedding.weight"
    embedding = _shape(tensors, name, 4)
    if embedding:
        width, _, _, patch = embedding
        facts += [Fact("vision", "hidden_size", width, name), Fact("vision", "patch_size", patch, name)]
        if rows := _shape(tensors, POSITIONS, 2):
            side = math.isqrt(max(rows[0] - 1, 0))
            if side and side**2 + 1 == rows[0]:
                facts.append(Fact("vision", "image_size", side * patch, POSITIONS))
        projector = "vision_proj.0.weight"
        if shape := _shape(tensors, projector, 2):
            merge = math.isqrt(shape[1] // width)
            if merge**2 * width == shape[1]:
                facts.append(Fact("", "spatial_merge_size", merge, projector))
                if merge == 1 and "plora_sub_GN" not in tensors:
                    facts.append(Fact("", "image_separators", False, "no plora_sub_GN"))
    name = VIT + "encoder.layers.0.mlp.fc1.weight"
    if shape := _shape(tensors, name, 2):
        facts.append(Fact("vision", "intermediate_size", shape[0], name))
    if layers := layer_count(tensors, VIT + "encoder.layers."):
        facts.append(Fact("vision", "num_hidden_layers", layers, VIT + "encoder.layers.*"))
    return facts


def structure_facts(tensors: Tensors) -> list[Fact]:
    """Head and separators."""
    facts = [Fact("", "head", head, name) for name, head in HEADS.items() if name in tensors]
    facts = facts[-1:]  # a vocabulary may ride along with a trained score
    if any(name.startswith("vision_proj.") for name in tensors):
        name = "plora_sub_GN"
        facts += [Fact("", "image_separators", True, name)] * (name in tensors)
    return facts


def adapter_ranks(tensors: Tensors) -> tuple[dict[str, int], dict[str, int]]:
    """Rank of partial LoRA by linear, and of each task adapter: the commonest, so that a damaged tensor stands out."""
    rows: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for name, tensor in tensors.items():
        match = ADAPTER.search(name)
        if match and match[2] == "A" and tensor.shape:
            linear = name.split(".")[-3] if match[1] == "Plora" else ""
            rows[match[1], linear][tensor.shape[0]] += 1
    ranks = {key: counter.most_common(1)[0][0] for key, counter in rows.items()}
    plora = {linear: rank for (adapter, linear), rank in ranks.items() if adapter == "Plora"}
    return plora, {name.removeprefix("lora_"): rank for (name, _), rank in ranks.items() if name != "Plora"}


def rank_facts(tensors: Tensors) -> list[Fact]:
    """Ranks of partial LoRA (the commonest, and those linears that differ) and of the task adapters."""
    plora, tasks = adapter_ranks(tensors)
    facts = []
    if plora:
        common = Counter(plora.values()).most_common(1)[0][0]
        facts.append(Fact("text", "plora_rank", common, f"{_an_adapter(tensors, plora, common)}"))
        for linear, rank in plora.items():
            if rank != common:
                facts.append(Fact("text", f"plora_{linear}_rank", rank, _an_adapter(tensors, {linear: rank}, rank)))
    # Of an index, which has no shapes, nothing is known of ranks; not that there are none.
    if any(name.startswith("model.layers.") and tensor.shape for name, tensor in tensors.items()):
        source = some(f"lora_{name}_A" for name in tasks) or "no lora_*_A"
        facts.append(Fact("text", "task_adapter_ranks", tasks, source))
    return facts


def _an_adapter(tensors: Tensors, plora: Mapping[str, int], rank: int) -> str:
    ends = tuple(f".{linear}.Plora_A.weight" for linear, found in plora.items() if found == rank)
    return next(name for name in tensors if name.endswith(ends))


def facts_of(tensors: Tensors, heads: Any) -> list[Fact]:
    """All that the tensors, by released name, say of the config."""
    return [*decoder_facts(tensors, heads), *vision_facts(tensors), *structure_facts(tensors), *rank_facts(tensors)]


def signs_of(facts: list[Fact]) -> dict[str, Any]:
    """What of the facts tells the kinds apart, see `kinds_internlm_xcomposer2.signs_of_kind`."""
    values = {(fact.section, fact.field): fact.value for fact in facts}
    signs = {
        "spatial_merge_size": values.get(("", "spatial_merge_size")),
        "head": values.get(("", "head")),
        "image_size": values.get(("vision", "image_size")),
    }
    if ("text", "plora_rank") in values:
        signs["own rank in wqkv"] = ("text", "plora_wqkv_rank") in values
    if ("text", "task_adapter_ranks") in values:
        signs["task adapters"] = bool(values["text", "task_adapter_ranks"])
    return {sign: value for sign, value in signs.items() if value is not None}


def _scale_alpha(text: dict[str, Any], field: str, rank: int, of_kind: Mapping[str, Any]) -> None:
    """Alpha is not in the weights: where nobody states it, a rank gets the kind's own scale."""
    alpha = field.removesuffix("rank") + "alpha"
    if text.get(alpha) is None:
        scale = of_kind.get(alpha, of_kind["plora_alpha"]) / of_kind.get(field, of_kind["plora_rank"])
        text[alpha] = int(scale * rank) if scale == int(scale) else scale * rank


def complete(fields: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], list[str]]:
    """`fields` of a `config.json` with what they leave out, and where they and the weights contradict each other.

    Args:
        tensors: by released name; without shapes (an index knows names alone) fewer facts are to be had.

    Raises:
        ValueError: an unknown `kind`.
    """
    fields = copy.deepcopy(dict(fields))
    relative = foreign(tensors)
    if relative is not None:
        return fields, [f"the weights are those of {relative}"]
    is_nested = isinstance(fields.get("text_config"), dict)
    text = fields["text_config"] if is_nested else fields
    vision = fields.get("vision_config")
    vision = dict(vision) if isinstance(vision, Mapping) else {}
    sections = {"": fields, "text": text, "vision": vision}
    labels = {"": "", "text": "text_config." if is_nested else "", "vision": "vision_config."}
    facts = facts_of(tensors, text.get("num_attention_heads", fields.get("num_attention_heads")))
    kind = kind_of({**fields, **text}, signs_of(facts))
    faults = []
    for section, field, value, source in facts:
        stated = sections[section].get(field)
        if section == "vision" and field == "image_size" and stated is None and fields.get("img_size") is not None:
            section, field, stated = "", "img_size", fields["img_size"]
        if field.startswith("plora_") and stated is None:
            _scale_alpha(text, field, value, kind_text_fields(kind))
        if stated is None or (field == "task_adapter_ranks" and stated == [] and not value):
            sections[section][field] = value
        elif stated != value:
            faults.append(f"{labels[section]}{field} is {stated!r}, but {source} gives {value!r}")
    positions = _shape(tensors, POSITIONS, 2)
    if positions and math.isqrt(max(positions[0] - 1, 0)) ** 2 + 1 != positions[0]:
        faults.append(f"{POSITIONS} has {positions[0]} rows, which is no square of patches and a class token")
    if vision:
        fields["vision_config"] = vision
    return {**fields, "kind": kind}, faults


@cache
def _renamings() -> tuple[list, list]:
    from transformers.core_model_loading import WeightRenaming

    inward = [WeightRenaming(released, inside) for released, inside in RENAMINGS]
    return inward, [renaming.reverse_transform() for renaming in reversed(inward)]


def released_name(name: str) -> str:
    """The released spelling of a tensor's name (a file may hold the module tree's own, which load too)."""
    inward, outward = _renamings()
    for renaming in (*inward, *outward):
        name, _ = renaming.rename_source_key(name)
    return name


def folder_of(name_or_path: Any, hub: Mapping[str, Any]) -> Path | None:
    """The folder that a `from_pretrained` reads, the hub's cache included; None where it is not on this machine."""
    path = Path(name_or_path)
    if path.is_file():
        return path.parent
    if path.is_dir():
        return path / (hub.get("subfolder") or "")
    where = {name: hub[name] for name in HUB if name in hub and name not in ("force_download", "local_files_only")}
    found = cached_file(str(name_or_path), CONFIG_NAME, local_files_only=True, **QUIETLY, **where)
    return None if found is None else Path(found).parent


QUIETLY = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def hub_file(name_or_path: Any, file: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a folder or a hub id, fetched where it is not on this machine; None where there is none."""
    where = {name: hub[name] for name in HUB if name in hub}
    found = cached_file(str(name_or_path), file, **QUIETLY, **where)
    return None if found is None else Path(found)


def names_in(index: Path) -> dict[str, Stored]:
    """The tensors of an index, by released name, without shapes."""
    weight_map = read_json(index).get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}
    return {released_name(name): Stored(name, (), "float32", file) for name, file in weight_map.items()}


def tensors_of(name_or_path: Any, hub: Mapping[str, Any]) -> dict[str, Stored]:
    """What is known of a checkpoint's tensors, by released name, before its weights are fetched or read.

    Of a hub id whose weights are not here yet: the names in its index, without shapes. Weights that cannot be read are
    none here; loading the model says what is wrong with them.
    """
    folder = folder_of(name_or_path, hub)
    try:
        stored = WeightFiles(folder).tensors.values() if folder is not None else ()
        return {released_name(tensor.name): tensor for tensor in stored}
    except NoWeights:
        if Path(name_or_path).exists():
            return {}
    except (Misfit, OSError):
        return {}
    indices = (name for name, is_index in LAYOUTS.items() if is_index)
    found = next(filter(None, (hub_file(name_or_path, index, hub) for index in indices)), None)
    return {} if found is None else names_in(found)


def complete_from_weights(
    fields: Mapping[str, Any], name_or_path: Any, hub: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """`fields` of a checkpoint's `config.json` with what its weights say besides, and contradictions.

    Where they contradict each other the fields stay as they are: reading a config needs no weights, and loading the
    model says what is wrong.
    """
    completed, faults = complete(fields, _unpacked(fields, tensors_of(name_or_path, hub)))
    return dict(fields) if faults else completed, faults


def _unpacked(fields: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors whose shapes are the model's: of quantised weights those of floating numbers."""
    if not fields.get("quantization_config"):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating}


def fetch_weights(name_or_path: Any, hub: Mapping[str, Any]) -> None:
    """Have the weight files of a hub id on this machine: those that transformers would fetch, else packed ones.

    What config, index and packing say is read first: a checkpoint that cannot be loaded is not downloaded.

    Raises:
        ValueError: they contradict each other, or weights are packed in another format.
        OSError: a file that is listed is not to be had.
    """
    stated = hub_file(name_or_path, CONFIG_NAME, hub)
    fields = {} if stated is None else read_json(stated)
    beside = hub_file(name_or_path, PACKED_SETTINGS, hub)
    packing = fields.get("quantization_config") if beside is None else read_json(beside)
    packing = packing if isinstance(packing, dict) else {}
    is_packed = beside is not None or packing.get("quant_method") in ("gptq", "awq")
    if is_packed and (faults := other_packing(packing)):
        raise Misfit(*(f"{name_or_path}: {fault}" for fault in faults))
    for name, layout in names_looked_for(hub.get("variant"), hub.get("use_safetensors")).items():
        found = hub_file(name_or_path, name, hub)
        if found is None:
            continue
        if LAYOUTS[layout]:
            names = names_in(found)
            raise_faults(name_or_path, complete(fields, _unpacked(fields, names))[1])
            where = {key: hub[key] for key in HUB if key in hub}
            if files := sorted({tensor.file for tensor in names.values()}):
                cached_files(str(name_or_path), files, **where)
        return
    if is_packed:
        base = packing.get("model_file_base_name") or f"gptq_model-{BITS}bit-{packing.get('group_size')}g"
        hub_file(name_or_path, f"{base}.safetensors", hub)


class Unread:
    """A tensor of a weight file that is read when transformers takes its values (`[...]`), as it does safetensors'."""

    def __init__(self, weights: WeightFiles, name: str):
        self.weights, self.name = weights, name

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.weights.tensors[self.name].dtype)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        return self.weights.read(self.name, unpacked_dtype=torch.float32)[index]


# Which linears a release has packed, as transformers' own quantiser of the layout wants it said.
PACKED_LINEARS: dict[str, dict[str, Any]] = {
    "GPTQ": {
        "quant_method": "gptq",
        "block_name_to_quantize": "model.language_model.layers",
        "modules_in_block_to_quantize": [
            [f"attention.{name}.linear" for name in ("wqkv", "wo")]
            + [f"feed_forward.{name}.linear" for name in ("w1", "w3", "w2")]
        ],
    },
    "AWQ": {"quant_method": "awq", "modules_to_not_convert": list(FULL_PRECISION)},
}


def method_of(quantization_config: Any) -> str:
    """Which of transformers' quantisers a config (or its dict) is of."""
    method = getattr(quantization_config, "quant_method", None)
    return str(getattr(method, "value", method))


def keeps_packed(quantization_config: Any) -> bool:
    """Whether the caller asks transformers' own quantiser for a packed format."""
    return method_of(quantization_config) in ("gptq", "awq")


def own_config(config_class: type, name_or_path: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A config to change, of arguments of a `from_pretrained`, and the other arguments."""
    kwargs = dict(kwargs)
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(config), kwargs
    path = name_or_path if config is None else config
    quantization = {name: kwargs.pop(name) for name in ("quantization_config",) if name in kwargs}
    config, kwargs = config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    return config, {**kwargs, **quantization}


def keeping_packed(
    config_class: type, name_or_path: Any, weights: WeightFiles, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a `from_pretrained` by which transformers' own quantiser finds what a release has packed.

    Raises:
        ValueError: `quantization_config` is of another layout than the weights.
    """
    layout = next(iter(weights.packed.values())).layout
    asked = method_of(kwargs["quantization_config"])
    if asked != layout.lower():
        raise ValueError(f"{name_or_path} is packed as {layout}, quantization_config is of {asked}: take {layout}'s")
    config, kwargs = own_config(config_class, name_or_path, kwargs)
    stated = {name: value for name, value in packing_of(weights.folder).items() if value is not None}
    config.quantization_config = {**PACKED_LINEARS[layout], **stated}
    if len(weights.files) == 1:
        config.transformers_weights = weights.files[0]  # transformers does not look for AutoGPTQ's names
    return {**kwargs, "config": config}


def unpacking(config_class: type, name_or_path: Any, weights: WeightFiles, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a `from_pretrained(None, ...)` that loads packed weights unpacked, each as its turn comes."""
    config, kwargs = own_config(config_class, name_or_path, kwargs)
    if hasattr(config, "quantization_config"):  # it describes the files, and not the model that comes of them
        del config.quantization_config
    state = {name: Unread(weights, name) for name in weights.tensors}
    return {**kwargs, "config": config, "state_dict": state}


class CheckedLoadingMixin:
    """`from_pretrained` that never leaves a parameter at random, and unpacks weights of 4 bits.

    Stands before `PreTrainedModel`.
    """

    @classmethod
    def from_pretrained(
        cls, name_or_path, *args, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs
    ):
        """transformers' `from_pretrained`, with errors where it warns or fails without a name.

        Weights packed in 4 bits (GPTQ, AWQ) become full precision. Under `quantization_config=GPTQConfig(...)` or
        `AwqConfig(...)` those of that layout stay packed, and transformers' own quantiser runs them (it needs
        gptqmodel; GPTQ also optimum).

        Raises:
            ValueError: tensors that are missing, of another shape, or of integers; a file that is cut short; a head
                that another class reads.
        """
        source, weights = name_or_path, None
        if name_or_path is not None and kwargs.get("state_dict") is None and kwargs.get("gguf_file") is None:
            weights = check_stored(name_or_path, kwargs)
        if weights is not None and weights.packed:
            if keeps_packed(kwargs.get("quantization_config")):
                kwargs = keeping_packed(cls.config_class, name_or_path, weights, kwargs)
            else:
                source, kwargs = None, unpacking(cls.config_class, name_or_path, weights, kwargs)
        model, info = super().from_pretrained(
            source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        if weights is not None and weights.packed and source is not None:
            vars(model.config).pop("transformers_weights", None)  # what is saved will have another name
        if source is None and weights is not None and model.can_generate():
            if (weights.folder / GENERATION_CONFIG_NAME).is_file():
                model.generation_config = GenerationConfig.from_pretrained(weights.folder)
        shapes = [f"{released_name(name)} is {(*is_,)}, not {(*due,)}" for name, is_, due in info["mismatched_keys"]]
        if shapes and not ignore_mismatched_sizes:
            wrong = f"{count(len(shapes), 'tensor')} of the wrong shape"
            raise ValueError(f"{name_or_path} has {wrong}: {some(sorted(shapes))}")
        if output_loading_info:  # who asks for the list decides by it
            return model, info
        missing = sorted(map(released_name, info["missing_keys"]))
        if missing:
            there = sorted(set(HEADS) & {released_name(name) for name in info["unexpected_keys"]})
            instead = f"; it has {there[0]} in its place, see `config.head`" if there and missing[0] in HEADS else ""
            raise ValueError(f"{name_or_path} lacks {count(len(missing), 'tensor')}: {some(missing)}{instead}")
        return model


def raise_faults(name_or_path: Any, faults: list[str]) -> None:
    """Raise a ValueError where config and weights contradict each other."""
    if faults:
        raise ValueError(f"config.json of {name_or_path} contradicts the weights: {some(faults, 8)}")


def check_stored(name_or_path: Any, kwargs: Mapping[str, Any]) -> WeightFiles | None:
    """The weight files of a checkpoint, of a hub id after they are fetched; None where it has none.

    Raises:
        ValueError: they are damaged, of integers, or contradict their `config.json`.
    """
    if not Path(name_or_path).exists():
        fetch_weights(name_or_path, kwargs)
    folder = folder_of(name_or_path, kwargs)
    if folder is None:
        return None
    try:
        weights = WeightFiles(folder, kwargs.get("variant"), kwargs.get("use_safetensors"))
    except NoWeights:
        return None  # transformers looks further, and says where
    except Misfit as misfit:
        raise Misfit(*(f"{folder}: {line}" for line in misfit.lines)) from misfit
    tensors = {released_name(name): tensor for name, tensor in weights.tensors.items()}
    config = folder / CONFIG_NAME
    fields = read_json(config) if config.is_file() else {}
    raise_faults(folder, complete(fields, _unpacked(fields, tensors))[1])
    if fields.get("quantization_config"):
        return weights
    whole = [name for name, tensor in tensors.items() if not tensor.is_floating and not name.endswith("position_ids")]
    if whole:
        kinds = f"{whole[0]} is {tensors[whole[0]].dtype}"
        raise ValueError(f"{folder}: {count(len(whole), 'tensor')} of no floating numbers: {some(whole)} ({kinds})")
    return weights
