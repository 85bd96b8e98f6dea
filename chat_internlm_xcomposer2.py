"""The public methods: thin steps over `generate`, see `ConversationMixin` for the steps."""

import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import Any

import torch
from transformers.generation import BaseStreamer, StoppingCriteriaList
from transformers.utils import logging

from .build_mlp import device_of
from .conversation_internlm_xcomposer2 import ConversationMixin, as_list
from .prompting_internlm_xcomposer2 import (
    WRITE_SYSTEM,
    chat_prompt,
    check_history,
    cut_answer,
    short,
    with_turn,
)
from .settings_internlm_xcomposer2 import with_settings
from .webpage_internlm_xcomposer2 import (
    PUBLIC_FILE,
    RESUME_QUERY,
    SCREENSHOT_QUERY,
    add_scripts,
    page_path,
    read_resume,
    real_pictures,
    script_query,
    write_page,
)

logger = logging.get_logger(__name__)

# Settings of which only 1 streams, and why.
CANNOT_STREAM = {
    "num_beams": "beams may change what is written already",
    "num_return_sequences": "the stream is one answer; ask again for another",
    "streamer": "it is the stream itself; `chat` takes a streamer",
}
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class TokenQueue(BaseStreamer):
    """A streamer that passes generated ids from the generating thread to the reading one, one list a step."""

    def __init__(self):
        self.ids: SimpleQueue[list[int] | None] = SimpleQueue()
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_is_next:
            self.ids.put(value.flatten().tolist())
        self._prompt_is_next = False

    def end(self) -> None:
        self.ids.put(None)


def settled(ids: Sequence[int], tokenizer) -> int:
    """How many of the ids decode to the same text whatever follows: all but a run of byte pieces at the end.

    Characters outside the vocabulary are spelled in bytes, and only a whole run of them makes text.
    """
    end = len(ids)
    while end and _BYTE_PIECE.fullmatch(tokenizer.convert_ids_to_tokens(ids[end - 1]) or ""):
        end -= 1
    return end


# Seconds that leaving a stream waits for its step under way, at most; the step then ends by itself.
LEAVING_S = 10.0

# Defaults of the release's methods, each list written once; see `with_settings`.
CHAT_SETTINGS: dict[str, Any] = {
    "max_new_tokens": 1024,
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 0.8,
    "repetition_penalty": 1.005,
}
ARTICLE_SETTINGS: dict[str, Any] = {
    "max_new_tokens": None,
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 0.8,
    "top_k": 40,
    "repetition_penalty": 1.005,
    "max_length": 8192,
    "seed": -1,
}
PAGE_SETTINGS: dict[str, Any] = {
    "max_new_tokens": 4800,
    "do_sample": True,
    "num_beams": 2,
    "temperature": 1.0,
    "repetition_penalty": 3.0,
    "seed": -1,
    "use_meta": False,
}
# What the webpage methods take besides and hand to `chat`.
THROUGH_PAGES = ("tokenizer", "hd_num", "history", "streamer", "meta_instruction", "escape_control_tokens")


