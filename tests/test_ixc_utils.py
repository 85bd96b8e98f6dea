"""Pictures and videos to pixels: recorded cases byte for byte, geometry by formula, every source, every error."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, features

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from xcomposer.model import ixc_utils as ixc  # noqa: E402

decoding = sys.modules[ixc.load_video.__module__.replace("media", "video_decoding")]

GOLDEN = ROOT / "tests" / "golden"
IMAGES = json.loads((GOLDEN / "image_cases.json").read_text())["cases"]
VIDEOS = json.loads((GOLDEN / "video_cases.json").read_text())
CLIP = GOLDEN / "videos" / "clip_90f_30fps_320x240.mp4"
LONG = GOLDEN / "videos" / "long_700f_10fps_160x128.mp4"
BUILT = {(3840, 2160): 6}  # pictures too large to keep: size -> number of the `pic` they are


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


# ---------------------------------------------------------------------------------------------------- recorded cases


@pytest.mark.parametrize("case", IMAGES["image_transform"], ids=lambda c: f"{c['size']}-{c['hd_num']}")
def test_image_transform_recorded(case):
    img = Image.open(GOLDEN / case["image"]) if case["image"] else pic(*case["size"], BUILT[tuple(case["size"])])
    out = ixc.Image_transform(img, case["hd_num"])
    assert list(out.size) == case["out"]["size"]
    assert sha(out) == case["out"]["sha256"]
    rows, cols = ixc.hd_grid(*case["size"], case["hd_num"])
    assert out.size == (cols * 560, rows * 560)


@pytest.mark.parametrize("case", IMAGES["frame2img"], ids=lambda c: f"{c['n']}x{c['frame_size']}")
def test_frame2img_recorded(case):
    out = ixc.frame2img([pic(*case["frame_size"], case["pic_index"] + i) for i in range(case["n"])])
    for x0, y0, x1, y1 in case["label_bands"]:
        assert np.asarray(out.crop((x0, y0, x1, y1))).min() < 128, "a label is written in each band"
        ImageDraw.Draw(out).rectangle([x0, y0, x1 - 1, y1 - 1], fill="white")
    assert list(out.size) == case["out"]["size"]
    assert sha(out) == case["out"]["sha256"]


@pytest.mark.parametrize("case", IMAGES["video_transform"], ids=lambda c: f"{c['in_size']}")
def test_video_transform_recorded(case):
    frames = [pic(*case["frame_size"], case["pic_index"] + i) for i in range(case["n"])]
    out = ixc.Video_transform(ixc.frame2img(frames))
    assert list(out.size) == case["out_size"]
    width, height = case["out_size"]
    assert ixc.video_grid(*case["in_size"]) == ixc.media_grid(frames) == (height // 560, width // 560)


@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
@pytest.mark.parametrize("case", VIDEOS, ids=lambda c: f"{c['video'][7:12]}-{c['num_frm']}")
def test_load_video_recorded(case, as_bytes):
    pytest.importorskip("av")
    path = GOLDEN / case["video"]
    source = path.read_bytes() if as_bytes else path
    frames, times = ixc.load_video(source, case["num_frm"], return_timestamps=True, backend="av")
    assert [frame_number(frame) for frame in frames] == case["indices"]
    assert {frame.size for frame in frames} == {tuple(case["size"])} and {frame.mode for frame in frames} == {"RGB"}
    assert times == pytest.approx([n / case["fps"] for n in case["indices"]], abs=1e-3)
    if "stitched" in case:
        stitched = ixc.frame2img(frames)
        assert list(stitched.size) == case["stitched"]
        assert list(ixc.Video_transform(stitched).size) == case["transformed"]


# ------------------------------------------------------------------------------------------------------------ geometry


def test_image_tokens_counts_what_the_sequence_holds():
    for side in (1, 2, 20):
        for rows in range(1, 5):
            for cols in range(1, 5):
                overview = sum(side + 1 for _ in range(side))
                tiles = sum(cols * side + 1 for _ in range(rows * side))
                assert ixc.image_tokens(rows, cols, side) == overview + 1 + tiles
    assert ixc.image_tokens(4, 6, 20) == 25 * 400 + 1 + 5 * 20


def test_hd_grid_is_the_largest_that_fits():
    draw_from = np.random.default_rng(0)
    for _ in range(400):
        width, height, hd_num = (int(n) for n in draw_from.integers(1, (5000, 5000, 60)))
        rows, cols = ixc.hd_grid(width, height, hd_num)
        assert ixc.hd_grid(height, width, hd_num) == (cols, rows)
        assert rows * cols <= hd_num
        ratio = max(width, height) / min(width, height)
        fitting = max(s for s in range(1, hd_num + 1) if s * math.ceil(s / ratio) <= hd_num)
        scale = min(fitting, math.ceil(max(width, height) / 560))
        assert max(rows, cols) == scale
        assert min(rows, cols) == max(1, math.ceil(int(560 * scale / ratio) / 560))


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (57, 55), (112, 168)])
@pytest.mark.parametrize("tile", [56, 112])
def test_grids_agree_with_the_transforms(size, tile):
    img = pic(*size, 1)
    rows, cols = ixc.hd_grid(*size, 6, tile)
    assert ixc.Image_transform(img, 6, tile).size == (cols * tile, rows * tile)
    assert ixc.media_grid(img, 6, tile) == (rows, cols)
    assert ixc.to_pixels(img, 6, tile).shape == (3, rows * tile, cols * tile)
    frames = [pic(8 + size[0] % 50, 9 + size[1] % 50, k) for k in range(3)]
    rows, cols = ixc.media_grid(frames, tile=tile)
    assert 1 in (rows, cols)
    assert ixc.Video_transform(ixc.frame2img(frames, tile=tile), tile=tile).size == (cols * tile, rows * tile)
    assert ixc.to_pixels(frames, tile=tile).shape == (3, rows * tile, cols * tile)


def test_padding_is_white_at_the_far_end():
    wide, tall = pic(200, 90, 0), pic(90, 200, 0)
    below, right = np.asarray(ixc.Image_transform(wide, 6, 56)), np.asarray(ixc.Image_transform(tall, 6, 56))
    inner = int(below.shape[1] / (200 / 90))
    assert (below[inner:] == 255).all() and not (below[inner - 1] == 255).all()
    assert (right[:, inner:] == 255).all() and not (right[:, inner - 1] == 255).all()


def test_stitched_measures_scale_with_the_tile():
    frames = [Image.new("RGB", (40, 20), "red")] * 2
    big, small = np.asarray(ixc.frame2img(frames)), np.asarray(ixc.frame2img(frames, tile=56))
    assert big.shape == (2 * (560 + 50), 1120, 3) and small.shape == (2 * (56 + 5), 112, 3)
    reds = (small == (255, 0, 0)).all(-1).all(1)
    assert reds[4:60].all() and reds[65:121].all() and reds.sum() == 112, "the label stays in its 4 px band"
    assert (small == 0).all(-1).all(1).sum() == 1, "one black rule, between the frames"
    assert (small[:4] < 128).any(), "a label, however small"
    tall = np.asarray(ixc.frame2img([Image.new("RGB", (20, 40), "red")] * 3))
    assert (tall == 0).all(-1).all(0).sum() == 4, "two rules of 2 px over the full height"


def test_labels_count_from_zero():
    def band(frames, k):
        return ixc.frame2img(frames).crop((0, k * 610, 1120, k * 610 + 40)).tobytes()

    def label(text):
        img = Image.new("RGB", (1120, 40), "white")
        ImageDraw.Draw(img).text((0, 0), text, font=ixc.get_font(40), fill="black")
        return img.tobytes()

    frames = [Image.new("RGB", (40, 20), "red")] * 2
    assert band(frames, 0) == label("<IMAGE 0>") and band(frames, 1) == label("<IMAGE 1>")


def test_hd_num_does_not_limit_a_video():
    img = pic(100, 900, 0)
    assert sha(ixc.Video_transform(img, 1, 56)) == sha(ixc.Video_transform(img, 25, 56))


def test_font_comes_from_the_folder(tmp_path):
    assert ixc.get_font(folder=tmp_path).getname() == ixc.get_font().getname()
    (tmp_path / "label.ttf").write_bytes(ixc.get_font(40).font_bytes)
    assert ixc.get_font(30, tmp_path).size == 30
    assert Path(ixc.get_font(30, tmp_path).path).name == "label.ttf"
    (tmp_path / "a.otf").write_bytes(b"no font")
    with pytest.raises(ValueError, match="a.otf is no readable font.*replace or remove"):
        ixc.get_font(30, tmp_path)


# ------------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (56, 56)])
def test_pixels_equal_scale_then_normalise(size):
    img = pic(*size, 3)
    raw = torch.from_numpy(np.array(ixc.Image_transform(img, 6, 56))).permute(2, 0, 1).float() / 255
    expected = (raw - torch.tensor(ixc.CLIP_MEAN).view(3, 1, 1)) / torch.tensor(ixc.CLIP_STD).view(3, 1, 1)
    pixels = ixc.media_pixels(img, 6, 56)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_video_pixels_equal_the_public_steps():
    frames = [pic(64, 48, k) for k in range(2)]
    stitched = ixc.Video_transform(ixc.frame2img(frames, tile=56), tile=56)
    torch.testing.assert_close(ixc.media_pixels(frames, tile=56), ixc.normalize(stitched, 56), rtol=0, atol=0)


def test_pixel_tensors_pass():
    pixels = torch.randn(1, 3, 56, 112, dtype=torch.float64)
    assert ixc.load_media(pixels) is pixels
    assert ixc.media_grid(pixels, tile=56) == (1, 2)
    assert torch.equal(ixc.media_pixels(pixels, tile=56), pixels[0].float())


@pytest.mark.parametrize("shape", [(3, 56, 57), (3, 0, 56), (1, 56, 56), (2, 3, 56, 56), (56, 56)])
def test_pixel_tensor_of_wrong_shape(shape):
    with pytest.raises(ValueError, match=rf"shape \({shape[0]}, .*multiples of 56"):
        ixc.media_pixels(torch.zeros(shape), tile=56)


def test_pixel_tensor_of_integers():
    with pytest.raises(ValueError, match="torch.uint8.*CLIP-normalised"):
        ixc.load_media(torch.zeros(3, 56, 56, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------------------- sources


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


def test_gif_is_a_video_when_it_moves(tmp_path):
    frames = [Image.new("RGB", (20, 10), (25 * k, 0, 0)) for k in range(10)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    kept, times = ixc.load_video(path, return_timestamps=True)
    assert [frame.getpixel((0, 0))[0] for frame in kept] == [0, 50, 100, 150, 200] and times == [0, 1, 2, 3, 4]
    assert [f.mode for f in ixc.load_media(path)] == ["RGB"] * 5
    frames[3].save(tmp_path / "still.gif")
    assert ixc.load_media(tmp_path / "still.gif").getpixel((0, 0)) == (75, 0, 0)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=0)
    assert len(ixc.load_video(path)) == 1, "no duration: ten a second"


# --------------------------------------------------------------------------------------------------------------- video


@pytest.mark.parametrize("kwargs, expected", [
    ({}, [0, 30, 60]),
    ({"start": 10}, [10, 40, 70]),
    ({"start": 10, "end": 41}, [10, 40]),
    ({"end": 1000}, [0, 30, 60]),
    ({"start": 89}, [89]),
    ({"fps": 2}, [0, 15, 30, 45, 60, 75]),
    ({"fps": 0.5}, [0, 60]),
    ({"fps": 300, "num_frm": 4}, [0, 18, 36, 54]),
    ({"num_frm": 1}, [0]),
])  # fmt: skip
def test_frames_chosen(kwargs, expected):
    pytest.importorskip("av")
    assert [frame_number(frame) for frame in ixc.load_video(CLIP, **kwargs)] == expected


def test_positional_signature():
    pytest.importorskip("av")
    assert [frame_number(frame) for frame in ixc.load_video(str(CLIP), 2, 5, 80)] == [5, 35]


@pytest.mark.parametrize("name, codec", [
    ("a.avi", "mpeg4"), ("a.mkv", "libx264"), ("a.mov", "mpeg4"), ("a.wmv", "wmv2"), ("a.webm", "libvpx-vp9"),
    ("a.webm", "libvpx"), ("a.ts", "mpeg2video"), ("a.flv", "flv"), ("a.mpg", "mpeg1video"),
])  # fmt: skip
def test_containers(name, codec, tmp_path):
    path = make_clip(tmp_path / name, codec, size=(256, 128), frames=75, rate=25)
    assert [frame_number(frame) for frame in ixc.load_video(path)] == [0, 25, 50]
    for start in (1, 13, 25, 38, 49, 61):  # far from and near to key frames
        assert frame_number(ixc.load_video(path, start=start)[0]) == start
    assert len(ixc.load_media(path.read_bytes())) == 3


def test_file_name_is_no_protocol(tmp_path, monkeypatch):
    make_clip(tmp_path / "clip.mp4", "mpeg4").rename(tmp_path / "concat:clip.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(ixc.load_video("concat:clip.mp4")) == 2


def test_b_frames_and_distant_key_frames(tmp_path):
    path = make_clip(tmp_path / "b.mp4", "libx264", frames=100, bf="3", g="24", **{"x264-params": "open-gop=1"})
    for start in range(0, 100, 7):
        assert [frame_number(f) for f in ixc.load_video(path, start=start, fps=2)] == list(range(start, 100, 5))


def test_variable_rate_is_numbered_by_frame(tmp_path):
    av = pytest.importorskip("av")
    path = make_clip(tmp_path / "steady.mp4", "libx264", frames=30, bf="0", g="7")
    varied = tmp_path / "varied.mkv"
    with av.open(str(path)) as old, av.open(str(varied), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for n, packet in enumerate(p for p in old.demux(video=0) if p.size):
            packet.stream = stream
            late = int(3 / packet.time_base) if n >= 15 else 0  # frame 15 stands three seconds late
            packet.pts, packet.dts = packet.pts + late, packet.dts + late
            new.mux(packet)
    frames, times = ixc.load_video(varied, fps=1e9, return_timestamps=True)
    assert [frame_number(f) for f in frames] == list(range(30))
    assert [frame_number(f) for f in ixc.load_video(varied, start=11)] == [11, 21]
    assert times[14:16] == pytest.approx([1.4, 4.5], abs=0.01)


def test_rotated_video_is_upright(tmp_path):
    path = make_clip(tmp_path / "phone.mp4", "mpeg4", size=(64, 48))
    upright = ixc.load_video(path)[0]
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # nine 16.16 numbers: turn a quarter clockwise, as phones write
    quarter = [0, 65536, 0, -65536 & 0xFFFFFFFF, 0, 0, 48 << 16, 0, 0x40000000]
    data[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big") for n in quarter)
    turned = ixc.load_video(bytes(data))[0]
    assert turned.size == (48, 64)
    assert sha(turned) == sha(upright.transpose(Image.Transpose.ROTATE_270))


def test_only_kept_frames_become_pictures(monkeypatch):
    """Few frames are decoded thanks to seeking, and none but the kept ones is turned into a picture."""
    av = pytest.importorskip("av")
    calls = {"picture": 0, "decoded": 0}

    class Frame:
        def __init__(self, frame):
            self.frame = frame

        def __getattr__(self, name):
            return getattr(self.frame, name)

        def to_image(self):
            calls["picture"] += 1
            return self.frame.to_image()

    numbered = decoding._AvReader._numbered

    def counting(self, container, stream):
        for at, frame in numbered(self, container, stream):
            calls["decoded"] += 1
            yield at, Frame(frame)

    monkeypatch.setattr(decoding._AvReader, "_numbered", counting)
    assert len(ixc.load_video(LONG, 8)) == 8 and calls["picture"] == 8
    with av.open(str(LONG)) as container:  # this clip has few key frames: all of it up to 690 may be needed
        keys = [n for n, p in enumerate(p for p in container.demux(video=0) if p.size) if p.is_keyframe]
    calls["decoded"] = 0
    assert frame_number(ixc.load_video(LONG, start=690)[0]) == 690
    assert calls["decoded"] == 690 - max(k for k in keys if k <= 690) + 1 < 300


def test_seek_that_lands_too_far_is_not_trusted(tmp_path, monkeypatch):
    path = make_clip(tmp_path / "far.mp4", "libx264", frames=60, g="10", bf="0")
    opened = decoding._AvReader._container

    class Far:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def seek(self, pts, stream):
            self.container.seek(pts + int(2 / stream.time_base), stream=stream)

    @contextlib.contextmanager
    def far(self):
        with opened(self) as (container, stream):
            yield Far(container), stream

    monkeypatch.setattr(decoding._AvReader, "_container", far)
    assert [frame_number(f) for f in ixc.load_video(path, start=5)] == [5, 15, 25, 35, 45, 55]


def test_header_that_promises_too_many_frames(tmp_path):
    path = make_clip(tmp_path / "cut.avi", "mpeg4", size=(256, 128), frames=60)
    whole = path.read_bytes()
    assert len(ixc.load_video(whole)) == 6
    cut = whole[: whole.index(b"movi") + (whole.index(b"idx1") - whole.index(b"movi")) // 2]
    kept = [frame_number(f) for f in ixc.load_video(cut)]
    assert kept == list(range(0, 60, 10))[: len(kept)] and 0 < len(kept) < 6


def test_promised_frames_that_do_not_decode_are_not_counted(monkeypatch):
    pytest.importorskip("av")
    index = decoding._AvReader._index
    lies = iter([400])

    def lying(self, stamps):
        extra = next(lies, 0)
        index(self, stamps + [(stamps[-1][0] + 512 * (i + 1), False) for i in range(extra)])

    monkeypatch.setattr(decoding._AvReader, "_index", lying)
    assert [frame_number(f) for f in ixc.load_video(CLIP, 8)] == [0, 30, 60]


class FakeVideo:
    """What decord and torchcodec offer of a 25-frame clip at 10 frames a second whose frame n is all n."""

    def __init__(self, file, num_threads=1):
        self.metadata = types.SimpleNamespace(num_frames=25, average_fps=10.0)

    def __len__(self):
        return 25

    def get_avg_fps(self):
        return 10.0

    def get_frame_timestamp(self, n):
        return np.array([7 + n / 10, 7.1 + n / 10])

    def __getitem__(self, n):
        return types.SimpleNamespace(asnumpy=lambda: np.full((4, 6, 3), n, np.uint8))

    def get_frame_at(self, n):
        return types.SimpleNamespace(data=torch.full((3, 4, 6), n, dtype=torch.uint8), pts_seconds=7 + n / 10)


@pytest.mark.parametrize("backend", ["torchcodec", "decord"])
def test_other_decoders(backend, monkeypatch):
    fake = types.SimpleNamespace(VideoDecoder=FakeVideo, VideoReader=FakeVideo)
    monkeypatch.setattr(decoding.importlib, "import_module", lambda name: {ixc.DECODERS[backend]: fake}[name])
    for source in (CLIP, CLIP.read_bytes()):
        frames, times = ixc.load_video(source, return_timestamps=True, backend=backend)
        assert [frame.getpixel((5, 3)) for frame in frames] == [(n,) * 3 for n in (0, 10, 20)]
        assert times == pytest.approx([0, 1, 2])


def test_decoder_preference_and_none_installed(monkeypatch):
    asked = []

    def absent(name):
        asked.append(name)
        raise {"av": ImportError, "torchcodec.decoders": RuntimeError, "decord": OSError}[name]

    monkeypatch.setattr(decoding.importlib, "import_module", absent)
    with pytest.raises(ImportError, match="av, torchcodec, decord.*pip install av"):
        ixc.load_video(CLIP)
    assert asked == ["av", "torchcodec.decoders", "decord"]
    with pytest.raises(ImportError, match="decord.*pip install av"):
        ixc.load_video(CLIP, backend="decord")


# -------------------------------------------------------------------------------------------------------------- errors


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


def test_sound_alone_is_no_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="sound.mp4.*no video stream"):
        ixc.load_media(path)


@pytest.mark.parametrize("kwargs, message", [
    ({"num_frm": 0}, "num_frm is 0.*1 or more"),
    ({"num_frm": 2.5}, "num_frm is 2.5.*integer"),
    ({"fps": 0}, "fps is 0.*above 0"),
    ({"start": -1}, "start is -1.*0 or more"),
    ({"end": 1.5}, "end is 1.5.*integer"),
    ({"start": 90}, "start=90.*90 frames"),
    ({"start": 30, "end": 30}, "start=30, end=30.*start < end"),
    ({"backend": "vlc"}, "vlc.*av, torchcodec, decord"),
])  # fmt: skip
def test_wrong_video_numbers(kwargs, message):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=message):
        ixc.load_video(CLIP, **kwargs)


@pytest.mark.parametrize("hd_num", [0, -3, 2.0, None, True])
def test_wrong_hd_num(hd_num):
    img = pic(20, 10, 0)
    calls = (ixc.Image_transform, ixc.Video_transform, ixc.media_pixels, lambda i, n: ixc.hd_grid(2, 1, n))
    for call in (*calls, ixc.media_grid, ixc.to_pixels):
        with pytest.raises(ValueError, match=f"hd_num is {hd_num!r}.*1 or more"):
            call(img, hd_num)


def test_no_frames_to_stitch():
    with pytest.raises(ValueError, match="0 frames"):
        ixc.frame2img([])


# ----------------------------------------------------------------------------------------------------------- addresses


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


# ----------------------------------------------------------------------------------------------------------- the module


FILES = ["ixc_utils", "media_internlm_xcomposer2", "video_decoding_internlm_xcomposer2", "download_internlm_xcomposer2"]


def test_loads_as_remote_code_by_itself(tmp_path, monkeypatch):
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    # Without what other tests have loaded from another cache.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "transformers_modules").exists()])
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "repo").mkdir()
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", tmp_path / "repo")
    loaded = dynamic.get_class_from_dynamic_module("ixc_utils.load_video", str(tmp_path / "repo"))
    assert loaded.__name__ == "load_video"


@pytest.mark.parametrize("name", FILES)
def test_nothing_heavy_is_imported(name, tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    assert dynamic_imports(tmp_path / f"{name}.py") <= {"PIL", "numpy", "torch"} | set(sys.stdlib_module_names)


def test_geometry_needs_no_other_file(tmp_path):
    """A copy of the file by itself transforms pictures; only reading a source asks for the files beside."""
    shutil.copy(ROOT / "ixc_utils.py", tmp_path)
    code = (
        "import sys, ixc_utils; from PIL import Image; from ixc_utils import Image_transform, frame2img, get_font\n"
        "assert Image_transform(Image.new('L', (9, 5)), 4, 56).size == (56, 56)\n"
        "assert not any(name.split('.')[0] == 'xcomposer' for name in sys.modules)\n"
        "try: ixc_utils.load_video\n"
        "except ModuleNotFoundError as error: assert 'media_internlm_xcomposer2' in str(error)\n"
        "try: ixc_utils.load_vidio\n"
        "except AttributeError as error: assert 'load_vidio' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})


def test_released_names_are_those_of_the_files_beside():
    media = sys.modules[ixc.load_media.__module__]
    assert all(getattr(ixc, name) is getattr(media, name) for name in ixc._OF_MEDIA)


def dynamic_imports(path):
    check = pytest.importorskip("transformers.dynamic_module_utils")
    return set(check.get_imports(str(path)))


@pytest.mark.parametrize("tile", [56, 560])
def test_tiles_at_once_equal_tiles_of_pixels(tile):
    """Still pictures, a video and ready pixels, each with its own number of tiles."""
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "blue", "green")]
    still = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 301, 3), dtype=np.uint8))
    pictures = [still, frames, still.transpose(Image.Transpose.TRANSPOSE), ixc.to_pixels(still, 2, tile)]
    limits = [6, 6, 3, 2]
    tiles, grids = ixc.to_tiles(pictures, limits, tile)
    pixels = [ixc.to_pixels(picture, limit, tile) for picture, limit in zip(pictures, limits, strict=True)]
    wanted_tiles, wanted_grids = ixc.stack_tiles(pixels, tile)
    assert torch.equal(tiles, wanted_tiles) and torch.equal(grids, wanted_grids)
    assert grids.tolist() == [[1, *ixc.media_grid(p, limit, tile)] for p, limit in zip(pictures, limits, strict=True)]
