"""What each mode trains, from loading the model to what of it is trainable.

full     every parameter but the task adapters, less what is frozen by a switch
lora     a PEFT LoRA on the decoder's linears
qlora    the same on 4-bit weights
adapter  a task adapter of the model's own (`web`, `write` = sft + dpo, or a new name), the rest frozen
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from xcomposer.model.configuration_internlm_xcomposer2 import INFER_MODES

MODES = ("full", "lora", "qlora", "adapter")
LEARNING_RATES = {"full": 1e-5, "lora": 5e-5, "qlora": 5e-5, "adapter": 5e-5}
# The decoder's own linears, beneath their adapters.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))\.linear"
ADAPTER_FILE = "task_adapter.safetensors"  # what a checkpoint of an adapter run holds
CAUSAL = {"task_type": "CAUSAL_LM"}
# Part of the model -> its parameters in the module tree.
PARTS = {
    "vision_tower": r"model\.vision_tower\.",
    "projector": r"model\.(vision_proj\.|plora_\w+_GN)",
    "partial_lora": r".*\.Plora_[AB]\.",
}


def load_model(
    folder: str | Path, mode: str, dtype: torch.dtype | str | None = None, device=None, scores: bool = False, **kwargs
):
    """The model of a checkpoint folder, as `mode` trains it: 4-bit for qlora, without unused task adapters.

    Args:
        dtype: of the weights. None: float32 for full (optimisers need it), else as they were saved.
        device: for qlora, whose weights are quantised where they will stay.
        scores: with a score head: the checkpoint's, else a new one.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
    if dtype is None:
        dtype = torch.float32 if mode == "full" else "auto"
    if mode == "qlora":
        compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
        if device is not None and torch.device(device).type != "cpu":
            kwargs["device_map"] = {"": device}
    if scores:
        kwargs["new_head"] = True
    auto_class = AutoModelForSequenceClassification if scores else AutoModel
    model = auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=True, **kwargs)
    if is_deepspeed_zero3_enabled():  # transformers keeps more renamings than it applied, and would save by them
        del model._weight_conversions
    return model


def prepare_full(model: nn.Module, frozen: tuple[str, ...] = ()) -> None:
    """Train all but the task adapters and the `frozen` parts (see `PARTS`)."""
    patterns = [r".*\.task_[AB]\.", *(PARTS[part] for part in frozen)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(re.match(pattern, name) for pattern in patterns))


def prepare_lora(
    model: nn.Module, rank: int = 64, alpha: int = 64, dropout: float = 0.05, start: str | Path | None = None
) -> nn.Module:
    """`model` in a PEFT wrapper that trains a LoRA alone.

    Args:
        start: folder of a LoRA to go on from; its own rank counts.

    Raises:
        ImportError: no PEFT. ValueError: `start` was made for another base.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"LoRA needs PEFT ({error}): pip install peft") from error
    if getattr(model, "is_quantized", False):
        # Not peft.prepare_model_for_kbit_training: it would turn the vision tower and partial LoRA to float32.
        model.requires_grad_(False)
    if start is not None:
        compare_lora(model, Path(start))
        return peft.PeftModel.from_pretrained(model, start, is_trainable=True)
    # A score head is trained whole, and saved with the LoRA.
    head = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if hasattr(model, "score") else CAUSAL
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, **head)
    return peft.get_peft_model(model, config)


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linears that carry task adapters, by their name in the module tree."""
    for name, module in model.named_modules():
        if hasattr(module, "task_A"):
            yield name, module


def adapter_names(name: str) -> tuple[str, ...]:
    """Task adapters behind an `infer_mode`; a further adapter is its own mode.

    Raises:
        ValueError: "base", or a name that has no place on disk (`lora_<name>_A`).
    """
    names = INFER_MODES.get(name, (name,))
    if not names or not re.fullmatch(r"[a-z0-9]+", name):
        raise ValueError(f"a task adapter cannot be called {name!r}; use web, write, or small letters and digits")
    return names


