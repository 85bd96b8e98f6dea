"""What the tables of odd input share: when a case is held, and a check of how many of a family are."""

import gc
import os
import threading
import time
from pathlib import Path

MOST_TEXT, MOST_SECONDS = 2000, 5.0
LAST_STEPS = 0.5  # seconds that a thread may take to end after the call
REFUSALS = (ValueError, TypeError, OSError)
OPEN_FILES = Path("/proc/self/fd")


def _files() -> set[str]:
    """Regular files that this process holds open, on systems that tell."""
    held = set()
    for entry in OPEN_FILES.iterdir() if OPEN_FILES.is_dir() else ():
        try:
            held.add(os.readlink(entry))
        except OSError:  # closed meanwhile, as the listing's own
            continue
    return {path for path in held if os.path.isfile(path)}


def fault(call, names=()):
    """Why `call()` does not hold, or None.

    Held: it works, or it raises a ValueError, TypeError or OSError within 5 seconds whose text is under 2,000
    characters and holds one of `names`; and no thread or file stays open.
    """
    gc.collect()
    threads, files, begun = set(threading.enumerate()), _files(), time.monotonic()
    found = None
    try:
        call()
    except REFUSALS as error:
        text = str(error)
        if len(text) >= MOST_TEXT:
            found = f"a message of {len(text)} characters"
        elif names and not any(name.lower() in text.lower() for name in names):
            found = f"{type(error).__name__} names none of {names}: {text[:200]}"
    except BaseException as error:  # noqa: B036 - whatever it is, it is the finding
        found = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.monotonic() - begun
    gc.collect()
    if found is None and seconds > MOST_SECONDS:
        found = f"took {seconds:.1f} s"
    for thread in set(threading.enumerate()) - threads:
        thread.join(LAST_STEPS)  # a server of the tests ends its side a little after the client
    left = [
        thread for thread in set(threading.enumerate()) - threads if thread.is_alive() and "server" not in thread.name
    ]
    if found is None and (left or _files() - files):
        found = f"left open: {left} {_files() - files}"
    return found


def assert_held(cases, least=0.97, most_faults=20):
    """Of `cases`, (name, call, words one of which a refusal must hold), at least the share `least` is held."""
    gc.collect()
    gc.freeze()  # what the libraries hold is not looked at again for each case: that took longer than the cases
    try:
        faults = {name: why for name, call, words in cases if (why := fault(call, words))}
    finally:
        gc.unfreeze()
    share = 1 - len(faults) / len(cases)
    print(f"{len(cases) - len(faults)} of {len(cases)} held")  # `pytest -rP` shows it
    listed = "\n".join(f"{name}: {why}" for name, why in list(faults.items())[:most_faults])
    assert share >= least, f"{len(cases) - len(faults)} of {len(cases)} held\n{listed}"
    return share, faults
