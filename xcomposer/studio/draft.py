"""An article under work: undo, redo, an edit that waits for a yes, the steps of the model. Knows no model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xcomposer.article import Article

MOST_UNDO = 200


@dataclass
class Ghost:
    """An edit that the visitor has not yet taken: the article with it, and the block that it is about."""

    article: Article
    block: str
    how: str
    done: bool = False


@dataclass
class Draft:
    """The article, those before it and those undone.

    steps: of the model, with what is shown beside each: "…" while it runs, "✓" when it is done.
    """

    now: Article = field(default_factory=Article)
    past: list[Article] = field(default_factory=list)
    future: list[Article] = field(default_factory=list)
    ghost: Ghost | None = None
    steps: dict[str, str] = field(default_factory=dict)
    _before: Article | None = None  # the step that runs

    def put(self, article: Article, before: Article | None = None) -> None:
        """A new state that can be undone. before: the state to go back to, where `now` has moved on with the work."""
        before = self.now if before is None else before
        if article != before:
            self.past = [*self.past, before][-MOST_UNDO:]
            self.future = []
        self.now = article

    def begin(self, step: str) -> None:
        """A step of the model begins, which moves `now` as it goes."""
        self.steps[step], self._before = "…", self.now

    def done(self, step: str, progress: str = "") -> None:
        """The step is over, and is undone as one."""
        changed = self._settled()
        self.steps[step] = f"✓ {progress}" if changed else "✓"

    def keep_work(self) -> None:
        """The model's work is over or was left: what there is stays, and can be undone."""
        self._settled()
        self.steps = {step: state for step, state in self.steps.items() if state.startswith("✓")}
        if self.ghost:
            self.ghost.done = True

    def _settled(self) -> bool:
        before, self._before = self._before, None
        changed = before is not None and before != self.now
        if changed:
            self.put(self.now, before)
        return changed

    def undo(self) -> None:
        if self.past:
            self.future.append(self.now)
            self.now = self.past.pop()

    def redo(self) -> None:
        if self.future:
            self.past.append(self.now)
            self.now = self.future.pop()

    def keep(self, kept: bool) -> None:
        """Take the waiting edit, or leave it."""
        if self.ghost and kept:
            self.put(self.ghost.article)
        self.ghost = None

    def act(self, do: str, block: str = "", **values: Any) -> None:
        """A change by the visitor's own hand: a name of `ACTIONS`. What comes from a browser is not believed.

        Raises:
            ValueError: an unknown action, no such block, values that do not fit it.
        """
        if do not in ACTIONS:
            raise ValueError(f"unknown action {do!r}; there are {', '.join(ACTIONS)}")
        self.put(ACTIONS[do](self.now, str(block), values))


def _text(values: Mapping[str, Any], name: str = "text") -> str:
    text = values.get(name, "")
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {type(text).__name__}")
    return text.replace("\r", "").strip()


def _picked(article: Article, block: str, values: Mapping[str, Any]) -> Article:
    picture = _text(values, "picture")
    if picture not in article.block(block).candidates:
        raise ValueError("this picture is no candidate of the place")
    return article.changed(block, picture=picture)


def _moved(by: int):
    return lambda article, block, values: article.moved(block, article.index(block) + by)


ACTIONS = {
    "title": lambda article, block, values: article.titled(_text(values)),
    "text": lambda article, block, values: article.changed(block, text=_text(values)),
    "caption": lambda article, block, values: article.changed(block, caption=" ".join(_text(values).split())),
    "up": _moved(-1),
    "down": _moved(1),
    "delete": lambda article, block, values: article.without(block),
    "paragraph": lambda article, block, values: article.with_text("", block)[0],
    "place": lambda article, block, values: article.with_place(block)[0],
    "pick": _picked,
    "remove": lambda article, block, values: article.changed(block, picture=""),
}
