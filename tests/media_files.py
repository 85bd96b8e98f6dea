"""Pictures and clips that the tests of reading and geometry draw for themselves."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
CLIP = GOLDEN / "videos" / "clip_90f_30fps_320x240.mp4"
LONG = GOLDEN / "videos" / "long_700f_10fps_160x128.mp4"


def pic(width, height, number):
    """The test picture of that number, as the recorded cases were made from."""
    y, x = np.mgrid[0:height, 0:width]
    draw_from = np.random.default_rng(number)
    ramps = [x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + 2 * y + 37 * number) % 256]
    img = Image.fromarray(np.stack(ramps, -1).astype(np.uint8))
    for _ in range(6):
        cx, cy = int(draw_from.integers(0, width)), int(draw_from.integers(0, height))
        r = int(draw_from.integers(3, max(4, min(width, height) // 3)))
        fill = tuple(int(c) for c in draw_from.integers(0, 255, 3))
        ImageDraw.Draw(img).ellipse([cx - r, cy - r, cx + r, cy + r], fill=fill)
    return img


def sha(img):
    return hashlib.sha256(img.tobytes()).hexdigest()


def frame_number(img):
    """The number in the 16 black or white cells of a coded clip's top quarter, leftmost = bit 0."""
    grey = np.asarray(img.convert("L"))
    height, width = grey.shape
    return sum(int(grey[height // 8, int((i + 0.5) * width / 16)] > 127) << i for i in range(16))


def file_bytes(img, kind="PNG", **options):
    buffer = io.BytesIO()
    img.save(buffer, kind, **options)
    return buffer.getvalue()


def make_clip(path, codec, size=(64, 48), frames=20, rate=10, **stream_options):
    """A clip coded like the recorded ones."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        try:
            stream = container.add_stream(codec, rate=rate)
        except av.FFmpegError:
            pytest.skip(f"this PyAV has no {codec} encoder")
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = stream_options
        for n in range(frames):
            img = Image.new("RGB", size, (90, 90, 90))
            for bit in range(16):
                box = [bit * size[0] // 16, 0, (bit + 1) * size[0] // 16 - 1, size[1] // 4]
                ImageDraw.Draw(img).rectangle(box, fill="white" if n >> bit & 1 else "black")
            container.mux(stream.encode(av.VideoFrame.from_image(img)))
        container.mux(stream.encode())
    return path
