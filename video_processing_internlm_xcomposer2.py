"""AutoVideoProcessor: a video -> one tall picture of labelled frames -> tiles, through `ixc_utils` as `chat` does it.

Legend: n videos, N tiles of all of them, tile = side of one ViT input in pixels.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image, ImageFont
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import TensorType
from transformers.video_processing_utils import BaseVideoProcessor

from .image_processing_internlm_xcomposer2 import TileFields
from .ixc_utils import BAND, choose_frames, get_font
from .media_internlm_xcomposer2 import load_media, load_video
from .prompting_internlm_xcomposer2 import short
from .remote_code_internlm_xcomposer2 import attach_to_package


class InternLMXComposer2VideosKwargs(TypedDict, total=False):
    """What a call may set; see `InternLMXComposer2VideoProcessor`."""

    num_frames: int | None
    fps: int | float | None
    do_sample_frames: bool | None
    video_metadata: Any
    font: Any
    return_tensors: str | TensorType | None


def is_frame(value: Any) -> bool:
    """Whether `value` is one opened frame: a PIL picture, or an array (H, W) or (H, W, 3)."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim < 4)


def is_frame_list(value: Any) -> bool:
    """Whether `value` is one video given as a list of opened frames."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(is_frame(frame) for frame in value)


def as_video_list(videos: Any) -> list[Any]:
    """One video or a list of them -> a list of paths, addresses, bytes, lists of frames, arrays (T, H, W, 3)."""
    if isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim == 5:
        return list(videos)
    return list(videos) if isinstance(videos, list | tuple) and not is_frame_list(videos) else [videos]


def as_metadata_list(metadata: Any, count: int) -> list[dict]:
    """`video_metadata` as one mapping for each of `count` videos, {} where nothing is known."""
    metadata = metadata if isinstance(metadata, list | tuple) else [metadata] * (count if metadata is None else 1)
    if len(metadata) != count:
        raise ValueError(f"video_metadata describes {len(metadata)} videos, but there are {count}; pass one for each")
    return [{} if entry is None else _as_mapping(entry) for entry in metadata]


def _as_mapping(entry: Any) -> dict:
    """transformers' `VideoMetadata` is read as a mapping, and is none."""
    try:
        return {key: entry[key] for key in entry}
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"video_metadata holds {short(entry)}; pass a mapping for each video, or None") from error


class InternLMXComposer2VideoProcessor(TileFields, BaseVideoProcessor):
    """Videos -> `pixel_values_videos` (N, 3, tile, tile), `video_grid_thw` (n, 3): each video is one stitched picture.

    Args:
        num_frames: most frames of a video.
        fps: frames a second to choose from.
        do_sample_frames: None chooses frames of files, and keeps all where frames are given; True chooses of both,
            False keeps every frame of both.
        font: of the frame labels: a PIL font, a font file, or a folder with one; None: a font file in the checkpoint's
            folder, else Pillow's own. Not saved.
        tile, patch_size, merge_size: as in `InternLMXComposer2ImageProcessor`.
    """

    valid_kwargs = InternLMXComposer2VideosKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    num_frames = 32
    fps = 1.0
    do_sample_frames = None
    font = None

    def preprocess(
        self,
        videos: Any,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Any = None,
        font: Any = None,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """Tiles of one video or of a list of videos.

        Args:
            videos: a path, an address, bytes, a list of frames (opened or not), or an array (T, H, W, 3).
            video_metadata: for each video given as frames, a mapping whose `fps` is their rate; without it, all of the
                frames are candidates.
            Others: as in the class.

        Raises:
            ImportError: a video file and no decoder. ValueError: no video, one that cannot be read, wrong numbers.
        """
        videos = as_video_list(videos)
        if not videos:
            raise ValueError("0 videos; pass videos=None for a prompt without")
        frames = self.fetch_frames(videos, num_frames, fps, do_sample_frames, video_metadata)
        font = self._font(self.font if font is None else font)
        tiles, grids = self.layout.tiles(frames, self.default_hd_num, font)
        return BatchFeature({"pixel_values_videos": tiles, "video_grid_thw": grids}, tensor_type=return_tensors)

    def fetch_frames(
        self,
        videos: list[Any],
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Any = None,
    ) -> list[list[Image.Image]]:
        """Each video's chosen frames, a file's in the size they are stitched in; arguments as in `preprocess`."""
        num_frames = self.num_frames if num_frames is None else num_frames
        fps = self.fps if fps is None else fps
        sampled = self.do_sample_frames if do_sample_frames is None else do_sample_frames
        chosen = []
        for video, known in zip(videos, as_metadata_list(video_metadata, len(videos)), strict=True):
            if isinstance(video, str | os.PathLike | bytes | bytearray | memoryview):
                most, rate = (sys.maxsize, float("inf")) if sampled is False else (num_frames, fps)
                chosen.append(load_video(video, num_frm=most, fps=rate, tile=self.tile))
                continue
            if isinstance(video, torch.Tensor):
                video = video.cpu().numpy()
            if not isinstance(video, Iterable):
                raise ValueError(f"a video is {short(video)}; pass a path, an address, bytes, frames or an array")
            if sampled:
                numbers = choose_frames(len(video), known.get("fps") or fps, num_frames, None, None, fps)
                video = [video[number] for number in numbers]
            chosen.append(load_media([frame.numpy() if isinstance(frame, torch.Tensor) else frame for frame in video]))
        return chosen

    @staticmethod
    def _font(font: Any) -> Any:
        """A PIL font of `BAND` pixels, None for Pillow's own."""
        if not isinstance(font, str | os.PathLike):
            if font is not None and not hasattr(font, "getmask"):  # what Pillow draws with
                raise ValueError(f"font is {short(font)}; pass a PIL font, a font file, or a folder with one")
            return font
        if Path(font).is_dir():
            return get_font(BAND, font)
        try:
            return ImageFont.truetype(os.fspath(font), BAND)
        except OSError as error:
            raise ValueError(f"font {os.fspath(font)!r} is no readable font file or folder ({error})") from error

    @classmethod
    def get_video_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """See `read_fields`."""
        fields, kwargs = cls.read_fields(super().get_video_processor_dict, pretrained_model_name_or_path, **kwargs)
        folder = Path(pretrained_model_name_or_path)
        return {"font": str(folder) if folder.is_dir() else None, **fields}, kwargs

    def to_dict(self) -> dict[str, Any]:
        """What is saved: all but the font, which belongs to this machine."""
        fields = super().to_dict()
        fields.pop("font", None)
        return fields


attach_to_package(__name__)

__all__ = ["InternLMXComposer2VideoProcessor"]
