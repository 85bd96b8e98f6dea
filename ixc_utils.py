"""Pictures and videos to pixels: geometry, decoding, normalisation. Knows no model and no text.

Legend: tile = side of one ViT input in pixels (560); side = tile // 28 tokens; rows, cols = tiles of a picture.
A picture becomes (3, rows * tile, cols * tile) floats; a video first becomes one long picture of labelled frames.
Nothing here touches the network but the http(s) address a caller passes as the source.
"""

from __future__ import annotations

import base64
import binascii
import functools
import http.client
import importlib
import io
import math
import os
import re
import string
import time
import urllib.error
import urllib.request
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TILE = 560  # the sizes of a stitched video (label band, gap, rule) are given at this tile and scale with it
BAND, GAP, RULE = 40, 10, 2
ONE_IMAGE_HD_NUM, MANY_IMAGES_HD_NUM = 24, 6  # most tiles of the only picture of a conversation, of each of several
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".mov", ".wmv", ".webm", ".gif", ".m4v", ".mpg", ".ts", ".flv")
URL_TIMEOUT = 30.0  # seconds for the whole download
URL_MAX_BYTES = 512 * 2**20
DECODERS = {"av": "av", "torchcodec": "torchcodec.decoders", "decord": "decord"}  # name -> module, best first

_ORIENTATION = 0x0112  # EXIF tag
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # pictures kept in an MP4-like box
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"pnot", b"uuid")
_VIDEO_MAGIC = (b"\x1aE\xdf\xa3", b"0&\xb2u", b"FLV\x01", b"OggS", b"\0\0\x01\xba", b"\0\0\x01\xb3")
_TS_DISCONT = 0x200  # FFmpeg's flag of formats whose time stamps may jump
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError)  # what Pillow raises on damaged files

Picture = Image.Image | list[Image.Image] | torch.Tensor  # what load_media returns: still, video frames, ready pixels
Size = tuple[int, int]  # width, height
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
File = str | io.BytesIO  # local path, or contents


# ---------------------------------------------------------------------------------------------------------- geometry


def image_tokens(rows: int, cols: int, side: int) -> int:
    """Tokens of a picture of rows x cols tiles: global view with row ends, a separator, tiles with row ends."""
    return side * (side + 1) + 1 + rows * side * (cols * side + 1)


def check_hd_num(hd_num: Any) -> None:
    """Raises ValueError for a number of tiles below 1."""
    _check_count("hd_num", hd_num, "the number of tiles the picture may take, 24 by default")


def default_hd_num(num_pictures: int) -> int:
    """Most tiles of each picture in a conversation of num_pictures (videos count), unless the caller says another."""
    return ONE_IMAGE_HD_NUM if num_pictures < 2 else MANY_IMAGES_HD_NUM


def hd_grid(width: int, height: int, hd_num: int, tile: int = TILE) -> tuple[int, int]:
    """(rows, cols) of tiles of a width x height picture after `Image_transform`; rows * cols <= hd_num."""
    return _grid(_hd_size(width, height, hd_num, tile), tile)


def video_grid(width: int, height: int, tile: int = TILE) -> tuple[int, int]:
    """(rows, cols) of tiles of a stitched width x height picture after `Video_transform`; one of them is 1."""
    return _grid(_video_size(width, height, tile), tile)


def _grid(size: Size, tile: int) -> tuple[int, int]:
    return math.ceil(size[1] / tile), math.ceil(size[0] / tile)


def _hd_size(width: int, height: int, hd_num: int, tile: int) -> Size:
    """Size before padding: the longer side becomes the most tiles s for which s * ceil(s / ratio) <= hd_num."""
    _check_count("hd_num", hd_num, "the number of tiles the picture may take, 24 by default")
    _check_count("tile", tile, "the side of one ViT input in pixels, 560 in the 7B release")
    ratio = _ratio(width, height)
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= hd_num:
        scale += 1
    scale = min(scale, math.ceil(max(width, height) / tile))  # never enlarge by more than filling the last tile
    size = tile * scale, max(1, int(tile * scale / ratio))
    return size if width >= height else size[::-1]


