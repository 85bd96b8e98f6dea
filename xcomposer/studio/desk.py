"""What the studio asks of a model: chat turns, pages, and how long a prompt is. Knows no gradio.

A desk stands over anything with the model's `stream_chat`, `stream_webpage` and `write_webpage`: the model itself, or
an `Endpoint`.
"""

import json
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xcomposer.article import Settings
from xcomposer.model.ixc_utils import default_hd_num
from xcomposer.model.prompting_internlm_xcomposer2 import (
    CHAT_SYSTEM,
    chat_prompt,
    place_images,
    tokenize_prompt,
    tokenize_with,
)
from xcomposer.model.threads_internlm_xcomposer2 import seeded
from xcomposer.model.webpage_internlm_xcomposer2 import (
    RESUME_QUERY,
    SCREENSHOT_QUERY,
    SCRIPT_QUERY,
    add_scripts,
    real_pictures,
)
from xcomposer.studio.conversation import Turn, asked
from xcomposer.studio.frame import code_of
from xcomposer.studio.line import Line
from xcomposer.studio.media import Media, tokens_of

KINDS = ("instruction", "resume", "screenshot")
GUARD = {"escape_control_tokens": True}  # visitors' text stays text


@dataclass(frozen=True)
class Choices:
    """The settings drawer. None: what each task's method has as its default.

    exact: always the likeliest token. seed: of the sampling; -1: none. hd_num: most tiles of a picture.
    """

    exact: bool = False
    seed: int = -1
    beams: int = 1
    temperature: float | None = None
    top_p: float | None = None
    penalty: float | None = None
    hd_num: int | None = None
    length: int | None = None

    def settings(self, **defaults: Any) -> dict[str, Any]:
        """Arguments of `chat` and its like: `defaults`, and over them what was chosen."""
        chosen = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "repetition_penalty": self.penalty,
            "hd_num": self.hd_num,
            "max_new_tokens": self.length,
            "num_beams": self.beams if self.beams > 1 else None,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return {"do_sample": not self.exact, "seed": int(self.seed), **defaults, **chosen}

    def of_article(self) -> Settings:
        """The settings of an article's steps."""
        given = self.settings()
        del given["seed"]
        return Settings(**given)


