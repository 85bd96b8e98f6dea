"""Requests in, answers out: many clients in front of one model.

A request passes three stages. Its pictures are fetched, side by side with others'; it is opened (pictures decoded,
prompt laid out and measured), a few at a time, since opened pictures take memory; it computes when its turn comes,
first come first served, in one thread. Whoever leaves is left out of the stages to come, and ends its own computing at
the next token.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from xcomposer.model.chat_internlm_xcomposer2 import ARTICLE_SETTINGS, CHAT_SETTINGS, PAGE_SETTINGS
from xcomposer.model.media_internlm_xcomposer2 import load_media
from xcomposer.model.prompting_internlm_xcomposer2 import (
    CHAT_SYSTEM,
    IMAGE_MARK,
    TEXT_JOINT,
    TURN_CLOSE,
    TURN_OPEN,
    WRITE_SYSTEM,
    escape_control_tokens,
    turn,
)
from xcomposer.model.threads_internlm_xcomposer2 import seeded
from xcomposer.serving.protocol import APIError, ChatRequest, ImageItem, SystemMessage, TextItem
from xcomposer.serving.sources import MediaRules, Source, read_source, require_pixels, sources_of
from xcomposer.serving.writer import Piece, Writer

OPENED = 2  # requests whose pictures are in memory: the one that computes and the next
FETCHERS = 16  # addresses that are waited for at once; they hold up other addresses only
BODIES = 8  # of the largest size, in memory at once
GREEDY_BELOW = 1e-5  # a temperature that is as good as 0
RETRY_AFTER = {"Retry-After": "5"}


class Mode(NamedTuple):
    """A way of answering that clients choose as a model: task adapters, system text, and defaults."""

    infer_mode: str
    system: str
    settings: dict[str, Any]


SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def _defaults(*methods: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Defaults of public methods, the last one's before the others'; without beams: what is streamed cannot change."""
    settings = {name: value for method in (*methods, more) for name, value in method.items()}
    names = ("max_new_tokens", "do_sample", "repetition_penalty", *SAMPLING)
    return {name: settings[name] for name in names if name in settings}


MODES = {
    "chat": Mode("base", CHAT_SYSTEM, _defaults(CHAT_SETTINGS)),
    "web": Mode("web", CHAT_SYSTEM, _defaults(CHAT_SETTINGS, PAGE_SETTINGS)),
    "write": Mode(
        "write", WRITE_SYSTEM, _defaults(CHAT_SETTINGS, ARTICLE_SETTINGS, max_new_tokens=ARTICLE_SETTINGS["max_length"])
    ),
}


class WrittenPenalty(LogitsProcessor):
    """OpenAI's penalties, of tokens that the answer holds already, and a client's biases.

    Args:
        presence: taken from each such token's logit. frequency: taken as often as the token was written.
        bias: token id -> what is added to its logit.
    """

    def __init__(self, presence: float, frequency: float, bias: dict[int, float]):
        self.presence, self.frequency, self.bias = presence, frequency, bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        written, counts = input_ids[0].unique(return_counts=True)
        scores[0, written] -= self.presence + self.frequency * counts.to(scores.dtype)
        for token, value in self.bias.items():
            scores[0, token] += value
        return scores


class Job:
    """A request on its way through the stages."""

    def __init__(self, request: ChatRequest, mode: Mode, writers: list[Writer]):
        self.request, self.mode, self.writers = request, mode, writers
        self.left = threading.Event()
        self.pieces: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        self.prompt_tokens = 0

    async def answers(self) -> AsyncIterator[Piece]:
        """The pieces of all answers, one answer after the other; what computing raises is raised here."""
        while (piece := await self.pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    @property
    def completion_tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers)

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        self.left.set()


class Room:
    """What a request takes of the memory for requests; `close` gives it back.

    Args:
        most: bytes of all requests together.
    """

    def __init__(self, engine: "Engine", most: int):
        self.engine, self.most, self.bytes = engine, most, 0

    def take(self, count: int) -> None:
        """Raises an APIError of 503 where others leave no room for so many more bytes."""
        if self.engine.bytes + count > self.most:
            message = "other requests take the memory for pictures; try again later"
            raise APIError(503, message, code="overloaded", headers=RETRY_AFTER)
        self.engine.bytes += count
        self.bytes += count

    def close(self) -> None:
        self.engine.bytes -= self.bytes
        self.bytes = 0