def _video_size(width: int, height: int, tile: int) -> Size:
    """Size before padding: the shorter side becomes one tile."""
    long = int(tile * _ratio(width, height))
    return (long, tile) if width >= height else (tile, long)


def _ratio(width: int, height: int) -> float:
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


def _check_count(name: str, value: Any, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}, but must be an integer of 1 or more: {remedy}")


# --------------------------------------------------------------------------------------------------------- transforms


def Image_transform(img: Image.Image, hd_num: int = 25, tile: int = TILE) -> Image.Image:
    """Resize a picture to at most hd_num tiles and pad it with white, below (landscape) or right (portrait).

    Returns an RGB picture whose sides are multiples of tile. Raises ValueError for hd_num below 1.
    Source: the released model's `Image_transform`, equal to it byte for byte.
    """
    return _padded(_resized(_flat(img), _hd_size(img.width, img.height, hd_num, tile)), tile)


def Video_transform(img: Image.Image, hd_num: int = 25, tile: int = TILE) -> Image.Image:
    """Resize a stitched picture to one tile across and pad its long side with white at the far end.

    A video takes as many tiles as its frames need: hd_num only keeps the released signature (a value below 1 is an
    error, as for pictures) and sets no limit; fewer frames, `load_video(num_frm=...)`, do.
    """
    _check_count("hd_num", hd_num, "it sets no limit for a video, take fewer frames instead")
    return _padded(_resized(_flat(img), _video_size(img.width, img.height, tile)), tile)


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
        canvas.paste(_flat(img).resize((width, height), Image.Resampling.BILINEAR), (x, y + band))
        draw.text((x, y), f"<IMAGE {k}>", font=font, fill="black")
        x, y = (0, y + band + height + gap) if down else (x + width + gap, 0)
        if k + 1 < len(sizes):
            at = (y if down else x) - gap + gap // 2  # where the released code draws it: rows 5 and 6 of 10
            box = (0, at, whole[0] - 1, at + rule - 1) if down else (at, 0, at + rule - 1, whole[1] - 1)
            draw.rectangle(box, fill="black")
    return canvas


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


def _resized(img: Image.Image, size: Size) -> Image.Image:
    """Bilinear, always in the landscape form: Pillow rounds between its two passes, so parity needs their order."""
    if img.width >= img.height:
        return img.resize(size, Image.Resampling.BILINEAR)
    turned = img.transpose(Image.Transpose.TRANSPOSE).resize(size[::-1], Image.Resampling.BILINEAR)
    return turned.transpose(Image.Transpose.TRANSPOSE)


def _padded(img: Image.Image, tile: int) -> Image.Image:
    rows, cols = _grid(img.size, tile)
    canvas = Image.new("RGB", (cols * tile, rows * tile), "white")
    canvas.paste(img, (0, 0))
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


# ------------------------------------------------------------------------------------------------- sources -> pictures


def media_pixels(
    source: Any,
    hd_num: int = 24,
    tile: int = TILE,
    font: Font | None = None,
    num_frm: int = 32,
    **options: Any,
) -> torch.Tensor:
    """Any source of `load_media` -> float32 (3, H, W), CLIP-normalised, H and W multiples of tile.

    options go to `load_media`. To count tokens before any resizing, call `load_media`, `media_grid` and `to_pixels`.
    """
    _check_count("hd_num", hd_num, "the number of tiles the picture may take, 24 by default")
    return to_pixels(load_media(source, num_frm=num_frm, **options), hd_num, tile, font)


def media_grid(picture: Picture, hd_num: int = 24, tile: int = TILE) -> tuple[int, int]:
    """(rows, cols) of tiles `to_pixels` will give for what `load_media` returned. Costs nothing."""
    if isinstance(picture, torch.Tensor):
        height, width = _checked_pixels(picture, tile).shape[1:]
        return height // tile, width // tile
    if isinstance(picture, Image.Image):
        return hd_grid(picture.width, picture.height, hd_num, tile)
    return video_grid(*_stitch_plan([frame.size for frame in picture], tile)[2], tile)


