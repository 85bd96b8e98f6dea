"""Training files -> rows: the texts of a conversation with a mark at each picture's place. Opens no picture.

Files: a JSON list, or one JSON object a line, of rows; or a `.txt` list of such files, each with a count in thousands.
Rows, told apart by their keys:

    conversations  [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...], the released format
    messages       [{"role": "user", "content": text, or [{"type": "text" | "image" | "video", ...}]}, ...], as TRL
    query          {"query", "response", "history": [[query, response], ...], "system"}

or pairs of conversations, the better one first, from which a score head learns:

    conversations_a, conversations_b  each as `conversations`, the released format of preference data
    chosen, rejected  each as `messages`, as TRL; or text, the answers to `prompt`. `prompt` goes in front of both

Beside them stand `image` or `images`, `video` or `videos` (a source or a list), which take the `<ImageHere>` marks of
the texts in order (pictures first); a question may also hold `<img>path-or-url</img>`. `hd_num` is the row's own.
"""

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xcomposer.model.prompting_internlm_xcomposer2 import IMAGE_MARK, ROLES, short

MOST_ROWS = 100_000_000  # of a file in a list: more would fill memory before the first is read
FORMATS = ("conversations", "messages", "query")
PAIRS = {"conversations": ("conversations_a", "conversations_b"), "messages": ("chosen", "rejected")}
INLINE = re.compile(rf"<img>(.*?)</img>|{IMAGE_MARK}", re.DOTALL)
ADDRESS = re.compile(r"data:|[A-Za-z][\w+.-]*://")
ROLE_NAMES = {"system": "system", **ROLES}
# Tokens that make up the prompt: in a text they would open turns and pictures that are none.
RESERVED = tuple(f"[UNUSED_TOKEN_{number}]" for number in (139, 140, 145, 146)) + ("<s>", "</s>")


class Row(NamedTuple):
    """A conversation to learn: (role, text) turns, and the pictures and videos of their marks, in order."""

    turns: list[tuple[str, str]]
    media: list[Any]
    hd_num: int | None = None
    name: str = "a row"


class Pair(NamedTuple):
    """Two conversations of which the first is the better one."""

    chosen: Row
    rejected: Row

    @property
    def name(self) -> str:
        return self.chosen.name


class BadRow(NamedTuple):
    """A row that cannot be trained on, and why."""

    name: str
    reason: str


class Media:
    """Hands out a row's pictures and videos in the order in which its texts ask for them."""

    def __init__(self, record: Mapping[str, Any], folders: Iterable[Path]):
        self.folders = list(folders)
        self.images = as_list(record.get("images", record.get("image")))
        self.videos = as_list(record.get("videos", record.get("video")))
        self.taken: list[Any] = []

    def take(self, source: Any) -> None:
        """The next mark stands for `source`."""
        if isinstance(source, Mapping):  # as datasets keep pictures, or an OpenAI image_url
            source = source.get("bytes") or source.get("url") or source.get("path")
        if source is None or source == "":
            raise ValueError("a picture without a path or an address")
        if isinstance(source, str) and not ADDRESS.match(source):
            source = locate(source, self.folders)
        self.taken.append(source)

    def take_given(self, kind: str = "") -> None:
        """The next mark stands for the next one of `images` or `videos` (kind "": of both, pictures first)."""
        lists = {"image": [self.images], "video": [self.videos]}.get(kind, [self.images, self.videos])
        given = next((sources for sources in lists if sources), None)
        if given is None:
            raise ValueError(f"more {kind or IMAGE_MARK} places than {kind or 'picture'}s listed")
        self.take(given.pop(0))

    def rest(self) -> list[Any]:
        """All sources in order. Those no text asked for come last: `place_images` says what to do about them."""
        while self.images or self.videos:
            self.take_given()
        return self.taken


def as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def locate(source: str, folders: Iterable[Path]) -> str:
    """A relative path as the first of `folders` that has it, else as the first. Never raises."""
    paths = [folder / source for folder in folders]
    return str(next((path for path in paths if os.path.exists(path)), paths[0] if paths else Path(source)))


