"""Pictures and videos to pixels: geometry, stitching, normalisation. Knows no model, no text and no file.

Legend: tile = side of one ViT input in pixels (560); side = tile // 28 tokens; rows, cols = tiles of a picture.
A picture becomes (3, rows * tile, cols * tile) floats; a video first becomes one long picture of labelled frames.
Sources are read by `media_internlm_xcomposer2`, whose public names are found here too.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:  # and for the loader of remote code, which follows the relative imports it can read
    from .media_internlm_xcomposer2 import load_media, load_video, media_pixels  # noqa: F401

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TILE = 560  # the sizes of a stitched video (label band, gap, rule) are given at this tile and scale with it
BAND, GAP, RULE = 40, 10, 2
ONE_IMAGE_HD_NUM, MANY_IMAGES_HD_NUM = 24, 6  # most tiles of the only picture of a conversation, of each of several
# How a still picture becomes tiles: one tile, squeezed to its shape; tiles as the picture has pixels for, padded at the
# far end; or as many tiles as `hd_num` allows, padded at both ends.
TILINGS = ("none", "capped", "uncapped")

_ORIENTATION = 0x0112  # EXIF tag
_MEDIA = "media_internlm_xcomposer2"
_OF_MEDIA = (  # released here, and read from the file beside
    *("load_media", "load_video", "media_pixels"),
    *("IMAGE_EXTENSIONS", "VIDEO_EXTENSIONS", "DECODERS", "URL_TIMEOUT", "URL_MAX_BYTES"),
)

Picture = Image.Image | list[Image.Image] | torch.Tensor  # what load_media returns: still, video frames, ready pixels
Size = tuple[int, int]  # width, height
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def __getattr__(name: str) -> Any:
    """The names of `media_internlm_xcomposer2`, which imports this file: looked up when first asked for."""
    if name not in _OF_MEDIA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    media = importlib.import_module(f".{_MEDIA}", __package__ or _folder_as_package())
    globals().update({known: getattr(media, known) for known in _OF_MEDIA})
    return globals()[name]


def _folder_as_package() -> str:
    """For callers who have this file on the path by itself: its siblings import one another relatively."""
    package = types.ModuleType("_ixc_utils_siblings")
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    return sys.modules.setdefault(package.__name__, package).__name__


# ---------------------------------------------------------------------------------------------------------- geometry


def image_tokens(rows: int, cols: int, side: int, separators: bool = True) -> int:
    """Tokens of a picture of rows x cols tiles: global view with row ends, a separator, tiles with row ends.

    Without separators a picture is its tile's tokens and nothing else.
    """
    if not separators:
        return rows * side * cols * side
    return side * (side + 1) + 1 + rows * side * (cols * side + 1)


def check_hd_num(hd_num: Any) -> None:
    """Raises ValueError for a number of tiles below 1."""
    check_count("hd_num", hd_num, "the number of tiles the picture may take, 24 by default")


def default_hd_num(num_pictures: int) -> int:
    """Most tiles of each picture in a conversation of num_pictures (videos count), unless the caller says another."""
    return ONE_IMAGE_HD_NUM if num_pictures < 2 else MANY_IMAGES_HD_NUM


def hd_grid(width: int, height: int, hd_num: int, tile: int = TILE, tiling: str = "capped") -> tuple[int, int]:
    """(rows, cols) of tiles of a width x height picture by a tiling of `TILINGS`; rows * cols <= hd_num."""
    return _grid(_hd_size(width, height, hd_num, tile, tiling), tile)


def video_grid(width: int, height: int, tile: int = TILE) -> tuple[int, int]:
    """(rows, cols) of tiles of a stitched width x height picture after `Video_transform`; one of them is 1."""
    return _grid(_video_size(width, height, tile), tile)


def choose_frames(count: int, rate: float, num_frm: int, start: int | None, end: int | None, fps: float) -> list[int]:
    """Frame numbers `load_video` keeps of count frames at rate frames a second. Pure."""
    first, last = start or 0, count if end is None else min(end, count)
    if not 0 <= first < last:
        raise ValueError(f"start={start}, end={end} hold none of the video's {count} frames; need start < end, {count}")
    picked = range(first, last, max(1, round(min(rate / fps, count))))
    n = len(picked)
    return [picked[int(i * n / (num_frm + 1))] for i in range(num_frm)] if n > num_frm else list(picked)


def _grid(size: Size, tile: int) -> tuple[int, int]:
    return math.ceil(size[1] / tile), math.ceil(size[0] / tile)


def _hd_size(width: int, height: int, hd_num: int, tile: int, tiling: str = "capped") -> Size:
    """Size before padding: the longer side becomes the most tiles s for which s * ceil(s / ratio) <= hd_num."""
    check_hd_num(hd_num)
    check_count("tile", tile, "the side of one ViT input in pixels, 560 in the 7B release")
    ratio = aspect_ratio(width, height)
    if tiling == "none":
        return tile, tile
    most = min(hd_num, 1 << 62)  # a float holds what is computed from it
    if tiling == "capped":  # never enlarge by more than filling the last tile
        most = min(most, math.ceil(max(width, height) / tile))
    scale = 1
    while scale < most:  # by halves: hd_num may be any number
        middle = (scale + most + 1) // 2
        fits = middle * math.ceil(middle / ratio) <= hd_num
        scale, most = (middle, most) if fits else (scale, middle - 1)
    size = tile * scale, max(1, int(tile * scale / ratio))
    return size if width >= height else size[::-1]


def _video_size(width: int, height: int, tile: int) -> Size:
    """Size before padding: the shorter side becomes one tile."""
    long = int(tile * aspect_ratio(width, height))
    return (long, tile) if width >= height else (tile, long)


def aspect_ratio(width: int, height: int) -> float:
    if min(width, height) < 1:
        raise ValueError(f"a picture of {width} x {height} has no pixels; pass one that has")
    return max(width, height) / min(width, height)


def _stitch_plan(sizes: Sequence[Size], tile: int) -> tuple[list[Size], bool, Size]:
    """Frame sizes in the stitched picture, whether frames go downwards, and the size of the whole."""
    if not sizes:
        raise ValueError("0 frames to stitch; a video needs at least one")
    band, gap, long = _scaled(BAND, tile), _scaled(GAP, tile), 2 * tile
    frames = [(long, max(1, int(long / (w / h)))) if w > h else (max(1, int(long * (w / h))), long) for w, h in sizes]
    down = sizes[0][0] > sizes[0][1]
    widths, heights = zip(*frames, strict=True)
    if down:
        return frames, down, (max(widths), sum(heights) + len(frames) * (band + gap))
    return frames, down, (sum(widths) + len(frames) * gap, max(heights) + band)


def _scaled(length: int, tile: int) -> int:
    return max(1, round(length * tile / TILE))


def check_count(name: str, value: Any, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}, but must be an integer of 1 or more: {remedy}")


# --------------------------------------------------------------------------------------------------------- transforms


def Image_transform(img: Image.Image, hd_num: int = 25, tile: int = TILE) -> Image.Image:
    """Resize a picture to at most hd_num tiles and pad it with white, below (landscape) or right (portrait).

    Returns an RGB picture whose sides are multiples of tile. Raises ValueError for hd_num below 1.
    Source: the released model's `Image_transform`, equal to it byte for byte.
    """
    return _padded(_resized(flatten(img), _hd_size(img.width, img.height, hd_num, tile)), tile)


def HD_transform(img: Image.Image, hd_num: int = 16, tile: int = 336) -> Image.Image:
    """`Image_transform` of InternLM-XComposer2-4KHD: small pictures are enlarged, and padding is at both ends.

    Source: the released model's `HD_transform`, equal to it byte for byte.
    """
    return _padded(_resized(flatten(img), _hd_size(img.width, img.height, hd_num, tile, "uncapped")), tile, True)


def Video_transform(img: Image.Image, hd_num: int = 25, tile: int = TILE) -> Image.Image:
    """Resize a stitched picture to one tile across and pad its long side with white at the far end.

    A video takes as many tiles as its frames need: hd_num only keeps the released signature (a value below 1 is an
    error, as for pictures) and sets no limit; fewer frames, `load_video(num_frm=...)`, do.
    """
    check_count("hd_num", hd_num, "it sets no limit for a video, take fewer frames instead")
    return _padded(_resized(flatten(img), _video_size(img.width, img.height, tile)), tile)


def frame2img(imgs: Sequence[Image.Image], font: Font | None = None, tile: int = TILE) -> Image.Image:
    """Stitch frames into one picture: landscape frames downwards, others side by side.

    Each frame gets a long side of 2 * tile and a white band above it with its label `<IMAGE k>`, k from 0; a gap
    with a black rule parts neighbours. The first frame decides the direction. font None: `get_font`.
    Band, gap, rule and the font scale with tile. Raises ValueError without frames.
    """
    sizes, down, whole = _stitch_plan([img.size for img in imgs], tile)
    band, gap, rule = (_scaled(length, tile) for length in (BAND, GAP, RULE))
    font = font or get_font(BAND)
    if tile != TILE and isinstance(font, ImageFont.FreeTypeFont):
        font = font.font_variant(size=max(1.0, font.size * tile / TILE))
    canvas = Image.new("RGB", whole, "white")
    draw = ImageDraw.Draw(canvas)
    x = y = 0
    for k, (img, (width, height)) in enumerate(zip(imgs, sizes, strict=True)):
        canvas.paste(flatten(img).resize((width, height), Image.Resampling.BILINEAR), (x, y + band))
        draw.text((x, y), f"<IMAGE {k}>", font=font, fill="black")
        x, y = (0, y + band + height + gap) if down else (x + width + gap, 0)
        if k + 1 < len(sizes):
            at = (y if down else x) - gap + gap // 2  # where the released code draws it: rows 5 and 6 of 10
            box = (0, at, whole[0] - 1, at + rule - 1) if down else (at, 0, at + rule - 1, whole[1] - 1)
            draw.rectangle(box, fill="black")
    return canvas


def shrink_frame(img: Image.Image, tile: int = TILE) -> Image.Image:
    """A frame in the size that `frame2img` gives it, so that a video is never whole in memory.

    Stitched, it is the same byte for byte: where rounding would part the two, or nothing is gained, it stays as it is.
    """
    (size,), _, _ = _stitch_plan([img.size], tile)
    if size[0] * size[1] >= img.width * img.height or _stitch_plan([size], tile)[0] != [size]:
        return img
    return flatten(img).resize(size, Image.Resampling.BILINEAR)


def get_font(size: float = BAND, folder: str | os.PathLike | None = None) -> Font:
    """The label font: the first .ttf or .otf file of the model folder, else Pillow's own. Never downloads.

    size is in pixels. Raises ValueError where the file is no font.
    """
    files = sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in (".ttf", ".otf")) if folder else []
    if not files:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(str(files[0]), size)
    except OSError as error:
        raise ValueError(f"{files[0]} is no readable font ({error}); replace or remove it") from error


def _squeezed(img: Image.Image, tile: int) -> Image.Image:
    """One tile, bicubic, aspect ignored. Tall pictures shrink downwards first: Pillow 13's order, in any Pillow."""
    if img.height > max(img.width, tile):
        img = img.resize((img.width, tile), Image.Resampling.BICUBIC)
    return img.resize((tile, tile), Image.Resampling.BICUBIC)