def to_pixels(picture: Picture, hd_num: int = 24, tile: int = TILE, font: Font | None = None) -> torch.Tensor:
    """What `load_media` returned -> float32 (3, rows * tile, cols * tile). hd_num counts for still pictures only."""
    if isinstance(picture, torch.Tensor):
        return _checked_pixels(picture, tile).to(torch.float32)
    return _to_tensor(_sized(picture, hd_num, tile, font), tile)


def to_tiles(
    pictures: Sequence[Picture],
    hd_num: int | Sequence[int] = 24,
    tile: int = TILE,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `load_media` returned, n times -> all their tiles (N, 3, tile, tile) float32, and grids (n, 3).

    As `stack_tiles` of `to_pixels`, without the pixels in between. hd_num: of all, or one for each picture.
    """
    most = [hd_num] * len(pictures) if isinstance(hd_num, int) else hd_num
    grids = [(1, *media_grid(picture, limit, tile)) for picture, limit in zip(pictures, most, strict=True)]
    tiles = np.empty((sum(rows * cols for _, rows, cols in grids), 3, tile, tile), np.float32)
    start = 0
    for picture, limit, (_, rows, cols) in zip(pictures, most, grids, strict=True):
        part = tiles[start : start + rows * cols]
        if isinstance(picture, torch.Tensor):
            part[:] = stack_tiles([to_pixels(picture, tile=tile)], tile)[0].detach().cpu().numpy()
        else:
            _write(_sized(picture, limit, tile, font), part.reshape(rows, cols, 3, tile, tile))
        start += rows * cols
    return torch.from_numpy(tiles), torch.tensor(grids)


def _sized(
    picture: Image.Image | list[Image.Image],
    hd_num: int,
    tile: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont | None,
) -> Image.Image:
    """A still picture, or a video's frames stitched, in the size that its tiles have, not yet padded."""
    if isinstance(picture, Image.Image):
        return _resized(_flat(picture), _hd_size(picture.width, picture.height, hd_num, tile))
    stitched = frame2img(picture, font, tile)
    return _resized(stitched, _video_size(stitched.width, stitched.height, tile))


def load_media(
    source: Any,
    *,
    num_frm: int = 32,
    start: int | None = None,
    end: int | None = None,
    fps: float = 1.0,
    backend: str | None = None,
    timeout: float = URL_TIMEOUT,
    max_bytes: int = URL_MAX_BYTES,
) -> Picture:
    """Read one picture or video.

    source: a path, an http(s) or data: address, or the bytes of a picture or video file; a PIL picture of any mode;
    a uint8 or [0, 1] float array of (H, W), (H, W, 3) or (H, W, 4); a list of such pictures, the frames of one video
    (all are kept); a floating pixel tensor. num_frm, start, end, fps, backend: see `load_video`.
    timeout (seconds) and max_bytes limit a download.

    Returns an RGB picture; a list of RGB frames for a video or an animated GIF; a pixel tensor as it is.
    Raises FileNotFoundError, ImportError without a video decoder, TypeError for a source of another type, and
    ValueError for all that cannot be read.
    """
    if isinstance(source, Image.Image):
        return _still(source, f"the {source.mode} picture given")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, torch.Tensor):
        if not source.is_floating_point():
            raise ValueError(
                f"pixel tensor of dtype {source.dtype}; pass floating, CLIP-normalised (3, H, W) pixels, "
                "or 8-bit pictures as PIL or numpy"
            )
        return source
    if isinstance(source, (list, tuple)):
        frames = [load_media(frame, timeout=timeout, max_bytes=max_bytes) for frame in source]
        stills = [frame for frame in frames if isinstance(frame, Image.Image)]
        if not frames or len(stills) < len(frames):
            raise ValueError(
                f"a list of {len(frames)} items, {len(stills)} of them pictures; a list is one video and holds its "
                "frames, one or more still pictures: pass several sources one by one"
            )
        return stills
    name, file = _open(source, timeout, max_bytes)
    head = _head(file)
    if _is_video(head) or (head.startswith(b"GIF8") and _gif_frames(file, name) > 1):
        return _read_video(file, name, head, num_frm, start, end, fps, backend)[0]
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):  # Pillow would start Ghostscript for these
        raise ValueError(f"{name} is PostScript; convert it to PNG first")
    try:
        img = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is neither a picture nor a video that can be read (first bytes {head[:16]!r}); known extensions: "
            f"{' '.join(dict.fromkeys(IMAGE_EXTENSIONS + VIDEO_EXTENSIONS))}"
        ) from error
    except (Image.DecompressionBombError, *_BROKEN) as error:
        raise _unreadable(name, error) from error
    with img:
        return _still(img, name)


