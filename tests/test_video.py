"""Videos to frames: recorded cases, containers, decoders, and what goes wrong."""

import contextlib
import json
import sys
import types

import numpy as np
import pytest
import torch
from media_files import CLIP, GOLDEN, LONG, frame_number, make_clip, sha
from PIL import Image

from xcomposer.model import ixc_utils as ixc

decoding = sys.modules[ixc.load_video.__module__.replace("media", "video_decoding")]

VIDEOS = json.loads((GOLDEN / "video_cases.json").read_text())


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
