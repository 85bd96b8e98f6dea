"""Code that was put into a model from outside, which may change its outputs without a weight that tells: forward hooks,
and a `forward` that is not a class's own.

What such code does depends on what it can reach, and that cannot be compared. Left out are hooks that surely only look
on (they count, note shapes, keep copies), and those of libraries whose effect lies in weights and numbers.
"""

import builtins
import dis
import functools
import inspect
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from types import CodeType, ModuleType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

LIBRARIES = ("accelerate", "transformers", "torch", "peft", "bitsandbytes", "torchao")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

# What a hook that only looks may name: attributes, methods and functions that change nothing they are asked of.
_LOOKING = frozenset(
    "append extend update get keys values items setdefault len print int float str bool tuple list dict type id repr "
    "round sorted zip enumerate range isinstance hasattr min max sum any all abs "
    "shape size dim ndim numel dtype device nbytes element_size is_cuda detach clone cpu double long item tolist mean "
    "std var norm amax amin isnan isinf isfinite "
    "last_hidden_state logits pooler_output hidden_states attentions past_key_values get_seq_length training "
    "__class__ __name__ time perf_counter process_time monotonic torch cuda synchronize memory_allocated "
    "max_memory_allocated is_tensor".split()
)
_CONTAINERS = (list, dict, set, deque, Counter, OrderedDict, defaultdict)
_WRITES = {"STORE_ATTR", "DELETE_ATTR", "DELETE_SUBSCR", "STORE_SLICE", "IMPORT_NAME", "MAKE_FUNCTION", "YIELD_VALUE"}
_SKIPPED = {"EXTENDED_ARG", "CACHE", "RESUME", "COPY_FREE_VARS", "PUSH_NULL", "PRECALL", "NOT_TAKEN"}
_FROM_OUTSIDE = ("LOAD_DEREF", "LOAD_GLOBAL")
_FILLING = ("append", "extend", "update", "setdefault")
_KEEPS = ("STORE_DEREF", "STORE_GLOBAL", "SWAP", "ROT_THREE", "STORE_SUBSCR")  # what may follow a `+=`


class Unseen(Exception):
    """Something that outputs may depend on and that cannot be compared; says what."""


def _reach(function: Callable) -> dict[str, Any] | None:
    """What a function reaches by name from outside of it; None: not all of it is there."""
    try:
        found = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return None
    return {**found.builtins, **found.globals, **found.nonlocals}


def _only_loads(value: Any, name: str) -> bool:
    """Whether what a hook reaches by this name is a number, a text, a plain container, or a harmless function."""
    if value is None or type(value) in (int, float, str, bool, *_CONTAINERS):
        return True
    harmless = isinstance(value, ModuleType) or inspect.isbuiltin(value) or value is vars(builtins).get(name)
    return name in _LOOKING and harmless


def only_looks(hook: Any) -> bool:
    """Whether a hook surely changes nothing: read from its byte code, where only harmless names are used, only
    containers from outside are written to, and nothing is returned (PyTorch takes what a hook returns).
    """
    code = getattr(hook, "__code__", None)
    reach = _reach(hook) if isinstance(code, CodeType) and inspect.isfunction(hook) else None
    if reach is None or not all(_only_loads(value, name) for name, value in reach.items()):
        return False
    if not _LOOKING.issuperset(set(code.co_names) - set(reach)):
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in _SKIPPED]
    return not any(step.opname in _WRITES for step in steps) and _writes_outside(steps, reach) and _gives_none(steps)


def _writes_outside(steps: list[dis.Instruction], reach: dict[str, Any]) -> bool:
    """Whether only containers from outside are written to (`seen["calls"] += 1`, `rows.append(..)`), and numbers from
    outside (`calls += 1`): a tensor's `x += 1` writes to the tensor.
    """
    outside = [step.opname in _FROM_OUTSIDE and isinstance(reach.get(step.argval), _CONTAINERS) for step in steps]
    stores = 0
    for at, step in enumerate(steps):
        after = steps[at + 1].opname if at + 1 < len(steps) else ""
        if step.opname == "STORE_SUBSCR":
            stores += 1
        elif "LOAD" in step.opname and at and outside[at - 1] and after in ("STORE_SUBSCR", "COPY", "DUP_TOP_TWO"):
            stores -= 1  # a container and a key, about to be stored by
        elif step.opname.startswith("INPLACE") or (step.opname == "BINARY_OP" and step.argrepr.endswith("=")):
            if after not in _KEEPS:
                return False
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _FILLING:
            item = at > 2 and steps[at - 1].opname.startswith("BINARY") and outside[at - 3]
            if not (at and outside[at - 1]) and not item:
                return False
    return stores <= 0


def _gives_none(steps: list[dis.Instruction]) -> bool:
    """Whether a function returns None alone, or is one call of `append` or the like, as a lambda has it."""
    values = [  # what stands before a jump's target is not all that may be returned there
        "" if step.is_jump_target else before.argval if before.opname == "LOAD_CONST" else before.opname
        for before, step in pairwise(steps)
        if step.opname == "RETURN_VALUE"
    ]
    values += [step.argval for step in steps if step.opname == "RETURN_CONST"]
    if all(value is None for value in values):
        return True
    fills = steps[0].opname in _FROM_OUTSIDE and any(step.argval in _FILLING for step in steps[1:4])
    return (
        fills
        and len(values) == 1
        and str(values[0]).startswith("CALL")
        and not any("JUMP" in step.opname for step in steps)
    )


def _home(function: Any) -> str:
    """Name of the module that a function's code, or a callable object's class, was written in."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "_torchdynamo_orig_callable", function)
    function = getattr(function, "__func__", function)
    return getattr(function, "__globals__", {}).get("__name__") or type(function).__module__


def _of_library(name: str) -> bool:
    """FSDP and its like gather and drop weights in hooks: these are no library here."""
    return name.partition(".")[0] in LIBRARIES and not name.startswith("torch.distributed")


def _own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether this `forward`, and what it wraps, was written where the module's class was, or in a library."""
    homes = {kind.__module__ for kind in type(module).__mro__}
    while forward is not None:
        home = _home(forward)
        if home not in homes and not _of_library(home):
            return False
        forward = getattr(forward, "__wrapped__", None)
    return True


def _check_hooks(hooks: Iterable[Any], where: str) -> None:
    for hook in hooks:
        if not _of_library(_home(hook)) and not only_looks(hook):
            raise Unseen(f"what {_place(hook)}, a forward hook of {where}, may change")


def _place(function: Any) -> str:
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} ({code.co_filename}, line {code.co_firstlineno})" if code else name


def forwards_of(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The `forward` of each class of these modules, and those put on single modules: code that their outputs depend on.

    Raises:
        Unseen: a hook that may change something, or a `forward` from elsewhere.
    """
    _check_hooks([*torch_module._global_forward_hooks.values()], "every module")
    _check_hooks([*torch_module._global_forward_pre_hooks.values()], "every module")
    seen = set()
    for module in modules:
        kind, fields = type(module), vars(module)
        for table in _HOOKS:
            if fields[table]:
                _check_hooks([*fields[table].values()], kind.__name__)
        put = [fields[name] for name in ("forward", "_old_forward") if name in fields]
        if kind not in seen:
            seen.add(kind)
            put.append(kind.forward)
        for forward in put:
            if not _own_forward(module, forward):
                raise Unseen(f"what {_place(forward)}, the forward of {kind.__name__}, does")
            yield forward
