"""What the server takes and gives, in the terms of OpenAI's chat completions.

The models below are the allow-list: a field that stands in none of them is refused by its name, one that OpenAI has and
this server has not, with the reason (`NOT_OFFERED`). `null` is the same as a field left out.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from xcomposer.model.settings_internlm_xcomposer2 import short

MOST_MESSAGES = 2048
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_BIASES = 300
MOST_TOP_LOGPROBS = 20
MOST_CHOICES = 16
MOST_TOKENS = 2**20
MOST_TILES, MOST_FRAMES = 96, 128  # the server's own limits may be lower

# Fields of OpenAI's that this server has not, and why.
_NO_TOOLS = "this model calls no tools"
_TEXT_ONLY = "this model writes text only"
NOT_OFFERED = {
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "tool_calls": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "parallel_tool_calls": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "web_search_options": _NO_TOOLS,
    "audio": _TEXT_ONLY,
    "modalities": _TEXT_ONLY,
    "annotations": _TEXT_ONLY,
    "refusal": _TEXT_ONLY,
    "name": "the model tells speakers apart by their roles only",
    "prediction": "there is no speculative text",
    "reasoning_effort": "this model does not reason apart from its answer",
    "reasoning_content": "this model does not reason apart from its answer",
    "verbosity": "say in the prompt how long the answer shall be",
    "store": "nothing is stored here",
    "num_beams": "answers are streamed, and beams may change what is written already; use the Python API",
    "best_of": "use n",
    "generation_config": "send its settings one by one",
    "chat_template": "the model's own prompt layout is used",
    "guided_json": "text is not constrained to a grammar",
    "guided_regex": "text is not constrained to a grammar",
    "structured_outputs": "text is not constrained to a grammar",
}


class APIError(Exception):
    """An answer that is an error, in OpenAI's form.

    Args:
        param: the field that is wrong.
        code: a word for programs.
        headers: of the HTTP answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message[:1900], param, code, headers

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Model(BaseModel):
    """A JSON object of the fields below and no others; numbers are numbers, not text."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Messages that a client got and sends back are full of fields that are null."""
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None or not (name in NOT_OFFERED or _has_default(cls, name))
        }


def _has_default(model: type[BaseModel], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is not None and not field.is_required()


class Address(_Model):
    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = "auto"


class VideoAddress(_Model):
    url: str = Field(min_length=1)


class TextItem(_Model):
    type: Literal["text"]
    text: str


class ImageItem(_Model):
    type: Literal["image_url"]
    image_url: Address


class VideoItem(_Model):
    type: Literal["video_url"]
    video_url: VideoAddress


Item = Annotated[TextItem | ImageItem | VideoItem, Field(discriminator="type")]


def _as_list(item: Callable[[str], Any]) -> BeforeValidator:
    """One text in the place of a list is a list of it."""
    return BeforeValidator(lambda value: [item(value)] if isinstance(value, str) else value)


AS_ITEMS = _as_list(lambda text: {"type": "text", "text": text})
Texts = Annotated[list[TextItem], Field(min_length=1), AS_ITEMS]
Items = Annotated[list[Item], Field(min_length=1), AS_ITEMS]


class SystemMessage(_Model):
    role: Literal["system", "developer"]
    content: Texts


class UserMessage(_Model):
    role: Literal["user"]
    content: Items


class AssistantMessage(_Model):
    role: Literal["assistant"]
    content: Texts


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Model):
    include_usage: bool = False


class ResponseFormat(_Model):
    type: str

    @model_validator(mode="after")
    def _text_alone(self):
        if self.type != "text":
            raise ValueError(f"{short(self.type)} is not offered, only 'text': the model is not held to a grammar")
        return self


class Extensions(_Model):
    """This model's own settings, as vLLM's clients nest them."""

    hd_num: int | None = Field(None, ge=1, le=MOST_TILES)
    num_frm: int | None = Field(None, ge=1, le=MOST_FRAMES)
    use_meta: bool | None = None


Share = Annotated[float, Field(ge=0, le=1)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,7}$")]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]], Field(max_length=MOST_STOPS), _as_list(str)
]


