"""A server with OpenAI's chat completions, on transformers: pictures, videos, streaming, pages and articles.

    pip install ".[serve]"
    xcomposer serve FOLDER --backend transformers --port 8000

One process, one model, one answer at a time: for many clients at once on a card, vLLM is the faster backend. `engine`
has the queue, `protocol` the fields, `sources` the pictures; here are the routes and the form of what goes out.
"""

import asyncio
import hmac
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers.utils import logging

from xcomposer.serving.engine import BODIES, Engine, Job, Room
from xcomposer.serving.protocol import APIError, ChatRequest, event, read_request
from xcomposer.serving.sources import MIB, MediaRules
from xcomposer.serving.writer import Piece

OPEN_PATHS = ("/health",)  # without the key, for whoever watches over the server
MOST_BODY = 64 * MIB
LARGE = 2**16  # bytes of a body that are worth a thread: others are answered meanwhile

logger = logging.get_logger(__name__)


def build_app(make_engine: Callable[[], Engine], api_key: str | None = None, max_body: int = MOST_BODY) -> Starlette:
    """The server as an ASGI application.

    Args:
        make_engine: called once the event loop runs.
        api_key: what clients must send as `Authorization: Bearer KEY`; None: nothing.
        max_body: bytes of a request.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.engine = make_engine()
        try:
            yield
        finally:
            app.state.engine.close()

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", show_model, methods=["GET"]),
        Route("/v1/chat/completions", complete, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {APIError: refuse, HTTPException: refuse_http, Exception: refuse}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.api_key, app.state.max_body = api_key, max_body
    return app


# ------------------------------------------------------------------------------------------------------------- routes


async def health(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    return JSONResponse({"status": "ok", "requests": engine.inside})


async def list_models(request: Request) -> Response:
    require_key(request)
    engine: Engine = request.app.state.engine
    return JSONResponse({"object": "list", "data": [model_card(engine, name) for name in engine.modes]})


async def show_model(request: Request) -> Response:
    require_key(request)
    engine, name = request.app.state.engine, request.path_params["name"]
    if name not in engine.modes:
        raise APIError(404, f"no model {name[:80]!r}; there are {', '.join(engine.modes)}", "model", "model_not_found")
    return JSONResponse(model_card(engine, name))


async def complete(request: Request) -> Response:
    """A chat's answer."""
    require_key(request)
    engine, most = request.app.state.engine, request.app.state.max_body
    room, response = Room(engine, BODIES * most), None
    try:
        body = await read_body(request, most, room)
        asked = await asyncio.to_thread(read_request, body) if len(body) > LARGE else read_request(body)
        del body  # pictures in base64: the request has them
        response = await unless_gone(request.receive, answer(engine, asked, room))
        return response
    finally:
        if not isinstance(response, EventStream):  # which gives the room back when it has ended
            room.close()


async def answer(engine: Engine, asked: ChatRequest, room: Room) -> Response:
    """What the model says: whole, or as server-sent events.

    Raises:
        APIError: whatever went wrong before the first event.
    """
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    try:
        job = await engine.submit(asked)
        if asked.stream:
            return EventStream(job, events_of(job, head), room)
        return JSONResponse({"object": "chat.completion", **head, **await whole(job)})
    except Exception as error:
        raise as_api_error(error) from error


# ---------------------------------------------------------------------------------------------------------- going in


def require_key(request: Request) -> None:
    key = request.app.state.api_key
    sent = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(sent.encode(), key.encode()):
        raise APIError(401, "wrong or no API key; send it as Authorization: Bearer KEY", code="invalid_api_key")


async def read_body(request: Request, most: int, room: Room) -> bytes:
    """The body of a request in JSON; takes the room for it.

    Raises:
        APIError: 415 for another type or encoding, 413 for more bytes than `most`, 503 where there is no room, 400 for
            a client that stops midway.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, f"Content-Type is {kind[:80] or 'absent'}; send application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise APIError(415, "a body with Content-Encoding; send it plain")
    too_large = APIError(413, f"the body is over {most} bytes; send smaller or fewer pictures")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
            room.take(len(chunk))
    except ClientDisconnect as error:
        raise APIError(400, "the body ends before its time") from error
    return bytes(body)


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[Any]) -> Any:
    """What `work` gives; it is cancelled when the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)  # nobody reads it
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


# ---------------------------------------------------------------------------------------------------------- going out


def model_card(engine: Engine, name: str) -> dict:
    return {
        "id": name,
        "object": "model",
        "created": engine.started,
        "owned_by": "xcomposer",
        "max_model_len": engine.max_length,
    }


