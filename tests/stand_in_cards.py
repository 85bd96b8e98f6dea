"""Cards that are not there: tensors that say they are on `card:0` or `card:1`, compute on the CPU, and meet no others.

`with Cards():` lets any build of PyTorch run a model that was moved by `to_cards`, with real values. An operation on
tensors of two devices raises, as it does on cards; a number without dimensions may come from the CPU. (FakeTensorMode
has no values, so that `generate` cannot run in it.)
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CARD = "card"


class CardModule(_DummyBackendModule):
    """What PyTorch asks a device's module, `torch.card`."""

    __name__ = "torch.card"  # dynamo asks every device's module for it

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend(CARD, backend_module=CardModule())  # PyTorch knows the device from here on
CPU = torch.device("cpu")
# What brings tensors of two devices together on purpose.
COPIES = {aten.copy_.default, aten._to_copy.default, aten._pin_memory.default}
# Operations whose indices may lie on the CPU.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def _inner(values: Any) -> Any:
    """Card tensors among values -> the CPU tensors in them."""
    return tree_map_only(CardTensor, lambda tensor: tensor.inner, values)


class DeviceMismatch(RuntimeError):
    """An operation got tensors of two devices, or another device's random numbers."""


class CardGenerator(torch.Generator):
    """Random numbers of a device, drawn on the CPU: `torch.Generator` while there are cards."""

    places: dict[int, torch.device] = {}  # by address: an operation gets the generator without its Python class

    def __new__(cls, device: Any = "cpu"):
        generator = super().__new__(cls, "cpu")
        cls.places[generator._cdata] = on(torch.device(device))
        return generator


class CardTensor(Tensor):
    """`inner`, a CPU tensor, under another device's name."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device | None = None, requires_grad: bool = False):
        device = inner.device if device is None else device  # accelerate makes a parameter anew from itself
        inner = _inner(inner)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device, requires_grad=requires_grad,
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    def tolist(self):
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo):
        return CardTensor(self.inner.clone(), self.device)

    def __repr__(self, **kwargs) -> str:
        return f"CardTensor({self.inner!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def on(device: torch.device) -> torch.device:
    return torch.device(CARD, device.index or 0) if device.type == CARD else device


def run(func, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation, computed on the CPU and named after the device of its tensors."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    judged = [args[0]] if func in INDEXING and isinstance(args[0], Tensor) else tensors
    found = {on(t.device) for t in judged if t.dim() or t.device.type == CARD}
    if len(found) > 1 and func not in COPIES:
        places = [f"{t.device} {tuple(t.shape)}" for t in tensors]
        raise DeviceMismatch(f"{func} on {', '.join(places)}")
    asked = kwargs.get("device")
    device = on(torch.device(asked)) if asked is not None else next(iter(found), CPU)
    generator = kwargs.get("generator")
    drawn_on = device if generator is None else CardGenerator.places.get(generator._cdata, CPU)
    if drawn_on != device:
        raise DeviceMismatch(f"{func} on {device} with a generator of {drawn_on}")
    if func is aten.copy_.default:
        device = on(args[0].device)
    inner_args, inner_kwargs = _inner((args, kwargs))
    if asked is not None:
        inner_kwargs["device"] = CPU
    out = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable and tensors and out is inner_args[0]:
        return args[0]
    return out if device == CPU else tree_map_only(Tensor, lambda t: CardTensor(t, device), out)


class _OneThread(TorchDispatchMode):
    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` is made on the CPU, then moved
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Cards(_OneThread):
    """While it is on, `device="card"` names a stand-in card, for new tensors and for `.to`, in new threads too."""

    def __enter__(self):
        self.run_thread = run_thread = threading.Thread.run

        def run_among_cards(thread):  # a mode holds for one thread alone
            with _OneThread():
                run_thread(thread)

        threading.Thread.run = run_among_cards
        self.generator, torch.Generator = torch.Generator, CardGenerator
        return super().__enter__()

    def __exit__(self, *exception):
        threading.Thread.run, torch.Generator = self.run_thread, self.generator
        CardGenerator.places.clear()
        return super().__exit__(*exception)


def to_card(value: Tensor, device: str) -> CardTensor:
    return CardTensor(value.detach().clone(), torch.device(device))


def to_cards(model: nn.Module, place) -> nn.Module:
    """Move every parameter and buffer to `place(its name)`, in place."""
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                moved = to_card(value, place(f"{prefix}.{name}".lstrip(".")))
                table[name] = nn.Parameter(moved, requires_grad=False) if table is module._parameters else moved
    return model
