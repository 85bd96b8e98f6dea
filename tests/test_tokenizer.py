"""The tokenizer against SentencePiece: on a vocabulary trained here, and on the released one (IXC_TOKENIZER_MODEL)."""

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xcomposer.checkpoints.fast_tokenizer import convert, differences, load_sentencepiece, main, mixed_corpus
from xcomposer.checkpoints.tiny import train_tokenizer
from xcomposer.model.tokenization_internlm_xcomposer2 import (
    InternLMXComposer2Tokenizer,
    backend_from_sentencepiece,
    merges_by_score,
)

REPO = Path(__file__).resolve().parents[1]

OPEN, END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
PROMPT = f"{OPEN}user\n请详细 describe 图片  😀\t\n{END}\n{OPEN}assistant\n"
RELEASED = os.environ.get("IXC_TOKENIZER_MODEL")


@pytest.fixture(scope="module", params=["trained", "released"])
def model_file(request, tmp_path_factory):
    if request.param == "released":
        if not RELEASED:
            pytest.skip("IXC_TOKENIZER_MODEL does not name the released tokenizer.model")
        return Path(RELEASED)
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    path.write_bytes(train_tokenizer())
    return path


@pytest.fixture(scope="module")
def reference(model_file):
    return load_sentencepiece(model_file)[0]


@pytest.fixture(scope="module", params=["model", "json beside the repo's config", "json alone"])
def folder(request, model_file, tmp_path_factory):
    """A folder to load from: tokenizer.model with this repo's files, or a tokenizer.json with them or without."""
    folder = tmp_path_factory.mktemp("checkpoint")
    if request.param != "json alone":
        for name in ("tokenization_internlm_xcomposer2.py", "tokenizer_config.json"):
            shutil.copy(REPO / name, folder)
    if request.param == "model":
        shutil.copy(model_file, folder / "tokenizer.model")
    else:
        convert(model_file, folder, json_only=request.param != "json alone")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_the_repo_class_is_loaded_where_the_config_names_it(tokenizer, folder):
    named = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert (type(tokenizer).__name__ == "InternLMXComposer2Tokenizer") == (named == "InternLMXComposer2Tokenizer")


def test_encodes_and_decodes_as_sentencepiece(tokenizer, model_file):
    reference, pieces = load_sentencepiece(model_file)
    paths = [path for pattern in ("*.py", "*.md", "xcomposer/**/*.py") for path in REPO.glob(pattern)]
    lines = [line for path in sorted(paths) for line in path.read_text("utf-8").splitlines(keepends=True)]
    texts = [*lines, "".join(line for line in lines if "<" not in line), *mixed_corpus(pieces, 3000, seed=1)]
    assert len(lines) > 300
    assert differences(tokenizer.backend_tokenizer, reference, texts) == []


def test_calls_that_users_make(tokenizer, reference):
    plain = reference.encode(PROMPT)
    assert tokenizer(PROMPT).input_ids == [1, *plain] == tokenizer.encode(PROMPT)
    assert tokenizer(PROMPT, add_special_tokens=False).input_ids == plain
    tensors = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=True)
    assert tensors.input_ids.tolist() == [[1, *plain]] and set(tensors) == {"input_ids", "attention_mask"}
    assert tokenizer.decode([1, *plain, 2], skip_special_tokens=True) == PROMPT
    assert tokenizer.batch_decode([plain, plain[:1]]) == [PROMPT, OPEN]


def test_ids_of_special_tokens_and_markers(tokenizer, reference):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 2
    markers = [f"[UNUSED_TOKEN_{number}]" for number in (139, 140, 145, 146)]
    ids = tokenizer.convert_tokens_to_ids(markers)
    assert ids == [reference.piece_to_id(marker) for marker in markers] and 0 not in ids
    assert [tokenizer.encode(f"a{marker}b", add_special_tokens=False)[1] for marker in markers] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(markers)
    assert set(tokenizer.all_special_tokens) == {"<s>", "</s>", "<unk>"}
    assert tokenizer("<s>a</s>", add_special_tokens=False).input_ids == [1, reference.piece_to_id("a"), 2]
    assert len(tokenizer) == reference.get_piece_size()


def test_a_batch_is_padded_on_the_left(tokenizer, reference):
    batch = tokenizer(["a", PROMPT], padding=True)
    width = len(reference.encode(PROMPT)) + 1
    assert batch.input_ids[0] == [2] * (width - 2) + [1, reference.piece_to_id("a")]
    assert batch.attention_mask[0] == [0] * (width - 2) + [1, 1]


