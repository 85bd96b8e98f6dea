"""Every source of a picture: files, bytes, arrays, addresses; every error."""

import base64
import http.server
import threading

import numpy as np
import pytest
import torch
from media_files import CLIP, file_bytes, frame_number, pic, sha
from PIL import Image, features

from xcomposer.model import ixc_utils as ixc

# -------------------------------------------------------------------------------------------------------------- sources


def test_every_source_gives_the_same_picture(tmp_path, monkeypatch):
    img = pic(40, 30, 2)
    data = file_bytes(img)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    (tmp_path / "no_extension").write_bytes(data)
    (tmp_path / "wrong.mp4").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    array = np.asarray(img)
    sources = [
        str(path), path, "picture.png", "no_extension", "wrong.mp4", data, bytearray(data), memoryview(data), img,
        "data:image/png;base64," + base64.b64encode(data).decode(), array, array / 255,
        (array / 255).astype(np.float32), np.asfortranarray(array),
        np.dstack([array, np.full((30, 40), 255, np.uint8)]),
    ]  # fmt: skip
    for source in sources:
        out = ixc.load_media(source)
        assert out.mode == "RGB" and out.size == (40, 30) and sha(out) == sha(img), type(source)
    grey = ixc.load_media(array[..., 0])
    assert sha(grey) == sha(Image.fromarray(array[..., 0]).convert("RGB"))


def test_video_sources():
    pytest.importorskip("av")
    url = "data:video/mp4;base64," + base64.b64encode(CLIP.read_bytes()).decode()
    for source in (CLIP, str(CLIP), CLIP.read_bytes(), url):
        assert [frame_number(frame) for frame in ixc.load_media(source)] == [0, 30, 60]
    assert len(ixc.load_media(CLIP, num_frm=2)) == 2
    frames = [pic(20, 10, k) for k in range(40)]
    assert [sha(f) for f in ixc.load_media(tuple(frames))] == [sha(f) for f in frames], "given frames are all kept"
    assert [f.mode for f in ixc.load_media([frames[0].convert("L"), np.asarray(frames[1])])] == ["RGB", "RGB"]


MODES = {
    "RGB": lambda img: img,
    "L": lambda img: img.convert("L"),
    "1": lambda img: img.convert("1"),
    "CMYK": lambda img: img.convert("CMYK"),
    "YCbCr": lambda img: img.convert("YCbCr"),
    "HSV": lambda img: img.convert("HSV"),
    "P": lambda img: img.quantize(200),
}


@pytest.mark.parametrize("mode", MODES)
def test_to_rgb_of_opaque_modes(mode):
    img = MODES[mode](pic(32, 24, 1))
    assert img.mode == mode
    out = ixc.to_rgb(img)
    assert sha(out) == sha(img.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_shows_white(mode):
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 128)])
    img = rgba.convert("LA").convert("La") if mode == "La" else rgba.convert("LA" if mode == "PA" else mode)
    if mode == "PA":
        img = Image.merge("PA", img.split())
    assert img.mode == mode
    clear, black, half = np.asarray(ixc.to_rgb(img))[0]
    assert (clear == 255).all() and (black == 0).all() and (abs(half.astype(int) - 127) <= 1).all()