def _resized(img: Image.Image, size: Size) -> Image.Image:
    """Bilinear, always in the landscape form: Pillow rounds between its two passes, so parity needs their order."""
    if img.width >= img.height:
        return img.resize(size, Image.Resampling.BILINEAR)
    turned = img.transpose(Image.Transpose.TRANSPOSE).resize(size[::-1], Image.Resampling.BILINEAR)
    return turned.transpose(Image.Transpose.TRANSPOSE)


def _padded(img: Image.Image, tile: int, centred: bool = False) -> Image.Image:
    rows, cols = _grid(img.size, tile)
    canvas = Image.new("RGB", (cols * tile, rows * tile), "white")
    spare = canvas.width - img.width, canvas.height - img.height
    canvas.paste(img, (spare[0] // 2, spare[1] // 2) if centred else (0, 0))
    return canvas


def _write(img: Image.Image, cells: np.ndarray) -> None:
    """Write a resized RGB picture into cells (rows, cols, 3, tile, tile): CLIP-normalised, white where it ends.

    One pass uint8 -> float32 a cell and channel, straight into its place; a cell stays in the processor's cache. The
    three channels go side by side where there are cores for it: NumPy computes without the interpreter's lock.
    """
    rows, cols, _, tile, _ = cells.shape

    def write(channel: int) -> None:
        std = CLIP_STD[channel]
        scale, shift = np.float32(1 / (255 * std)), np.float32(-CLIP_MEAN[channel] / std)
        white = np.float32(255) * scale + shift
        values = np.asarray(img.getchannel(channel))
        for row in range(rows):
            for col in range(cols):
                part = values[row * tile : (row + 1) * tile, col * tile : (col + 1) * tile]
                height, width = part.shape
                cell = cells[row, col, channel]
                np.multiply(part, scale, out=cell[:height, :width], dtype=np.float32)
                cell[:height, :width] += shift
                cell[height:] = white
                cell[:height, width:] = white

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))


