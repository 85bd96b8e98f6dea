"""`transformers serve` for this model: the OpenAI interface over HTTP, with pictures, videos and streaming.

    pip install "transformers[serving]"
    xcomposer serve CHECKPOINT --trust-remote-code --port 8000

takes every argument of `transformers serve`. `opt_in` is the step that makes it work: `transformers serve` knows models
by the library's own tables, so this model is written into them, in this process alone. It also drops the token that
closes an answer, refuses files of the server as pictures, and turns what is refused (a broken picture, say) into an
answer 400 that says why.

Over HTTP, `"chat_template_kwargs": {"hd_num": 9, "use_meta": true}` reaches the processor.
"""

import typer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, server, utils
from transformers.models.auto import modeling_auto
from transformers.utils import logging

MODEL_TYPE, ARCHITECTURE = "internlmxcomposer2", "InternLMXComposer2ForCausalLM"
CLOSE = "[UNUSED_TOKEN_145]"
CONTENT_TYPES = ("text", "input_text", "output_text", "image_url", "input_image", "video_url")

logger = logging.get_logger(__name__)


def opt_in() -> None:
    """Make `transformers serve`, in this process, serve the model."""
    for names in (
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        names[MODEL_TYPE] = ARCHITECTURE
    load_processor, build_server = model_manager.ModelManager._load_processor, server.build_server
    read_messages = utils.BaseHandler.get_processor_inputs_from_messages

    def load_and_hide_close(*args, **kwargs):
        processor = load_processor(*args, **kwargs)
        tokenizer = getattr(processor, "tokenizer", processor)
        if CLOSE in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [CLOSE]})
        return processor

    def build_and_answer(*args, **kwargs):
        app = build_server(*args, **kwargs)
        for kind in (ValueError, FileNotFoundError):
            app.add_exception_handler(kind, refuse)
        return app

    def check_and_read(messages, *args, **kwargs):
        check_types(messages)  # an unknown type would be left out without a word
        parsed = read_messages(messages, *args, **kwargs)
        check_addresses(parsed)
        return parsed

    model_manager.ModelManager._load_processor = load_and_hide_close
    server.build_server = build_and_answer
    utils.BaseHandler.get_processor_inputs_from_messages = staticmethod(check_and_read)


def items_of(messages: list[dict]) -> list[dict]:
    """The content items of all messages."""
    return [item for message in messages if isinstance(message.get("content"), list) for item in message["content"]]


def check_types(messages: list[dict]) -> None:
    """Raise a ValueError for a content item of a type that the model does not take."""
    for item in items_of(messages):
        if item.get("type") not in CONTENT_TYPES:
            raise ValueError(f"unknown type {item.get('type')!r} of a content item; use one of {CONTENT_TYPES}")


def check_addresses(messages: list[dict]) -> None:
    """Raise a ValueError for a picture or video that is not sent along and not on the web: files here stay private."""
    for item in items_of(messages):
        if "url" in item and not item["url"].lower().startswith(("http://", "https://", "data:")):
            raise ValueError(f"{item['type']} {item['url'][:80]!r} is no http(s) or data: address; send it as one")


async def refuse(request, error: Exception):
    """Answer 400 with the reason; the server goes on."""
    from fastapi.responses import JSONResponse

    logger.warning("%s refused: %s", request.url.path, error)
    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)


if __name__ == "__main__":
    opt_in()
    typer.run(Serve)
