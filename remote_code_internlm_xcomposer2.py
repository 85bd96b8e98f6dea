"""What a module misses when transformers loads it from a checkpoint's folder (`trust_remote_code=True`)."""

import sys


def attach_to_package(name: str) -> None:
    """Make the module called `name` an attribute of its package, as Python's own import does.

    transformers puts the modules that it executes itself into `sys.modules` alone. dill looks classes up through the
    package, and where it does not find them it writes them out whole, which fails for a TypedDict: a processor would
    not reach the workers of `datasets.map(num_proc=2)`.
    """
    package, _, own = name.rpartition(".")
    if package in sys.modules:
        setattr(sys.modules[package], own, sys.modules[name])


__all__ = ["attach_to_package"]