class ChatMixin(ConversationMixin):
    """`chat`, `write_artical` and the webpage methods of the release, and `stream_chat` and `batch_chat`.

    Each may be called from several threads, and gives what it would give alone. Sources are read and prompts laid out
    side by side. What computes or changes weights takes turns, one whole answer at a time: these methods, `generate`,
    loading, merging and saving task adapters. So a streamer must not wait for another call of the same model. `forward`
    by itself does not wait. An iterator of `stream_chat` that nobody reads on has its turn to the end of its answer.

    Settings that all of them take:

        those of transformers' `generate`, or a `generation_config` with them: what is said by name goes before it, and
            it before the method's own defaults
        seed: of the sampling; -1: none
        stop_token_ids: ids that end an answer besides the model's own
        bos_once: one BOS in front of the prompt, also where the chat of a kind has more
        num_frm, start, end, fps: of videos, see `load_video`
        escape_control_tokens: text stays text: a `[UNUSED_TOKEN_145]` or `</s>` that somebody typed opens and ends
            nothing. For text from strangers; off unless asked for, as in the release
    """

    @with_settings(CHAT_SETTINGS, after="streamer")
    @torch.no_grad()
    def chat(
        self,
        tokenizer=None,
        query: str = "",
        image: Any = None,
        hd_num: int | None = None,
        history: Iterable[tuple[str, str]] = (),
        streamer=None,
        infer_mode: str = "base",
        use_meta: bool = False,
        meta_instruction: str | None = None,
        escape_control_tokens: bool = False,
        answer_start: str = "",
        **settings,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer `query`, about pictures and videos if there are any.

        Args:
            tokenizer: the checkpoint's tokenizer; None takes `model.tokenizer`.
            query: text; `<ImageHere>` marks each picture's place (one picture may go unmarked).
            image: pictures and videos of the whole conversation, history first: one, or a list. Each is a path, a URL,
                bytes, a PIL image, an array, a pixel tensor, or a list of frames; see `load_media`.
            hd_num: most tiles a picture may have; None: 24 for one picture, 6 each for more.
            history: (query, answer) of the turns so far, as the last call returned it.
            infer_mode: task adapters that are on during this call: "base", "web", "write", or an adapter's name.
            use_meta: put `meta_instruction` (None: the released text) in front as the system turn. The older kinds
                always have one, and `meta_instruction=""` drops it.
            answer_start: text that the answer begins with; the model goes on from it, and what it adds is returned.
            settings: see the class.

        Returns:
            The answer, and history with this turn at its end.

        Raises:
            ValueError: slots and pictures differ in number, a prompt longer than the model's, a history of another
                shape, an unknown adapter, a setting out of its range, a picture that cannot be read. All before any
                compute.
        """
        self.config.adapters_of(infer_mode)
        tokenizer, history = self._tokenizer(tokenizer), check_history(history)
        text = chat_prompt(query, history, self._system(use_meta, meta_instruction), escape_control_tokens)
        text += answer_start
        conversation = self._open(tokenizer, text, image, hd_num, **settings)
        answer = self._answer(tokenizer, conversation, infer_mode, streamer=streamer, **settings)
        return answer, with_turn(history, query, answer)

    @with_settings(CHAT_SETTINGS, after="meta_instruction")
    def stream_chat(
        self,
        tokenizer=None,
        query: str = "",
        image: Any = None,
        hd_num: int | None = None,
        history: Iterable[tuple[str, str]] = (),
        infer_mode: str = "base",
        use_meta: bool = False,
        meta_instruction: str | None = None,
        escape_control_tokens: bool = False,
        answer_start: str = "",
        **settings,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """As `chat`, but yields (answer so far, history with it) as the answer grows, last what `chat` returns.

        Characters appear whole. The conversation is opened and checked in this call, before the first step; a thread
        then generates, whether or not the answer is read. Leaving the iterator early stops it; what it raises is
        raised here.
        """
        for name, why in CANNOT_STREAM.items():
            if settings.get(name, 1) != 1:
                raise ValueError(f"{name}={short(settings[name])} cannot stream: {why}")
        self.config.adapters_of(infer_mode)
        tokenizer, history = self._tokenizer(tokenizer), check_history(history)
        text = chat_prompt(query, history, self._system(use_meta, meta_instruction), escape_control_tokens)
        text += answer_start
        conversation = self._open(tokenizer, text, image, hd_num, **settings)

        def stream() -> Iterator[tuple[str, list[tuple[str, str]]]]:
            queue, left, failure = TokenQueue(), threading.Event(), []
            stop = StoppingCriteriaList(settings.pop("stopping_criteria", None) or [])
            stop.append(lambda ids, scores, **_: torch.full((len(ids),), left.is_set(), device=ids.device))
            device_type = device_of(self).type
            autocast = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)

            def generate() -> None:
                try:  # a thread starts with PyTorch's own modes, not with the caller's
                    with self.compute_lock.unless(left) as turn, torch.autocast(device_type, *autocast):
                        if turn:
                            self._answer(
                                tokenizer, conversation, infer_mode, streamer=queue, stopping_criteria=stop, **settings
                            )
                except BaseException as error:  # noqa: B036 - raised again in the reading thread
                    failure.append(error)
                finally:
                    queue.end()

            thread = threading.Thread(target=generate, name="stream_chat", daemon=True)
            thread.start()
            try:
                ids: list[int] = []
                while (step := queue.ids.get()) is not None:
                    ids += step
                    text = cut_answer(tokenizer.decode(ids[: settled(ids, tokenizer)], skip_special_tokens=True))
                    yield text, with_turn(history, query, text)
                thread.join()
                if failure:
                    raise failure.pop()  # kept here, it would hold its frames, and they hold it
                text = cut_answer(tokenizer.decode(ids, skip_special_tokens=True))
                yield text, with_turn(history, query, text)
            finally:
                left.set()
                if thread is not threading.current_thread():  # a forgotten iterator is closed by whoever finds it
                    thread.join(LEAVING_S)

        return stream()

    @with_settings(CHAT_SETTINGS, after="meta_instruction")
    @torch.no_grad()
    def batch_chat(
        self,
        tokenizer=None,
        queries: Sequence[str] = (),
        images: Sequence[Any] | None = None,
        histories: Sequence[Iterable[tuple[str, str]]] | None = None,
        hd_num: int | None = None,
        infer_mode: str = "base",
        use_meta: bool = False,
        meta_instruction: str | None = None,
        escape_control_tokens: bool = False,
        answer_start: str = "",
        **settings,
    ) -> tuple[list[str], list[list[tuple[str, str]]]]:
        """Answer several conversations at once.

        Args:
            queries: one query a conversation.
            images: for each conversation what `chat` takes as `image`; None: no pictures at all.
            histories: for each conversation its history; None: all begin here.
            Others: see `chat`.

        Returns:
            The answers, and the histories with this turn at their ends.

        Raises:
            ValueError: lists of different lengths, or what `chat` raises, with the row that is wrong.
        """
        queries = [queries] if isinstance(queries, str) else list(queries)
        given = {"queries": queries, "images": images, "histories": histories}
        rows = {name: [None] * len(queries) if row is None else list(row) for name, row in given.items()}
        if not queries or len({len(row) for row in rows.values()}) > 1:
            lengths = ", ".join(f"{len(row)} {name}" for name, row in rows.items())
            raise ValueError(f"batch_chat needs one entry a conversation in each list, got {lengths}")
        self.config.adapters_of(infer_mode)
        tokenizer = self._tokenizer(tokenizer)
        system = self._system(use_meta, meta_instruction)
        conversations, histories = [], []
        for index, (query, image, history) in enumerate(zip(*rows.values(), strict=True)):
            try:
                histories.append(check_history(history))
                text = chat_prompt(query, histories[-1], system, escape_control_tokens) + answer_start
                conversations.append(self._open(tokenizer, text, image, hd_num, **settings))
            except (ValueError, FileNotFoundError, TypeError) as error:
                raise type(error)(f"conversation {index}: {error}") from error
        answers = self._answer_batch(tokenizer, conversations, infer_mode, **settings)
        turns = zip(histories, queries, answers, strict=True)
        return answers, [with_turn(history, query, answer) for history, query, answer in turns]

    @with_settings(ARTICLE_SETTINGS, after="streamer")
    @torch.no_grad()
    def write_artical(
        self,
        inst: str,
        image: Any = None,
        hd_num: int | None = None,
        history: Iterable[tuple[str, str]] = (),
        streamer=None,
        use_meta: bool = False,
        meta_instruction: str | None = None,
        tokenizer=None,
        escape_control_tokens: bool = False,
        **settings,
    ) -> str:
        """Write an article by the instruction `inst`, with the write adapter on. (The spelling is the public one.)

        Args:
            settings: see the class; `max_length` is the most tokens of prompt and article together, `max_new_tokens`
                of the article alone (None: what `max_length` leaves).
            Others: see `chat`.
        """
        self.config.adapters_of("write")
        tokenizer = self._tokenizer(tokenizer)
        system = self._system(use_meta, meta_instruction, WRITE_SYSTEM, always=False)
        text = chat_prompt(inst, history, system, escape_control_tokens)
        conversation = self._open(tokenizer, text, image, hd_num, **settings)
        return self._answer(tokenizer, conversation, "write", streamer=streamer, **settings)

    @with_settings(PAGE_SETTINGS, after="image", through=THROUGH_PAGES)
    def write_webpage(
        self,
        inst: str,
        image: Any = None,
        task: str = "Instruction-aware Webpage Generation",
        output_path: str | os.PathLike | None = PUBLIC_FILE,
        **settings,
    ) -> str:
        """Write a webpage by the instruction `inst`, with the web adapter on; returns its HTML.

        Args:
            task: names the file, `<task with spaces as _>.html` in the working directory.
            output_path: another file for the page; None writes none.
            settings: see the class; `tokenizer`, `hd_num`, `history`, `streamer`, `meta_instruction`,
                `escape_control_tokens` as in `chat`.
        """
        path = page_path(task, output_path)
        return write_page(real_pictures(self._page(inst, image, settings)), path)

    @with_settings({**PAGE_SETTINGS, "num_beams": 1}, after="image", through=THROUGH_PAGES)
    def stream_webpage(self, inst: str, image: Any = None, **settings) -> Iterator[str]:
        """As `write_webpage` with one beam, but yields the HTML as it grows, last the whole page; writes no file.

        Leaving the iterator early stops the generation.

        Raises:
            ValueError: as `stream_chat`.
        """
        pages = self.stream_chat(query=inst, image=image, infer_mode="web", **settings)

        def stream() -> Iterator[str]:
            with closing(pages):
                for html, _ in pages:
                    yield real_pictures(html)

        return stream()

    @with_settings(PAGE_SETTINGS, after="image", through=THROUGH_PAGES)
    def resume_2_webpage(
        self,
        inst: str | os.PathLike,
        image: Any = None,
        task: str = "Resume-to-Personal Page",
        output_path: str | os.PathLike | None = PUBLIC_FILE,
        **settings,
    ) -> str:
        """Make a personal page of the resume in the Markdown file `inst`; a second pass adds its JavaScript.

        Args:
            Others: see `write_webpage`.

        Raises:
            FileNotFoundError: no such resume. ValueError: it is empty or no UTF-8 text.
        """
        path = page_path(task, output_path)
        text = read_resume(inst)
        settings["history"] = check_history(settings.get("history"))  # an iterator would be read up by the first pass
        html = self._page(RESUME_QUERY + text, image, settings)
        try:
            html = add_scripts(html, self._page(script_query(html, len(as_list(image))), image, settings))
        except ValueError as error:  # the page does not fit beside what was asked: it is worth having by itself
            logger.warning("The second pass could not run (%s): the page stays as the first pass wrote it.", error)
        return write_page(real_pictures(html), path)

    @with_settings(PAGE_SETTINGS, after="image", through=THROUGH_PAGES)
    def screen_2_webpage(
        self,
        inst: str = "",
        image: Any = None,
        task: str = "Screenshot-to-Webpage",
        output_path: str | os.PathLike | None = PUBLIC_FILE,
        **settings,
    ) -> str:
        """Write the HTML of the webpage that the picture `image` shows.

        Args:
            inst: the instruction; empty takes the one the model was trained with.
            Others: see `write_webpage`.

        Raises:
            ValueError: no picture.
        """
        if not as_list(image):
            raise ValueError("screen_2_webpage needs the picture of a webpage: pass image=[path]")
        path = page_path(task, output_path)
        return write_page(real_pictures(self._page(inst or SCREENSHOT_QUERY, image, settings)), path)

    def _page(self, query: str, image: Any, settings: dict) -> str:
        """One pass with the web adapter."""
        return self.chat(query=query, image=image, infer_mode="web", **settings)[0]
