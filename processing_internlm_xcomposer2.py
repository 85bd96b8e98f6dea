"""AutoProcessor: text with pictures and videos -> model inputs, for the same conversation equal to those of `chat`.

In text, `<ImageHere>` or `[UNUSED_TOKEN_140]` marks a picture's place and `[UNUSED_TOKEN_139]` a video's; each becomes
a run of the placeholder, as long as the picture has tokens. Prompts come from `chat_template.jinja`, which writes the
turns of `prompting_internlm_xcomposer2`; tiles come from `ixc_utils`.

Legend: B texts, T tokens, n pictures, N tiles of all of them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .image_processing_internlm_xcomposer2 import InternLMXComposer2ImagesKwargs, as_rows, config_of, first_given
from .prompting_internlm_xcomposer2 import (
    IGNORE_INDEX,
    IMAGE_MARK,
    SCORE_TOKEN,
    SYSTEM_TEXTS,
    TURN_CLOSE,
    check_text_length,
    short,
)
from .remote_code_internlm_xcomposer2 import attach_to_package
from .video_processing_internlm_xcomposer2 import InternLMXComposer2VideosKwargs, as_video_list, is_frame_list

CONTENT_TYPES = ("text", "image", "image_url", "video", "video_url")  # as in chat_template.jinja
OF_PARTS = ("text_kwargs", "images_kwargs", "videos_kwargs")
OF_CONFIG = ("bos_on_each_piece", "text_only_bos", "context_length")  # what a processor reads in `config.json`

TEXT_OPTIONS = {  # the tokenizer's, where what is odd would fail below the library: what each may be beside None
    "add_special_tokens": ("True or False", lambda value: isinstance(value, bool)),
    "padding_side": ("left or right", lambda value: isinstance(value, str) and value in ("left", "right")),
    "pad_to_multiple_of": (
        "an integer of 0 or more",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    ),
}


class InternLMXComposer2ProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call, by what they concern; flat ones are taken too."""

    images_kwargs: InternLMXComposer2ImagesKwargs
    videos_kwargs: InternLMXComposer2VideosKwargs
    _defaults = {"text_kwargs": {"padding": True, "padding_side": "left", "return_mm_token_type_ids": True}}


class Pictures(NamedTuple):
    """Sources of all texts' pictures in the order of their places, and the `hd_num` each has unless told."""

    sources: list[Any]
    hd_num: list[int]


def hd_num_of(kwargs: dict) -> int | list[int] | None:
    """`hd_num` among the arguments of a call, flat or under `images_kwargs`."""
    return first_given(kwargs.get("hd_num"), (kwargs.get("images_kwargs") or {}).get("hd_num"))


def share_out(items: list[Any], slots: Sequence[int], kind: str) -> list[list[Any]]:
    """A flat list of pictures or videos -> a list for each text, by the places the texts have for them."""
    if len(slots) == 1:
        return [items]
    if sum(slots) != len(items):
        raise ValueError(
            f"{len(items)} {kind}s for {len(slots)} texts with {sum(slots)} places for one; pass a list of lists, one "
            f"list for each text ([] for a text without)"
        )
    left = iter(items)
    return [[next(left) for _ in range(count)] for count in slots]


def check_items(conversation: Sequence[Any]) -> None:
    """Raise a ValueError for a content item of unknown type: the library opens sound before the template refuses it."""
    for message in conversation:
        if isinstance(message, list | tuple):
            check_items(message)
        elif isinstance(message, dict) and isinstance(message.get("content"), list | tuple):
            for item in message["content"]:
                kind = item.get("type") if isinstance(item, dict) else item
                if kind not in CONTENT_TYPES:
                    raise ValueError(f"unknown type {kind!r} of a content item; use one of {', '.join(CONTENT_TYPES)}")


def drop_close(text: Any, wanted: bool) -> Any:
    """Decoded text, or a list of it, without the closing token at its end, if `wanted`: it is no special token."""
    if isinstance(text, list):
        return [drop_close(entry, wanted) for entry in text]
    return text.removesuffix(TURN_CLOSE) if wanted else text


class InternLMXComposer2Inputs(BatchFeature):
    """What a processor returns: where labels are put into it, image tokens among them are not to be learned (-100).

    Trainers copy `input_ids` for labels, and TRL's SFT computes its loss without the model's `forward`, which would
    leave image tokens out.
    """

    placeholder_ids: tuple[int, ...] = ()

    def __setitem__(self, name: str, value: Any) -> None:
        ids = self.data.get("input_ids")
        if name == "labels" and hasattr(value, "masked_fill") and getattr(ids, "shape", None) == value.shape:
            for placeholder in self.placeholder_ids:
                value = value.masked_fill(ids == placeholder, IGNORE_INDEX)
        super().__setitem__(name, value)


