"""Several callers of one model: computing takes turns, and each call may draw random numbers of its own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ABANDONED_EVERY = 0.05  # seconds between two looks whether anybody still waits for a turn's answer


class ComputeLock:
    """Held by the one thread that computes with a model, which may enter it again. A copy or a pickle is a new one."""

    def __init__(self):
        self._lock = threading.RLock()

    def __reduce__(self):
        return type(self), ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_) -> None:
        self._lock.release()

    @contextmanager
    def unless(self, abandoned: threading.Event) -> Iterator[bool]:
        """Wait for a turn; gives False, and no turn, when the event is set before it comes."""
        while not (held := self._lock.acquire(timeout=ABANDONED_EVERY)) and not abandoned.is_set():
            pass
        try:
            yield held
        finally:
            if held:
                self._lock.release()


def takes_turns(method: Callable) -> Callable:
    """A method of a model that computes or changes weights: one thread at a time.

    What it makes may be kept for later calls, so it is made outside of the caller's inference mode: tensors of that
    mode can be neither trained nor changed in place elsewhere. No gradients.
    """

    @wraps(method)
    def call(self, *args, **kwargs):
        with self.compute_lock, torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return call


class _OwnNumbers(TorchFunctionMode):
    """Samples drawn in this thread come from generators of one seed, one a device."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.multinomial, Tensor.multinomial):
            kwargs = {"generator": self._generator(args[0].device), **kwargs}
        elif func is torch.rand_like:
            like = args[0]
            own = {"dtype": like.dtype, "device": like.device, "generator": self._generator(like.device)}
            func, args, kwargs = torch.rand, (like.shape,), {**own, **kwargs}
        return func(*args, **kwargs)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Sample from `seed` inside, in this thread alone; the random state of everybody else stays. -1: no seed."""
    if seed == -1:
        yield
        return
    with _OwnNumbers(seed):
        yield