def _to_tensor(img: Image.Image, tile: int) -> torch.Tensor:
    """Resized RGB picture -> (3, H, W) float32, padded with white to whole tiles and CLIP-normalised."""
    rows, cols = _grid(img.size, tile)
    pixels = np.empty((3, rows * tile, cols * tile), np.float32)
    _write(img, pixels.reshape(3, rows, tile, cols, tile).transpose(1, 3, 0, 2, 4))  # a view, tile by tile
    return torch.from_numpy(pixels)


# --------------------------------------------------------------------------------------------------- pictures -> pixels


def to_rgb(img: Image.Image) -> Image.Image:
    """Picture of any mode -> 8-bit RGB, turned upright by its EXIF orientation; transparency shows white.

    16-bit grey is divided by 257. Modes "I" and "F" have no fixed range: values within [0, 1] ("F" only), [0, 255] and
    [0, 65535] are taken as such, others are stretched from their least to their greatest. Other RGB is unchanged.
    """
    if img.getexif().get(_ORIENTATION, 1) != 1:
        img = ImageOps.exif_transpose(img)
    return flatten(img)


def flatten(img: Image.Image) -> Image.Image:
    if img.mode == "RGB" and "transparency" not in img.info:
        return img
    if img.mode[:1] in "IF":  # I, I;16 and its byte orders, F
        tops = {"F": (1, 255, 65535), "I": (255, 65535)}.get(img.mode, (65535,))
        return _grey(np.asarray(img, dtype=np.float64), tops)
    if img.has_transparency_data:
        img = img.convert("LA").convert("RGBA") if img.mode == "La" else img.convert("RGBA")
        flat = Image.new("RGB", img.size, "white")
        flat.paste(img, mask=img.getchannel("A"))
        return flat
    return img.convert("RGB")


