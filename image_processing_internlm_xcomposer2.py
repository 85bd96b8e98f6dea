"""AutoImageProcessor: pictures -> tiles, through `ixc_utils` as `chat` does it. Knows no model and no text.

Legend: n pictures, N tiles of all of them, tile = side of one ViT input in pixels.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import TensorType

from .configuration_internlm_xcomposer2 import VISION_DEFAULTS, InternLMXcomposer2Config
from .ixc_utils import TILE, PictureLayout
from .kinds_internlm_xcomposer2 import COMMON
from .media_internlm_xcomposer2 import load_media
from .remote_code_internlm_xcomposer2 import attach_to_package

# Arguments that say where a file is to be found; what is left after reading is for the constructor.
HUB_OPTIONS = (
    "cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder", "_from_auto",
    "_from_pipeline", "image_processor_filename",
)  # fmt: skip

class InternLMXComposer2ImagesKwargs(TypedDict, total=False):
    """What a call may set: `hd_num`, most tiles of a picture (one number, or one for each); `crop_to_patches`, see
    `preprocess`; and `return_tensors`."""

    hd_num: int | list[int] | None
    crop_to_patches: bool | None
    return_tensors: str | TensorType | None


def first_given(*values: Any) -> Any:
    """The first of `values` that is not None."""
    return next((value for value in values if value is not None), None)


def as_rows(images: Any) -> list[list[Any]]:
    """A picture, the pictures of one conversation, or a list of those for each conversation -> rows of pictures."""
    if not isinstance(images, list | tuple):
        return [[images]]
    if images and all(isinstance(row, list | tuple) for row in images):
        return [list(row) for row in images]
    return [list(images)]


OF_CONFIG = ("tiling", "image_separators", "default_hd_num", "many_images_hd_num")


def config_of(name: str | os.PathLike, **hub_options) -> InternLMXcomposer2Config | None:
    """The config of a checkpoint, or of the checkpoint that a processor's file lies in; None where there is none."""
    path = Path(name)
    try:
        fields, _ = InternLMXcomposer2Config.get_config_dict(path.parent if path.is_file() else name, **hub_options)
    except OSError:
        return None
    return InternLMXcomposer2Config(**fields)


class TileFields:
    """What image and video processor share. Without them in its own file, a checkpoint's `config.json` counts."""

    tile = TILE
    patch_size = VISION_DEFAULTS["patch_size"]
    merge_size = COMMON["spatial_merge_size"]
    tiling = COMMON["tiling"]
    image_separators = COMMON["image_separators"]
    default_hd_num = COMMON["default_hd_num"]
    many_images_hd_num = COMMON["many_images_hd_num"]

    @property
    def tokens_per_side(self) -> int:
        """Tokens along one side of a tile: merge_size x merge_size patches make one."""
        return self.tile // self.patch_size // self.merge_size

    @property
    def layout(self) -> PictureLayout:
        """What becomes of pictures."""
        return PictureLayout.of(self)

    def num_tokens(self, rows: int, cols: int) -> int:
        """Tokens of a picture of rows x cols tiles."""
        return self.layout.tokens(rows, cols)

    @staticmethod
    def fields_of_checkpoint(name: str | os.PathLike, **hub_options) -> dict[str, Any]:
        """The fields above by the `config.json` beside the processor's own file; {} where there is none."""
        config = config_of(name, **hub_options)
        if config is None:
            return {}
        return {
            "tile": config.tile,
            "patch_size": config.vision_config.patch_size,
            "merge_size": config.spatial_merge_size,
            **{name: getattr(config, name) for name in OF_CONFIG},
        }

    @classmethod
    def read_fields(cls, library: Callable, name: str | os.PathLike, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields of a processor, and the arguments left over.

        The processor's own file, read by `library`, stands over the checkpoint's `config.json`. Releases have no such
        file: theirs are the defaults.

        Raises:
            OSError: neither file is there.
        """
        sizes = cls.fields_of_checkpoint(name, **kwargs)
        try:
            fields, kwargs = library(name, **kwargs)
        except OSError:
            if not sizes:
                raise
            fields, kwargs = {}, {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
        return {**sizes, **fields}, kwargs


class InternLMXComposer2ImageProcessor(TileFields, BaseImageProcessor):
    """Pictures of any source that `chat` takes -> `pixel_values` (N, 3, tile, tile), `image_grid_thw` (n, 3).

    Args:
        hd_num: most tiles of a picture; None: the checkpoint's (24 for the only picture of a conversation, 6 each for
            more, in 2.5).
        tile, patch_size, merge_size: side of a tile and of a patch in pixels, patches along a side of a token.
    """

    valid_kwargs = InternLMXComposer2ImagesKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]
    hd_num = None

    @property
    def size(self) -> dict[str, int]:
        """The picture that takes most tokens: a serving engine reserves memory by it."""
        tiles = 1 if self.tiling == "none" else first_given(self.hd_num, self.default_hd_num)
        return {"height": tiles * self.tile, "width": self.tile}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open sources, in whatever nesting they come."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(source) for source in image_url_or_urls]
        return load_media(image_url_or_urls)

    def preprocess(
        self,
        images: Any,
        hd_num: int | Sequence[int] | None = None,
        return_tensors: str | TensorType | None = None,
        crop_to_patches: bool | None = None,
    ) -> BatchFeature:
        """Tiles of one picture, of a conversation's pictures (a list), or of several conversations' (a list of lists).

        Args:
            images: see `load_media` for what a picture may be.
            hd_num: as in the class; or a list, one for each picture.
            crop_to_patches: asked for by trainers (TRL's GRPO), which then read each picture's tiles in `num_patches`
                (n). False: one tile a picture.

        Raises:
            ValueError: no picture, one that cannot be read, an `hd_num` below 1 or one list too long or short.
        """
        rows = as_rows(images)
        pictures = [picture for row in rows for picture in row]
        if not pictures:
            raise ValueError("0 images; pass images=None for a prompt without")
        hd_num = 1 if crop_to_patches is False else first_given(hd_num, self.hd_num)
        if hd_num is None:
            hd_num = [self.layout.default_hd_num(len(row)) for row in rows for _ in row]
        elif not isinstance(hd_num, list | tuple):
            hd_num = [hd_num] * len(pictures)
        if len(hd_num) != len(pictures):
            raise ValueError(f"hd_num lists {len(hd_num)} numbers for {len(pictures)} images; pass one for each")
        for most in hd_num:
            self.layout.grid_of_size(1, 1, most)  # a wrong hd_num shows before any picture is opened
        tiles, grids = self.layout.tiles([load_media(picture) for picture in pictures], hd_num)
        data = {"pixel_values": tiles, "image_grid_thw": grids}
        if crop_to_patches is not None:
            data["num_patches"] = grids.prod(-1)
        return BatchFeature(data, tensor_type=return_tensors)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Rows of `pixel_values` of a picture: its tiles."""
        hd_num = first_given((images_kwargs or {}).get("hd_num"), self.hd_num, self.default_hd_num)
        rows, cols = self.layout.grid_of_size(width, height, hd_num)
        return rows * cols

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """See `read_fields`."""
        return cls.read_fields(super().get_image_processor_dict, pretrained_model_name_or_path, **kwargs)


attach_to_package(__name__)

__all__ = ["InternLMXComposer2ImageProcessor"]
