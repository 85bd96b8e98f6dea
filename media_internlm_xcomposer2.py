"""Sources to pictures: files, http(s) and data: addresses, bytes, arrays, PIL pictures, videos.

Nothing here touches the network but the http(s) address a caller passes as the source.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import re
import string
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import torch
from PIL import Image

from .ixc_utils import TILE, Font, Picture, aspect_ratio, check_hd_num, flatten, to_pixels, to_rgb
from .video_decoding_internlm_xcomposer2 import (
    BROKEN,
    DECODERS,  # noqa: F401  (also a name of this file)
    VIDEO_EXTENSIONS,
    File,
    gif_frames,
    is_video,
    read_video,
    unreadable,
)

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
URL_TIMEOUT = 30.0  # seconds for the whole download
URL_MAX_BYTES = 512 * 2**20


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
    if is_video(head) or (head.startswith(b"GIF8") and gif_frames(file, name) > 1):
        return read_video(file, name, head, num_frm, start, end, fps, backend)[0]
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):  # Pillow would start Ghostscript for these
        raise ValueError(f"{name} is PostScript; convert it to PNG first")
    try:
        img = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is neither a picture nor a video that can be read (first bytes {head[:16]!r}); known extensions: "
            f"{' '.join(dict.fromkeys(IMAGE_EXTENSIONS + VIDEO_EXTENSIONS))}"
        ) from error
    except (Image.DecompressionBombError, *BROKEN) as error:
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
) -> list[Image.Image] | tuple[list[Image.Image], list[float]]:
    """Frames of a video, RGB and upright: about fps a second from frame number start to end, num_frm at most.

    video_path: path, http(s) or data: address, or bytes; .gif too. Every round(rate / fps)-th frame is a candidate; of
    n candidates, where n > num_frm, number int(i * n / (num_frm + 1)) is kept for each i. end is exclusive; None, or
    past the last frame: up to the last frame. backend: a name of `DECODERS`, None for the first one installed.
    return_timestamps: also the kept frames' times in seconds from the first frame of the video.
    Raises FileNotFoundError, ImportError without a decoder, ValueError for a broken file or wrong numbers.
    """
    name, file = _open(video_path, timeout, max_bytes)
    frames, times = read_video(file, name, _head(file), num_frm, start, end, fps, backend)
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
        raise ValueError(f"array of shape {array.shape}; pass {wanted} (channels last)")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(f"float array with values from {low:g} to {high:g}; scale it to [0, 1] or pass uint8")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"array of dtype {array.dtype}; pass {wanted}")
    return flatten(Image.fromarray(np.ascontiguousarray(array)))


def _still(img: Image.Image, name: str) -> Image.Image:
    aspect_ratio(*img.size)  # a picture without pixels
    try:
        img.load()
        return to_rgb(img)
    except (Image.DecompressionBombError, *BROKEN) as error:
        raise unreadable(name, error) from error


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
