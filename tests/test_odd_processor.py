# ruff: noqa: E501 - tables
"""Odd calls of the processor: each works, or is refused in words that name the argument; answers stay as before."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, MARK
from odd_cases import assert_held
from PIL import Image
from transformers import AutoProcessor

PICTURE = str(GOLDEN / "images" / "small_56x56.png")
CLIP = str(GOLDEN / "videos" / "clip_90f_30fps_320x240.mp4")
PLACE, FILM = "[UNUSED_TOKEN_140]", "[UNUSED_TOKEN_139]"
MEGABYTES, NAN = 8 * 2**20, float("nan")

SMALL = Image.new("RGB", (30, 20), "red")
FRAMES = [SMALL] * 3
NO_VALUE = [b"x", 0, 1.5, True, {}, object(), print, {1, 2}, NAN]
NUMBERS = [
    0,
    -1,
    1,
    2.5,
    NAN,
    float("inf"),
    "3",
    "",
    b"3",
    [],
    [1],
    [1, 2],
    {},
    object(),
    True,
    10**18,
    1 + 2j,
    np.int64(2),
    np.float32(2),
    torch.tensor(2),
]
SWITCHES = [None, 0, 1, 2, "yes", [], {}, object(), NAN, "longest", "max_length", "pt", "np", "xx"]

# The words of which a refusal must hold one, and calls.
TEXTS = ["", " ", "\0", "a\0b", "\ud800", "x\udc80y", "\ufdd0", "\U0010ffff", MARK, MARK * 2, FILM, PLACE * 3, f"{MARK}{FILM}", MARK * 5000, "<s>", "<s><s>a",
         "a" * 3000, "a" * MEGABYTES, " " * MEGABYTES, "漢" * MEGABYTES, "word " * (MEGABYTES // 5), MARK * 900_000, [], [""], ["a", ""], ["a", None], ["a", 5], [["a"]],
         [[]], ("a", "b"), ["a"] * 50, ["a", "b" * MEGABYTES], iter("ab"), None, *NO_VALUE, [b"x"], [{"role": "user", "content": "a"}], torch.ones(2), np.array(["a"])]  # fmt: skip
IMAGES = [None, [], [[]], [[], []], [None], [[None]], SMALL, [SMALL], [[SMALL]], [[[SMALL]]], [SMALL] * 2, [[SMALL], [SMALL]], "no.png", "", "a\0b", b"", b"x", "x" * 5000,
          "http://127.0.0.1:1/a", "data:,", np.zeros((6, 4, 3), np.uint8), np.zeros((0, 4, 3)), np.full((6, 4), NAN), torch.full((3, 56, 56), NAN), torch.zeros(3, 56, 56),
          torch.zeros(2, 3, 56, 56), iter([SMALL]), {"url": PICTURE}, {}, {"type": "image", "image": PICTURE}, [SMALL, None], Image.new("RGB", (0, 5)), *NO_VALUE]  # fmt: skip
VIDEOS = [None, [], [[]], [None], CLIP, [CLIP], [[CLIP]], [CLIP, CLIP], FRAMES, [FRAMES], [[FRAMES]], np.zeros((3, 20, 30, 3), np.uint8), np.zeros((0, 20, 30, 3), np.uint8),
          np.zeros((3, 20), np.uint8), np.zeros((1, 3, 20, 30, 3), np.uint8), torch.zeros(3, 20, 30, 3, dtype=torch.uint8), "no.mp4", "", b"", b"x", PICTURE, "a\0b",
          "http://127.0.0.1:1/a", [None, SMALL], [SMALL, "no.png"], iter(FRAMES), {}, {"url": CLIP}, *NO_VALUE]  # fmt: skip
KINDS = {"hd_num": NUMBERS, "images_kwargs": [None, {}, {"hd_num": 0}, {"hd_num": 1}, {"what": 1}, 5, "x", []], "return_tensors": SWITCHES,
         "padding": SWITCHES, "add_special_tokens": SWITCHES, "truncation": SWITCHES, "max_length": NUMBERS, "padding_side": ["left", "right", "up", 5, None],
         "audio": [None, b"x", []], "text_kwargs": [None, {}, {"padding": "x"}, {"what": 1}, 5, []], "what": [1], "pad_to_multiple_of": [None, 0, 8, -1, 2.5, "x"]}  # fmt: skip
OF_FILMS = {"num_frames": NUMBERS, "fps": NUMBERS, "do_sample_frames": SWITCHES, "font": [None, "", "no.ttf", 5, [], PICTURE, str(GOLDEN), b"x", object()],
            "video_metadata": [None, [], {}, [{}], [{"fps": 2}], [{"fps": 0}], [{"fps": NAN}], [{"fps": "x"}], [None], 5, "x", [5], [{}, {}]], "videos_kwargs": [None, {}, {"what": 1}, 5]}  # fmt: skip


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint, trust_remote_code=True)


@pytest.fixture(autouse=True)
def as_before(processor):
    """What the usual calls give stays the same."""

    def usual():
        inputs = processor(text=[f"see {MARK}", "hi"], images=[[SMALL], []], return_tensors="pt")
        return {name: value.tolist() for name, value in inputs.items()}

    before = usual()
    yield
    assert usual() == before


def families():
    texts = [(text, {}) for text in TEXTS]
    texts += [(text, {"images": SMALL}) for text in ("a", MARK, MARK * 2, FILM, ["a"], [MARK, MARK], [MARK, "a"], None)]
    yield "text", ("text", "character"), texts
    yield (
        "images",
        ("image", "picture", "bytes", "pass", "no.png", "http", "data:", "path"),
        [(text, {"images": images}) for images in IMAGES for text in (f"see {MARK}", ["a", f"see {MARK}"])],
    )
    yield (
        "videos",
        ("video", "bytes", "no.mp4", "no.png", "http", "path", "frame"),
        [(f"see {FILM}", {"videos": videos}) for videos in VIDEOS],
    )
    given = [(f"see {MARK}", {"images": SMALL, name: value}) for name, values in KINDS.items() for value in values]
    given += [
        (f"see {FILM}", {"videos": [FRAMES], name: value}) for name, values in OF_FILMS.items() for value in values
    ]
    given += [(f"see {FILM}", {"videos": CLIP, name: value}) for name in ("num_frames", "fps") for value in NUMBERS]
    yield "arguments", (), given


def words_of(given):
    """Names and values of the arguments of a call."""
    for name in given.keys() - {"images", "videos"}:
        yield name
        yield str(given[name])
        if isinstance(given[name], dict):
            yield from given[name]


@pytest.mark.parametrize("family, words, calls", list(families()), ids=lambda value: value if isinstance(value, str) else "")
def test_odd_calls(processor, family, words, calls):
    def case(text, given):
        named = words or tuple(words_of(given))
        return (
            f"{text!r:.40} { {name: value for name, value in given.items() if value is not SMALL}!s:.80}",
            lambda: processor(text=text, **given),
            named,
        )

    assert_held([case(text, given) for text, given in calls])


@pytest.mark.parametrize("text", ["a" * MEGABYTES, "word " * (MEGABYTES // 5)])
def test_megabytes_are_never_tokenised(processor, tiny_model, monkeypatch, text):
    def called(*args, **kwargs):
        raise AssertionError("tokenised")

    monkeypatch.setattr(type(processor.tokenizer), "__call__", called)
    monkeypatch.setattr(type(tiny_model.tokenizer), "__call__", called)
    for call in (lambda text: processor(text=text), lambda text: processor(text=[text, "a"]), tiny_model.encode_text):
        with pytest.raises(ValueError, match=f"{len(text)} characters"):
            call(text)


def test_a_text_that_is_cut_may_be_long(processor):
    assert len(processor(text="a" * 200_000, truncation=True, max_length=5)["input_ids"][0]) == 5