def test_palette_and_rgb_with_a_transparent_colour(tmp_path):
    img = Image.new("P", (2, 1))
    img.putpalette([10, 20, 30, 200, 100, 50])
    img.putdata([0, 1])
    img.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(ixc.load_media(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    img.convert("RGB").save(tmp_path / "rgb.png", transparency=(200, 100, 50))
    assert np.asarray(ixc.load_media(tmp_path / "rgb.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    "values, dtype, expected",
    [
        ([0, 257 * 3, 65535], np.uint16, [0, 3, 255]),
        ([0, 1, 255], np.int32, [0, 1, 255]),
        ([0, 257 * 3, 65535], np.int32, [0, 3, 255]),
        ([-100, 2, 100], np.int32, [0, 130, 255]),
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([0, 7, 200], np.float32, [0, 7, 200]),
        ([-1, 0.5, 1], np.float32, [0, 191, 255]),
    ],
)
def test_deep_grey_is_scaled(values, dtype, expected, tmp_path):
    img = Image.fromarray(np.array([values], dtype))
    out = np.asarray(ixc.to_rgb(img))
    assert (out[0] == np.array(expected)[:, None]).all()
    img.save(tmp_path / "deep.tiff")
    assert (np.asarray(ixc.load_media(tmp_path / "deep.tiff")) == out).all()


def test_grey_that_is_not_a_number():
    with pytest.raises(ValueError, match="nan.*replace NaN"):
        ixc.to_rgb(Image.fromarray(np.array([[0, np.nan]], np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    img = pic(32, 16, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = ixc.load_media(file_bytes(img, exif=exif))
    assert out.size == ((16, 32) if orientation > 4 else (32, 16))
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}[orientation]
    assert sha(out) == sha(img if turned is None else img.transpose(Image.Transpose(turned)))
    assert ixc.to_rgb(out).size == out.size, "upright pictures are not turned again"


def test_plain_rgb_is_untouched():
    img = pic(30, 20, 0)
    assert ixc.to_rgb(img) is img


def test_avif_is_no_video():
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert ixc.load_media(file_bytes(pic(40, 30, 2), "AVIF")).size == (40, 30)


# --------------------------------------------------------------------------------------------------------------- errors


def bomb():
    data = bytearray(file_bytes(Image.new("1", (8, 8))))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = __import__("zlib").crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("source, error, message", [
    ("no/such/file.png", FileNotFoundError, "no/such/file.png.*working directory.*check the path"),
    (b"", ValueError, "0 bytes"),
    (b"hello world, this is text", ValueError, r"b'hello world, thi'.*known extensions.*\.png.*\.mp4"),
    (file_bytes(pic(60, 40, 0))[:700], ValueError, "700 bytes given is broken or cut short.*again"),
    (file_bytes(pic(60, 40, 0), "JPEG")[:-300], ValueError, "broken or cut short.*again"),
    (bomb(), ValueError, r"3600000000 pixels.*limit.*PIL\.Image\.MAX_IMAGE_PIXELS"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", ValueError, "PostScript.*PNG"),
    (CLIP.read_bytes()[:3000], ValueError, "video.*3000 bytes given is broken"),
    (b"\0\0\0\x18ftypmp42" + bytes(300), ValueError, "video.*312 bytes given is broken"),
    ("file:///etc/hostname", ValueError, "file.*only http, https and data"),
    ("ftp://host/a.png", ValueError, "ftp.*only http, https and data"),
    ("data:image/png;base64,@@@", ValueError, "data:image/png.*base64"),
    ("data:image/png;base64,", ValueError, "holds no data.*data:image/png;base64"),
    (np.zeros((3, 20, 30), np.uint8), ValueError, r"\(3, 20, 30\).*channels last"),
    (np.zeros((0, 20, 3), np.uint8), ValueError, r"\(0, 20, 3\)"),
    (np.zeros((2, 2, 3), np.int64), ValueError, "int64.*uint8"),
    (np.full((2, 2, 3), 7.5), ValueError, r"7\.5.*\[0, 1\]"),
    (np.full((2, 2), np.nan), ValueError, r"nan.*\[0, 1\]"),
    (Image.new("RGB", (0, 5)), ValueError, "0 x 5"),
    ([], ValueError, "0 items.*one or more"),
    ([torch.zeros(3, 56, 56)], ValueError, "1 items, 0 of them pictures"),
    (None, TypeError, "NoneType.*pass a path"),
    (7, TypeError, "int.*pass a path"),
])  # fmt: skip
def test_unreadable_sources(source, error, message):
    with pytest.raises(error, match=message):
        ixc.load_media(source)


def test_unreadable_files(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.xyz").write_text("plain words")
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\nfile:///etc/hostname\n")
    for name, message in {
        "": "folder.*pass one picture",
        "empty.png": "empty.png.*0 bytes",
        "notes.xyz": "notes.xyz.*known extensions.*.webm",
        "playlist.mp4": "playlist.mp4.*known extensions",
    }.items():
        with pytest.raises(ValueError, match=message):
            ixc.load_media(tmp_path / name)
    for name in ("notes.xyz", "playlist.mp4"):
        with pytest.raises(ValueError, match=f"{name}.*is no video.*known extensions.*mkv"):
            ixc.load_video(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ addresses


class Handler(http.server.BaseHTTPRequestHandler):
    picture = file_bytes(pic(40, 30, 2))

    def do_GET(self):
        page = self.path.lstrip("/")
        if page in ("to_file", "to_ftp", "moved"):
            self.send_response(302)
            target = {"to_file": "file:///etc/hostname", "to_ftp": "ftp://127.0.0.1/a.png", "moved": "/picture"}[page]
            self.send_header("Location", target)
            self.end_headers()
            return
        if page == "missing":
            self.send_error(404)
            return
        kind, body = {
            "text": ("text/html", b"<html>not a picture</html>"),
            "empty": ("image/png", b""),
            "clip": ("text/plain", CLIP.read_bytes()),
        }.get(page, ("text/plain", self.picture))
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if page not in ("endless", "slow", "drip"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            if page == "slow":
                self.server.release.wait(5)
            for _ in range(10**4 if page == "endless" else 0):
                self.wfile.write(bytes(10**5))
                self.server.sent += 10**5
            for _ in range(60 if page == "drip" else 0):  # three seconds, unless the client gives up
                if self.server.release.wait(0.05):
                    break
                self.wfile.write(b"x")
                self.server.drops += 1
            self.wfile.write(body)
        except OSError:
            pass  # the client hung up, as it should

    def log_message(self, *args):
        pass


@pytest.fixture()
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.release, server.sent, server.drops = threading.Event(), 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("page", ["picture", "moved", "picture?q=a b", "图片.png"])
def test_url_picture(server, page):
    assert sha(ixc.load_media(f"{server.url}/{page}")) == sha(pic(40, 30, 2))


def test_url_video(server):
    pytest.importorskip("av")
    assert [frame_number(f) for f in ixc.load_media(f"{server.url}/clip")] == [0, 30, 60]
    assert [frame_number(f) for f in ixc.load_video(f"{server.url}/clip", 2)] == [0, 30]


@pytest.mark.parametrize("page, options, message", [
    ("missing", {}, "missing answered 404.*check the address"),
    ("text", {}, r"text/html.*b'<html>not a pict'"),
    ("empty", {}, "empty.*image/png"),
    ("picture", {"max_bytes": 100}, "over 100 bytes.*max_bytes"),
    ("endless", {"max_bytes": 10**6}, "over 1000000 bytes.*max_bytes"),
    ("slow", {"timeout": 0.2}, "timed out after 0.2 s.*timeout"),
    ("drip", {"timeout": 0.3}, "timed out after 0.3 s.*timeout"),
    ("to_file", {}, "to_file.*answered 302.*file:///etc/hostname' is not allowed"),
    ("to_ftp", {}, "to_ftp could not be fetched.*unknown url type: ftp"),
])  # fmt: skip
def test_url_errors(server, page, options, message):
    with pytest.raises(ValueError, match=message):
        ixc.load_media(f"{server.url}/{page}", **options)
    assert server.drops < 40, "the limit is on the whole download, not on the wait for its next byte"
    assert server.sent < 10**8, "a download over the limit is dropped, not read to its end"


def test_url_of_nobody():
    with pytest.raises(ValueError, match="could not be fetched.*check the address"):
        ixc.load_media("http://127.0.0.1:1/a.png", timeout=2)


def test_data_url_too_large():
    with pytest.raises(ValueError, match="over 10 bytes.*max_bytes"):
        ixc.load_media("data:image/png;base64," + "A" * 100, max_bytes=10)
