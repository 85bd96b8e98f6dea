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
        self.failure = openai.OpenAIError
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
        temperature: float = 1.0,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        top_k: int | None = None,
        num_beams: int = 1,
        escape_control_tokens: bool = True,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """As the model's. Raises: ValueError: what the server refuses, and what it has not: beams, text as tokens."""
        if num_beams > 1:
            raise ValueError(f"{num_beams} beams, but a server answers with one: set beams to 1")
        if not escape_control_tokens:
            raise ValueError("escape_control_tokens=False, but a server takes text as text")
        pictures = iter(image or ())
        messages = [{"role": "system", "content": meta_instruction}] if use_meta and meta_instruction else []
        for asked, said in history:
            messages += [
                {"role": "user", "content": content_of(asked, pictures)},
                {"role": "assistant", "content": said},
            ]
        unmarked = len(image or ()) == 1 and IMAGE_MARK not in "".join([query, *(asked for asked, _ in history)])
        messages.append({"role": "user", "content": content_of(IMAGE_MARK * unmarked + query, pictures)})
        extra: dict[str, Any] = {"repetition_penalty": repetition_penalty}
        if top_k:
            extra["top_k"] = top_k
        if hd_num:
            extra["mm_processor_kwargs"] = {"hd_num": hd_num}
        if answer_start:
            messages.append({"role": "assistant", "content": answer_start})
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        model = self.model_of(infer_mode)

        def stream() -> Iterator[tuple[str, list[tuple[str, str]]]]:
            answer = ""
            try:
                chunks = self.client.chat.completions.create(
                    model=model,
                    messages=messages,
                    stream=True,
                    max_tokens=max_new_tokens,
                    temperature=temperature if do_sample else 0.0,
                    top_p=top_p if do_sample else 1.0,
                    seed=None if seed == -1 else seed,
                    extra_body=extra,
                )
                with chunks:
                    for chunk in chunks:
                        if chunk.choices and (more := chunk.choices[0].delta.content):
                            answer += more
                            yield answer, with_turn(history, query, answer)
            except self.failure as error:
                raise ValueError(f"the server at {self.url}: {error}") from error
            yield answer, with_turn(history, query, answer)

        return stream()

    def chat(self, *args: Any, **kwargs: Any) -> tuple[str, list[tuple[str, str]]]:
        """The whole answer, as the model's `chat`."""
        *_, last = self.stream_chat(*args, **kwargs)
        return last

    def stream_webpage(
        self, inst: str, image: Any = None, max_new_tokens: int = 4800, repetition_penalty: float = 3.0, **kwargs: Any
    ) -> Iterator[str]:
        """As the model's. A server counts the prompt in its penalty, so `repetition_penalty` is left at 1 there."""
        penalty = 1.0 if repetition_penalty == 3.0 else repetition_penalty
        settings = {"max_new_tokens": max_new_tokens, "repetition_penalty": penalty, "infer_mode": "web", **kwargs}
        for html, _ in self.stream_chat(None, inst, image, **settings):
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