def test_save_and_reload(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == type(tokenizer).__name__
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again(PROMPT).input_ids == tokenizer(PROMPT).input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert (again.padding_side, again.pad_token_id) == ("left", 2)


def test_the_vocabulary_file_alone_is_enough(model_file, tmp_path):
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    for tokenizer in (
        InternLMXComposer2Tokenizer.from_pretrained(tmp_path),
        InternLMXComposer2Tokenizer(str(model_file)),
    ):
        assert tokenizer("a").input_ids == [1, *tokenizer("a", add_special_tokens=False).input_ids]
        assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.add_eos_token) == ("left", "</s>", False)


@pytest.mark.parametrize("bos, eos", [(False, False), (True, True), (False, True)])
def test_added_tokens_survive_saving(model_file, tmp_path, bos, eos):
    tokenizer = InternLMXComposer2Tokenizer(model_file, add_bos_token=bos, add_eos_token=eos)
    tokenizer.save_pretrained(tmp_path)
    again = InternLMXComposer2Tokenizer.from_pretrained(tmp_path)
    assert (again.add_bos_token, again.add_eos_token) == (bos, eos)
    plain = again.encode("a", add_special_tokens=False)
    assert again("a").input_ids == tokenizer("a").input_ids == [1] * bos + plain + [2] * eos


def test_released_prompts():
    """Ids recorded from the original: turn markers, Chinese, line ends."""
    if not RELEASED:
        pytest.skip("IXC_TOKENIZER_MODEL does not name the released tokenizer.model")
    tokenizer = InternLMXComposer2Tokenizer(RELEASED)
    assert tokenizer.convert_tokens_to_ids([END, OPEN]) == [92542, 92543] and len(tokenizer) == 92544
    text = f"{OPEN}user\nDescribe this image in detail{END}\n{OPEN}assistant\n"
    ids = [92543, 1008, 364, 5054, 3280, 550, 2321, 435, 7856, 92542, 364, 92543, 525, 11353, 364]
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    golden = REPO / "tests" / "golden" / "chat_cases.json"
    for case in json.loads(golden.read_text("utf-8")) if golden.is_file() else []:
        if case.get("response") is not None:
            assert tokenizer.decode(case["output_ids"]).split(END)[0].strip() == case["response"].strip()


def test_a_nul_is_a_byte_but_its_piece_still_decodes():
    if not RELEASED:
        pytest.skip("IXC_TOKENIZER_MODEL does not name the released tokenizer.model")
    backend = backend_from_sentencepiece(RELEASED)
    assert backend.encode("\0").ids == [3] and backend.decode([354]) == "\0"


def test_merges_follow_scores_not_ids():
    scores = {"a": 0.0, "b": 0.0, "c": 0.0, "bc": -2.0, "ab": -1.0, "abc": -3.0}
    assert merges_by_score(scores) == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "no tokenizer.json and no tokenizer.model"),
        (b"", "holds no pieces"),
        (b"\xff\xfe broken", "is no SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    ],
)
def test_a_missing_or_broken_vocabulary_is_named(tmp_path, data, message):
    for name in ("tokenization_internlm_xcomposer2.py", "tokenizer_config.json"):
        shutil.copy(REPO / name, tmp_path)
    if data is not None:
        (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match="no SentencePiece vocabulary at .*absent.model"):
        InternLMXComposer2Tokenizer(tmp_path / "absent.model")


def test_a_vocabulary_with_other_settings_is_refused(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(train_tokenizer())
    proto.normalizer_spec.add_dummy_prefix = True
    proto.trainer_spec.byte_fallback = False
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="it has no byte_fallback, add_dummy_prefix"):
        backend_from_sentencepiece(tmp_path / "tokenizer.model")


def test_the_tool_writes_nothing_that_differs(tmp_path, monkeypatch, capsys):
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer())
    monkeypatch.setattr("xcomposer.checkpoints.fast_tokenizer.backend_from_sentencepiece", _without_merges)
    assert main([str(tmp_path)]) == 1
    assert "differ from SentencePiece, nothing written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def _without_merges(path):
    from tokenizers import Tokenizer

    fields = json.loads(backend_from_sentencepiece(path).to_str())
    fields["model"]["merges"] = fields["model"]["merges"][:-50]
    return Tokenizer.from_str(json.dumps(fields))


def test_the_tool_replaces_other_files_only_by_force(tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert main([str(tmp_path)]) == 1
    assert "--force" in capsys.readouterr().err and not (tmp_path / "tokenizer.json").exists()
    assert main([str(tmp_path), "--json-only"]) == 0
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"
    assert main([str(tmp_path), "--force"]) == 0 == main([str(tmp_path)])  # the second time nothing differs
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert len([*tmp_path.iterdir()]) == 3  # no temporary file stays


def test_the_tool_names_a_missing_source(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "tokenizer.model does not exist" in capsys.readouterr().err