def place_inline(text: str, media: Media) -> str:
    """Text with `<img>source</img>` turned into marks; sources and marks are taken in their order."""

    def mark(found: re.Match) -> str:
        if found[1] is None:
            media.take_given()
        else:
            media.take(found[1].strip())
        return IMAGE_MARK

    placed = INLINE.sub(mark, text)
    if "<img>" in placed:
        raise ValueError("<img> without </img>")
    return placed


def text_of(content: Any, role: str, media: Media) -> str:
    """Text of a turn from a string or from typed items."""
    if isinstance(content, str):
        if role == "assistant":  # an answer may well hold HTML
            for _ in range(content.count(IMAGE_MARK)):
                media.take_given()
            return content
        return place_inline(content, media)
    if not isinstance(content, list):
        raise ValueError(f"a turn of {type(content).__name__}: {str(content)[:40]!r}; write text or typed items")
    text = ""
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text":
            text += item["text"]
            continue
        if kind not in ("image", "image_url", "video", "video_url"):
            raise ValueError(f"a content item of type {short(kind)}; use text, image or video")
        source = next((item[key] for key in (kind, kind[:5], "url", "path") if item.get(key) is not None), None)
        media.take_given(kind[:5]) if source is None else media.take(source)
        text += IMAGE_MARK
    return text