def _grey(values: np.ndarray, tops: tuple[int, ...]) -> Image.Image:
    """White is the first of tops that no value exceeds; beyond them all, the greatest value, and black the least."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"grey values from {low} to {high}; replace NaN and infinity first")
    top = next((float(top) for top in tops if low >= 0 and high <= top), None)
    if top is None:
        values, top = values - low, (high - low) or 1.0
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8)).convert("RGB")


def media_grid(picture: Picture, hd_num: int = 24, tile: int = TILE, tiling: str = "capped") -> tuple[int, int]:
    """(rows, cols) of tiles `to_pixels` will give for what `load_media` returned. Costs nothing.

    Raises:
        ValueError: a video, or pixels of several tiles, where a picture has one.
    """
    if isinstance(picture, Image.Image):
        return hd_grid(picture.width, picture.height, hd_num, tile, tiling)
    if isinstance(picture, torch.Tensor):
        height, width = _checked_pixels(picture, tile).shape[1:]
        if tiling == "none" and (height, width) != (tile, tile):
            raise ValueError(f"pixels of {width} x {height}; this checkpoint takes {tile} x {tile}, see vis_processor")
        return height // tile, width // tile
    if tiling == "none":
        raise ValueError(
            f"a video of {len(picture)} frames becomes one picture of several tiles, and this checkpoint sees a single "
            f"tile of {tile} pixels a picture; pass frames as pictures, each with its own mark"
        )
    return video_grid(*_stitch_plan([frame.size for frame in picture], tile)[2], tile)


def to_pixels(
    picture: Picture, hd_num: int = 24, tile: int = TILE, font: Font | None = None, tiling: str = "capped"
) -> torch.Tensor:
    """What `load_media` returned -> float32 (3, rows * tile, cols * tile). hd_num counts for still pictures only."""
    if isinstance(picture, torch.Tensor):
        return _checked_pixels(picture, tile).to(torch.float32)
    return _to_tensor(_sized(picture, hd_num, tile, font, tiling), tile)


def to_tiles(
    pictures: Sequence[Picture],
    hd_num: int | Sequence[int] = 24,
    tile: int = TILE,
    font: Font | None = None,
    tiling: str = "capped",
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `load_media` returned, n times -> all their tiles (N, 3, tile, tile) float32, and grids (n, 3).

    As `stack_tiles` of `to_pixels`, without the pixels in between. hd_num: of all, or one for each picture.
    """
    most = hd_num if isinstance(hd_num, Sequence) else [hd_num] * len(pictures)
    grids = [(1, *media_grid(picture, limit, tile, tiling)) for picture, limit in zip(pictures, most, strict=True)]
    tiles = np.empty((sum(rows * cols for _, rows, cols in grids), 3, tile, tile), np.float32)
    start = 0
    for picture, limit, (_, rows, cols) in zip(pictures, most, grids, strict=True):
        part = tiles[start : start + rows * cols]
        if isinstance(picture, torch.Tensor):
            part[:] = stack_tiles([to_pixels(picture, tile=tile)], tile)[0].detach().cpu().numpy()
        else:
            _write(_sized(picture, limit, tile, font, tiling), part.reshape(rows, cols, 3, tile, tile))
        start += rows * cols
    return torch.from_numpy(tiles), torch.tensor(grids)