@dataclass
class About:
    """What a model folder says of itself in `studio.json`: what it knows, and examples for each tab."""

    name: str
    knows: dict[str, str] = field(default_factory=dict)
    chat: list[dict] = field(default_factory=list)
    page: list[str] = field(default_factory=list)
    resume: str = ""
    screenshot: str = ""
    article: list[dict] = field(default_factory=list)

    @classmethod
    def of_folder(cls, folder: Path) -> "About":
        """Raises: ValueError: a `studio.json` that cannot be read."""
        file = folder / "studio.json"
        if not file.is_file():
            return cls(folder.resolve().name)
        try:
            about = cls(folder.resolve().name, **json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        for example in (*about.chat, *about.article):
            example["files"] = [str(folder / name) for name in example.get("files", ())]
        for name in ("resume", "screenshot"):
            if getattr(about, name):
                setattr(about, name, str(folder / getattr(about, name)))
        return about


class Stopped(Exception):
    """Ends a generation whose reader has left."""


class Desk:
    """One model for everybody, who come to it by `line`.

    Args:
        model: see above; None: it comes later, by `open`, and who needs it waits.
        max_new_tokens: of a chat answer where nothing is chosen.
    """

    def __init__(self, model: Any, about: About, max_new_tokens: int = 1024):
        self.about, self.max_new_tokens = about, max_new_tokens
        self.line = Line()
        self._model, self._loaded = None, threading.Event()
        if model is not None:
            self.open(model)

    def open(self, model: Any) -> None:
        """The model is loaded."""
        self._model = model
        self._loaded.set()
        self.line.open()

    def close(self) -> None:
        """No model will come: who waits for it learns so."""
        self._loaded.set()

    @property
    def model(self) -> Any:
        """The model, once it is loaded. Raises: ValueError: it could not be."""
        self._loaded.wait()
        if self._model is None:
            raise ValueError("the model could not be loaded")
        return self._model

    def answer(self, turns: Sequence[Turn], choices: Choices) -> Iterator[str]:
        """The answer to the last turn as it grows; in one piece with beams.

        Raises: ValueError: as `stream_chat`.
        """
        query, history, pictures = asked(turns)
        settings = choices.settings(max_new_tokens=self.max_new_tokens)
        given = dict(query=query, image=pictures, history=history, use_meta=True, **GUARD, **settings)
        if self._beams(choices):
            del given["seed"]
            yield from self._whole(lambda **more: self._seeded_chat(choices.seed, **given, **more))
            return
        for text, _ in self.model.stream_chat(**given):
            yield text

    def _seeded_chat(self, seed: int, **given: Any) -> str:
        with seeded(seed):
            return self.model.chat(**given)[0]

    def page(
        self,
        kind: str,
        text: str,
        screenshot: Media | None,
        history: Sequence[tuple[str, str]],
        choices: Choices,
    ) -> Iterator[str]:
        """A page's HTML as it grows: by instruction, from a resume's text, or from a screenshot.

        history: (what was asked, page) where this is a change to a page. A resume takes a second pass, for its script.

        Raises: ValueError: nothing to go by, at once; and as `stream_webpage`.
        """
        wanted = {
            "instruction": (text, "say what the page should be"),
            "resume": (text, "give a resume: drop a Markdown file or write one"),
            "screenshot": (screenshot, "give a screenshot: drop a picture of a page"),
        }
        given, remedy = wanted[kind]
        if not given or (isinstance(given, str) and not given.strip()):
            raise ValueError(remedy)
        return self._pages(kind, text, screenshot, history, choices)

    def _pages(
        self, kind: str, text: str, screenshot: Media | None, history: Sequence[tuple[str, str]], choices: Choices
    ) -> Iterator[str]:
        query = {
            "instruction": text,
            "resume": RESUME_QUERY + text,
            "screenshot": text.strip() or SCREENSHOT_QUERY,
        }[kind]
        pictures = [screenshot.opened] if kind == "screenshot" else []
        code = ""
        for answer in self._page(query, pictures, history, choices):
            code = code_of(answer)
            yield code
        if kind == "resume" and not history:
            script = ""
            for answer in self._page(SCRIPT_QUERY + code, [], (), choices):
                script = answer
                yield code  # so that it can be stopped while the script is written
            yield real_pictures(add_scripts(code, script))

    def _page(self, query: str, pictures: list, history: Sequence, choices: Choices) -> Iterator[str]:
        given = dict(inst=query, image=pictures, history=list(history), **GUARD, **choices.settings())
        if self._beams(choices):
            yield from self._whole(lambda **more: self.model.write_webpage(output_path=None, **given, **more))
        else:
            yield from self.model.stream_webpage(**given)

    def _beams(self, choices: Choices) -> bool:
        """Whether several beams are asked for, which cannot stream. Raises: ValueError: a server has one."""
        if choices.beams > 1 and not hasattr(self.model, "write_webpage"):
            raise ValueError(f"{choices.beams} beams, but a server answers with one: set beams to 1")
        return choices.beams > 1

    @staticmethod
    def _whole(call: Any) -> Iterator[str]:
        """The answer of a call that cannot stream: "" again and again while it lasts, so that it can be stopped."""
        left, done = threading.Event(), queue.SimpleQueue()

        def watch(input_ids: Any, scores: Any, **_: Any) -> Any:
            if left.is_set():
                raise Stopped
            done.put(None)
            return input_ids.new_zeros(len(input_ids), dtype=bool)

        def work() -> None:
            try:
                done.put((call(stopping_criteria=[watch]), None))
            except BaseException as error:  # noqa: B036 - raised again in the reading thread
                done.put(("", error))

        thread = threading.Thread(target=work, name="studio", daemon=True)
        thread.start()
        try:
            while (said := done.get()) is None:
                yield ""
            answer, error = said
            if error is not None:
                raise error
            yield answer
        finally:
            left.set()

    def count(self, turns: Sequence[Turn], choices: Choices) -> tuple[list[tuple[int, int]], int, int]:
        """((tiles, tokens) of each picture of the last turn, tokens of the whole prompt, the model's limit).

        The whole and the limit are 0 where the model runs elsewhere.
        """
        query, history, pictures = asked(turns)
        config = getattr(self.model, "config", None)
        tile, side = (config.tile, config.tokens_per_side) if config else (560, 20)
        hd_num = choices.hd_num or default_hd_num(len(pictures))
        sizes = [tokens_of(one, hd_num, tile, side) for turn in turns for one in turn.media]
        new = sizes[len(sizes) - len(turns[-1].media) :]
        if config is None:
            return new, 0, 0
        pieces = place_images(chat_prompt(query, history, CHAT_SYSTEM, True), len(pictures))
        ids = [config.image_token_id] * len(pictures)
        tokenize = tokenize_with(self.model.tokenizer)
        prompt = tokenize_prompt(pieces, [tokens for _, tokens in sizes], ids, tokenize)
        return new, len(prompt.input_ids), config.context_length
