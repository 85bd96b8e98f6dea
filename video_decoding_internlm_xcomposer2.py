"""Frames of a video: which decoder, which frames, at what times. Files only, and bytes in memory: knows no address.

A frame number counts from the first frame that the container shows.
"""

from __future__ import annotations

import importlib
import io
import numbers
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from .ixc_utils import check_count, choose_frames, flatten, shrink_frame

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".mov", ".wmv", ".webm", ".gif", ".m4v", ".mpg", ".ts", ".flv")
DECODERS = {"av": "av", "torchcodec": "torchcodec.decoders", "decord": "decord"}  # name -> module, best first
MAX_SERIAL_PIXELS = 1 << 29  # of a GIF, decoded at about 6 ns each

_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # pictures kept in an MP4-like box
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"pnot", b"uuid")
_VIDEO_MAGIC = (b"\x1aE\xdf\xa3", b"0&\xb2u", b"FLV\x01", b"OggS", b"\0\0\x01\xba", b"\0\0\x01\xb3")
TS_PACKET = 188  # bytes of an MPEG transport stream's packet
_TS_DISCONT = 0x200  # FFmpeg's flag of formats whose time stamps may jump

File = str | io.BytesIO  # local path, or contents


def is_video(head: bytes) -> bool:
    """By content: an extension may lie, and a decoder asked to guess would also play text files and playlists."""
    if head[4:8] in _MP4_BOXES:
        return head[8:12] not in _STILL_BRANDS
    riff = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    packets = head[: TS_PACKET * 3 : TS_PACKET]  # each opens with the letter, which other files may hold by chance
    transport = set(packets) == {ord("G")} and len(packets) > 1 and not head.startswith(b"GIF8")
    return riff or transport or head.startswith(_VIDEO_MAGIC)


def unreadable(name: str, error: Exception) -> ValueError:
    """The error to raise for a file that a decoder gave up on."""
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(f"{name}: {error}; shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file")
    reason = str(error)[:500] or type(error).__name__
    return ValueError(f"{name} is broken or cut short ({reason}); fetch or export it again")


def check_pixel_count(width: int, height: int) -> None:
    """Pillow's limit against files that claim more pixels than memory holds, for what Pillow does not open."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > 2 * most:
        raise Image.DecompressionBombError(f"{width} x {height} pixels exceed the limit of {2 * most}")


def read_video(
    file: File,
    name: str,
    head: bytes,
    num_frm: int,
    start: int | None,
    end: int | None,
    fps: float,
    backend: str | None,
    tile: int | None = None,
) -> tuple[list[Image.Image], list[float]]:
    """(frames, their times in seconds); see `load_video`. tile: frames are shrunk for it as they are read."""
    check_count("num_frm", num_frm, "the number of frames to keep, 32 by default")
    if isinstance(fps, bool) or not isinstance(fps, numbers.Real) or not fps > 0:
        raise ValueError(f"fps is {fps!r}, but must be above 0: frames to take per second of video, 1 by default")
    for key, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0):
            raise ValueError(f"{key} is {value!r}, but must be a frame number, an integer of 0 or more")
    if head.startswith(b"GIF8"):
        reader_of, module = _GifReader, None
    elif is_video(head):
        reader_of, module = _decoder(backend)
    else:
        known = " ".join(VIDEO_EXTENSIONS)
        raise ValueError(f"{name} is no video (first bytes {head[:16]!r}); known extensions: {known}")
    try:
        reader = reader_of(module, file)
        reader.tile = tile
        count = reader.count
    except Exception as error:  # each decoder has exceptions of its own
        raise unreadable(f"video {name}", error) from error
    while count > 0:
        wanted = choose_frames(count, reader.rate, num_frm, start, end, fps)
        if reader.pixels_until(wanted[-1]) > MAX_SERIAL_PIXELS:
            raise ValueError(
                f"video {name}: frame {wanted[-1]} of {count} takes {reader.pixels_until(wanted[-1])} pixels to reach, "
                f"more than {MAX_SERIAL_PIXELS}; convert it to MP4, or pass a smaller end"
            )
        try:
            kept = reader.read(wanted)
            if len(kept) == len(wanted):
                return [frame for frame, _ in kept], [seconds for _, seconds in kept]
            count = min(count - 1, reader.recount())  # the container promises more frames than decode
        except Exception as error:
            raise unreadable(f"video {name}", error) from error
    raise ValueError(f"video {name} has no frame that can be decoded; fetch or export it again")


def _decoder(backend: str | None) -> tuple[Any, Any]:
    if backend is not None and (not isinstance(backend, str) or backend not in DECODERS):
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
    tile: int | None = None  # set: frames are kept in the size they are stitched in

    def read(self, wanted: list[int]) -> list[tuple[Image.Image, float]]:
        raise NotImplementedError

    def kept(self, frame: Image.Image) -> Image.Image:
        return frame if self.tile is None else shrink_frame(frame, self.tile)

    def pixels_until(self, number: int) -> int:
        """Pixels to decode before frame `number` shows, where each frame is drawn over the last; 0: none."""
        return 0

    def recount(self) -> int:
        """Frames that do decode, where fewer do than count; 0 where the decoder cannot tell."""
        return 0


class _AvReader(_Reader):
    """PyAV. The packets' time stamps, read without decoding, map frame numbers to times also at a variable rate."""

    def __init__(self, av: Any, file: File):
        self.av, self.file = av, file
        with self._container() as (container, stream):
            check_pixel_count(stream.codec_context.width, stream.codec_context.height)
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
                        kept.append((self.kept(self._upright(frame)), self._seconds(at, stream)))
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
        pictures = ((Image.fromarray(f.data.permute(1, 2, 0).contiguous().numpy()), f.pts_seconds) for f in frames)
        return [(self.kept(picture), at - first) for picture, at in pictures]