class InternLMXComposer2Processor(ProcessorMixin):
    """Text, pictures and videos -> inputs of the model.

    Returns `InternLMXComposer2Inputs`, a dict: `input_ids`, `attention_mask`, `mm_token_type_ids` (B, T), padded on the
    left (types: 1 picture, 2 video); `pixel_values` (N, 3, tile, tile) and `image_grid_thw` (n, 3); for videos
    `pixel_values_videos`, `video_grid_thw`.

    A call takes `text` (one or a list), `images` and `videos` (for one text: one or a list; for several: a list of
    lists), the tokenizer's arguments, `hd_num` (see `InternLMXComposer2ImageProcessor`), and `num_frames`, `fps`,
    `do_sample_frames`, `font` (see `InternLMXComposer2VideoProcessor`). The only picture of a single text may go
    unmarked: it stands in front, as in `chat`; in a batch each place is marked.

    `apply_chat_template` takes `use_meta=True` for the released system text, with `meta_instruction` for another; a
    system message does the same.

    Raises:
        ValueError: places and pictures differ in number, an unknown content item, an `hd_num` below 1, a source that
            cannot be read, a text far too long for the model. ImportError: a video file and no decoder. All before any
            compute.
    """

    valid_processor_kwargs = InternLMXComposer2ProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        bos_on_each_piece=False,
        text_only_bos=1,
        context_length=None,
    ):
        self.image_token, self.video_token = "[UNUSED_TOKEN_140]", "[UNUSED_TOKEN_139]"
        ids = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        if tokenizer.unk_token_id in ids:
            raise ValueError(f"the tokenizer lacks {self.image_token} or {self.video_token}; use this model's")
        self.image_token_id, self.video_token_id = ids
        self.bos_on_each_piece, self.text_only_bos = bos_on_each_piece, text_only_bos
        self.context_length = context_length  # of the checkpoint; None: the tokenizer's `model_max_length`
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """The library's, and what the checkpoint's `config.json` says of prompts.

        A release has no chat template, and gets the one beside this file; a kind's own system turn goes into it, and
        the token that a score is read at.
        """
        config = config_of(pretrained_model_name_or_path, **kwargs)
        fields, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        template = Path(__file__).with_name("chat_template.jinja")
        if fields.get("chat_template") is None and template.is_file():
            fields["chat_template"] = template.read_text(encoding="utf-8")
        if config is not None:
            of_config = {name: getattr(config, name) for name in OF_CONFIG}
            fields = {**of_config, **fields}
            told = {
                "default_system": SYSTEM_TEXTS[config.default_system],
                "score_token": SCORE_TOKEN if config.head == "score" else None,
            }
            written = fields.get("chat_template")
            for name, text in told.items():
                if text and isinstance(written, str) and f"set {name}" not in written:
                    written = f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} %}}\n{written}"
            if written is not None:
                fields["chat_template"] = written
        return fields, kwargs

    def check_argument_for_proper_class(self, argument_name, argument):
        """The library's check, but for the video processor: its base class goes unexported without torchvision."""
        if argument_name == "video_processor":
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)

    def apply_chat_template(self, conversation, chat_template=None, *, load_audio_from_video=False, **kwargs):
        """The library's; what the template refuses is a ValueError.

        `load_audio_from_video` is not passed on: servers set it for every video, and this model takes no audio.
        """
        check_items(conversation)
        try:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def decode(self, *args, **kwargs) -> str | list[str]:
        """The tokenizer's; `skip_special_tokens=True` also drops the token that closes an answer."""
        return drop_close(super().decode(*args, **kwargs), kwargs.get("skip_special_tokens", False))

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """See `decode`."""
        return drop_close(super().batch_decode(*args, **kwargs), kwargs.get("skip_special_tokens", False))

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """See `decode`; what a pipeline shows."""
        return self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def __call__(self, *args, return_text_replacement_offsets: bool = False, **kwargs):
        """See the class.

        Args:
            return_text_replacement_offsets: asked for by serving engines, which keep each picture apart and reuse it
                beside others. Then the `hd_num` of a picture depends on nothing but the picture: 24 unless told.
        """
        for name in OF_PARTS:
            if not isinstance(kwargs.get(name, {}), Mapping):
                raise ValueError(f"{name} is {short(kwargs[name])}, but must be a mapping of arguments")
        # An assistant mask asks for both offsets.
        serving = return_text_replacement_offsets and not kwargs.get("return_offsets_mapping")
        if serving and first_given(hd_num_of(kwargs), self.image_processor.hd_num) is None:
            kwargs["hd_num"] = self.image_processor.default_hd_num
        try:
            made = super().__call__(*args, return_text_replacement_offsets=return_text_replacement_offsets, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error
        inputs = InternLMXComposer2Inputs(made.data, skip_tensor_conversion=made.skip_tensor_conversion)
        inputs.placeholder_ids = (self.image_token_id, self.video_token_id)
        return inputs

    # Steps of the library's `__call__`, in its order.

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Give each text its pictures and videos, and check that they fit."""
        if audio is not None:
            raise ValueError("audio is no input of this model; pass text, images and videos")
        if text is None and images is None and videos is None:
            raise ValueError("nothing to process; pass text, images or videos")
        if text is None:
            image_rows = as_rows(images) if images is not None else []
            video_rows = [[] for _ in image_rows]
            videos = as_video_list(videos) if videos is not None else None
        else:
            text = self._texts(text, **kwargs)
            image_rows = self._image_rows(images, text)
            video_rows = self._video_rows(videos, text)
            self._place(text, image_rows, video_rows)
            text = [self._with_bos(entry, **kwargs) for entry in text]
            videos = [video for row in video_rows for video in row] or None
        sources = [source for row in image_rows for source in row]
        hd_num = [
            self.image_processor.layout.default_hd_num(len(pictures) + len(films))
            for pictures, films in zip(image_rows, video_rows, strict=True)
            for _ in pictures
        ]
        return Pictures(sources, hd_num) if sources else None, text, videos, None

    def validate_inputs(self, **kwargs):
        """Nothing left to do: `prepare_inputs_layout` has compared text by text, the library would compare sums."""

    def _process_images(self, images: Pictures, hd_num=None, **kwargs):
        """Tiles, and the text that stands for each picture."""
        hd_num = first_given(hd_num, self.image_processor.hd_num, images.hd_num)
        inputs = self.image_processor(images.sources, hd_num=hd_num, **kwargs)
        return inputs, [self.replace_image_token(inputs, index) for index in range(len(images.sources))]

    def _process_videos(self, videos: list[Any], **kwargs):
        """Tiles, and the text that stands for each video."""
        inputs = self.video_processor(videos, **kwargs)
        return inputs, [self.replace_video_token(inputs, index) for index in range(len(videos))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What stands for picture `image_idx` in the text."""
        _, rows, cols = (int(count) for count in image_inputs["image_grid_thw"][image_idx])
        return self.image_token * self.image_processor.num_tokens(rows, cols)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        """What stands for video `video_idx` in the text."""
        _, rows, cols = (int(count) for count in video_inputs["video_grid_thw"][video_idx])
        return self.video_token * self.video_processor.num_tokens(rows, cols)

    # Text and its places.

    def _texts(self, text: str | Sequence[str], **kwargs) -> list[str]:
        """A list of texts whose places are all placeholders, and whose BOS is the tokenizer's to add."""
        if not isinstance(text, str | list | tuple):
            raise ValueError(f"text must be text or a list of texts, got {type(text).__name__}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("0 texts; pass text=None for pictures alone")
        flat = {**kwargs, **(kwargs.get("text_kwargs") or {})}
        for name, (wanted, fits) in TEXT_OPTIONS.items():
            if flat.get(name) is not None and not fits(flat[name]):
                raise ValueError(f"{name} is {short(flat[name])}, but must be {wanted}")
        for index, entry in enumerate(texts):
            if not isinstance(entry, str):
                raise ValueError(f"text[{index}] must be text, got {type(entry).__name__}")
            if not flat.get("truncation"):  # who has the tokenizer cut texts may pass long ones
                check_text_length(entry, self.context_length or self.tokenizer.model_max_length, self.tokenizer)
        texts = [entry.replace(IMAGE_MARK, self.image_token) for entry in texts]
        adds_bos = flat.get("add_special_tokens", True)
        if adds_bos and self.tokenizer.add_bos_token:  # the chat template's text begins with one
            texts = [entry.removeprefix(self.tokenizer.bos_token) for entry in texts]
        return texts

    def _with_bos(self, text: str, **kwargs) -> str:
        """The text with the BOS that the kind's chat has beside the one in front.

        That one is the tokenizer's, or a chat template has written it: `apply_chat_template(tokenize=True)` then asks
        for no special tokens.
        """
        adds_bos = {**kwargs, **(kwargs.get("text_kwargs") or {})}.get("add_special_tokens", True)
        if not (adds_bos and self.tokenizer.add_bos_token) and not text.startswith(self.tokenizer.bos_token):
            return text
        slots = "|".join(map(re.escape, (self.image_token, self.video_token)))
        if not re.search(slots, text):
            return self.tokenizer.bos_token * (self.text_only_bos - 1) + text
        if not self.bos_on_each_piece:
            return text
        return re.sub(f"({slots})(?!{slots}|$)", lambda slot: slot[0] + self.tokenizer.bos_token, text)

    def _image_rows(self, images: Any, texts: list[str]) -> list[list[Any]]:
        if images is None or (isinstance(images, list | tuple) and not images):
            return [[] for _ in texts]
        if isinstance(images, list | tuple) and any(isinstance(row, list | tuple) for row in images):
            return self._matching([row or [] for row in images], len(texts), "image")
        items = list(images) if isinstance(images, list | tuple) else [images]
        return share_out(items, [text.count(self.image_token) for text in texts], "image")

    def _video_rows(self, videos: Any, texts: list[str]) -> list[list[Any]]:
        if videos is None or (isinstance(videos, list | tuple) and not videos):
            return [[] for _ in texts]
        nested = isinstance(videos, list | tuple) and all(
            isinstance(row, list | tuple | None.__class__) and not is_frame_list(row) for row in videos
        )
        if nested:
            return self._matching([row or [] for row in videos], len(texts), "video")
        return share_out(as_video_list(videos), [text.count(self.video_token) for text in texts], "video")

    @staticmethod
    def _matching(rows: list[Sequence[Any]], count: int, kind: str) -> list[list[Any]]:
        if len(rows) != count:
            raise ValueError(f"{len(rows)} lists of {kind}s but {count} texts; pass one for each text, [] for none")
        return [list(row) if isinstance(row, list | tuple) else [row] for row in rows]

    def _place(self, texts: list[str], image_rows: list[list[Any]], video_rows: list[list[Any]]) -> None:
        """Check every text's places against its pictures and videos; mark the one that may go unmarked, in place."""
        for index, (text, pictures, films) in enumerate(zip(texts, image_rows, video_rows, strict=True)):
            slots = text.count(self.image_token), text.count(self.video_token)
            if slots == (len(pictures), len(films)):
                continue
            if len(texts) == 1 and slots == (0, 0) and len(pictures) + len(films) == 1:
                bos = self.tokenizer.bos_token if text.startswith(self.tokenizer.bos_token) else ""
                texts[0] = bos + (self.image_token if pictures else self.video_token) + text.removeprefix(bos)
                continue
            raise ValueError(
                f"text[{index}] has {slots[0]} places for images but {len(pictures)} images, and {slots[1]} places for "
                f"videos but {len(films)} videos; mark each image's place with {IMAGE_MARK} (or an image item in the "
                f"chat), each video's with {self.video_token} (or a video item), and pass them in that order"
            )

    # For serving engines, which count before they compute.

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """Tokens of pictures of the given (height, width) and of videos of (frames, height, width), all of one prompt.

        `num_image_patches` counts a picture's rows of `pixel_values`: its tiles.
        """
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            layout = self.image_processor.layout
            default = layout.default_hd_num(len(image_sizes) + len(video_sizes or ()))
            most = first_given(hd_num_of(kwargs), self.image_processor.hd_num, default)
            grids = [layout.grid_of_size(width, height, most) for height, width in image_sizes]
            data["num_image_tokens"] = [self.image_processor.num_tokens(*grid) for grid in grids]
            data["num_image_patches"] = [rows * cols for rows, cols in grids]
        if video_sizes is not None:
            films = [[Image.new("1", (width, height))] * frames for frames, height, width in video_sizes]
            layout = self.video_processor.layout
            data["num_video_tokens"] = [layout.tokens(*layout.grid(film, layout.hd_num)) for film in films]
        return MultiModalData(**data)


attach_to_package(__name__)

__all__ = ["InternLMXComposer2Inputs", "InternLMXComposer2Processor"]