def to_rgb(img: Image.Image) -> Image.Image:
    """Picture of any mode -> 8-bit RGB, turned upright by its EXIF orientation; transparency shows white.

    16-bit grey is divided by 257. Modes "I" and "F" have no fixed range: values within [0, 1] ("F" only), [0, 255] and
    [0, 65535] are taken as such, others are stretched from their least to their greatest. Other RGB is unchanged.
    """
    if img.getexif().get(_ORIENTATION, 1) != 1:
        img = ImageOps.exif_transpose(img)
    return _flat(img)


def _flat(img: Image.Image) -> Image.Image:
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


def _from_array(array: np.ndarray) -> Image.Image:
    wanted = "(H, W), (H, W, 3) or (H, W, 4) of uint8, or of floats in [0, 1]"
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"array of shape {array.shape}; pass {wanted} (channels last)")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(f"float array with values from {low:g} to {high:g}; scale it to [0, 1] or pass uint8")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"array of dtype {array.dtype}; pass {wanted}")
    return _flat(Image.fromarray(np.ascontiguousarray(array)))


def _still(img: Image.Image, name: str) -> Image.Image:
    _ratio(*img.size)
    try:
        img.load()
        return to_rgb(img)
    except (Image.DecompressionBombError, *_BROKEN) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> ValueError:
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(f"{name}: {error}; shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file")
    return ValueError(f"{name} is broken or cut short ({error}); fetch or export it again")


def _checked_pixels(pixels: torch.Tensor, tile: int) -> torch.Tensor:
    shape = tuple(pixels.shape)
    if pixels.ndim == 4 and shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel() or any(n % tile for n in pixels.shape[1:]):
        raise ValueError(f"pixel tensor of shape {shape}; pass (3, H, W) or (1, 3, H, W), H and W multiples of {tile}")
    if not pixels.is_floating_point():
        raise ValueError(f"pixel tensor of dtype {pixels.dtype}; pass floating, CLIP-normalised pixels")
    return pixels


# ------------------------------------------------------------------------------------------------ files and addresses