def raw_turns(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(role as written, content) of each turn, in whichever of `FORMATS` the record is."""
    if "conversations" in record:
        if record.get("system"):
            yield "system", record["system"]
        for entry in record["conversations"]:
            yield entry.get("from", entry.get("role")), entry.get("value", entry.get("content"))
    elif "messages" in record:
        for entry in record["messages"]:
            yield entry["role"], entry["content"]
    elif "query" in record:
        if record.get("system"):
            yield "system", record["system"]
        for asked, said in [*(record.get("history") or []), (record["query"], record.get("response", ""))]:
            yield "user", asked
            yield "assistant", said
    else:
        raise ValueError(
            f"unknown format: none of {', '.join(FORMATS)} among its keys {short(sorted(map(str, record)))}"
        )


def row_of(record: Any, name: str = "a row", folders: Iterable[Path] = ()) -> Row:
    """One record of a file -> a row.

    Args:
        name: what messages call it.
        folders: where relative paths of pictures are looked for, in this order.

    Raises:
        ValueError: an unknown format or role, a turn that is no text, marks without pictures, reserved tokens in a
            text, no answer or an empty one.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a row must be an object, got {type(record).__name__}")
    media = Media(record, folders)
    turns = []
    try:
        for role, content in raw_turns(record):
            if role not in ROLE_NAMES:
                raise ValueError(f"unknown role {short(role)}; use one of {sorted(ROLE_NAMES)}")
            turns.append((ROLE_NAMES[role], text_of(content, ROLE_NAMES[role], media)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not as its format has it ({type(error).__name__}: {short(str(error))})") from error
    check_turns(turns)
    hd_num = record.get("hd_num")
    if hd_num is not None and (isinstance(hd_num, bool) or not isinstance(hd_num, int) or hd_num < 1):
        raise ValueError(f"hd_num is {short(hd_num)}, but must be an integer of 1 or more")
    return Row(turns, media.rest(), hd_num, name)


def as_messages(part: Any, role: str) -> list:
    """A prompt or an answer of preference data as messages: text is one of them."""
    return [{"role": role, "content": part}] if isinstance(part, str) else list(part or ())


def pair_of(record: Mapping[str, Any], name: str = "a row", folders: Iterable[Path] = ()) -> Pair | None:
    """One record of preference data -> its pair; None for a record of single conversations.

    Raises:
        ValueError: as `row_of`, or half of a pair; says which conversation is wrong.
    """
    rows = []
    for form, keys in PAIRS.items():
        there = [key for key in keys if key in record]
        if len(there) == 1:
            raise ValueError(f"{there[0]} without {keys[keys[0] == there[0]]}")
        for key in there:
            said = record[key]
            try:
                if form == "messages":
                    said = as_messages(record.get("prompt"), "user") + as_messages(said, "assistant")
                rows.append(row_of({**record, form: said}, name, folders))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{key}: {error}") from error
        if there:
            return Pair(*rows)
    return None


def check_turns(turns: list[tuple[str, str]]) -> None:
    """Raise a ValueError for turns that teach nothing or that the prompt cannot hold."""
    roles = [role for role, _ in turns]
    if "assistant" not in roles:
        raise ValueError("no answer: no turn of the assistant")
    if roles[-1] != "assistant":
        raise ValueError(f"the last turn is the {roles[-1]}'s: nothing answers it")
    if "system" in roles[1:]:
        raise ValueError("a system turn that is not the first")
    for number, (role, text) in enumerate(turns, start=1):
        if role == "assistant" and not text.strip():
            raise ValueError(f"empty answer in turn {number}")
        found = [token for token in RESERVED if token in text]
        if found:
            raise ValueError(f"turn {number} holds {found[0]}, which the prompt itself is made of")


def read_text(path: Path) -> str:
    """A file's text in UTF-8, with or without a byte order mark.

    Raises:
        OSError: no such file, or none that can be read. ValueError: no name of a file, or no UTF-8 text in it.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); save it as such") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no name of a file: {error}") from error


def read_records(path: Path) -> list[Any]:
    """The records of one JSON or JSONL file, by content.

    Raises:
        FileNotFoundError: no such file. ValueError: neither JSON nor JSONL; says where both stop.
    """
    text = read_text(path)
    try:
        records = json.loads(text)
        return records if isinstance(records, list) else [records]
    except RecursionError as error:
        raise ValueError(f"{path}: JSON nested too deeply to read") from error
    except ValueError as whole:  # also a number of more digits than Python reads
        records = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                if line.strip():
                    records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}: unknown format; tried JSON ({whole}), JSON lines (line {number}: {error}) and, for "
                    f"files named .txt, a list of files"
                ) from error
        return records


def listed_files(path: Path) -> Iterator[tuple[Path, int | None]]:
    """Files of a `.txt` list and how many rows to take of each (None: all of them).

    Raises:
        ValueError: a line that is not a file name and a number.
    """
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, _, count = line.rpartition(" ")
        try:
            rows = float(count) * 1000 if name else None
        except ValueError:
            name, rows = line, None
        if rows is not None and not 0.5 < rows <= MOST_ROWS:  # NaN fails too
            raise ValueError(
                f"{path} line {number}: {short(count)} thousand rows; a count in thousands must be above 0 and at most "
                f"{MOST_ROWS // 1000}"
            )
        rows = None if rows is None else round(rows)
        yield Path(locate(name.strip() or line, [path.parent, Path()])), rows


def read_rows(path: str | Path, image_folder: str | Path | None = None, seed: int = 0) -> list[Row | Pair | BadRow]:
    """All rows of a training file, bad ones as `BadRow`, each named by its file and its number from 1.

    A list's file gives the number of rows asked for: a random part of it (by `seed`), or all of it over and over and
    then a random part. Relative paths of pictures are looked for in `image_folder`, beside the file, and here.

    Raises:
        FileNotFoundError: a file that is not there. ValueError: a file of no known format, or without rows.
    """
    path = Path(path)
    if path.suffix == ".txt":
        rows = []
        for index, (file, count) in enumerate(listed_files(path)):
            if file.suffix == ".txt":
                raise ValueError(f"{path} lists {file}, which is a list itself; name its files here")
            whole = read_rows(file, image_folder, seed)
            count = len(whole) if count is None else count
            picked = random.Random(f"{seed} {index}").sample(range(len(whole)), count % len(whole))
            rows += whole * (count // len(whole)) + [whole[i] for i in sorted(picked)]
    else:
        folders = [Path(folder) for folder in (image_folder, path.parent, ".") if folder is not None]
        rows = []
        for number, record in enumerate(read_records(path), start=1):
            name = f"{path.name} row {number}"
            try:
                pair = pair_of(record, name, folders) if isinstance(record, Mapping) else None
                rows.append(pair or row_of(record, name, folders))
            except ValueError as error:
                rows.append(BadRow(name, str(error)))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows
