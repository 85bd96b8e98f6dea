"""What Apple's GPU needs of the code, checked without one: it has no float64 and no complex numbers."""

import pytest
import torch
from conftest import GOLDEN
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNKNOWN = (torch.float64, torch.complex64, torch.complex128)
PICTURE = str(GOLDEN / "images/small_150x100.png")
CALLS = {
    "text": ("chat", ["Hello"], {}),
    "picture": ("chat", ["What is it?", [PICTURE]], {}),
    "beams": ("chat", ["What is it?", [PICTURE]], {"num_beams": 2}),
    "sampled": ("chat", ["What is it?", [PICTURE]], {"do_sample": True}),
    "beyond the plain positions": ("chat", ["word " * 300], {}),
    "batch": ("batch_chat", [["Hello", "What?"], [None, [PICTURE]]], {}),
    "article": ("write_artical", ["Write."], {}),
}


class NoDoubles(TorchDispatchMode):
    """Raises where an operation makes a tensor of a type that the device does not know."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.dtype in UNKNOWN:
                raise TypeError(f"{func} makes a tensor of {value.dtype}")
        return out


@pytest.mark.parametrize("call", CALLS)
def test_no_type_that_the_device_lacks(tiny_model, tiny_tokenizer, call):
    method, arguments, settings = CALLS[call]
    if method != "write_artical":
        arguments, settings = [tiny_tokenizer, *arguments], {"do_sample": False, **settings}
    with NoDoubles():
        getattr(tiny_model, method)(*arguments, max_new_tokens=4, **settings)


def test_the_watch_sees_a_double():
    with NoDoubles(), pytest.raises(TypeError, match="float64"):
        torch.zeros(1, dtype=torch.float64)