def _sized(
    picture: Image.Image | list[Image.Image], hd_num: int, tile: int, font: Font | None, tiling: str
) -> Image.Image:
    """A still picture, or a video's frames stitched, in the size that its tiles have; padded where that is centred."""
    if isinstance(picture, Image.Image):
        if tiling == "none":
            return _squeezed(flatten(picture), tile)
        if tiling == "uncapped":
            return HD_transform(picture, hd_num, tile)
        return _resized(flatten(picture), _hd_size(picture.width, picture.height, hd_num, tile))
    stitched = frame2img(picture, font, tile)
    return _resized(stitched, _video_size(stitched.width, stitched.height, tile))


class PictureLayout(NamedTuple):
    """What a checkpoint makes of pictures: the side of a tile in pixels and in tokens, how many tiles, what is between.

    Args:
        tiling: one of `TILINGS`.
        separators: row ends, and a vector between global view and tiles; without them there is no global view either.
        hd_num, many_hd_num: most tiles of the only picture of a conversation, of each of several, unless told.
    """

    tile: int = TILE
    side: int = TILE // 28
    tiling: str = "capped"
    separators: bool = True
    hd_num: int = ONE_IMAGE_HD_NUM
    many_hd_num: int = MANY_IMAGES_HD_NUM

    @classmethod
    def of(cls, fields: Any) -> PictureLayout:
        """By the fields of a checkpoint's config or of a processor, which name them alike."""
        return cls(
            tile=fields.tile,
            side=fields.tokens_per_side,
            tiling=fields.tiling,
            separators=fields.image_separators,
            hd_num=fields.default_hd_num,
            many_hd_num=fields.many_images_hd_num,
        )

    def default_hd_num(self, num_pictures: int) -> int:
        """Most tiles of each picture in a conversation of num_pictures (videos count), unless the caller says."""
        return self.hd_num if num_pictures < 2 else self.many_hd_num

    def grid_of_size(self, width: int, height: int, hd_num: int) -> tuple[int, int]:
        """See `hd_grid`."""
        return hd_grid(width, height, hd_num, self.tile, self.tiling)

    def grid(self, picture: Picture, hd_num: int) -> tuple[int, int]:
        """See `media_grid`."""
        return media_grid(picture, hd_num, self.tile, self.tiling)

    def tokens(self, rows: int, cols: int) -> int:
        """See `image_tokens`."""
        return image_tokens(rows, cols, self.side, self.separators)

    def pixels(self, picture: Picture, hd_num: int, font: Font | None = None) -> torch.Tensor:
        """See `to_pixels`."""
        return to_pixels(picture, hd_num, self.tile, font, self.tiling)

    def tiles(
        self, pictures: Sequence[Picture], hd_num: int | Sequence[int], font: Font | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `to_tiles`."""
        return to_tiles(pictures, hd_num, self.tile, font, self.tiling)

    def normalised(self, img: Image.Image) -> torch.Tensor:
        """`vis_processor`: a picture -> pixels (3, H, W); resized where a picture is one tile, else padded to tiles."""
        return to_pixels(img, 1, self.tile, None, "none") if self.tiling == "none" else normalize(img, self.tile)


def _checked_pixels(pixels: torch.Tensor, tile: int) -> torch.Tensor:
    shape = tuple(pixels.shape)
    if pixels.ndim == 4 and shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel() or any(n % tile for n in pixels.shape[1:]):
        raise ValueError(f"pixel tensor of shape {shape}; pass (3, H, W) or (1, 3, H, W), H and W multiples of {tile}")
    if not pixels.is_floating_point():
        raise ValueError(f"pixel tensor of dtype {pixels.dtype}; pass floating, CLIP-normalised pixels")
    return pixels


# ----------------------------------------------------------------------------------------------------- pixels -> tiles


def normalize(img: Image.Image, tile: int = TILE) -> torch.Tensor:
    """RGB picture -> CLIP-normalised (3, H, W) float32, padded with white to whole tiles."""
    return _to_tensor(to_rgb(img), tile)


def stack_tiles(pictures: Sequence[torch.Tensor], tile: int = TILE) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of n pictures -> all their tiles (N, 3, tile, tile) in row order, and grids (n, 3) of (1, rows, cols)."""
    pictures = [_checked_pixels(pixels, tile) for pixels in pictures]
    grids = [(1, pixels.shape[1] // tile, pixels.shape[2] // tile) for pixels in pictures]
    tiles = _uninitialised((sum(rows * cols for _, rows, cols in grids), 3, tile, tile), pictures)
    start = 0
    for pixels, (_, rows, cols) in zip(pictures, grids, strict=True):
        end = start + rows * cols
        cut = pixels.reshape(3, rows, tile, cols, tile).permute(1, 3, 0, 2, 4)  # (3, h, t, w, t) -> (h, w, 3, t, t)
        tiles[start:end].view(rows, cols, 3, tile, tile).copy_(cut)
        start = end
    return tiles, torch.tensor(grids)


def overview(tiles: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Tiles of one picture (rows * cols, 3, tile, tile) -> its global view (3, tile, tile), in the same dtype.

    The whole picture at one tile's size: bicubic in fp32, no antialiasing.
    """
    tile = tiles.shape[-1]
    grid = tiles.reshape(rows, cols, 3, tile, tile).permute(2, 0, 3, 1, 4)  # (h, w, 3, t, t) -> (3, h, t, w, t)
    pixels = grid.reshape(1, 3, rows * tile, cols * tile).float()
    view = torch.nn.functional.interpolate(pixels, (tile, tile), mode="bicubic", align_corners=False)
    return view[0].to(tiles.dtype)


def _uninitialised(shape: tuple[int, ...], like: Sequence[torch.Tensor]) -> torch.Tensor:
    """Room for pixels, in the dtype and on the device of `like`.

    From NumPy where it can be: it asks for huge pages, and 90 MB in small ones take as long as the resize.
    """
    dtype = functools.reduce(torch.promote_types, (pixels.dtype for pixels in like))
    if dtype == torch.float32 and like[0].device.type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, dtype=dtype, device=like[0].device)
