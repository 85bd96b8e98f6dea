"""Task adapters in memory only while they are needed, and merged into the weights for a while.

The write and web adapters are a fifth of the 7B release, and `chat` uses none of them: they stay in the checkpoint's
files until a call asks for them. `save_pretrained` writes them all the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .build_mlp import CHECKED_ADAPTERS, AdaptedProjection, in_own_type, resident_task_adapters
from .recognition_internlm_xcomposer2 import ADAPTER, folder_of
from .threads_internlm_xcomposer2 import takes_turns
from .weight_files_internlm_xcomposer2 import NoWeights, WeightFiles

logger = logging.get_logger(__name__)

SHARDED_BY = ("tp_plan", "tp_size", "device_mesh", "distributed_config")  # arguments that cut weights up in loading


def adapter_files(folder: Path, variant: str | None, use_safetensors: bool | None) -> WeightFiles | None:
    """The weight files of a checkpoint, those with task adapters mapped: they can be read when the folder is gone."""
    try:
        weights = WeightFiles(folder, variant, use_safetensors)
    except NoWeights:
        return None
    for name, tensor in weights.tensors.items():
        match = ADAPTER.search(name)
        if match and match[1] != "Plora":
            weights.map(tensor.file)
    return weights


class TaskAdapterMixin:
    """`task_adapters=` of `from_pretrained`, loading and release, and merging; stands before `PreTrainedModel`."""

    _adapter_files: WeightFiles | None = None  # where adapters that are not in memory lie
    _merged_mode: str | None = None
    stack_task_adapters = True  # False: each adapter of the write mode runs for itself

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, task_adapters: str | Sequence[str] = "lazy", **kwargs
    ):
        """transformers' `from_pretrained`, and:

        Args:
            task_adapters: "lazy" leaves the task adapters on disk until a method needs them; "all" loads them now; a
                list of names loads these and leaves the others.

        Raises:
            ValueError: another word for `task_adapters`.
        """
        if isinstance(task_adapters, str) and task_adapters not in ("lazy", "all"):
            raise ValueError(f"task_adapters={task_adapters!r}; use 'lazy', 'all', or a list of names such as ['web']")
        # Where the weights do not simply come from files, or are cut up on the way, everything is loaded at once.
        eager = pretrained_model_name_or_path is None or any(
            kwargs.get(name) is not None for name in ("state_dict", "gguf_file", *SHARDED_BY)
        )
        names = None if eager or task_adapters == "all" else () if task_adapters == "lazy" else tuple(task_adapters)
        with resident_task_adapters(names):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if names is not None:
            folder = folder_of(pretrained_model_name_or_path, kwargs).absolute()
            model._adapter_files = adapter_files(folder, kwargs.get("variant"), kwargs.get("use_safetensors"))
            unknown = sorted(set(names) - set(model.config.task_adapter_ranks))
            if unknown:
                here = sorted(model.config.task_adapter_ranks) or "none"
                raise ValueError(f"task_adapters names {unknown}, but the checkpoint has {here}")
        return loaded

    def _adapted_linears(self) -> Iterator[tuple[str, AdaptedProjection]]:
        for name, module in self.named_modules():
            if isinstance(module, AdaptedProjection):
                yield name, module

    def task_adapters_in_memory(self) -> list[str]:
        """Names of the task adapters that are loaded."""
        _, first = next(self._adapted_linears())
        return list(first.task_A)

    @takes_turns
    def load_task_adapters(self, names: Sequence[str], device: torch.device | str | None = None) -> list[str]:
        """Load task adapters that are not in memory; returns those that were loaded.

        Args:
            device: where to; default: beside the weights they adapt.

        Raises:
            ValueError: the checkpoint does not hold such an adapter.
        """
        missing = [name for name in names if name not in self.task_adapters_in_memory()]
        if not missing:
            return []
        files = self._adapter_files
        folder = files.folder if files is not None else "this model"
        logger.info("loading task adapters %s from %s", missing, folder)
        loaded: dict[tuple[str, str, str], nn.Linear] = {}
        for path, module in self._adapted_linears():
            released = path.replace("model.language_model.", "model.")
            for name in missing:
                for part in ("A", "B"):
                    key = f"{released}.lora_{name}_{part}.weight"
                    if files is None or key not in files.tensors:
                        raise ValueError(
                            f"the task adapter {name!r} is not in {folder} (no {key}); load a checkpoint that has it, "
                            f"or use infer_mode='base'"
                        )
                    loaded[path, name, part] = _linear_of(files.read(key), module, device)
        # The first linear is the one that other threads ask, so it comes last.
        for path, module in reversed(list(self._adapted_linears())):
            for name in missing:
                module.task_A[name] = loaded[path, name, "A"]
                module.task_B[name] = loaded[path, name, "B"]
        return missing

    @takes_turns
    def release_task_adapters(self, names: Sequence[str] | None = None) -> None:
        """Drop task adapters from memory (None: all); the next call that needs one loads it again.

        Raises:
            ValueError: the model was not loaded from files that they could be read from again.
        """
        names = self.task_adapters_in_memory() if names is None else list(names)
        if names and self._adapter_files is None:
            raise ValueError(
                "these task adapters are in memory alone: save the model and load it again to release them"
            )
        for _, module in self._adapted_linears():
            module.part()
            for name in names:
                for pairs in (module.task_A, module.task_B):
                    if name in pairs:
                        del pairs[name]

    @contextmanager
    def task_adapters_checked(self, infer_mode: str) -> Iterator[None]:
        """Inside, a mode's adapters are in memory and known to be as they were: not each step looks at every layer."""
        outer = CHECKED_ADAPTERS.set(None)
        try:
            with torch.no_grad():
                self._need_task_adapters(infer_mode)
            CHECKED_ADAPTERS.set((id(self), infer_mode))
            yield
        finally:
            CHECKED_ADAPTERS.reset(outer)

    def _need_task_adapters(self, infer_mode: str) -> None:
        """Have the adapters of a mode in memory, and several of them (write) stacked into one."""
        compiling = torch.compiler.is_compiling()
        if not compiling and CHECKED_ADAPTERS.get() == (id(self), infer_mode):
            return
        if infer_mode == self._merged_mode:
            return
        if self._merged_mode is not None:
            raise ValueError(
                f"the adapters of {self._merged_mode!r} are merged into the weights: infer_mode={infer_mode!r} would "
                f"answer with them on; leave `merged_task_adapter` first"
            )
        names = self.config.adapters_of(infer_mode)
        if not set(names) <= set(self.task_adapters_in_memory()):
            self.load_task_adapters(names)
        if len(names) > 1 and not torch.is_grad_enabled() and not compiling:
            self._join_task_adapters(names)

    @takes_turns
    def _join_task_adapters(self, names: tuple[str, ...]) -> None:
        """Let these adapters run as one pair, or each for itself, by `stack_task_adapters`."""
        with in_own_type(self):  # weights are joined as they are
            for _, module in self._adapted_linears():
                if module.is_joint(names) != self.stack_task_adapters:
                    module.stack(names) if self.stack_task_adapters else module.part()

    @takes_turns
    def save_pretrained(self, *args, **kwargs) -> None:
        """transformers' `save_pretrained`, with the task adapters that are still on disk."""
        if self._merged_mode is not None:
            raise ValueError(f"{self._merged_mode!r} is merged into the weights; save outside of `merged_task_adapter`")
        passing = [] if self._adapter_files is None else list(self.config.text_config.task_adapter_ranks)
        passing = self.load_task_adapters(passing, device="cpu")
        if passing and kwargs.get("state_dict"):  # of a sharded model: the caller's, gathered before
            endings = tuple(f".task_{side}.{name}.weight" for name in passing for side in "AB")
            on_disk = {name: tensor for name, tensor in self.named_parameters() if name.endswith(endings)}
            kwargs["state_dict"] = {**kwargs["state_dict"], **on_disk}
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.release_task_adapters(passing)

    @contextmanager
    def merged_task_adapter(self, infer_mode: str) -> Iterator[None]:
        """Inside, the mode's adapters are part of the weights: a step costs what it costs without adapters.

        W + sum of B A is made in fp32; the plain weights wait in host memory and come back exactly. It is so for all
        threads: merging waits for a call that is under way, and until the end a call of another mode is refused.

        Raises:
            ValueError: an unknown mode, quantised weights, or a mode merged already.
        """
        plain = self._merge_task_adapter(infer_mode)
        try:
            yield
        finally:
            self._unmerge_task_adapter(plain)

    @takes_turns
    def _merge_task_adapter(self, infer_mode: str) -> dict[str, Tensor]:
        """Merge, and return the plain weights by their linears' names."""
        if self._merged_mode is not None:
            raise ValueError(f"{self._merged_mode!r} is merged already")
        adapters = self.config.adapters_of(infer_mode)
        self.load_task_adapters(adapters)
        plain: dict[str, Tensor] = {}
        try:
            for path, module in self._adapted_linears():
                weight = module.linear.weight
                plain_tensor = type(weight.data) is Tensor and weight.is_floating_point()
                if not plain_tensor or weight.is_meta:
                    raise ValueError(
                        f"{path} is quantised or offloaded: merge the checkpoint with `xcomposer merge`"
                    )
                plain[path] = weight.to("cpu", copy=True)
                total = weight.float()
                for name in adapters:
                    total = total + module.task_B[name].weight.float() @ module.task_A[name].weight.float()
                weight.copy_(total)
        except BaseException:
            self._unmerge_task_adapter(plain)
            raise
        self._merged_mode = infer_mode
        return plain

    @takes_turns
    def _unmerge_task_adapter(self, plain: dict[str, Tensor]) -> None:
        """Give back the plain weights."""
        self._merged_mode = None
        for path, module in self._adapted_linears():
            if path in plain:
                module.linear.weight.copy_(plain[path])


def _linear_of(weight: Tensor, module: AdaptedProjection, device: torch.device | str | None) -> nn.Linear:
    """A bias-free linear around `weight`, in the dtype of the module's adapters and on its device."""
    beside = module.Plora_A.weight
    if device is None:
        hook = getattr(module.Plora_A, "_hf_hook", None)  # accelerate runs offloaded weights elsewhere
        device = getattr(hook, "execution_device", None) if beside.is_meta else beside.device
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(device=device, dtype=beside.dtype), requires_grad=beside.requires_grad)
    return linear
