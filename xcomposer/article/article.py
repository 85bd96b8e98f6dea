"""An illustrated article as a value: blocks by id, steps from article to article, JSON both ways. Pure.

Nothing is changed in place: whoever keeps the articles that were, can go back to any of them. Pictures are named by the
ids that a `Pictures` store gave them; an article holds no picture itself.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

TEXT, PICTURE = "text", "picture"
VERSION = 1  # of the JSON


@dataclass(frozen=True)
class Settings:
    """How the model answers, as in transformers' `generate`; the defaults are the public demo's.

    hd_num: most tiles a picture may have; None: 24 for one picture, 6 each for more.
    max_new_tokens: of an article; the other steps have their own, smaller limits.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int = 40
    repetition_penalty: float = 1.005
    num_beams: int = 1
    max_new_tokens: int = 4096
    hd_num: int | None = None

    def __post_init__(self):
        for name, value, low in (
            ("temperature", self.temperature, 0), ("top_k", self.top_k, 0), ("num_beams", self.num_beams, 1),
            ("repetition_penalty", self.repetition_penalty, 0), ("max_new_tokens", self.max_new_tokens, 1),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
                raise ValueError(f"{name} must be a number of at least {low}, got {value!r}")
        if not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")

    @property
    def generation(self) -> dict[str, Any]:
        """What `generate` takes of it, the limits left out."""
        left_out = ("max_new_tokens", "hd_num")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True)
class Block:
    """A paragraph, or the place of a picture.

    text: of a paragraph.
    picture: id of the picture that stands here; "": none yet.
    caption: of the picture.
    candidates: ids of pictures to choose from, best first once the model has chosen.
    """

    id: str
    kind: str = TEXT
    text: str = ""
    picture: str = ""
    caption: str = ""
    candidates: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in (TEXT, PICTURE):
            raise ValueError(f"block {self.id!r} is of an unknown kind {self.kind!r}; use {TEXT!r} or {PICTURE!r}")


class Paragraph(NamedTuple):
    """What the model reads as `<Seg{i}>`: a block's text, or the title (block "")."""

    block: str
    text: str


