# ruff: noqa: E501 - tables
"""Odd vocabularies: foreign, cut, damaged, with other settings: each loads, or is refused in words that name it."""

import json
import shutil

import pytest
from conftest import REPO
from odd_cases import assert_held
from transformers import AutoTokenizer

from xcomposer.checkpoints.tiny import train_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
CODE = [path.name for path in REPO.glob("*_internlm_xcomposer2.py")] + ["tokenizer_config.json"]
ODD_VALUES = [None, 0, -1, 1.5, "", "x", "a" * 5000, [], {}, True, "</s>"]
ODD_BYTES = {"empty": b"", "spaces": b" " * 50, "zeros": bytes(500), "text": b"hello\n" * 9, "page": b"<html>404</html>", "pointer": POINTER,
             "json": b'{"a": 1}', "zip": b"PK\x03\x04" + bytes(90), "pickle": b"\x80\x04\x95" + bytes(60), "ones": b"\xff" * 900, "mark": b"\xef\xbb\xbf{}"}  # fmt: skip


def vocabularies(whole):
    """Contents of a tokenizer.model, by name."""
    from sentencepiece import sentencepiece_model_pb2 as spm

    yield from ODD_BYTES.items()
    for share in (0.99, 0.9, 0.7, 0.5, 0.2, 0.05, 0.001):
        yield f"cut to {share}", whole[: int(len(whole) * share)]
    for at in range(0, len(whole), len(whole) // 12):
        yield f"damaged at {at}", whole[:at] + b"\xa5\x5a\xff" + whole[at + 3 :]

    def changed(change):
        proto = spm.ModelProto.FromString(whole)
        change(proto)
        return proto.SerializeToString()

    changes = {
        "dummy prefix": lambda p: setattr(p.normalizer_spec, "add_dummy_prefix", True),
        "extra spaces": lambda p: setattr(p.normalizer_spec, "remove_extra_whitespaces", True),
        "character map": lambda p: setattr(p.normalizer_spec, "precompiled_charsmap", b"x" * 40),
        "suffix": lambda p: setattr(p.trainer_spec, "treat_whitespace_as_suffix", True),
        "no bytes": lambda p: setattr(p.trainer_spec, "byte_fallback", False),
        "unigram": lambda p: setattr(p.trainer_spec, "model_type", 1),
        "words": lambda p: setattr(p.trainer_spec, "model_type", 3),
        "unused": lambda p: setattr(p.pieces[900], "type", 5),
        "no pieces": lambda p: p.ClearField("pieces"),
        "three pieces": lambda p: p.pieces.__delitem__(slice(3, None)),
        "no bytes pieces": lambda p: p.pieces.__delitem__(slice(3, 259)),
        "half the pieces": lambda p: p.pieces.__delitem__(slice(500, None)),
        "no markers": lambda p: [setattr(piece, "piece", f"mark{n}") for n, piece in enumerate(p.pieces) if "UNUSED" in piece.piece],
        "a piece twice": lambda p: setattr(p.pieces[901], "piece", p.pieces[900].piece),
        "an empty piece": lambda p: setattr(p.pieces[900], "piece", ""),
        "a long piece": lambda p: setattr(p.pieces[900], "piece", "a" * 10**5),
        "no unk": lambda p: setattr(p.pieces[0], "piece", "none"),
        "another unk": lambda p: setattr(p.trainer_spec, "unk_piece", "?"),
        "no bos": lambda p: setattr(p.pieces[1], "piece", "<bos>"),
        "scores of NaN": lambda p: setattr(p.pieces[900], "score", float("nan")),
        "scores of infinity": lambda p: setattr(p.pieces[900], "score", float("inf")),
        "all scores one": lambda p: [setattr(piece, "score", 0.0) for piece in p.pieces],
    }  # fmt: skip
    for name, change in changes.items():
        yield name, changed(change)


def folders(root, whole, fast):
    """Folders to load a tokenizer from, by name; a file's contents None: left out."""
    config = json.loads((REPO / "tokenizer_config.json").read_text())

    def folder(name, **files):
        place = root / name.replace(" ", "_").replace("/", "_")[:80]
        place.mkdir()
        for file in CODE:
            shutil.copy(REPO / file, place)
        for file, data in files.items():
            (place / f"tokenizer{file}").write_bytes(data)
        return place.name, place

    for name, data in vocabularies(whole):
        yield folder(f"model {name}", **{".model": data})
    yield folder("nothing")
    for name, data in {**ODD_BYTES, "half": fast[: len(fast) // 2], "null": b"null", "list": b"[]", "number": b"5"}.items():  # fmt: skip
        yield folder(f"json {name}", **{".json": data})
    parts = json.loads(fast)
    for part in ("model", "decoder", "normalizer", "pre_tokenizer", "post_processor", "added_tokens", "version"):
        for value in (None, {}, [], "x", 5):
            yield folder(f"json {part} {value}", **{".json": json.dumps({**parts, part: value}).encode()})
    for field in ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "model_max_length", "padding_side"):  # fmt: skip
        for number, value in enumerate(ODD_VALUES):
            data = json.dumps({**config, field: value}).encode()
            yield folder(f"config {field} {number}", **{".model": whole, "_config.json": data})
    for name, data in ODD_BYTES.items():
        yield folder(f"config {name}", **{".model": whole, "_config.json": data})


def test_odd_vocabularies(tmp_path, tiny_model, tiny_tokenizer):
    whole = train_tokenizer()
    (tmp_path / "whole").mkdir()
    tiny_tokenizer.save_pretrained(tmp_path / "whole")
    fast = (tmp_path / "whole" / "tokenizer.json").read_bytes()
    before = tiny_model.chat(tiny_tokenizer, "hello", max_new_tokens=2, do_sample=False)

    def use(place):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
        tiny_model.chat(tokenizer, "hello 图片", max_new_tokens=1, do_sample=False)

    words = ("tokenizer", "vocabulary", "token", "padding side", str(tmp_path))
    cases = [(name, lambda place=place: use(place), words) for name, place in folders(tmp_path, whole, fast)]
    assert len(cases) > 150
    assert_held(cases, 0.85)
    assert tiny_model.chat(tiny_tokenizer, "hello", max_new_tokens=2, do_sample=False) == before


def other_tokenizer(**special):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "hello": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", **special)


def test_another_models_tokenizer_is_refused(tiny_model, tiny_tokenizer):
    far = other_tokenizer()
    far.add_tokens([f"word{n}" for n in range(tiny_model.config.vocab_size)])
    far.add_tokens(["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"])
    for tokenizer in (other_tokenizer(), far):
        with pytest.raises(ValueError, match="another model's"):
            tiny_model.chat(tokenizer, "hello", max_new_tokens=1)
    tiny_model.chat(tiny_tokenizer, "hello", max_new_tokens=1)