def usage(job: Job) -> dict:
    prompt, written = job.prompt_tokens, job.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


async def whole(job: Job) -> dict:
    """All answers of a request, and what they took."""
    texts, entries, reasons = ([[] for _ in job.writers] for _ in range(3))
    try:
        async for piece in job.answers():
            texts[piece.index].append(piece.text)
            entries[piece.index].extend(piece.logprobs)
            reasons[piece.index].append(piece.finish_reason)
    finally:
        job.leave()
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(texts[index]), "refusal": None},
            "logprobs": logprobs(job.request, entries[index]),
            "finish_reason": reasons[index][-1],
        }
        for index in range(len(job.writers))
    ]
    return {"choices": choices, "usage": usage(job)}


def logprobs(request: ChatRequest, entries: list[dict]) -> dict | None:
    return {"content": entries, "refusal": None} if request.logprobs else None


async def events_of(job: Job, head: dict) -> AsyncIterator[str]:
    """A request's answers as server-sent events; an error after the first of them is an event, too."""
    request = job.request
    counted = request.stream_options is not None and request.stream_options.include_usage

    def chunk(choices: list[dict], used: dict | None = None) -> str:
        return event(
            {"object": "chat.completion.chunk", **head, "choices": choices, **({"usage": used} if counted else {})}
        )

    def choice(index: int, delta: dict, piece: Piece | None = None) -> dict:
        found = logprobs(request, piece.logprobs) if piece and piece.logprobs else None
        reason = piece.finish_reason if piece else None
        return {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}

    begun: set[int] = set()
    try:
        async for piece in job.answers():
            if piece.index not in begun:
                begun.add(piece.index)
                yield chunk([choice(piece.index, {"role": "assistant", "content": ""})])
            yield chunk([choice(piece.index, {"content": piece.text} if piece.text else {}, piece)])
        if counted:
            yield chunk([], usage(job))
        yield event("[DONE]")
    except Exception as error:
        yield event(as_api_error(error).body())


class EventStream(Response):
    """Server-sent events of a job; a client that goes away ends the job."""

    def __init__(self, job: Job, events: AsyncIterator[str], room: Room):
        super().__init__(headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self.job, self.events, self.room = job, events, room

    async def __call__(self, scope, receive, send) -> None:
        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for text in self.events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, send_all())
        except OSError:  # the connection broke while something was sent
            pass
        finally:
            self.job.leave()
            self.room.close()


# -------------------------------------------------------------------------------------------------------------- errors


def as_api_error(error: Exception) -> APIError:
    """What a client learns of an error: of its own faults all, of the server's that there was one."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        logger.warning("out of memory: %s", error)
        return APIError(503, "not enough memory for this request; send fewer or smaller pictures, or less text")
    logger.error("a request failed", exc_info=error)
    return APIError(500, "the server failed; its log says why")


async def refuse(request: Request, error: Exception) -> Response:
    found = as_api_error(error)
    return JSONResponse(found.body(), found.status, headers=found.headers)


async def refuse_http(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    what = {404: "there is no such address", 405: "is not the method here"}.get(error.status_code, error.detail)
    message = f"{request.method} {request.url.path[:200]}: {what}"
    return JSONResponse(APIError(error.status_code, message).body(), error.status_code, headers=error.headers)


# ------------------------------------------------------------------------------------------------------------- running


def serve(args: Namespace) -> int:
    """Load the model and serve until stopped; arguments of `xcomposer serve`."""
    import uvicorn

    from xcomposer.loading import DEFAULT_MODEL, load

    given = {name: value for name, value in vars(args).items() if value is not None}
    model, tokenizer = load(
        Namespace(
            model=Path(given.get("model", DEFAULT_MODEL)),
            num_gpus=args.num_gpus,
            device=args.device,
            dtype=given.get("dtype", "auto"),
            adapter=None,
        )
    )
    body = given.get("max_body", MOST_BODY // MIB) * MIB
    default = MediaRules()
    rules = MediaRules(
        most=given.get("max_pictures", default.most),
        pixels=given.get("max_pixels", default.pixels),
        bytes=body,
        timeout=given.get("media_timeout", default.timeout),
        addresses=args.allow_addresses,
        private_addresses=args.allow_private_addresses,
        folder=args.allowed_local_media_path,
    )
    name = str(given.get("model", DEFAULT_MODEL))
    most = {"max_queue": given["max_queue"]} if "max_queue" in given else {}

    def make_engine() -> Engine:
        return Engine(model, tokenizer, name, rules, max_length=args.max_model_len, **most)

    app = build_app(make_engine, args.api_key, body)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False, timeout_graceful_shutdown=10)
    return 0