class Engine:
    """One model and its queue. Made and used inside one event loop.

    Args:
        name: what clients may call the model besides "chat".
        max_queue: most requests that wait or compute; more are refused with 503.
        max_length: most tokens of prompt and answer together; None: what the model takes.
    """

    def __init__(
        self, model, tokenizer, name: str, rules: MediaRules, max_queue: int = 64, max_length: int | None = None
    ):
        self.model, self.tokenizer, self.rules, self.max_queue = model, tokenizer, rules, max_queue
        context = model.config.context_length
        self.max_length = context if max_length is None else min(max_length, context)
        self.modes = {name: MODES["chat"], **{known: mode for known, mode in MODES.items() if self._has(mode)}}
        self.vocab_size = model.config.text_config.vocab_size
        self.stops = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_CLOSE))
        self.started = int(time.time())
        self.inside = 0
        self.opened = asyncio.Semaphore(OPENED)
        self.bytes = 0  # of requests in memory
        self.fetchers = ThreadPoolExecutor(FETCHERS, "fetch")
        self.openers = ThreadPoolExecutor(OPENED, "open")
        self.turns = ThreadPoolExecutor(1, "generate")
        self.jobs: set[Job] = set()

    def _has(self, mode: Mode) -> bool:
        try:
            self.model.config.adapters_of(mode.infer_mode)
        except ValueError:
            return False
        return True

    def close(self) -> None:
        """End what computes, refuse what waits."""
        for job in self.jobs:
            job.leave()
        for pool in (self.fetchers, self.openers, self.turns):
            pool.shutdown(wait=False, cancel_futures=True)

    async def submit(self, request: ChatRequest) -> Job:
        """Check a request, open it, and put it in the queue. Cancelling this leaves the queue.

        Raises:
            APIError: 400 for what is wrong with it, 404 for another model, 503 if the queue is full.
        """
        mode = self.modes.get(request.model)
        if mode is None:
            known = ", ".join(self.modes)
            raise APIError(404, f"no model {request.model[:80]!r}; there are {known}", "model", "model_not_found")
        sources = sources_of(request, self.rules)
        biases = self._biases(request)
        if self.inside >= self.max_queue:
            message = f"{self.inside} requests are waiting already; try again later"
            raise APIError(503, message, code="overloaded", headers=RETRY_AFTER)
        job = Job(request, mode, [])
        self.inside += 1
        self.jobs.add(job)
        try:
            loop = asyncio.get_running_loop()
            remote = [source for source in sources if source.remote]
            fetching = (loop.run_in_executor(self.fetchers, read_source, source, self.rules) for source in remote)
            fetched = dict(zip(remote, await asyncio.gather(*fetching), strict=True))
            await self.opened.acquire()
            try:
                conversation = await loop.run_in_executor(self.openers, self._open, job, sources, fetched)
                self._start(job, conversation, biases)
            except BaseException:
                self.opened.release()
                raise
        except BaseException:
            job.leave()
            self._gone(job)
            raise
        return job

    def _gone(self, job: Job) -> None:
        self.inside -= 1
        self.jobs.discard(job)

    def _system(self, request: ChatRequest, mode: Mode) -> str:
        """The system text of a request without a system message: the released one where it is asked for, or where the
        kind of model always has one; "" for none.

        Raises:
            APIError: there is a system message, too.
        """
        use_meta = bool(request.extension("use_meta"))
        if isinstance(request.messages[0], SystemMessage):
            if use_meta:
                raise APIError(400, "use_meta and a system message: there is room for one system text", "use_meta")
            return ""
        return self.model._system(use_meta, None, mode.system, always=mode.infer_mode != "write")

    def _biases(self, request: ChatRequest) -> dict[int, float]:
        biases = {int(token): value for token, value in request.logit_bias.items()}
        if biases and max(biases) >= self.vocab_size:
            raise APIError(400, f"logit_bias.{max(biases)}: there are {self.vocab_size} token ids", "logit_bias")
        return biases

    def _open(self, job: Job, sources: Sequence[Source], fetched: Mapping[Source, bytes]) -> Any:
        """Pictures decoded and the prompt laid out; nothing computed. Runs in an opening thread."""
        request, mode = job.request, job.mode
        files = [fetched[source] if source in fetched else read_source(source, self.rules) for source in sources]
        require_pixels(files, sources, self.rules)
        frames = request.extension("num_frm")
        options = {"tile": self.model.config.tile} | ({} if frames is None else {"num_frm": frames})
        pictures = []
        for file, source in zip(files, sources, strict=True):
            try:
                pictures.append(load_media(file, **options))
            except (ValueError, TypeError, OSError) as error:
                raise APIError(400, f"{source.param}: {error}", source.param) from error
            except ImportError as error:
                raise APIError(501, f"{source.param}: {error}", source.param) from error
        try:
            text = prompt_text(request, self._system(request, mode))
            return self.model._open(self.tokenizer, text, pictures, tiles_of(request), self.max_length)
        except ValueError as error:
            code = "context_length_exceeded" if "max_length" in str(error) else None
            raise APIError(400, str(error), "messages", code) from error

    def _start(self, job: Job, conversation: Any, biases: dict[int, float]) -> None:
        request, loop = job.request, asyncio.get_running_loop()
        job.prompt_tokens = len(conversation.prompt.input_ids)
        room = self.max_length - job.prompt_tokens
        name = "max_tokens" if request.max_tokens else "max_completion_tokens"
        asked = getattr(request, name)
        if asked is not None and asked > room:
            raise APIError(
                400,
                f"the prompt has {job.prompt_tokens} tokens and {name} is {asked}, together more than the model's "
                f"{self.max_length}; {room} would fit",
                name,
                "context_length_exceeded",
            )
        settings = generation_settings(request, job.mode, min(room, asked or job.mode.settings["max_new_tokens"]))

        def emit(piece: Piece | BaseException | None) -> None:
            loop.call_soon_threadsafe(job.pieces.put_nowait, piece)

        def finished(_) -> None:
            loop.call_soon_threadsafe(self.opened.release)
            loop.call_soon_threadsafe(self._gone, job)

        stops = [*request.stop, TURN_CLOSE]
        top = (request.top_logprobs or 0) if request.logprobs else None
        job.writers = [Writer(self.tokenizer, self.stops, stops, index, emit, top) for index in range(request.n)]
        future = self.turns.submit(self._compute, job, conversation, settings, biases, emit)
        future.add_done_callback(finished)

    def _compute(self, job: Job, conversation, settings: dict, biases: dict[int, float], emit: Callable) -> None:
        """All answers of one request, in the computing thread."""
        request = job.request
        penalty = settings.pop("repetition_penalty")
        try:
            for index, writer in enumerate(job.writers):
                if job.left.is_set():
                    return
                processors = LogitsProcessorList([writer.observe])  # first: log-probabilities are the model's own
                if penalty != 1.0:
                    processors.append(RepetitionPenaltyLogitsProcessor(penalty))
                if request.presence_penalty or request.frequency_penalty or biases:
                    processors.append(WrittenPenalty(request.presence_penalty, request.frequency_penalty, biases))

                def ended(ids, scores, writer=writer, **_):
                    return torch.full((len(ids),), writer.stopped or job.left.is_set(), device=ids.device)

                seed = -1 if request.seed is None else (request.seed + index) % 2**63
                with torch.no_grad(), seeded(seed):
                    self.model._answer(
                        self.tokenizer,
                        conversation,
                        job.mode.infer_mode,
                        streamer=writer,
                        stopping_criteria=StoppingCriteriaList([ended]),
                        logits_processor=processors,
                        repetition_penalty=1.0,
                        **settings,
                    )
                writer.finish()
        except Exception as error:
            emit(error)
        finally:
            emit(None)


