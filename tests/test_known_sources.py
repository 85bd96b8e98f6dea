"""A later turn does not read its pictures and videos again, and never takes one for another."""

import os

import numpy as np
import pytest
from PIL import Image

from xcomposer.model import ixc_utils as ixc
from xcomposer.model.media_internlm_xcomposer2 import KnownSources, source_identity

GREEDY = {"do_sample": False, "max_new_tokens": 2}
URL = "http://127.0.0.1:1/picture.png"


def picture(number, size=(90, 60)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def reads(tiny_model, monkeypatch):
    """Sources that the model opened; addresses give the picture of `shown`."""
    tiny_model.reuse.clear()
    names = tiny_model._open_source.__func__.__globals__
    seen, shown, load = [], [picture(0)], names["load_media"]

    def load_media(source, **options):
        seen.append(source)
        return load(shown[0] if source == URL else source, **options)

    monkeypatch.setitem(names, "load_media", load_media)
    return seen, shown


def test_files_and_bytes_are_read_once(tiny_model, reads, tmp_path):
    seen, _ = reads
    path = tmp_path / "a.png"
    picture(1).save(path)
    first, history = tiny_model.chat(query="what", image=path, **GREEDY)
    second, _ = tiny_model.chat(query="and", image=path, history=history, **GREEDY)
    assert seen == [path]
    tiny_model.chat(query="what", image=os.path.relpath(path), **GREEDY)
    assert len(seen) == 1, "the same file by another path"
    for _ in range(2):
        assert tiny_model.chat(query="what", image=path.read_bytes(), **GREEDY)[0] == first
    assert len(seen) == 2
    tiny_model.reuse.clear()
    again = tiny_model.chat(query="and", image=path, history=history, **GREEDY)[0]
    assert again == second and len(seen) == 3


@pytest.mark.parametrize("change", ["content", "size", "hd_num", "replaced"])
def test_a_changed_file_is_read_again(tiny_model, reads, tmp_path, change):
    seen, _ = reads
    path = tmp_path / "a.bmp"
    picture(1).save(path)
    tiny_model.chat(query="what", image=path, **GREEDY)
    if change == "replaced":
        picture(2).save(tmp_path / "b.bmp")
        os.replace(tmp_path / "b.bmp", path)
    elif change != "hd_num":
        picture(2, (90, 60) if change == "content" else (60, 90)).save(path)
        os.utime(path, ns=(1, 1))
    hd_num = 2 if change == "hd_num" else None
    answer = tiny_model.chat(query="what", image=path, hd_num=hd_num, **GREEDY)[0]
    assert len(seen) == 2
    tiny_model.reuse.clear()
    assert tiny_model.chat(query="what", image=path, hd_num=hd_num, **GREEDY)[0] == answer


def test_an_address_that_has_expired_ends_no_conversation(tiny_model, reads):
    seen, shown = reads
    _, history = tiny_model.chat(query="what", image=URL, **GREEDY)
    shown[0] = b"gone"
    second, history = tiny_model.chat(query="and", image=URL, history=history, **GREEDY)
    third, _ = tiny_model.chat(query="so", image=URL, history=history, **GREEDY)
    assert len(seen) == 1
    with pytest.raises(ValueError):  # a new conversation sees what the address holds now
        tiny_model.chat(query="what", image=URL, **GREEDY)
    shown[0] = picture(0)
    tiny_model.reuse.clear()
    assert tiny_model.chat(query="so", image=URL, history=history, **GREEDY)[0] == third


def test_another_conversation_sees_what_an_address_holds_now(tiny_model, reads):
    seen, shown = reads
    _, history = tiny_model.chat(query="what", image=URL, **GREEDY)
    shown[0] = picture(5)
    tiny_model.chat(query="what else", image=URL, **GREEDY)
    tiny_model.chat(query="what", image=URL, **GREEDY)
    assert len(seen) == 3


def test_nothing_is_known_where_nothing_is_kept(tiny_model, reads, tmp_path):
    seen, _ = reads
    path = tmp_path / "a.png"
    picture(1).save(path)
    limit, tiny_model.reuse.picture_bytes = tiny_model.reuse.picture_bytes, 0
    try:
        for _ in range(2):
            tiny_model.chat(query="what", image=path, **GREEDY)
    finally:
        tiny_model.reuse.picture_bytes = limit
    assert len(seen) == 2


def test_the_store_holds_the_newest():
    known = KnownSources(limit=3)
    for number in range(5):
        known.keep((("address", number),), "prompt", number)
    assert [known.find((("address", n),), "prompt and more") for n in range(5)] == [None, None, 2, 3, 4]
    assert known.find((("address", 4),), "prompt") is None and len(known._prompts) == 3
    assert source_identity([b"x", "no/such/file"]) is None and source_identity(picture(0)) is None


@pytest.mark.parametrize("tile", [56, 560])
@pytest.mark.parametrize(
    "size", [(3840, 2160), (1080, 1920), (2000, 2000), (1121, 13), (997, 3001), (30, 20), (5000, 7)]
)
def test_shrunk_frames_are_stitched_to_the_same_bytes(size, tile):
    frames = [picture(number, size) for number in range(2)]
    shrunk = [ixc.shrink_frame(frame, tile) for frame in frames]
    assert ixc.frame2img(shrunk, tile=tile).tobytes() == ixc.frame2img(frames, tile=tile).tobytes()
    assert ixc.media_grid(shrunk, tile=tile) == ixc.media_grid(frames, tile=tile)