@dataclass(frozen=True)
class Article:
    """Title and blocks, and what they came from.

    material: ids of the pictures that were given with the instruction.
    seed: of the sampling of every step; -1: none, each try is another.
    made: ids given so far, so that none comes twice.
    """

    title: str = ""
    blocks: tuple[Block, ...] = ()
    instruction: str = ""
    material: tuple[str, ...] = ()
    seed: int = -1
    settings: Settings = field(default_factory=Settings)
    made: int = 0

    @property
    def paragraphs(self) -> list[Paragraph]:
        """The title, if there is one, and every paragraph, in the model's numbering."""
        title = [Paragraph("", self.title)] if self.title else []
        return title + [Paragraph(block.id, block.text) for block in self.blocks if block.kind == TEXT]

    @property
    def places(self) -> list[Block]:
        """The picture blocks."""
        return [block for block in self.blocks if block.kind == PICTURE]

    @property
    def pictures(self) -> list[str]:
        """Ids of every picture it names: standing, candidate or material; each once."""
        named = [name for block in self.blocks for name in (block.picture, *block.candidates)]
        return list(dict.fromkeys(name for name in (*named, *self.material) if name))

    def index(self, block: str) -> int:
        """Where a block stands.

        Raises:
            ValueError: no block has this id.
        """
        for at, found in enumerate(self.blocks):
            if found.id == block:
                return at
        raise ValueError(f"no block {block!r} in the article; it has {', '.join(b.id for b in self.blocks) or 'none'}")

    def block(self, block: str) -> Block:
        """The block with this id. Raises: as `index`."""
        return self.blocks[self.index(block)]

    def paragraph_before(self, block: str) -> int:
        """Number of the last paragraph before a block (title counted), -1 before the first. Raises: as `index`."""
        before = sum(found.kind == TEXT for found in self.blocks[: self.index(block)])
        return before - 1 + bool(self.title)

    def titled(self, title: str) -> "Article":
        return replace(self, title=" ".join(title.split()))

    def changed(self, block: str, **values: Any) -> "Article":
        """With other values in one block: `text`; or `picture`, `caption`, `candidates`.

        Raises:
            ValueError: no such block, or values that its kind does not have.
        """
        at = self.index(block)
        allowed = ("text",) if self.blocks[at].kind == TEXT else ("picture", "caption", "candidates")
        wrong = [name for name in values if name not in allowed]
        if wrong:
            raise ValueError(f"block {block!r} is a {self.blocks[at].kind} and has no {wrong[0]}; it has {allowed}")
        if "candidates" in values:
            values["candidates"] = tuple(values["candidates"])
        blocks = (*self.blocks[:at], replace(self.blocks[at], **values), *self.blocks[at + 1 :])
        return replace(self, blocks=blocks)

    def inserted(self, at: int, kind: str = TEXT, **values: Any) -> tuple["Article", str]:
        """With a new block at position `at` (0: the first), and its id."""
        name = f"b{self.made + 1}"
        block = Block(name, kind, **values)
        at = max(0, min(at, len(self.blocks)))
        return replace(self, blocks=(*self.blocks[:at], block, *self.blocks[at:]), made=self.made + 1), name

    def with_text(self, text: str, after: str | None = None) -> tuple["Article", str]:
        """With a new paragraph after block `after` ("": first; None: last), and its id. Raises: as `index`."""
        return self.inserted(self._behind(after), text=text)

    def with_place(self, after: str | None = None, **values: Any) -> tuple["Article", str]:
        """With a new place of a picture after block `after` ("": first; None: last), and its id. Raises: as `index`."""
        return self.inserted(self._behind(after), PICTURE, **values)

    def _behind(self, after: str | None) -> int:
        return len(self.blocks) if after is None else self.index(after) + 1 if after else 0

    def without(self, block: str) -> "Article":
        """Without this block. Raises: as `index`."""
        at = self.index(block)
        return replace(self, blocks=(*self.blocks[:at], *self.blocks[at + 1 :]))

    def moved(self, block: str, to: int) -> "Article":
        """With this block at position `to`. Raises: as `index`."""
        found = self.block(block)
        rest = [b for b in self.blocks if b.id != block]
        to = max(0, min(to, len(rest)))
        return replace(self, blocks=(*rest[:to], found, *rest[to:]))

    def to_json(self) -> str:
        """Everything but the pictures themselves; `from_json` reads it."""
        return json.dumps({"version": VERSION, **asdict(self)}, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Article":
        """The article that `to_json` wrote.

        Raises:
            ValueError: no such JSON; says what is wrong with it.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"not the JSON of an article: {error}") from error
        if not isinstance(data, dict) or data.pop("version", None) != VERSION:
            raise ValueError(f"not the JSON of an article: it must be an object with version {VERSION}")
        blocks = [_made(Block, "block", block) for block in _rows(data, "blocks")]
        settings = _made(Settings, "settings", data.get("settings", {}))
        rest = {**data, "blocks": tuple(blocks), "material": tuple(_rows(data, "material")), "settings": settings}
        article = _made(cls, "article", rest)
        ids = [block.id for block in blocks]
        if len(set(ids)) < len(ids):
            raise ValueError(f"not the JSON of an article: a block id comes twice among {', '.join(ids)}")
        numbers = [int(name[1:]) for name in ids if name[:1] == "b" and name[1:].isdecimal()]
        return replace(article, made=max([article.made, *numbers]))


def _rows(data: dict[str, Any], name: str) -> Sequence[Any]:
    rows = data.get(name, [])
    if not isinstance(rows, list):
        raise ValueError(f"not the JSON of an article: {name} must be a list, got {type(rows).__name__}")
    return rows


# What the fields of an article's JSON must be; a list of texts where it says tuple.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("id", "kind", "text", "picture", "caption", "title", "instruction"), str),
    **dict.fromkeys(("seed", "made", "num_beams", "top_k", "max_new_tokens"), int),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), (int, float)),
    "do_sample": bool, "hd_num": (int, type(None)), "candidates": (list, tuple), "material": tuple,
}  # fmt: skip


def _made(kind: type, what: str, values: Any) -> Any:
    """An instance of a dataclass from JSON values, each checked."""
    if not isinstance(values, dict):
        raise ValueError(f"not the JSON of an article: {what} must be an object, got {type(values).__name__}")
    known = {f.name for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"not the JSON of an article: {what} has an unknown field {name!r}")
        if name in _KINDS and (not isinstance(value, _KINDS[name]) or (_KINDS[name] is int and value is True)):
            raise ValueError(f"not the JSON of an article: {what}.{name} cannot be {value!r}")
        if isinstance(value, list | tuple) and name in ("candidates", "material"):
            if not all(isinstance(entry, str) for entry in value):
                raise ValueError(f"not the JSON of an article: {what}.{name} must be a list of texts")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if kind is Block and not values.get("id"):
        raise ValueError("not the JSON of an article: a block has no id")
    return kind(**values)


SENTENCE_ENDS = ".!?。！？…:：;；"


def is_title(line: str, following: Iterable[str]) -> bool:
    """Whether the first line of an article is its title: short, no sentence, and more comes after it."""
    return any(following) and len(line) <= 80 and not line.endswith(tuple(SENTENCE_ENDS))
