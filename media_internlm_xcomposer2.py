"""Sources to pictures: files, http(s) and data: addresses, bytes, arrays, PIL pictures, videos.

Nothing here touches the network but the http(s) address a caller passes as the source.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .download_internlm_xcomposer2 import (
    URL_MAX_BYTES,
    URL_TIMEOUT,
    decode_base64,
    is_base64,
    read_address,
    scheme_of,
    shorten,
)
from .ixc_utils import TILE, Font, Picture, aspect_ratio, check_hd_num, flatten, to_pixels, to_rgb
from .video_decoding_internlm_xcomposer2 import (
    DECODERS,  # noqa: F401  (also a name of this file)
    VIDEO_EXTENSIONS,
    File,
    check_pixel_count,
    gif_frames,
    is_video,
    read_video,
    unreadable,
)

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
PIXEL_RANGE = 100.0  # CLIP-normalised pixels lie between -2 and 3; those of 0 to 255 are a mistake to name


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
    tile: int | None = None,
) -> Picture:
    """Read one picture or video.

    source: a path, an http(s) or data: address, or the bytes of a picture or video file; a PIL picture of any mode;
    a uint8 or [0, 1] float array of (H, W), (H, W, 3) or (H, W, 4); a list of such pictures, the frames of one video
    (all are kept); a floating pixel tensor. num_frm, start, end, fps, backend: see `load_video`.
    timeout (seconds) and max_bytes limit a download. tile: a video's frames come in the size they will be stitched in.

    Returns an RGB picture; a list of RGB frames for a video or an animated GIF; a pixel tensor as it is.
    Raises FileNotFoundError, ImportError without a video decoder, TypeError for a source of another type, and
    ValueError for all that cannot be read.
    """
    if isinstance(source, Image.Image):
        return _still(source, f"the {source.mode} picture given")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, torch.Tensor):
        return _from_tensor(source)
    if isinstance(source, (list, tuple)):
        return _from_frames(source, timeout, max_bytes)
    name, file = _open(source, timeout, max_bytes)
    head = _head(file)
    if is_video(head) or (head.startswith(b"GIF8") and gif_frames(file) > 1):
        return read_video(file, name, head, num_frm, start, end, fps, backend, tile)[0]
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):  # Pillow would start Ghostscript for these
        raise ValueError(f"{name} is PostScript; convert it to PNG first")
    try:
        img = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is neither a picture nor a video that can be read (first bytes {head[:16]!r}); known extensions: "
            f"{' '.join(dict.fromkeys(IMAGE_EXTENSIONS + VIDEO_EXTENSIONS))}"
        ) from error
    except Exception as error:  # each decoder has exceptions of its own
        raise unreadable(name, error) from error
    with img:
        return _still(img, name)


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
    tile: int | None = None,
) -> list[Image.Image] | tuple[list[Image.Image], list[float]]:
    """Frames of a video, RGB and upright: about fps a second from frame number start to end, num_frm at most.

    video_path: path, http(s) or data: address, or bytes; .gif too. Every round(rate / fps)-th frame is a candidate; of
    n candidates, where n > num_frm, number int(i * n / (num_frm + 1)) is kept for each i. end is exclusive; None, or
    past the last frame: up to the last frame. backend: a name of `DECODERS`, None for the first one installed.
    return_timestamps: also the kept frames' times in seconds from the first frame of the video. tile: frames come in
    the size they will be stitched in.
    Raises FileNotFoundError, ImportError without a decoder, ValueError for a broken file or wrong numbers.
    """
    name, file = _open(video_path, timeout, max_bytes)
    frames, times = read_video(file, name, _head(file), num_frm, start, end, fps, backend, tile)
    return (frames, times) if return_timestamps else frames


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
    check_hd_num(hd_num)
    return to_pixels(load_media(source, num_frm=num_frm, **options), hd_num, tile, font)


def _from_array(array: np.ndarray) -> Image.Image:
    wanted = "(H, W), (H, W, 3) or (H, W, 4) of uint8, or of floats in [0, 1]"
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"array of shape {shorten(str(array.shape))}; pass {wanted} (channels last)")
    try:
        check_pixel_count(array.shape[1], array.shape[0])
    except Image.DecompressionBombError as error:
        raise unreadable("the array given", error) from error
    array = np.asarray(array)  # a masked array's or a matrix's own arithmetic would get in the way
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(f"float array with values from {low:g} to {high:g}; scale it to [0, 1] or pass uint8")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"array of dtype {shorten(str(array.dtype))}; pass {wanted}")
    return flatten(Image.fromarray(np.ascontiguousarray(array)))


def _from_tensor(pixels: torch.Tensor) -> torch.Tensor:
    wanted = "floating, CLIP-normalised (3, H, W) pixels, or 8-bit pictures as PIL or numpy"
    if not pixels.is_floating_point():
        raise ValueError(f"pixel tensor of dtype {pixels.dtype}; pass {wanted}")
    if pixels.is_meta or pixels.layout != torch.strided:
        raise ValueError(f"pixel tensor on {pixels.device} of layout {pixels.layout} holds no pixels; pass {wanted}")
    if pixels.numel():
        low, high = (float(value) for value in torch.aminmax(pixels.detach()))
        if not (low > -PIXEL_RANGE and high < PIXEL_RANGE):  # NaN fails too
            raise ValueError(f"pixel tensor with values from {low:g} to {high:g}; pass {wanted}, about -2 to 3")
    return pixels


def _from_frames(frames: Sequence[Any], timeout: float, max_bytes: int) -> list[Image.Image]:
    stills: list[Image.Image] = []
    for frame in frames:
        opened = None if isinstance(frame, (list, tuple)) else load_media(frame, timeout=timeout, max_bytes=max_bytes)
        stills += [opened] if isinstance(opened, Image.Image) else []
    if not stills or len(stills) < len(frames):
        raise ValueError(
            f"a list of {len(frames)} items, {len(stills)} of them pictures; a list is one video and holds its "
            "frames, one or more still pictures: pass several sources one by one"
        )
    return stills


def _still(img: Image.Image, name: str) -> Image.Image:
    aspect_ratio(*img.size)  # a picture without pixels
    try:
        img.load()
        return to_rgb(img)
    except Exception as error:  # each decoder has exceptions of its own
        raise unreadable(name, error) from error


# ------------------------------------------------------------------------------------------------------ known sources


def source_identity(source: Any) -> Hashable | None:
    """What tells a source apart without decoding it; None where it is to be opened anyway, or does not exist.

    A file: its real path, device, inode, size and time of change. Bytes and data: addresses: their hash. An http(s)
    address: itself, which says nothing about its contents: see `KnownSources`. A list: that of each item. Opened
    pictures, arrays and tensors cost nothing to open: None.
    """
    if isinstance(source, (list, tuple)):
        items = tuple(source_identity(item) for item in source)
        return None if None in items else items
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "bytes", _hash(source)
    if isinstance(source, str) and (scheme := scheme_of(source)):
        return ("data", _hash(source)) if scheme == "data" else ("address", source)
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        path = os.path.realpath(source)
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return "file", path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _has_address(identity: Hashable) -> bool:
    return isinstance(identity, tuple) and (identity[:1] == ("address",) or any(map(_has_address, identity)))


class KnownSources:
    """What reading a source gave, so that a later turn need not read it again. The oldest of `limit` goes first.

    The contents behind an address may change, so an address is known within its conversation alone: to a prompt that
    goes on where a prompt with it ended.
    """

    def __init__(self, limit: int = 1024):
        self._limit, self._lock = limit, threading.Lock()
        self._known: OrderedDict[tuple, Any] = OrderedDict()
        self._prompts: dict[Hashable, list[tuple[int, bytes]]] = {}  # of an address: length and hash of past prompts

    def find(self, key: tuple[Hashable, ...], prompt: str) -> Any | None:
        """What was kept under `key`, whose first item is a `source_identity`; of an address, if `prompt` goes on."""
        with self._lock:
            for length, past in reversed(self._prompts.get(key, [])):
                if length < len(prompt) and _hash(prompt[:length]) == past:
                    return self._known.get((key, past))
            return self._known.get(key)

    def keep(self, key: tuple[Hashable, ...], prompt: str, value: Any) -> None:
        """Keep what reading the source of `key` gave, in the conversation whose text is `prompt`."""
        with self._lock:
            if _has_address(key[0]):
                prompts = self._prompts.setdefault(key, [])
                past = _hash(prompt)
                self._prompts[key] = [entry for entry in prompts if entry[1] != past] + [(len(prompt), past)]
                self._known[key, past] = value
            else:
                self._known[key] = value
            while len(self._known) > self._limit:
                oldest, _ = self._known.popitem(last=False)
                if isinstance(oldest[-1], bytes) and oldest[0] in self._prompts:
                    left = [entry for entry in self._prompts.pop(oldest[0]) if entry[1] != oldest[1]]
                    self._prompts.update({oldest[0]: left} if left else {})

    def clear(self) -> None:
        """Forget every source."""
        with self._lock:
            self._known.clear()
            self._prompts.clear()


def _hash(contents: Any) -> bytes:
    contents = contents.encode("utf-8", "surrogatepass") if isinstance(contents, str) else contents
    return hashlib.blake2b(contents, digest_size=16).digest()


# -------------------------------------------------------------------------------------------------- files and addresses


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
    path = os.fsdecode(source)
    if isinstance(source, str) and scheme_of(source):
        name, data = read_address(source, timeout, max_bytes)
        return name, io.BytesIO(data)
    name = repr(shorten(path))
    if not os.path.exists(path):
        if isinstance(source, str) and is_base64(source):
            name = f"{shorten(source, 60)!r}, no file, taken for base64,"
            return name, io.BytesIO(decode_base64(source, name))
        folder = shorten(os.getcwd())
        raise FileNotFoundError(f"no file {name} (working directory {folder!r}); check the path")
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder; pass one picture or video file in it")
    if not os.path.isfile(path):
        raise ValueError(f"{name} is a device or a pipe; pass a picture or video file, or its bytes")
    if not os.path.getsize(path):
        raise ValueError(f"{name} is empty (0 bytes); fetch or export it again")
    return name, path


def _head(file: File) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getbuffer()[:512].tobytes()
    with open(file, "rb") as opened:
        return opened.read(512)
