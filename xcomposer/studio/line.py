"""The model's work for many visitors: in a line, one at a time, left at the next token. Knows no gradio.

gradio's own queue can only be left by `cancels=`, which closes a generator from another thread while it computes, and
it says one's place in English alone. Here who waits and who is served looks at each step whether the work is left.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

QUEUE = 16  # most waiting; who comes then is told to come again
LOOK_S = 0.5  # between two looks of one who waits: the work may be left, the visitor gone


@dataclass(eq=False)
class Work:
    """What the model does in a tab, from the click that asks for it to its end.

    do: gives what the tab is to show as it goes on; called once, with the work itself.
    keep: puts away what there is so far, whichever way the work ends.
    left: it was stopped, and whatever the model still says of it goes nowhere.
    note: what the tab says of that.
    """

    do: Callable[["Work"], Iterator[Any]]
    keep: Callable[[], None] = lambda: None
    taken: bool = False
    left: bool = False
    note: str = ""


class Now(NamedTuple):
    """How far work is. value: what the model gave; None: it waits, with `before` others served first (0: the model is
    being loaded). due: it is time to show it."""

    value: Any
    before: int
    due: bool


class Line:
    """Who comes first is served first. Closed until `open` is called."""

    def __init__(self, most: int = QUEUE):
        self.most = most
        self._line: list[object] = []
        self._moved = threading.Condition()
        self._opened = False

    def open(self) -> None:
        with self._moved:
            self._opened = True
            self._moved.notify_all()

    def turn(self, work: Work, start: Callable[[], Iterator[Any]], every_s: float) -> Iterator[Now]:
        """Wait, then give each value of `start()`, which is closed at the end; ends early once the work is left.

        Args:
            every_s: seconds between two values that are due.

        Raises:
            ValueError: too many wait; and whatever `start` raises.
        """
        me = object()
        with self._moved:
            if len(self._line) > self.most:
                raise ValueError(f"{self.most} are waiting for the model already: try again in a while")
            self._line.append(me)
        try:
            while not work.left and (before := self._wait(me)) is not None:
                yield Now(None, before, True)
            if work.left:
                return
            shown = 0.0
            with closing(start()) as values:
                for value in values:
                    if work.left:
                        return
                    due = time.monotonic() - shown > every_s
                    yield Now(value, 0, due)
                    shown = time.monotonic() if due else shown
        finally:
            with self._moved:
                self._line.remove(me)
                self._moved.notify_all()

    def _wait(self, me: object) -> int | None:
        """How many are served before, after a short wait for fewer; None: it is one's turn."""
        with self._moved:
            if not self._first(me):
                self._moved.wait_for(lambda: self._first(me), LOOK_S)
            return None if self._first(me) else self._line.index(me)

    def _first(self, me: object) -> bool:
        return self._opened and self._line[0] is me