class _DecordReader(_Reader):
    def __init__(self, module: Any, file: File):
        self.video = module.VideoReader(file, num_threads=1)
        self.count, self.rate = len(self.video), self.video.get_avg_fps()

    def read(self, wanted: list[int]) -> list[tuple[Image.Image, float]]:
        first = float(self.video.get_frame_timestamp(0)[0])
        times = [float(self.video.get_frame_timestamp(number)[0]) - first for number in wanted]
        return [(self.kept(Image.fromarray(self.video[n].asnumpy())), at) for n, at in zip(wanted, times, strict=True)]


class _GifReader(_Reader):
    """Pillow. Times come from each frame's duration; 0 means a tenth of a second, as browsers have it."""

    def __init__(self, _: None, file: File):
        self.file, self.times = file, [0.0]
        with Image.open(file) as img:
            self.pixels = img.width * img.height
        for delay in gif_delays(_contents(file)):
            self.times.append(self.times[-1] + (delay or 10) / 100)
        self.count = len(self.times) - 1
        self.rate = self.count / self.times[-1] if self.count else 1.0

    def pixels_until(self, number: int) -> int:
        return (number + 1) * self.pixels

    def read(self, wanted: list[int]) -> list[tuple[Image.Image, float]]:
        kept = []
        with Image.open(self.file) as img:
            for number in wanted:
                img.seek(number)
                kept.append((self.kept(flatten(img.copy())), self.times[number]))
        return kept


_READERS = {"av": _AvReader, "torchcodec": _TorchcodecReader, "decord": _DecordReader}


def gif_delays(data: bytes) -> list[int]:
    """Each frame's delay in hundredths of a second, 0 where the file says none. Decodes nothing.

    Source: the blocks of GIF89a, sections 17 to 27; what is cut short ends the list.
    """
    delays, delay = [], 0
    at = 13 + _color_table(data[10:11])
    while at < len(data) and data[at] in b"!,":
        if data[at] == ord("!"):  # an extension: a label, then sub-blocks
            if data[at + 1 : at + 2] == b"\xf9":
                delay = int.from_bytes(data[at + 4 : at + 6], "little")
            at += 2
        else:  # a frame: its place, perhaps its colours, the least code size, then sub-blocks
            delays.append(delay)
            delay = 0
            at += 11 + _color_table(data[at + 9 : at + 10])
        while at < len(data) and data[at]:
            at += data[at] + 1
        at += 1
    return delays


def _color_table(flags: bytes) -> int:
    """Bytes of the colour table that packed fields announce."""
    return 3 << (flags[0] % 8 + 1) if flags and flags[0] & 0x80 else 0


def _contents(file: File) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    with open(file, "rb") as opened:
        return opened.read()


def gif_frames(file: File) -> int:
    """Number of frames of a GIF file."""
    return len(gif_delays(_contents(file)))
