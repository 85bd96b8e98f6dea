"""A visitor's pictures and videos: read once, checked, named as the visitor named them."""

import base64
import html
import io
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xcomposer.model.ixc_utils import image_tokens, media_grid
from xcomposer.model.media_internlm_xcomposer2 import load_media, load_video
from xcomposer.model.video_decoding_internlm_xcomposer2 import is_video

FRAMES = 32  # most frames of a video, as `load_video` has it
THUMBNAIL, PREVIEW = 112, 720  # longest sides, in pixels
EXPECTED = (OSError, ValueError, TypeError, ImportError, RuntimeError)  # bad input, missing decoder, memory full


@dataclass(frozen=True)
class Media:
    """An opened picture (a PIL image) or video (its frames, with their times in seconds).

    name: the visitor's own. path: where this session keeps the file. source: the upload that it came from.
    """

    name: str
    path: Path
    source: Path
    opened: Any
    times: tuple[float, ...] = ()

    @property
    def frames(self) -> list[Image.Image]:
        return self.opened if isinstance(self.opened, list) else [self.opened]


def read_media(source: Path, folder: Path) -> Media:
    """Open an uploaded file and keep a copy of it in `folder`.

    Raises:
        ValueError, OSError, ImportError: it cannot be read; the message has the file's own name and no path.
    """
    try:
        with open(source, "rb") as file:
            head = file.read(512)
        if is_video(head):
            opened, times = load_video(str(source), num_frm=FRAMES, return_timestamps=True)
        else:
            opened, times = load_media(str(source), num_frm=FRAMES), ()
    except EXPECTED as error:
        raise type(error)(without_paths(str(error), source)) from error
    kept = folder / f"{secrets.token_hex(8)}{source.suffix.lower()[:8]}"
    shutil.copyfile(source, kept)
    return Media(source.name, kept, source, opened, tuple(times))


def without_paths(message: str, source: Path) -> str:
    """An error for a visitor: the file's own name in place of the server's path, no working directory."""
    message = message.replace(str(source), source.name)
    return " ".join(re.sub(r" \(working directory '[^']*'\)", "", message).split())


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def tokens_of(media: Media, hd_num: int, tile: int, side: int) -> tuple[int, int]:
    """(tiles, tokens) that a picture or a whole video becomes."""
    rows, cols = media_grid(media.opened, hd_num, tile)
    return rows * cols, image_tokens(rows, cols, side)


def data_address(picture: Image.Image, longest: int = PREVIEW) -> str:
    """A picture, no larger than that, as a data: address."""
    small = picture.copy()
    small.thumbnail((longest, longest))
    made = io.BytesIO()
    small.convert("RGB").save(made, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(made.getvalue()).decode()}"


def strip_of(media: Sequence[Media], notes: Sequence[str]) -> str:
    """Thumbnails with a note each, and a video's frames with their times, as HTML."""
    cards = []
    for one, note in zip(media, notes, strict=True):
        frames = "".join(
            f'<figure><img alt="{time_of(at)}" src="{data_address(frame, THUMBNAIL)}">'
            f"<figcaption>{time_of(at)}</figcaption></figure>"
            for frame, at in zip(one.frames, one.times, strict=False)
        )
        shown = frames or f'<img alt="" src="{data_address(one.frames[0], THUMBNAIL)}">'
        kind, said = "frames" if frames else "still", f"<b>{html.escape(one.name)}</b> {html.escape(note)}"
        cards.append(f'<div class="card"><div class="{kind}">{shown}</div>{said}</div>')
    return f'<div class="strip">{"".join(cards)}</div>' if cards else ""


def time_of(seconds: float) -> str:
    return f"{int(seconds) // 60}:{seconds % 60:04.1f}"
