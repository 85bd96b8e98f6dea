"""The tiny checkpoint: the released names and shapes, every file layout, and files that load."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from xcomposer.checkpoints import tiny

REPO = Path(__file__).resolve().parents[1]

GOLDEN_SHAPES = REPO / "tests" / "golden" / "tiny_shapes.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "v2.5 model")  # dots and spaces must do no harm


def read_weights(folder):
    """All tensors of a checkpoint folder by name, through its index where it has one."""
    index = [*folder.glob("*.index.json")]
    if index:
        where = json.loads(index[0].read_text())["weight_map"]
        files = sorted(set(where.values()))
        parts = {file: _read(folder / file) for file in files}
        assert {name: file for file, part in parts.items() for name in part} == where
        return {name: tensor for part in parts.values() for name, tensor in part.items()}, files
    (file,) = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return _read(file), [file.name]


def _read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def test_names_and_shapes_are_those_recorded_from_the_original():
    shapes = tiny.released_shapes({**tiny.TINY, "vocab_size": 92544})
    recorded = json.loads(GOLDEN_SHAPES.read_text())
    assert {name: list(shape) for name, shape in shapes.items()} == recorded


def test_shapes_of_the_7b_release():
    shapes = tiny.released_shapes({})
    assert shapes["model.tok_embeddings.weight"] == (92544, 4096)
    assert shapes["model.layers.31.attention.wqkv.weight"] == (6144, 4096)
    assert shapes["model.layers.31.feed_forward.w2.lora_web_A.weight"] == (512, 14336)
    assert shapes["plora_sub_GN"] == (1, 1, 1, 4096)
    assert shapes["vit.vision_tower.vision_model.embeddings.position_embedding.weight"] == (1601, 1024)
    assert 11.0e9 < sum(math.prod(shape) for shape in shapes.values()) < 11.2e9
    released = REPO / "config.json"
    if released.is_file():
        assert tiny.released_shapes(json.loads(released.read_text())) == shapes


def test_task_adapters_can_be_left_out():
    shapes = tiny.released_shapes({**tiny.TINY, "vocab_size": 100, "task_adapter_ranks": {}})
    assert not any(".lora_" in name for name in shapes) and any("Plora_A" in name for name in shapes)


def test_weights_follow_their_names():
    same = [tiny.seeded("model.layers.0.attention.wo.weight", (64, 64)) for _ in range(2)]
    assert same[0].dtype == np.float32 and np.array_equal(*same)
    assert not np.array_equal(same[0], tiny.seeded("model.layers.1.attention.wo.weight", (64, 64)))
    spread = {
        "output.weight": 2 / 8,
        "a.wo.weight": 1 / 8,
        "a.wo.Plora_B.weight": 0.7 / 8,
        "model.tok_embeddings.weight": 0.5,
    }
    for name, deviation in spread.items():
        assert tiny.seeded(name, (500, 64)).std() == pytest.approx(deviation, rel=0.02)
    assert tiny.seeded("model.norm.weight", (5000,)).mean() == pytest.approx(1, abs=0.01)
    assert tiny.seeded("vision_proj.0.bias", (5000,)).std() == pytest.approx(0.1, rel=0.05)
    assert tiny.seeded("plora_glb_GN", (1, 1, 5000)).std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("shards", [1, 3, 142])
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_every_file_layout_holds_the_same_weights(tmp_path, fmt, shards):
    out = tiny.write_checkpoint(tmp_path / "out", shards=shards, fmt=fmt, dtype="bf16", code="none")
    weights, files = read_weights(out)
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == tiny.released_shapes(config)
    for name, tensor in weights.items():
        assert torch.equal(tensor, torch.from_numpy(tiny.seeded(name, tensor.shape)).bfloat16())
    stem = "model" if fmt == "safetensors" else "pytorch_model"
    assert files == (
        [f"{stem}.{fmt}"] if shards == 1 else [f"{stem}-{i:05d}-of-{shards:05d}.{fmt}" for i in range(1, shards + 1)]
    )
    assert not [*out.glob("*.py")]


def test_shards_are_about_equal(tmp_path):
    weights = {str(number): torch.zeros(100) for number in range(10)}
    assert [len(part) for part in tiny._split(weights, 4)] == [3, 2, 3, 2]
    with pytest.raises(ValueError, match="between 1 and 10, the number of tensors, got 11"):
        tiny._split(weights, 11)


def test_config_and_tokenizer_load_and_agree(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    assert config.vocab_size == len(tokenizer) == 1000
    markers = tokenizer.convert_tokens_to_ids(["[UNUSED_TOKEN_140]", "[UNUSED_TOKEN_139]"])
    assert [config.image_token_id, config.video_token_id] == markers
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.tile == 56 and config.task_adapter_ranks == {"sft": 8, "dpo": 8, "web": 16}
    stops = json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [2, tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_145]")]
    text = "Describe this image: 图片 😀"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}


def test_code_is_copied_or_linked(checkpoint, tmp_path):
    name = "tokenization_internlm_xcomposer2.py"
    assert (checkpoint / name).read_bytes() == (REPO / name).read_bytes() and not (checkpoint / name).is_symlink()
    linked = tiny.write_checkpoint(tmp_path / "linked", code="link")
    assert (linked / name).resolve() == REPO / name
    assert {path.name for path in linked.glob("*.py")} == {path.name for path in REPO.glob("*.py")}


def test_fields_and_vocabulary_can_be_given(tmp_path):
    (tmp_path / "some.model").write_bytes(tiny.train_tokenizer(700))
    out = tiny.write_checkpoint(
        tmp_path / "out",
        config={"num_hidden_layers": 1, "vision_config": {"image_size": 84}},
        vocab_size=900,
        tokenizer_model=tmp_path / "some.model",
        code="none",
    )
    weights, _ = read_weights(out)
    assert weights["output.weight"].shape == (900, 64)
    assert weights["vit.vision_tower.vision_model.embeddings.position_embedding.weight"].shape == (37, 32)
    assert not any("layers.1.attention" in name for name in weights)
    assert (out / "tokenizer.model").read_bytes() == (tmp_path / "some.model").read_bytes()


def test_training_is_deterministic_and_refuses_impossible_sizes():
    assert tiny.train_tokenizer() == tiny.train_tokenizer()
    for pieces in (50, 100000):
        with pytest.raises(ValueError, match=f"vocabulary of {pieces} pieces cannot be trained"):
            tiny.train_tokenizer(pieces)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": "int8"}, "dtype must be one of fp32"),
        ({"fmt": "gguf"}, "fmt must be one of safetensors, bin"),
        ({"code": "zip"}, "code must be one of"),
        ({"vocab_size": 999}, "999 is smaller than the vocabulary of 1000"),
        ({"shards": 0}, "shards must lie between 1 and 142"),
    ],
)
def test_wrong_choices_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.write_checkpoint(tmp_path / "out", **arguments)
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_existing_checkpoint_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("precious")
    assert tiny.main([str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    choices = ["--dtype", "fp16", "--format", "bin", "--shards", "2", "--config", '{"plora_rank": 4}']
    assert tiny.main([str(out), *choices]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    weights, files = read_weights(out)
    assert weights["model.layers.0.attention.wo.Plora_A.weight"].shape == (4, 64) and len(files) == 2
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
