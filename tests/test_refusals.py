"""What is wrong with a call is said before anything is computed, with the value and the remedy."""

import sys

import pytest
import torch
from chats import PICTURES, QUERY, tokens_of
from conftest import CLOSE, MARK, OPEN, load, tiny


@pytest.mark.parametrize(
    "query, images, said",
    [
        (f"{MARK}{MARK} which?", 3, ["2 <ImageHere> slots", "3 images"]),
        (f"{MARK}{MARK} which?", 1, ["2 <ImageHere> slots", "1 image"]),
        (f"{MARK} which?", 0, ["1 <ImageHere> slot", "0 images"]),
        ("which?", 2, ["0 <ImageHere> slots", "2 images"]),
    ],
)
def test_slots_and_images(no_compute, query, images, said):
    with pytest.raises(ValueError) as error:
        no_compute.chat(None, query, PICTURES[:images])
    for part in said:
        assert part in str(error.value)
    with pytest.raises(ValueError, match="slots"):
        no_compute.write_artical(query, PICTURES[:images])
    with pytest.raises(ValueError, match="slots"):
        no_compute.interleav_wrap_chat(query, PICTURES[:images], [], "")


def test_slots_in_history_count(no_compute):
    with pytest.raises(ValueError, match="2 <ImageHere> slots but 1 images?"):
        no_compute.chat(None, f"{MARK} and this?", PICTURES[:1], history=[(f"{MARK} what?", "a cat")])


def test_over_long_prompts(no_compute, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(no_compute.config, "context_length", 60)
    text = len(tiny_tokenizer(f"{OPEN}user\n{QUERY}{CLOSE}\n{OPEN}assistant\n").input_ids)
    with pytest.raises(ValueError) as error:
        no_compute.chat(None, QUERY, PICTURES[3])
    said = str(error.value)
    assert str(text + 59) in said and "60" in said
    fits = int(said.split("hd_num=")[1].split()[0])

    def length(hd_num):
        pictures = sys.modules[type(no_compute).__module__.rsplit(".", 1)[0] + ".ixc_utils"]
        grid = pictures.media_grid(pictures.load_media(PICTURES[3]), hd_num, 56)
        return text + pictures.image_tokens(*grid, 2)

    assert length(fits) < 60 <= length(fits + 1)


def test_over_long_text_is_not_cut(no_compute, monkeypatch):
    monkeypatch.setattr(no_compute.config, "context_length", 60)
    with pytest.raises(ValueError, match=r"60.*shorten") as error:
        no_compute.chat(None, "word " * 100)
    assert "hd_num=" not in str(error.value)


@pytest.mark.parametrize("hd_num", [0, -1, 2.5, "6"])
def test_hd_num_below_one(no_compute, hd_num):
    for run in (
        lambda: no_compute.chat(None, QUERY, PICTURES[:1], hd_num=hd_num),
        lambda: no_compute.write_artical(QUERY, PICTURES[:1], hd_num=hd_num),
        lambda: no_compute.write_webpage(QUERY, PICTURES[:1], hd_num=hd_num, output_path=None),
        lambda: no_compute.encode_img(PICTURES[0], hd_num=hd_num),
    ):
        with pytest.raises(ValueError, match="hd_num") as error:
            run()
        assert str(hd_num) in str(error.value)


@pytest.mark.parametrize("image", [None, PICTURES[0]])
def test_hd_num_is_checked_with_and_without_pictures(no_compute, image):
    with pytest.raises(ValueError, match="hd_num is 0"):
        no_compute.chat(None, QUERY, image, hd_num=0)


def test_unknown_adapter(no_compute):
    with pytest.raises(ValueError, match="'poetry'.*base.*web.*write"):
        no_compute.chat(None, QUERY, infer_mode="poetry")


def test_adapters_this_checkpoint_lacks(tmp_path):
    model = load(tiny.write_checkpoint(tmp_path / "without", config={"task_adapter_ranks": {"web": 16}}))
    model.tokenizer = object()
    for run in (
        lambda: model.chat(None, QUERY, infer_mode="write"),
        lambda: model.write_artical(QUERY),
        lambda: model.generate(inputs_embeds=torch.zeros(1, 3, 64), infer_mode="write"),
    ):
        with pytest.raises(ValueError, match="sft.*dpo") as error:
            run()
        assert "web" in str(error.value) and "base" in str(error.value)


@pytest.mark.parametrize(
    "history",
    [
        ["not a pair"],
        [("a", "b", "c")],
        [("a",)],
        [("a", None)],
        [{"role": "user", "content": "a"}],
        "a string",
        {"a": "b"},
        [["ok", "ok"], 3],
        5,
    ],
)
def test_history_of_the_wrong_shape(no_compute, history):
    for run in (
        lambda: no_compute.chat(None, QUERY, history=history),
        lambda: no_compute.write_artical(QUERY, history=history),
        lambda: no_compute.write_webpage(QUERY, history=history, output_path=None),
    ):
        with pytest.raises(ValueError, match=r"history.*\(query, answer\)"):
            run()


def test_no_tokenizer(no_compute):
    no_compute.tokenizer = None
    for run in (
        lambda: no_compute.chat(None, QUERY),
        lambda: no_compute.write_artical(QUERY),
        lambda: no_compute.write_webpage(QUERY, output_path=None),
        lambda: no_compute.encode_text(QUERY),
        lambda: no_compute.interleav_wrap_chat(QUERY, []),
    ):
        with pytest.raises(ValueError, match="tokenizer.*AutoTokenizer.from_pretrained"):
            run()


def test_missing_picture(no_compute, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png"):
        no_compute.chat(None, QUERY, [str(tmp_path / "missing.png")])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("empty.png", "text.png"):
        with pytest.raises(ValueError, match=name):
            no_compute.chat(None, f"{MARK}{MARK}{QUERY}", [PICTURES[0], str(tmp_path / name)])


def test_nothing_is_printed(tiny_model, capsys):
    tokens_of(tiny_model)
    assert capsys.readouterr().out == ""
