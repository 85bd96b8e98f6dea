"""PEFT adapters under the release's names: targets such as `attention.wqkv`, and files that were saved beside it.

The released code lets PEFT wrap `attention.wqkv` and its like whole; here the LoRA sits on their `.linear`, and decoder
and tower have other names. PEFT takes what it adapts from the module tree alone and has no hook for other names, so two
of its functions are wrapped, for models of this family (`teach_peft`). Only names change, so logits are the same.
"""

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.utils import is_peft_available

from .recognition_internlm_xcomposer2 import HUB, RENAMINGS

PEFT_PREFIX = "base_model.model."  # of every name in an adapter's file
# `...attention.wqkv.lora_A.weight`: the module that carries the LoRA, and what the LoRA calls its own.
LORA_NAME = re.compile(r"^(?P<module>.+)\.(?P<own>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\..+)?)$")
# Name of a module with weights -> its released name; what `RENAMINGS` says of parameters, backwards.
RELEASED_MODULES = (
    (r"\.(wqkv|wo|w1|w2|w3)\.linear$", r".\1"),
    (r"\.task_([AB])\.([a-z0-9]+)$", r".lora_\2_\1"),
    (r"^lm_head$", "output"),
    (r"^model\.language_model\.", "model."),
    (r"^model\.vision_tower\.", "vit.vision_tower.vision_model."),
    (r"^model\.vision_proj\.", "vision_proj."),
)


def renamed(parameter: str) -> str:
    """A released parameter name as the module tree has it; a name of the tree stays."""
    for pattern, replacement in RENAMINGS:
        parameter = re.sub(pattern, replacement, parameter)
    return parameter


def renamed_module(module: str) -> str:
    """A released module name as the module tree has it: `model.layers.0.attention.wqkv` -> `... .wqkv.linear`."""
    return renamed(f"{module}.weight").removesuffix(".weight")


def released_module(module: str) -> str:
    """The other way round: a module name of the tree as the release has it."""
    for pattern, replacement in RELEASED_MODULES:
        module = re.sub(pattern, replacement, module)
    return module


def renamed_key(key: str) -> str:
    """A name in an adapter's file, with the names of this module tree; one of this tree stays."""
    name = key.removeprefix(PEFT_PREFIX)
    match = LORA_NAME.match(name)
    name = f"{renamed_module(match['module'])}.{match['own']}" if match else renamed(name)
    return PEFT_PREFIX + name if key.startswith(PEFT_PREFIX) else name


def by_module(patterns: Mapping[str, Any] | None, modules: Sequence[str]) -> dict[str, Any]:
    """Ranks or alphas by pattern of released names -> by whole names of this tree; the first that fits counts."""
    found = {}
    for module in modules:
        fits = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
        value = next(fits, None)
        if value is not None:
            found[renamed_module(module)] = value
    return found


def adaptable_modules(model: nn.Module) -> Iterator[str]:
    """Names of the modules that an adapter may sit on, also where there is one already."""
    for name, module in model.named_modules():
        has_weights = bool(module._parameters or module._buffers) and not module._modules
        if has_weights and ".lora_" not in name:
            yield name.removesuffix(".base_layer")


class ReleasedAdaptersMixin:
    """A model whose PEFT adapters may have released names; stands before `PreTrainedModel`."""

    def named_modules(self, *args, **kwargs):
        """PyTorch's. PEFT begins here, however late it was imported, and so learns the released names in time."""
        teach_peft()
        return super().named_modules(*args, **kwargs)

    def rename_adapter_targets(self, config: Any, is_target: Callable[[Any, str], Any]) -> None:
        """Rewrite a LoRA's PEFT config, in place, if its targets are released names; others are left as they are.

        Targets are written out: patterns and layer numbers of the released tree would mean something else here.

        Args:
            is_target: PEFT's judgement whether a config names a module.
        """
        released = {name: released_module(name) for name in adaptable_modules(self)}
        here = {name for name in released if is_target(config, name)}
        there = {name for name, old in released.items() if is_target(config, old)}
        if there <= here:
            return
        modules = [released[name] for name in released if name in here | there]
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(config, field) or {}
            left = {pattern: value for pattern, value in patterns.items() if not by_module({pattern: value}, modules)}
            setattr(config, field, {**by_module(patterns, modules), **left})
        config.target_modules = here | there
        config.layers_to_transform = config.layers_pattern = None
        if config.modules_to_save:
            config.modules_to_save = [renamed_module(module) for module in config.modules_to_save]

    def load_adapter(self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None, **kwargs):
        """transformers' `load_adapter`, of a file with released names too."""
        if adapter_state_dict is None and peft_model_id is not None and is_peft_available():
            load_peft_weights = importlib.import_module("peft.utils").load_peft_weights  # no import that loaders check
            given = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
            of_hub = {name: given[name] for name in HUB if name in given}
            adapter_state_dict = load_peft_weights(peft_model_id, device="cpu", **of_hub)
        if adapter_state_dict is not None:
            adapter_state_dict = {renamed_key(name): value for name, value in adapter_state_dict.items()}
        return super().load_adapter(peft_model_id, adapter_name, peft_config, adapter_state_dict, **kwargs)


def teach_peft() -> None:
    """Let PEFT take released names for models of this family, if the program has imported it; once.

    Other models' adapters go the way they went.
    """
    peft = sys.modules.get("peft")
    tuner = getattr(peft, "LoraModel", None)
    if tuner is None or hasattr(tuner._prepare_adapter_config, "takes_released_names"):
        return
    prepare, set_state = tuner._prepare_adapter_config, peft.set_peft_model_state_dict

    @functools.wraps(prepare)
    def _prepare_adapter_config(self, peft_config, model_config):
        peft_config = prepare(self, peft_config, model_config)
        rename_targets = getattr(self.model, "rename_adapter_targets", None)
        if rename_targets is not None and peft_config.peft_type == "LORA":
            rename_targets(peft_config, self._check_target_module_exists)
        return peft_config

    @functools.wraps(set_state)
    def set_peft_model_state_dict(model, peft_model_state_dict, *args, **kwargs):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if hasattr(base, "rename_adapter_targets"):
            peft_model_state_dict = {renamed_key(name): value for name, value in peft_model_state_dict.items()}
        return set_state(model, peft_model_state_dict, *args, **kwargs)

    _prepare_adapter_config.takes_released_names = True  # also to another copy of this file
    tuner._prepare_adapter_config = _prepare_adapter_config
    for module in (peft, peft.peft_model, peft.utils, peft.utils.save_and_load):
        module.set_peft_model_state_dict = set_peft_model_state_dict


__all__ = ["ReleasedAdaptersMixin"]
