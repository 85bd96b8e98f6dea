"""Pictures and videos to pixels: recorded cases byte for byte, geometry by formula."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import GOLDEN, ROOT, pic, sha
from PIL import Image, ImageDraw

from xcomposer.model import ixc_utils as ixc

IMAGES = json.loads((GOLDEN / "image_cases.json").read_text())["cases"]
VIDEOS = json.loads((GOLDEN / "video_cases.json").read_text())
BUILT = {(3840, 2160): 6}  # pictures too large to keep: size -> number of the `pic` they are


# ------------------------------------------------------------------------------------------------------- recorded cases


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


# ------------------------------------------------------------------------------------------------------------- geometry


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


# --------------------------------------------------------------------------------------------------------------- pixels


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
