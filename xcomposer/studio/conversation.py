"""Conversations of the chat tab as values: turns, what the model reads of them, files both ways. Knows no model."""

import base64
import binascii
import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xcomposer.model.prompting_internlm_xcomposer2 import IMAGE_MARK as MARK
from xcomposer.studio.media import Media

VERSION = 1  # of the JSON
TITLE = 32  # characters
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)


@dataclass
class Turn:
    """A question with its pictures, and the answer so far."""

    question: str
    media: list[Media] = field(default_factory=list)
    answer: str = ""


@dataclass
class Conversation:
    """Turns in order; the last one may be under way.

    number: tells conversations of a visitor apart.
    """

    number: int = 1
    turns: list[Turn] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its first question, cut; "" for none yet."""
        text = " ".join(self.turns[0].question.replace(MARK, " ").split()) if self.turns else ""
        return text if len(text) <= TITLE else f"{text[: TITLE - 1].rstrip()}…"

    @property
    def media(self) -> list[Media]:
        return [one for turn in self.turns for one in turn.media]


def marked(text: str, count: int) -> str:
    """A question with a mark for each of its pictures: at the marks it has, if there is one for each, else in front."""
    return text if text.count(MARK) == count else MARK * count + text.replace(MARK, "")


def asked(turns: Sequence[Turn]) -> tuple[str, list[tuple[str, str]], list[Any]]:
    """(query, history, pictures) of the last turn, as `chat` takes them."""
    queries = [marked(turn.question, len(turn.media)) for turn in turns]
    pictures = [one.opened for turn in turns for one in turn.media]
    if len(pictures) == 1:
        queries[0] = queries[0].removeprefix(MARK)  # a single picture goes unmarked, as the model was trained
    answers = [turn.answer.replace(MARK, "") for turn in turns]
    return queries[-1], list(zip(queries[:-1], answers, strict=False)), pictures


def as_typed(text: str) -> str:
    """Markdown in which every tag is shown and none is obeyed; code keeps its own characters, as Markdown has it."""
    parts, at = [], 0
    for code in CODE.finditer(text):
        parts += [_literal(text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, _literal(text[at:])])


def _literal(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def to_markdown(conversation: Conversation) -> str:
    """Questions and answers to read; pictures by name."""
    lines = [f"# {conversation.title or 'Conversation'}"]
    for turn in conversation.turns:
        names = " ".join(f"[{one.name}]" for one in turn.media)
        question = f"{names} {turn.question}".strip()
        lines += ["\n".join(f"> {line}" for line in question.splitlines() or [""]), turn.answer]
    return "\n\n".join(lines) + "\n"


def to_json(conversation: Conversation) -> str:
    """Everything, pictures included; `from_json` reads it."""
    turns = [
        {
            "question": turn.question,
            "media": [
                {"name": one.name, "data": base64.b64encode(one.path.read_bytes()).decode()} for one in turn.media
            ],
            "answer": turn.answer,
        }
        for turn in conversation.turns
    ]
    return json.dumps({"version": VERSION, "turns": turns}, ensure_ascii=False, indent=1)


def from_json(text: str, folder: Path, read: Callable[[Path, Path], Media]) -> Conversation:
    """The conversation that `to_json` wrote; its pictures are read as uploads are.

    Raises:
        ValueError: no such JSON, or a picture in it that cannot be read.
    """
    wrong = "this file is no conversation that the studio saved"
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{wrong}: {error}") from error
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("turns"), list):
        raise ValueError(f"{wrong}: it must be an object with version {VERSION} and turns")
    turns = []
    try:
        for row in data["turns"]:
            question, answer = row["question"], row["answer"]
            if not isinstance(question, str) or not isinstance(answer, str):
                raise TypeError("question and answer must be text")
            media = [_restored(one["name"], one["data"], folder, read) for one in row["media"]]
            turns.append(Turn(question, media, answer))
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"{wrong}: {error!r}") from error
    return Conversation(turns=turns)


def _restored(name: Any, data: Any, folder: Path, read: Callable[[Path, Path], Media]) -> Media:
    if not isinstance(name, str) or not isinstance(data, str):
        raise TypeError("a picture needs a name and its data")
    unpacked = folder / f"in-{secrets.token_hex(4)}"
    unpacked.mkdir()
    source = unpacked / (Path(name.replace("\\", "/")).name[-80:] or "picture")
    try:
        source.write_bytes(base64.b64decode(data, validate=True))
        return read(source, folder)
    finally:
        source.unlink(missing_ok=True)
        unpacked.rmdir()
