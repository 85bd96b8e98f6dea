"""The public methods: thin steps over `generate`, see `ConversationMixin` for the steps."""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from transformers.generation import BaseStreamer, StoppingCriteriaList

from .conversation_internlm_xcomposer2 import ConversationMixin, as_list, place_of
from .prompting_internlm_xcomposer2 import WRITE_SYSTEM, chat_prompt, check_history, cut_answer, with_turn
from .threads_internlm_xcomposer2 import seeded
from .webpage_internlm_xcomposer2 import (
    PUBLIC_FILE,
    RESUME_QUERY,
    SCREENSHOT_QUERY,
    SCRIPT_QUERY,
    add_scripts,
    page_path,
    read_resume,
    real_pictures,
    write_page,
)

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

# Defaults of `stream_chat` and `batch_chat`: those of `chat`.
CHAT_SETTINGS: dict[str, Any] = {
    "max_new_tokens": 1024,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 0.8,
    "repetition_penalty": 1.005,
}


class ChatMixin(ConversationMixin):
    """`chat`, `write_artical` and the webpage methods of the release, and `stream_chat` and `batch_chat`.

    Each may be called from several threads, and gives what it would give alone. Sources are read and prompts laid out
    side by side. What computes or changes weights takes turns, one whole answer at a time: these methods, `generate`,
    loading, merging and saving task adapters. So a streamer must not wait for another call of the same model. `forward`
    by itself does not wait. An iterator of `stream_chat` that nobody reads on has its turn to the end of its answer.
    """

    @torch.no_grad()
    def chat(
        self,
        tokenizer=None,
        query: str = "",
        image: Any = None,
        hd_num: int | None = None,
        history: Sequence[tuple[str, str]] = (),
        streamer=None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        infer_mode: str = "base",
        use_meta: bool = False,
        meta_instruction: str | None = None,
        **kwargs,
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
            streamer, kwargs and the rest: as in transformers' `generate`.

        Returns:
            The answer, and history with this turn at its end.

        Raises:
            ValueError: slots and pictures differ in number, a prompt longer than the model's, a history of another
                shape, an unknown adapter, a picture that cannot be read. All before any compute.
        """
        check_history(history)
        history = list(history or ())
        tokenizer = self._tokenizer(tokenizer)
        self.config.adapters_of(infer_mode)
        system = self._system(use_meta, meta_instruction)
        conversation = self._open(tokenizer, chat_prompt(query, history, system), image, hd_num)
        answer = self._answer(
            tokenizer,
            conversation,
            infer_mode,
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            **kwargs,
        )
        return answer, with_turn(history, query, answer)

    def stream_chat(
        self,
        tokenizer=None,
        query: str = "",
        image: Any = None,
        hd_num: int | None = None,
        history: Sequence[tuple[str, str]] = (),
        infer_mode: str = "base",
        use_meta: bool = False,
        meta_instruction: str | None = None,
        **kwargs,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """As `chat`, but yields (answer so far, history with it) as the answer grows, last what `chat` returns.

        Characters appear whole. The conversation is opened and checked in this call, before the first step; a thread
        then generates, whether or not the answer is read. Leaving the iterator early stops it; what it raises is
        raised here.
        """
        check_history(history)
        history = list(history or ())
        tokenizer = self._tokenizer(tokenizer)
        self.config.adapters_of(infer_mode)
        if kwargs.get("num_beams", 1) != 1:
            raise ValueError(f"num_beams={kwargs['num_beams']} cannot stream: beams may change what is written already")
        system = self._system(use_meta, meta_instruction)
        conversation = self._open(tokenizer, chat_prompt(query, history, system), image, hd_num)
        settings = {**CHAT_SETTINGS, **kwargs}

        def stream() -> Iterator[tuple[str, list[tuple[str, str]]]]:
            queue, left, failure = TokenQueue(), threading.Event(), []
            stop = StoppingCriteriaList(settings.pop("stopping_criteria", None) or [])
            stop.append(lambda ids, scores, **_: torch.full((len(ids),), left.is_set(), device=ids.device))
            device_type = place_of(self).type
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

    @torch.no_grad()
    def batch_chat(
        self,
        tokenizer=None,
        queries: Sequence[str] = (),
        images: Sequence[Any] | None = None,
        histories: Sequence[Sequence[tuple[str, str]]] | None = None,
        hd_num: int | None = None,
        infer_mode: str = "base",
        use_meta: bool = False,
        meta_instruction: str | None = None,
        **kwargs,
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
        rows = {"queries": queries, "images": images, "histories": histories}
        rows = {name: [None] * len(queries) if given is None else list(given) for name, given in rows.items()}
        if not queries or len({len(given) for given in rows.values()}) > 1:
            lengths = ", ".join(f"{len(given)} {name}" for name, given in rows.items())
            raise ValueError(f"batch_chat needs one entry a conversation in each list, got {lengths}")
        tokenizer = self._tokenizer(tokenizer)
        self.config.adapters_of(infer_mode)
        system = self._system(use_meta, meta_instruction)
        conversations = []
        for index, (query, image, history) in enumerate(zip(*rows.values(), strict=True)):
            try:
                text = chat_prompt(query, history or (), system)
                conversations.append(self._open(tokenizer, text, image, hd_num))
            except (ValueError, FileNotFoundError, TypeError) as error:
                raise type(error)(f"conversation {index}: {error}") from error
        answers = self._answer_batch(tokenizer, conversations, infer_mode, **{**CHAT_SETTINGS, **kwargs})
        turns = zip(rows["histories"], queries, answers, strict=True)
        return answers, [with_turn(history or (), query, answer) for history, query, answer in turns]

    @torch.no_grad()
    def write_artical(
        self,
        inst: str,
        image: Any = None,
        hd_num: int | None = None,
        history: Sequence[tuple[str, str]] = (),
        streamer=None,
        max_new_tokens: int | None = None,
        do_sample: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.8,
        top_k: int = 40,
        repetition_penalty: float = 1.005,
        max_length: int = 8192,
        seed: int = -1,
        use_meta: bool = False,
        meta_instruction: str | None = None,
        tokenizer=None,
        **kwargs,
    ) -> str:
        """Write an article by the instruction `inst`, with the write adapter on. (The spelling is the public one.)

        Args:
            max_length: most tokens of prompt and article together.
            max_new_tokens: most tokens of the article; None: what `max_length` leaves.
            seed: of the sampling; -1: none.
            Others: see `chat`.
        """
        tokenizer = self._tokenizer(tokenizer)
        self.config.adapters_of("write")
        system = self._system(use_meta, meta_instruction, WRITE_SYSTEM, always=False)
        conversation = self._open(tokenizer, chat_prompt(inst, history, system), image, hd_num, max_length)
        room = max_length - len(conversation.prompt.input_ids)
        with seeded(seed):
            return self._answer(
                tokenizer,
                conversation,
                "write",
                streamer=streamer,
                max_new_tokens=room if max_new_tokens is None else min(max_new_tokens, room),
                do_sample=do_sample,
                num_beams=num_beams,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                repetition_penalty=repetition_penalty,
                **kwargs,
            )

    @torch.no_grad()
    def write_webpage(
        self,
        inst: str,
        image: Any = None,
        max_new_tokens: int = 4800,
        do_sample: bool = True,
        num_beams: int = 2,
        temperature: float = 1.0,
        repetition_penalty: float = 3.0,
        seed: int = -1,
        use_meta: bool = False,
        task: str = "Instruction-aware Webpage Generation",
        output_path: str | os.PathLike | None = PUBLIC_FILE,
        **kwargs,
    ) -> str:
        """Write a webpage by the instruction `inst`, with the web adapter on; returns its HTML.

        Args:
            task: names the file, `<task with spaces as _>.html` in the working directory.
            output_path: another file for the page; None writes none.
            kwargs: `tokenizer`, `hd_num`, `history`, `meta_instruction` as in `chat`; the rest as in `generate`.
            Others: see `write_artical`.
        """
        path = page_path(task, output_path)
        settings = dict(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            use_meta=use_meta,
        )
        return write_page(real_pictures(self._web(inst, image, **settings, **kwargs)), path)

    @torch.no_grad()
    def resume_2_webpage(
        self,
        inst: str | os.PathLike,
        image: Any = None,
        max_new_tokens: int = 4800,
        do_sample: bool = True,
        num_beams: int = 2,
        temperature: float = 1.0,
        repetition_penalty: float = 3.0,
        seed: int = -1,
        use_meta: bool = False,
        task: str = "Resume-to-Personal Page",
        output_path: str | os.PathLike | None = PUBLIC_FILE,
        **kwargs,
    ) -> str:
        """Make a personal page of the resume in the Markdown file `inst`; a second pass adds its JavaScript.

        Args:
            Others: see `write_webpage`.

        Raises:
            FileNotFoundError: no such resume. ValueError: it is empty or no UTF-8 text.
        """
        path = page_path(task, output_path)
        text = read_resume(inst)
        settings = dict(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            use_meta=use_meta,
        )
        html = self._web(RESUME_QUERY + text, image, **settings, **kwargs)
        script = self._web(SCRIPT_QUERY + html, image, **settings, **kwargs)
        return write_page(real_pictures(add_scripts(html, script)), path)

    @torch.no_grad()
    def screen_2_webpage(
        self,
        inst: str = "",
        image: Any = None,
        max_new_tokens: int = 4800,
        do_sample: bool = True,
        num_beams: int = 2,
        temperature: float = 1.0,
        repetition_penalty: float = 3.0,
        seed: int = -1,
        use_meta: bool = False,
        task: str = "Screenshot-to-Webpage",
        output_path: str | os.PathLike | None = PUBLIC_FILE,
        **kwargs,
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
        return self.write_webpage(
            inst or SCREENSHOT_QUERY,
            image,
            max_new_tokens,
            do_sample,
            num_beams,
            temperature,
            repetition_penalty,
            seed,
            use_meta,
            task,
            output_path,
            **kwargs,
        )

    def _web(self, query: str, image: Any, seed: int, use_meta: bool, tokenizer=None, **kwargs) -> str:
        """One pass with the web adapter."""
        with seeded(seed):
            return self.chat(tokenizer, query, image, use_meta=use_meta, infer_mode="web", **kwargs)[0]
