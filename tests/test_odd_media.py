# ruff: noqa: E501 - tables
"""Odd pictures, arrays, addresses and videos: each is read, or refused at once in words that name it."""

import base64
import contextlib
import http.server
import io
import itertools
import struct
import threading
import urllib.parse
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_cases import assert_held
from PIL import Image

from xcomposer.model import download_internlm_xcomposer2 as download
from xcomposer.model import ixc_utils as ixc
from xcomposer.model.media_internlm_xcomposer2 import load_media, load_video

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow on broken files
CLIP = Path(__file__).parent / "golden" / "videos" / "clip_90f_30fps_320x240.mp4"
RNG = np.random.default_rng(0)


def read(source, hd_num=2, tile=56, **options):
    """What a call does with a source before any compute, and the pixels."""
    picture = load_media(source, **options)
    rows, cols = ixc.media_grid(picture, hd_num, tile)
    if rows * cols < 64:
        pixels = ixc.to_pixels(picture, hd_num, tile)
        assert torch.isfinite(pixels).all()


def encoded(img, kind="PNG", **options):
    buffer = io.BytesIO()
    img.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size=(24, 18), mode="RGB"):
    return Image.fromarray(RNG.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def gif(frames=3, size=(20, 10), **options):
    pictures = [noise(size) for _ in range(frames)]
    return encoded(pictures[0], "GIF", save_all=True, append_images=pictures[1:], **options)


def empty_gif_frames(frames, width, height):
    """A GIF of `frames` frames as large as wanted, each of a few bytes."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"!\xf9\x04\0\x04\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0"
    return head + frame * frames + b";"


def png_of(width, height):
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


# ------------------------------------------------------------------------------------------------------------ pictures


def picture_cases(folder):
    kinds = ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "SGI", "DDS"]
    for kind in kinds:
        with contextlib.suppress(OSError, KeyError, ValueError):  # a build of Pillow without it
            whole = encoded(noise(), kind)
            for share in (1, 0.9, 0.6, 0.3, 0.1, 0.02):
                yield f"{kind} cut to {share}", whole[: max(1, int(len(whole) * share))]
            for seed in range(6):  # bytes changed at random, after the first ones, which say what it is
                broken = bytearray(whole)
                for at in np.random.default_rng(seed).integers(8, len(whole), 12):
                    broken[at] ^= 0xA5
                yield f"{kind} damaged {seed}", bytes(broken)
    for mode in (
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBX",
        "RGBa",
        "La",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
        "I",
        "F",
    ):
        with contextlib.suppress(ValueError):
            yield (
                f"mode {mode}",
                noise().convert("RGBA" if mode == "RGBa" else "LA" if mode == "La" else "RGB").convert(mode),
            )
    for mode in ("I;16", "I;16B", "I;16L"):
        yield f"mode {mode}", Image.new(mode, (9, 7))
    for size in ((1, 1), (1, 4000), (4000, 1), (3, 65000), (0, 5), (5, 0), (0, 0)):
        yield f"size {size}", Image.new("RGB", size)
    for size in ((60000, 60000), (2**31 - 1, 2**31 - 1), (0, 0), (1, 2**31 - 1)):
        yield f"PNG that says {size}", png_of(*size)
    closed = Image.open(io.BytesIO(encoded(noise())))
    closed.close()
    yield "a closed picture", closed
    path = folder / "gone.png"
    path.write_bytes(encoded(noise()))
    lazy = Image.open(path)
    path.write_bytes(b"other contents now")
    yield "a picture whose file has changed", lazy
    exif = Image.Exif()
    for orientation in (0, 1, 5, 8, 9, 77):
        exif[0x0112] = orientation
        yield f"orientation {orientation}", encoded(noise(), "JPEG", exif=exif.tobytes())
    still = bytearray(encoded(noise((40, 30)), "GIF"))
    still[188] = ord("G")
    yield "still GIF with a G where a stream's packet opens", bytes(still)
    for text in (
        b"",
        b" ",
        b"G" * 600,
        b"\0" * 600,
        b"BM",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8",
        b"<svg/>",
        b"%!PS",
        b"%PDF-1.4",
    ):
        yield f"bytes {text[:12]!r}", text
    for value in (None, 7, 2.5, object(), {"a": 1}, {1, 2}, lambda: 0, Image, io.BytesIO(encoded(noise())), True):
        yield f"a {type(value).__name__}", value
    own = []
    own.append(own)
    for value in (
        [],
        [[]],
        own,
        [None],
        [noise(), None],
        [noise()] * 3,
        (noise(),),
        [[noise()]],
        ["no.png"],
        [b"x", b"y"],
    ):
        yield f"a list {str(value)[:40]}", value


def test_odd_pictures(tmp_path):
    words = ("pass", "bytes given", "picture", "list", "cannot read", "no.png", "0 bytes")
    cases = [(name, lambda source=source: read(source), words) for name, source in picture_cases(tmp_path)]
    assert len(cases) > 150
    assert_held(cases)


# -------------------------------------------------------------------------------------------------------------- arrays


def array_cases():
    shapes = [
        (),
        (5,),
        (6, 4),
        (6, 4, 1),
        (6, 4, 2),
        (6, 4, 3),
        (6, 4, 4),
        (3, 6, 4),
        (2, 6, 4, 3),
        (0, 4, 3),
        (6, 0),
        (6, 4, 0),
    ]
    for shape, dtype in itertools.product(shapes, ("uint8", "float32", "int64", "bool")):
        yield f"array {shape} {dtype}", np.zeros(shape, dtype)
    for dtype in (
        "int8",
        "uint16",
        "float16",
        "float64",
        "longdouble",
        "complex64",
        "U3",
        "O",
        "M8[s]",
        ">f4",
        ">u2",
        "V4",
    ):
        yield f"array of {dtype}", np.zeros((6, 4, 3), dtype)
    for value in (np.nan, np.inf, -np.inf, -0.5, 1.5, 255.0, 1e30):
        yield f"array with {value}", np.array([[0.5, value]], np.float32)
        yield f"pixels with {value}", torch.full((3, 56, 56), value)
        one = torch.zeros(3, 56, 56)
        one[1, 3, 5] = value
        yield f"pixels with one {value}", one
    yield "huge view", np.broadcast_to(np.uint8(3), (200_000, 200_000))
    yield "huge colour view", np.broadcast_to(np.uint8(3), (200_000, 200_000, 3))
    yield "huge float view", np.broadcast_to(np.float32(0.5), (200_000, 200_000, 4))
    yield "reversed", RNG.integers(0, 255, (6, 4, 3), dtype=np.uint8)[::-1, ::-1, ::-1]
    yield "columns first", np.asfortranarray(np.zeros((6, 4, 3), np.uint8))
    yield "masked", np.ma.masked_array(np.zeros((6, 4), np.uint8), True)
    yield "matrix", np.asmatrix(np.zeros((6, 4), np.uint8))
    yield "records", np.zeros((6, 4), [("r", "u1"), ("g", "u1")])
    for shape in (
        (),
        (3,),
        (3, 56),
        (3, 56, 56),
        (1, 3, 56, 56),
        (2, 3, 56, 56),
        (3, 57, 56),
        (4, 56, 56),
        (3, 0, 56),
        (3, 0, 0),
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64):
            yield f"tensor {shape} {dtype}", torch.zeros(shape, dtype=dtype)
    yield "tensor without contents", torch.zeros(3, 56, 56, device="meta")
    yield "sparse tensor", torch.zeros(3, 56, 56).to_sparse()
    yield "tensor with a gradient", torch.zeros(3, 56, 56, requires_grad=True)
    yield "view of one number", torch.zeros(1).expand(3, 560, 560)


def test_odd_arrays():
    words = ("array", "pixel tensor")
    cases = [(name, lambda source=source: read(source), words) for name, source in array_cases()]
    assert len(cases) > 120
    assert_held(cases)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 255.0])
def test_pixels_that_are_no_numbers_never_pass(value):
    pixels = torch.zeros(3, 56, 56)
    pixels[0, 0, 0] = value
    with pytest.raises(ValueError, match=f"values from .*{'nan' if value != value else ''}"):
        load_media(pixels)


# ----------------------------------------------------------------------------------------------------------- addresses


PICTURE = encoded(noise())
STATUSES = (201, 204, 206, 300, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 410, 418, 429, 500, 502, 503, 599)


class Odd(http.server.BaseHTTPRequestHandler):
    """What the path says: /cut/10 ends 10 bytes early, /status/404 answers that, /drip/... takes its time, ..."""

    def do_GET(self):
        what, _, value = urllib.parse.unquote(self.path).strip("/").partition("/")
        with contextlib.suppress(OSError):  # the client hung up
            getattr(self, what, self.whole)(value)
        self.close_connection = True

    def answer(self, body, length=None, status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Type", "image/png")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length != -1:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def whole(self, value):
        self.answer(PICTURE)

    def cut(self, value):
        self.answer(PICTURE[: -int(value)], len(PICTURE))

    def clip(self, value):
        data = CLIP.read_bytes()
        self.answer(data[: int(len(data) * float(value))], len(data))

    def longer(self, value):
        self.answer(PICTURE + b"x" * 50, len(PICTURE))

    def length(self, value):
        self.answer(PICTURE, value)

    def status(self, value):
        self.answer(PICTURE, status=int(value))

    def loop(self, value):
        self.answer(b"", status=302, Location=f"/loop/{int(value or 0) + 1}")

    def to(self, value):
        self.answer(b"", status=302, Location=value)

    def drip(self, value):
        pieces = {"head": b"HTTP/1.1 200 OK\r\nX-A: b" + b"a" * 400, "body": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 400}[
            value
        ]
        for byte in pieces:
            if self.server.release.wait(0.02):
                return
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    def slow(self, value):
        self.server.release.wait(0.15)
        self.answer(b"", status=302, Location=f"/slow/{int(value) + 1}")

    def raw(self, value):
        self.wfile.write({
            "nothing": b"", "text": b"hello\r\n\r\n", "half": b"HTTP/1.1 200", "http9": b"HTTP/9.9 200 OK\r\n\r\nx",
            "headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n", "line": b"HTTP/1.1 200 " + b"a" * 99999,
            "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
            "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab",
        }[value])  # fmt: skip

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    server.daemon_threads, server.release = True, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="server", daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def address_cases(url):
    for path in ("whole", "longer/1", "图片", "a b", "?q=%zz", "%00", "#x", "whole?" + "a" * 5000):
        yield f"GET {path[:20]}", f"{url}/{path}"
    for path in (
        *(f"cut/{n}" for n in (1, 10, 100)), *(f"length/{n}" for n in ("-5", "x", "1e3", 10**18, 0)),
        *(f"status/{n}" for n in STATUSES), *(f"raw/{n}" for n in "nothing text half http9 headers line chunk chunks".split()),
        *(f"to/{n}" for n in ("file:///etc/passwd", "ftp://127.0.0.1/a", "data:,x", "http://", "http://[", "//", "///", "a" * 9000,
                              "http://127.0.0.1:99999/", "gopher://x", "javascript:0", "")),
        "clip/0.5", "clip/0.9", "loop/0",
    ):  # fmt: skip
        yield f"GET {path[:24]}", f"{url}/{path}"
    for odd in (
        "http://", "http:///a.png", "https://", "http://:80/", "http://127.0.0.1:0/", "http://127.0.0.1:1/a", "http://127.0.0.1:x/",
        "http://127.0.0.1:999999/", "http://[::1", "http://[zz]/", "http://a b/", "http://a\nb/", "http://user:pw@127.0.0.1:1/",
        "http://" + "a" * 300 + "/", "http://ex\x00ample/", "http://..../", "http://-/", "HTTP://127.0.0.1:1/", "http://\ud800/",
        "http://例え.127.0.0.1:1/", "https://127.0.0.1:1/", "ftp://127.0.0.1/a", "file:///etc/hostname", "s3://bucket/key",
        "javascript://x", "x" * 100 + "://y", "http://" + "é" * 80 + "/", "http://127.0.0.1:1/" + "a" * 3_000_000,
    ):  # fmt: skip
        yield f"address {odd[:24]!r}", odd
    plain = base64.b64encode(PICTURE).decode()
    lines = "\n".join(plain[at : at + 76] for at in range(0, len(plain), 76))
    for name, odd in {
        "plain": f"data:image/png;base64,{plain}", "lines": f"data:image/png;base64,{lines}", "upper": f"DATA:IMAGE/PNG;BASE64,{plain}",
        "bare": plain, "bare lines": lines, "no padding": f"data:;base64,{plain.rstrip('=')}", "spaces": f"data:;base64, {plain} ",
        "url alphabet": "data:;base64," + plain.replace("+", "-").replace("/", "_"), "percent": "data:image/png," + urllib.parse.quote(PICTURE),
        "percent base64": "data:;base64," + urllib.parse.quote(plain), "charset": f"data:image/png;charset=utf-8;base64,{plain}",
        "no comma": "data:image/png;base64", "empty": "data:,", "nothing": "data:", "not base64": "data:;base64,@@@@", "odd length": "data:;base64,A",
        "text": "data:text/plain,hello", "long text": "data:text/plain," + "a" * 10**6, "big base64": "A" * 3_000_000, "big broken": "A" * 3_000_001,
        "unicode": "data:;base64,图片", "wrong type": f"data:video/mp4;base64,{plain}", "cut": f"data:;base64,{plain[:100]}",
        "clip": "data:video/mp4;base64," + base64.b64encode(CLIP.read_bytes()).decode(),
    }.items():  # fmt: skip
        yield f"data: {name}", odd
    for odd in (
        "no/such.png",
        "a\0b.png",
        "x" * 5000,
        "\ud800.png",
        "",
        " ",
        ".",
        "/",
        "/dev/zero",
        "~",
        "*.png",
        "C:\\a.png",
        "a" * 3_000_000,
    ):
        yield f"path {odd[:12]!r}", odd


def test_odd_addresses(server):
    words = ("http", "data:", "no file", "folder", "taken for base64", "device", "scheme")
    cases = [(name, lambda source=source: read(source, timeout=3), words) for name, source in address_cases(server.url)]
    assert len(cases) > 110
    assert_held(cases)


@pytest.mark.parametrize(
    "name", ["lines", "upper", "no padding", "bare", "bare lines", "url alphabet", "spaces", "percent base64"]
)
def test_ways_to_write_base64(server, name):
    source = dict(address_cases(server.url))[f"data: {name}"]
    assert load_media(source).tobytes() == Image.open(io.BytesIO(PICTURE)).tobytes()


@pytest.mark.parametrize("path", ["drip/head", "drip/body", "slow/0"])
def test_time_limit_is_for_the_whole_download(server, path):
    """Headers and redirects included: a server that sends a byte now and then does not hold the caller."""
    with pytest.raises(ValueError, match="timed out after 0.4 s"):
        load_media(f"{server.url}/{path}", timeout=0.4)


def test_an_address_answers_soon_or_never(server, monkeypatch):
    """A caller who sets no limit still gets an error at once where headers drip."""
    assert download.ANSWER_TIMEOUT < 5
    monkeypatch.setattr(download, "ANSWER_TIMEOUT", 0.3)
    with pytest.raises(ValueError, match="timed out after 0.3 s"):
        load_media(f"{server.url}/drip/head")


@pytest.mark.parametrize(
    "path, wanted", [("cut/10", "cut off after"), ("clip/0.9", "cut off after"), ("loop/0", "redirects more than")]
)
def test_short_downloads_are_errors(server, path, wanted):
    with pytest.raises(ValueError, match=wanted):
        load_media(f"{server.url}/{path}")


# -------------------------------------------------------------------------------------------------------------- videos


def video_cases():
    whole = CLIP.read_bytes()
    for share in (1, 0.95, 0.8, 0.5, 0.2, 0.05, 0.01):
        yield f"cut to {share}", whole[: int(len(whole) * share)], {}
    for seed in range(12):
        broken = bytearray(whole)
        for at in np.random.default_rng(seed).integers(12, len(whole), 40):
            broken[at] ^= 0x5A
        yield f"damaged {seed}", bytes(broken), {}
    numbers = (
        0,
        1,
        -1,
        10**18,
        -(10**18),
        2.5,
        float("nan"),
        float("inf"),
        "3",
        None,
        True,
        np.int64(3),
        np.float32(2),
        [1],
        1 + 2j,
    )
    for field in ("num_frm", "start", "end", "fps"):
        for number in numbers:
            yield f"{field}={number!r}", whole, {field: number}
    for fps in (1e-300, 5e-324, 1e300, -0.0, 1e-9):
        yield f"fps={fps}", whole, {"fps": fps}
    for start, end in ((0, 1), (89, 90), (90, 91), (50, 50), (60, 20), (10**9, 10**9 + 1)):
        yield f"start={start}, end={end}", whole, {"start": start, "end": end}
    for backend in ("vlc", "", 7, ["av"], "AV"):
        yield f"backend={backend!r}", whole, {"backend": backend}
    for frames, size in ((2, (20, 10)), (40, (9, 7)), (3, (1, 200))):
        yield f"GIF of {frames}", gif(frames, size), {}
    yield "GIF without pauses", gif(4, duration=0), {}
    yield "GIF of 3000 large frames", empty_gif_frames(3000, 4000, 4000), {}
    yield "GIF of 3000 small frames", empty_gif_frames(3000, 8, 8), {}
    yield "GIF that says 65535 x 65535", empty_gif_frames(2, 65535, 65535), {}
    animated = gif(5)
    for share in (0.9, 0.6, 0.3, 0.1):
        yield f"GIF cut to {share}", animated[: int(len(animated) * share)], {}
    for seed in range(12):
        broken = bytearray(animated)
        for at in np.random.default_rng(seed).integers(6, len(animated), 10):
            broken[at] ^= 0x3C
        yield f"GIF damaged {seed}", bytes(broken), {}
    for head in (
        b"\0\0\0\x18ftypmp42",
        b"RIFF\0\0\0\0AVI ",
        b"\x1aE\xdf\xa3",
        b"0&\xb2u",
        b"FLV\x01",
        b"OggS",
        b"\0\0\x01\xba",
        b"G" + bytes(187) + b"G",
    ):
        yield f"a header alone {head[:5]!r}", head, {}
        yield f"a header and zeros {head[:5]!r}", head + bytes(2000), {}


def test_odd_videos():
    pytest.importorskip("av")
    words = ("video", "bytes given", "num_frm", "start", "end", "fps", "backend")

    def call(source, options):
        ixc.media_grid(load_video(source, **options), tile=56)

    cases = [(n, lambda source=s, options=o: call(source, options), words) for n, s, o in video_cases()]
    assert len(cases) > 120
    assert_held(cases)


@pytest.mark.parametrize("hd_num", [10**18, 10**30, np.int64(2**62)])
def test_a_huge_number_of_tiles_is_counted_at_once(hd_num):
    assert ixc.hd_grid(1000, 500, hd_num, 56) == ixc.hd_grid(1000, 500, 1000, 56)
