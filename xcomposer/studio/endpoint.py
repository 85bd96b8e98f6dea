"""A model behind a server of the OpenAI interface (vLLM, transformers), with the methods that the studio calls.

The server's models `web` and `write`, where it offers them, answer for those modes: `xcomposer serve` names them so.
"""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from xcomposer.model.prompting_internlm_xcomposer2 import CHAT_SYSTEM, IMAGE_MARK, with_turn
from xcomposer.model.webpage_internlm_xcomposer2 import real_pictures

TIMEOUT_S = 600.0  # without a token
OTHERS = ("web", "write")


class Endpoint:
    """`stream_chat`, `chat`, `stream_webpage` and `write_webpage` of a model, answered by a server.

    Args:
        url: the server's address, with or without `/v1`.
        key: its API key, if it wants one.

    Raises:
        ValueError: no server there, or one without models; says what was asked.
        ImportError: no `openai`.
    """

    tokenizer = None

    def __init__(self, url: str, key: str = ""):
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"--endpoint needs the openai package ({error}): pip install openai") from error
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.failure, self.refusal = openai.OpenAIError, openai.BadRequestError
        self.client = openai.OpenAI(base_url=self.url, api_key=key or "none", timeout=TIMEOUT_S, max_retries=0)
        try:
            self.models = [model.id for model in self.client.models.list()]
        except openai.OpenAIError as error:
            raise ValueError(f"no models at {self.url}/models ({error}); is the server running?") from error
        if not self.models:
            raise ValueError(f"the server at {self.url} offers no model")

    def model_of(self, infer_mode: str) -> str:
        """The server's model for a mode.

        Raises: ValueError: it has none.
        """
        if infer_mode == "base":
            return next((name for name in self.models if name not in OTHERS), self.models[0])
        if infer_mode not in self.models:
            raise ValueError(
                f"the server at {self.url} offers no model {infer_mode!r}, only {', '.join(self.models)}; "
                "start it with `xcomposer serve`, which offers the checkpoint's task adapters"
            )
        return infer_mode

    def stream_chat(
        self,
        tokenizer: Any = None,
        query: str = "",
        image: Any = None,
        hd_num: int | None = None,
        history: Sequence[tuple[str, str]] = (),
        infer_mode: str = "base",
        use_meta: bool = False,
        meta_instruction: str = CHAT_SYSTEM,
        answer_start: str = "",
        seed: int = -1,
        do_sample: bool = True,
        max_new_tokens: int = 1024,
        temperature: float | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        top_k: int | None = None,
        num_beams: int = 1,
        escape_control_tokens: bool = True,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """As the model's; what is None is the server's own default.

        Raises: ValueError: what the server refuses, and what it has not: beams, text as tokens.
        """
        if num_beams > 1:
            raise ValueError(f"{num_beams} beams, but a server answers with one: set beams to 1")
        if not escape_control_tokens:
            raise ValueError("escape_control_tokens=False, but a server takes text as text")
        pictures = iter(image or ())
        queries = [*(asked for asked, _ in history), query]
        if len(image or ()) == 1 and IMAGE_MARK not in "".join(queries):
            queries[0] = IMAGE_MARK + queries[0]  # the model has it in front of everything; a message is the nearest
        messages = [{"role": "system", "content": meta_instruction}] if use_meta and meta_instruction else []
        for asked, (_, said) in zip(queries, history, strict=False):
            messages += [
                {"role": "user", "content": content_of(asked, pictures)},
                {"role": "assistant", "content": said},
            ]
        messages.append({"role": "user", "content": content_of(queries[-1], pictures)})
        extra: dict[str, Any] = {"repetition_penalty": repetition_penalty, "top_k": top_k}
        extra = {name: value for name, value in extra.items() if value is not None}
        if hd_num:
            extra["mm_processor_kwargs"] = {"hd_num": hd_num}
        if answer_start:
            messages.append({"role": "assistant", "content": answer_start})
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        settings = {"temperature": temperature, "top_p": top_p} if do_sample else {"temperature": 0.0, "top_p": 1.0}
        settings |= {"seed": None if seed == -1 else seed, "max_tokens": max_new_tokens}
        settings = {name: value for name, value in settings.items() if value is not None}
        asked_for = {"model": self.model_of(infer_mode), "messages": messages, **settings, "extra_body": extra}

        def stream() -> Iterator[tuple[str, list[tuple[str, str]]]]:
            answer = ""
            try:
                with self._begun(asked_for) as chunks:
                    for chunk in chunks:
                        if chunk.choices and (more := chunk.choices[0].delta.content):
                            answer += more
                            yield answer, with_turn(history, query, answer)
            except self.failure as error:
                raise ValueError(f"the server at {self.url}: {error}") from error
            yield answer, with_turn(history, query, answer)

        return stream()

    def _begun(self, asked_for: dict[str, Any]) -> Any:
        """A stream of chunks. More tokens than there is room for are as many as there is room for, as with the model:
        a server refuses such a number."""
        try:
            return self.client.chat.completions.create(stream=True, **asked_for)
        except self.refusal as error:
            if "max_tokens" not in str(error):
                raise
        return self.client.chat.completions.create(
            stream=True, **{name: value for name, value in asked_for.items() if name != "max_tokens"}
        )

    def chat(self, *args: Any, **kwargs: Any) -> tuple[str, list[tuple[str, str]]]:
        """The whole answer, as the model's `chat`."""
        *_, last = self.stream_chat(*args, **kwargs)
        return last

    def stream_webpage(
        self, inst: str, image: Any = None, max_new_tokens: int = 4800, **settings: Any
    ) -> Iterator[str]:
        """As the model's. Its penalty of 3 is of written tokens, as `xcomposer serve` has it by itself; vLLM's counts
        the prompt, so none is sent."""
        for html, _ in self.stream_chat(None, inst, image, infer_mode="web", max_new_tokens=max_new_tokens, **settings):
            yield real_pictures(html)


def content_of(text: str, pictures: Iterator[Any]) -> list[dict]:
    """A turn's content items: text, and a picture or a video at each mark."""
    content: list[dict] = []
    for at, piece in enumerate(re.split(re.escape(IMAGE_MARK), text)):
        if at:
            content.append(item_of(next(pictures)))
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def item_of(picture: Any) -> dict:
    """A picture as PNG; a video as its frames, in the form that vLLM takes them: JPEGs parted by commas."""
    if isinstance(picture, list):
        frames = ",".join(_encoded(frame, "JPEG") for frame in picture)
        return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_encoded(picture, 'PNG')}"}}


def _encoded(picture: Image.Image, kind: str) -> str:
    made = io.BytesIO()
    picture.convert("RGB").save(made, kind)
    return base64.b64encode(made.getvalue()).decode()