def prepare_adapter(
    model: nn.Module, name: str, rank: int | None = None, start: str | Path | None = None
) -> tuple[str, ...]:
    """Train the task adapters of `infer_mode=name` alone; those the checkpoint lacks are made, and change nothing yet.

    Args:
        rank: of a new adapter (default 256); an adapter that is there has its own.
        start: file or folder with the adapter's tensors (`..lora_<name>_A.weight`) to begin from.

    Returns: names of the adapters.

    Raises:
        ValueError: an impossible name, another rank than the checkpoint's, or `start` is of another base.
    """
    names = adapter_names(name)
    ranks = model.config.text_config.task_adapter_ranks
    for adapter in names:
        if rank is not None and ranks.get(adapter, rank) != rank:
            raise ValueError(
                f"adapter {adapter!r} has rank {ranks[adapter]} in this checkpoint, but rank {rank} is asked for; "
                f"leave the rank out to go on with it, or give the new adapter another name"
            )
    model.load_task_adapters([adapter for adapter in names if adapter in ranks])
    for adapter in names:
        if adapter not in ranks:
            add_adapter(model, adapter, 256 if rank is None else rank)
    if start is not None:
        read_adapter(model, names, Path(start))
    endings = tuple(f".task_{side}.{adapter}.weight" for adapter in names for side in "AB")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith(endings))
    return names


@torch.no_grad()
def add_adapter(model: nn.Module, name: str, rank: int) -> None:
    """Give every decoder linear a new task adapter: A random, B zero."""
    for config in {id(c): c for c in (model.config.text_config, model.model.language_model.config)}.values():
        config.task_adapter_ranks[name] = rank
    for _, module in adapted_linears(model):
        beside = module.Plora_A.weight
        made = {"device": beside.device, "dtype": beside.dtype}
        low = nn.Linear(module.linear.in_features, rank, bias=False, **made)
        high = nn.Linear(rank, module.linear.out_features, bias=False, **made)
        nn.init.kaiming_uniform_(low.weight, a=5**0.5)  # as PEFT starts a LoRA
        nn.init.zeros_(high.weight)
        module.task_A[name], module.task_B[name] = low, high


def adapter_state(state: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Task adapters among a state dict's tensors, under their released names."""
    found = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"model\.language_model\.(.+)\.task_([AB])\.(\w+)\.weight", key)
        if match and match[3] in names:
            found[f"model.{match[1]}.lora_{match[3]}_{match[2]}.weight"] = tensor
    return found


@torch.no_grad()
def read_adapter(model: nn.Module, names: tuple[str, ...], start: Path) -> None:
    """Overwrite task adapters with those of a file, or of a checkpoint folder.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    own = adapter_state(dict(model.named_parameters()), names)
    files = [start] if start.is_file() else sorted(start.glob("*.safetensors"))
    endings = tuple(f".lora_{name}_{side}.weight" for name in names for side in "AB")
    given = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            given.update({key: tensors.get_tensor(key) for key in tensors.keys() if key.endswith(endings)})
    compare({key: tuple(t.shape) for key, t in given.items()}, {key: tuple(t.shape) for key, t in own.items()}, start)
    for key, tensor in given.items():
        own[key].copy_(tensor)


def compare_lora(model: nn.Module, folder: Path) -> None:
    """Raise a ValueError where a PEFT LoRA was made for a model of other names or sizes."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} is no LoRA folder: it has no {file.name}")
    given, own = {}, {}
    for key, tensor in load_file(file).items():
        if ".lora_" not in key:  # a head that was trained with it
            continue
        linear, side = key.removeprefix("base_model.model.").rsplit(".lora_", 1)
        given[linear, side[0]] = tensor.shape[1 if side[0] == "A" else 0]
    for linear, _ in given:
        try:
            module = model.get_submodule(linear)
        except AttributeError:
            continue
        own[linear, "A"], own[linear, "B"] = module.in_features, module.out_features
    for linear, module in model.named_modules():
        if re.fullmatch(LORA_TARGETS, linear) and any(other.endswith(linear[-8:]) for other, _ in given):
            own[linear, "A"], own[linear, "B"] = module.in_features, module.out_features
    compare(given, own, folder)


def compare(given: Mapping, own: Mapping, source: Path) -> None:
    """Raise a ValueError that lists how an adapter's tensors differ from what the base has places for."""
    lines = [f"{key} is {given[key]} there, {own[key]} here" for key in given if key in own and given[key] != own[key]]
    lines += [f"{key} has no place here" for key in given if key not in own]
    lines += [f"{key} is not there" for key in own if key not in given]
    if lines:
        shown = "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
        raise ValueError(f"the adapter in {source} was trained on another base: {shown}")


def trainable_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
