"""Damaged and odd weight files: an error that names tensor or file, or a model that works; never random weights.

The rows are damages of one tiny checkpoint; each is loaded as users load it, with task adapters on disk and in memory.
"""

import json
import shutil

import pytest
import torch
from conftest import load
from safetensors.torch import load_file, save_file

from xcomposer.checkpoints import tiny

WQKV = "model.layers.0.attention.wqkv.weight"
TOKENS, HEAD, SUB = "model.tok_embeddings.weight", "output.weight", "plora_sub_GN"
WEB = "model.layers.1.feed_forward.w2.lora_web_B.weight"
PLORA = "model.layers.1.attention.wo.Plora_A.weight"
VIT = "vit.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"
EACH = (WQKV, TOKENS, HEAD, SUB, PLORA, VIT, "vision_proj.2.bias", "model.norm.weight")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("whole") / "IXC whole v1.0")


@pytest.fixture
def damaged(whole, tmp_path):
    """A change of the weights by name -> a folder with the changed weights."""

    def folder_of(change):
        folder = tmp_path / "IXC damaged v1.0"
        shutil.copytree(whole, folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return folder_of


def drop(name):
    return lambda weights: weights.pop(name)


def cast(name):
    return lambda weights: weights.update({name: weights[name].to(torch.int32)})


def grow(name):
    return lambda weights: weights.update({name: torch.cat([weights[name], weights[name]])})


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("damage", [drop, cast, grow])
def test_a_damaged_tensor_is_named(damaged, damage, name):
    with pytest.raises(ValueError, match=r"plora_sub_GN" if name == SUB else name.replace(".", r"\.")):
        load(damaged(damage(name)))


@pytest.mark.parametrize("damage", [drop, cast, grow])
def test_a_damaged_task_adapter_is_never_random(damaged, damage):
    with pytest.raises(ValueError, match="lora_web_B"):
        load(damaged(damage(WEB)), task_adapters="all")


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def pointer(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def lost_shard(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tiny.write_weights(folder, weights, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def adapters_lost(folder):
    weights = {n: t for n, t in load_file(folder / "model.safetensors").items() if "lora_web" not in n}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))


def another_img_size(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("vision_config")
    (folder / "config.json").write_text(json.dumps({**config, "img_size": 490}))


FILES = {
    "cut": (cut, "model.safetensors .* is cut short"),
    "pointer": (pointer, "is a Git LFS pointer"),
    "empty": (empty, "is cut short or no safetensors file"),
    "lost shard": (lost_shard, "model-00002-of-00003.safetensors"),
    "adapters lost": (adapters_lost, "task_adapter_ranks is .*'web'"),
    "another width": (another_width, "hidden_size is 128, but model.tok_embeddings.weight gives 64"),
    "img_size": (another_img_size, "img_size is 490, but .*position_embedding.weight gives 56"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(whole, tmp_path, name):
    change, message = FILES[name]
    folder = tmp_path / "IXC odd v1.0"
    shutil.copytree(whole, folder)
    change(folder)
    with pytest.raises((ValueError, OSError), match=message):
        load(folder)


def test_variant_also_for_the_adapters(whole, tmp_path):
    folder = tmp_path / "IXC variant v1.0"
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    model = load(folder, variant="fp16")
    assert model.load_task_adapters(["web"]) == ["web"]


def test_saving_when_the_folder_is_gone(whole, tmp_path):
    folder = tmp_path / "IXC gone v1.0"
    shutil.copytree(whole, folder)
    model = load(folder)
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "saved")
    saved, before = load_file(tmp_path / "saved" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in before if "post_layernorm" not in name)


def test_an_index_beside_a_single_file_is_read_alike(whole, tmp_path):
    """The model takes the single file; so does every tool."""
    from xcomposer.checkpoints import merge
    from xcomposer.model.weight_files_internlm_xcomposer2 import weight_files

    folder = tmp_path / "IXC both v1.0"
    shutil.copytree(whole, folder)
    other = {n: torch.zeros_like(t) for n, t in load_file(folder / "model.safetensors").items()}
    tiny.write_weights(folder, other, shards=2)
    assert weight_files(folder)[0] == ["model.safetensors"]
    merge.merge(folder, tmp_path / "merged", "base", progress=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")[WQKV]
    assert torch.equal(merged, load(folder).model.language_model.layers[0].attention.wqkv.linear.weight)
    assert merged.abs().sum() > 0