def _open(source: Any, timeout: float, max_bytes: int) -> tuple[str, File]:
    """(name for messages, local path or bytes in memory)."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ValueError("0 bytes of data; pass the bytes of a picture or video file")
        return f"the {len(source)} bytes given", io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"cannot read a {type(source).__name__}; pass a path, an http(s) or data: address, bytes, a PIL picture, "
            "a numpy array, a pixel tensor or a list of frames"
        )
    path = os.fspath(source)
    if isinstance(source, str) and (scheme := re.match(r"(data):|([A-Za-z][\w+.-]*)://", source)):
        kind = (scheme[1] or scheme[2]).lower()
        if kind in ("http", "https"):
            return _fetch(source, timeout, max_bytes)
        if kind == "data":
            return _data_url(source, max_bytes)
        raise ValueError(f"{source!r} has scheme {kind!r}; only http, https and data are read; pass files as a path")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no file {path!r} (working directory {os.getcwd()!r}); check the path")
    if os.path.isdir(path):
        raise ValueError(f"{path!r} is a folder; pass one picture or video file in it")
    if not os.path.getsize(path):
        raise ValueError(f"{path!r} is empty (0 bytes); fetch or export it again")
    return repr(path), path


def _fetch(url: str, timeout: float, max_bytes: int) -> tuple[str, File]:
    """Download with a limit on the whole time and size; redirects stay within http(s), as no other handler exists."""
    opener = urllib.request.OpenerDirector()
    for handler in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect"):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    deadline, data = time.monotonic() + timeout, bytearray()
    too_large = f"{url} is over {max_bytes} bytes; pass a smaller file or a larger max_bytes"
    try:
        request = urllib.request.Request(quote(url, safe=string.punctuation), headers={"User-Agent": "ixc_utils/2.5"})
        with opener.open(request, timeout=timeout) as response:
            kind = response.headers.get("Content-Type", "none")
            if (response.length or 0) > max_bytes:
                raise ValueError(too_large)
            while chunk := response.read1(1 << 16):  # returns what has come, so that a slow sender meets the deadline
                data += chunk
                if len(data) > max_bytes:
                    raise ValueError(too_large)
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answered {error.code} {error.reason}; check the address") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
            raise ValueError(f"{url} timed out after {timeout:g} s; try again or pass a larger timeout") from error
        raise ValueError(f"{url} could not be fetched ({error}); check the address and the network") from error
    if not data:
        raise ValueError(f"{url} is empty (0 bytes, content type {kind}); check the address")
    return f"{url} (content type {kind})", io.BytesIO(data)


def _data_url(url: str, max_bytes: int) -> tuple[str, File]:
    header, comma, payload = url.partition(",")
    short = url[:40] + "..."
    if len(payload) > max_bytes * 4 // 3 + 4:
        raise ValueError(f"{short} is over {max_bytes} bytes; pass a smaller file or a larger max_bytes")
    try:
        raw = unquote_to_bytes(payload)
        data = base64.b64decode(raw, validate=True) if header.endswith(";base64") else raw
    except binascii.Error as error:
        raise ValueError(f"{short} is not valid base64 ({error}); encode the file's bytes again") from error
    if not comma or not data:
        raise ValueError(f"{short} holds no data; write data:image/png;base64,...")
    return short, io.BytesIO(data)


def _head(file: File) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getbuffer()[:512].tobytes()
    with open(file, "rb") as opened:
        return opened.read(512)


def _is_video(head: bytes) -> bool:
    """By content: an extension may lie, and a decoder asked to guess would also play text files and playlists."""
    if head[4:8] in _MP4_BOXES:
        return head[8:12] not in _STILL_BRANDS
    riff = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    transport = head[:1] == head[188:189] == b"G"
    return riff or transport or head.startswith(_VIDEO_MAGIC)


# --------------------------------------------------------------------------------------------------------------- video


def load_video(
    video_path: Any,
    num_frm: int = 32,
    start: int | None = None,
    end: int | None = None,
    fps: float = 1.0,
    return_timestamps: bool = False,
    backend: str | None = None,
    timeout: float = URL_TIMEOUT,
    max_bytes: int = URL_MAX_BYTES,
) -> list[Image.Image] | tuple[list[Image.Image], list[float]]:
    """Frames of a video, RGB and upright: about fps a second from frame number start to end, num_frm at most.

    video_path: path, http(s) or data: address, or bytes; .gif too. Every round(rate / fps)-th frame is a candidate; of
    n candidates, where n > num_frm, number int(i * n / (num_frm + 1)) is kept for each i. end is exclusive; None, or
    past the last frame: up to the last frame. backend: a name of `DECODERS`, None for the first one installed.
    return_timestamps: also the kept frames' times in seconds from the first frame of the video.
    Raises FileNotFoundError, ImportError without a decoder, ValueError for a broken file or wrong numbers.
    """
    name, file = _open(video_path, timeout, max_bytes)
    frames, times = _read_video(file, name, _head(file), num_frm, start, end, fps, backend)
    return (frames, times) if return_timestamps else frames


def choose_frames(count: int, rate: float, num_frm: int, start: int | None, end: int | None, fps: float) -> list[int]:
    """Frame numbers `load_video` keeps of count frames at rate frames a second. Pure."""
    first, last = start or 0, count if end is None else min(end, count)
    if not 0 <= first < last:
        raise ValueError(f"start={start}, end={end} hold none of the video's {count} frames; need start < end, {count}")
    picked = range(first, last, max(1, round(rate / fps)))
    n = len(picked)
    return [picked[int(i * n / (num_frm + 1))] for i in range(num_frm)] if n > num_frm else list(picked)


def _read_video(
    file: File,
    name: str,
    head: bytes,
    num_frm: int,
    start: int | None,
    end: int | None,
    fps: float,
    backend: str | None,
) -> tuple[list[Image.Image], list[float]]:
    _check_count("num_frm", num_frm, "the number of frames to keep, 32 by default")
    if not fps > 0:
        raise ValueError(f"fps is {fps!r}, but must be above 0: frames to take per second of video, 1 by default")
    for key, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0):
            raise ValueError(f"{key} is {value!r}, but must be a frame number, an integer of 0 or more")
    if head.startswith(b"GIF8"):
        reader_of, module = _GifReader, None
    elif _is_video(head):
        reader_of, module = _decoder(backend)
    else:
        known = " ".join(VIDEO_EXTENSIONS)
        raise ValueError(f"{name} is no video (first bytes {head[:16]!r}); known extensions: {known}")
    try:
        reader = reader_of(module, file)
        count = reader.count
    except Exception as error:  # each decoder has exceptions of its own
        raise _unreadable(f"video {name}", error) from error
    while count > 0:
        wanted = choose_frames(count, reader.rate, num_frm, start, end, fps)
        try:
            kept = reader.read(wanted)
            if len(kept) == len(wanted):
                return [frame for frame, _ in kept], [seconds for _, seconds in kept]
            count = min(count - 1, reader.recount())  # the container promises more frames than decode
        except Exception as error:
            raise _unreadable(f"video {name}", error) from error
    raise ValueError(f"video {name} has no frame that can be decoded; fetch or export it again")


def _decoder(backend: str | None) -> tuple[Any, Any]:
    if backend is not None and backend not in DECODERS:
        raise ValueError(f"backend is {backend!r}; use {', '.join(DECODERS)}, or None for the first one installed")
    for key in [backend] if backend else DECODERS:
        try:
            return _READERS[key], importlib.import_module(DECODERS[key])
        except (ImportError, OSError, RuntimeError):  # installed without the libraries it needs counts as absent
            continue
    raise ImportError(f"no video decoder ({backend or ', '.join(DECODERS)}) can be imported; run `pip install av`")


class _Reader:
    """count frames at rate a second; `read` gives each wanted frame with its time, stopping short of what fails."""

    count: int
    rate: float

    def read(self, wanted: list[int]) -> list[tuple[Image.Image, float]]:
        raise NotImplementedError

    def recount(self) -> int:
        """Frames that do decode, where fewer do than count; 0 where the decoder cannot tell."""
        return 0


class _AvReader(_Reader):
    """PyAV. The packets' time stamps, read without decoding, map frame numbers to times also at a variable rate."""

    def __init__(self, av: Any, file: File):
        self.av, self.file = av, file
        with self._container() as (container, stream):
            self.rate = float(stream.average_rate or stream.guessed_rate or 1)
            # a packet marked for discard is cut away by the container's edit list
            packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
            self.steady = not int(container.format.flags) & _TS_DISCONT
        self._index(packets)

    def _index(self, stamps: list[tuple[int | None, bool]]) -> None:
        self.count = len(stamps)
        timed = [(pts, key) for pts, key in stamps if pts is not None]
        # where stamps are missing or may jump (MPEG streams), frames are counted from the first one, and never sought
        self.times = sorted(pts for pts, _ in timed) if self.steady and len(timed) == len(stamps) else None
        self.keys = sorted(pts for pts, key in timed if key) if self.times else []

    @contextmanager
    def _container(self) -> Iterator[tuple[Any, Any]]:
        if isinstance(self.file, io.BytesIO):
            self.file.seek(0)
        with self.av.open(self.file if isinstance(self.file, io.BytesIO) else f"file:{self.file}") as container:
            if not container.streams.video:
                raise ValueError("no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream

    def read(self, wanted: list[int]) -> list[tuple[Image.Image, float]]:
        kept: list[tuple[Image.Image, float]] = []
        with self._container() as (container, stream):
            frames, at = self._numbered(container, stream), -1 if self.times is None else self.times[0]
            for number in wanted:
                target = number if self.times is None else self.times[number]
                key = bisect_right(self.keys, target)
                sought = key > 0 and self.keys[key - 1] > at  # nothing between here and that key frame is wanted
                if sought:
                    container.seek(self.keys[key - 1], stream=stream)
                    frames = self._numbered(container, stream)
                for at, frame in frames:
                    if sought and at > target:  # the file's index is wrong: decode from the start instead
                        self.keys = []
                        return self.read(wanted)
                    sought = False
                    if at >= target:
                        kept.append((self._upright(frame), self._seconds(at, stream)))
                        break
        return kept

    def _numbered(self, container: Any, stream: Any) -> Any:
        for number, frame in enumerate(container.decode(stream)):
            yield (number if self.times is None else frame.pts), frame

    def _seconds(self, at: int, stream: Any) -> float:
        return at / self.rate if self.times is None else float((at - self.times[0]) * stream.time_base)

    @staticmethod
    def _upright(frame: Any) -> Image.Image:
        picture = frame.to_image()
        turn = getattr(frame, "rotation", 0) % 360  # counterclockwise
        return picture.rotate(turn, expand=True) if turn else picture

    def recount(self) -> int:
        stamps = []
        with self._container() as (container, stream):
            try:
                for frame in container.decode(stream):
                    stamps.append((frame.pts, bool(frame.key_frame)))
            except self.av.FFmpegError:
                pass  # cut short: what came before is the video
        self._index(stamps)
        return self.count


class _TorchcodecReader(_Reader):
    def __init__(self, module: Any, file: File):
        self.video = module.VideoDecoder(file.getvalue() if isinstance(file, io.BytesIO) else file)
        self.count, self.rate = self.video.metadata.num_frames, self.video.metadata.average_fps or 1.0

    def read(self, wanted: list[int]) -> list[tuple[Image.Image, float]]:
        first = self.video.get_frame_at(0).pts_seconds
        frames = (self.video.get_frame_at(number) for number in wanted)
        return [(Image.fromarray(f.data.permute(1, 2, 0).contiguous().numpy()), f.pts_seconds - first) for f in frames]


class _DecordReader(_Reader):
    def __init__(self, module: Any, file: File):
        self.video = module.VideoReader(file, num_threads=1)
        self.count, self.rate = len(self.video), self.video.get_avg_fps()

    def read(self, wanted: list[int]) -> list[tuple[Image.Image, float]]:
        first = float(self.video.get_frame_timestamp(0)[0])
        times = [float(self.video.get_frame_timestamp(number)[0]) - first for number in wanted]
        return [(Image.fromarray(self.video[n].asnumpy()), at) for n, at in zip(wanted, times, strict=True)]


class _GifReader(_Reader):
    """Pillow. Times come from each frame's duration; 0 means a tenth of a second, as browsers have it."""

    def __init__(self, _: None, file: File):
        self.file, self.times = file, [0.0]
        with Image.open(file) as img:
            for number in range(getattr(img, "n_frames", 1)):
                img.seek(number)
                self.times.append(self.times[-1] + (img.info.get("duration") or 100) / 1000)
        self.count = len(self.times) - 1
        self.rate = self.count / self.times[-1]

    def read(self, wanted: list[int]) -> list[tuple[Image.Image, float]]:
        kept = []
        with Image.open(self.file) as img:
            for number in wanted:
                img.seek(number)
                kept.append((_flat(img.copy()), self.times[number]))
        return kept


_READERS = {"av": _AvReader, "torchcodec": _TorchcodecReader, "decord": _DecordReader}


def _gif_frames(file: File, name: str) -> int:
    try:
        with Image.open(file) as img:
            return getattr(img, "n_frames", 1)
    except (Image.DecompressionBombError, *_BROKEN) as error:
        raise _unreadable(name, error) from error


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