def prompt_text(request: ChatRequest, system: str) -> str:
    """A request's messages in the model's layout, with a mark at each picture's place; `system` in front, if any."""
    text = turn("system", system) if system else ""
    messages, begun = request.messages, ""
    if request.continue_final_message:
        *messages, last = messages
        begun = "".join(body_of(item) for item in last.content)
    for message in messages:
        role = "system" if isinstance(message, SystemMessage) else message.role
        text += turn(role, "".join(body_of(item) for item in message.content))
    return f"{text}{TURN_OPEN}assistant\n{begun}"


def body_of(item: Any) -> str:
    """An item of a message in the prompt: whatever a client typed stays text, a picture's mark too."""
    if not isinstance(item, TextItem):
        return IMAGE_MARK
    return escape_control_tokens(item.text).replace(IMAGE_MARK, IMAGE_MARK[0] + TEXT_JOINT + IMAGE_MARK[1:])


def tiles_of(request: ChatRequest) -> int | None:
    """Most tiles of each picture: `hd_num`, or one where OpenAI's `detail` is "low".

    Raises:
        APIError: pictures that differ in it.
    """
    items = [item for message in request.messages for item in message.content if isinstance(item, ImageItem)]
    low = {item.image_url.detail == "low" for item in items}
    asked = request.extension("hd_num")
    if low == {True, False}:
        raise APIError(400, "detail is low for some pictures only; a request has one number of tiles", "detail")
    if low == {True} and asked not in (None, 1):
        raise APIError(400, f"detail is low, which is hd_num 1, and hd_num is {asked}; send one of them", "hd_num")
    return 1 if low == {True} else asked


def generation_settings(request: ChatRequest, mode: Mode, max_new_tokens: int) -> dict[str, Any]:
    """Settings of `generate`: the mode's, and over them what the request says."""
    names = (*SAMPLING, "repetition_penalty")
    said = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    settings = {**mode.settings, **said, "max_new_tokens": max_new_tokens}
    if settings["temperature"] < GREEDY_BELOW:
        settings["do_sample"] = False
        for name in SAMPLING:
            settings.pop(name, None)
    return settings