class ChatRequest(_Model):
    """The body of POST /v1/chat/completions.

    What differs from OpenAI: `top_k`, `min_p`, `repetition_penalty` (of written tokens), `hd_num` (most tiles of a
    picture), `num_frm` (most frames of a video), `use_meta` (the released system text) besides; defaults are those of
    the model's own methods.
    """

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    # How much
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: Stops = Field(default_factory=list)
    # How a token is chosen
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Share | None = None
    top_k: int | None = Field(None, ge=0, le=MOST_TOKENS)
    min_p: Share | None = None
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=MOST_BIASES
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    # What comes back
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    # This model's own, flat or as vLLM's clients send them
    hd_num: int | None = Field(None, ge=1, le=MOST_TILES)
    num_frm: int | None = Field(None, ge=1, le=MOST_FRAMES)
    use_meta: bool | None = None
    chat_template_kwargs: Extensions | None = None
    mm_processor_kwargs: Extensions | None = None
    # vLLM's names: the last message is the assistant's, and the answer goes on from it
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    # Labels for the operator of OpenAI's service: taken, since clients send them, and of no effect there either
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _fit_together(self):
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise APIError(400, "max_tokens and max_completion_tokens are one setting; send one of them", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options needs stream: true", "stream_options")
        for index, message in enumerate(self.messages):
            if index and isinstance(message, SystemMessage):
                param = f"messages[{index}].role"
                raise APIError(400, f"{param} is {message.role!r}; only the first message can be the system's", param)
        if self.continue_final_message == self.add_generation_prompt:
            remedy = "send one as true and the other as false, or leave both out"
            both = "continue_final_message and add_generation_prompt"
            raise APIError(400, f"{both} are both {str(self.add_generation_prompt).lower()}; {remedy}", both.split()[0])
        wanted = AssistantMessage if self.continue_final_message else UserMessage
        if not isinstance(self.messages[-1], wanted):
            role = self.messages[-1].role
            does = "goes on from an assistant's" if self.continue_final_message else "answers a user's"
            raise APIError(400, f"the last message is the {role}'s; the model {does}", "messages")
        return self

    def extension(self, name: str) -> Any:
        """One of this model's own settings, wherever it was sent; None: nowhere.

        Raises:
            APIError: it was sent in several places that disagree.
        """
        places = (self, self.chat_template_kwargs, self.mm_processor_kwargs)
        values = {getattr(place, name) for place in places if place is not None} - {None}
        if len(values) > 1:
            raise APIError(400, f"{name} is sent as {' and '.join(map(str, sorted(values)))}; send one of them", name)
        return values.pop() if values else None


def read_request(body: bytes) -> ChatRequest:
    """A body of JSON as a request.

    Raises:
        APIError: 400, naming the field and what it takes.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> APIError:
    """What the first thing wrong with a request is, in one sentence."""
    found = error.errors(include_url=False, include_context=False)[0]
    path = list(found["loc"])
    # Behind an index stands which kind of entry it was taken for: not in what the client sent.
    path = [part for before, part in zip([None, *path], path, strict=False) if not isinstance(before, int)]
    param = short_path(path)
    name = str(path[-1]) if path else ""
    if found["type"] == "extra_forbidden":
        reason = NOT_OFFERED.get(name, "no such field")
        message = f"{param} is not offered: {reason}"
    elif found["type"] == "missing":
        message = f"{param} is missing"
    elif found["type"] == "json_invalid":
        message, param = f"the body is no valid JSON: {found['msg'].removeprefix('Invalid JSON: ')}", ""
    else:
        message = f"{param or 'the body'}: {found['msg'].removeprefix('Value error, ')}"
        value = found.get("input")
        if isinstance(value, str | int | float | bool):
            message += f"; got {short(value)}"
    more = error.error_count() - 1
    return APIError(400, message + (f" (and {more} more)" if more else ""), param or None)


def short_path(path: list) -> str:
    """`messages[0].content` for ["messages", 0, "content"]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")[:200]


def event(body: dict | str) -> str:
    """One server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n"
