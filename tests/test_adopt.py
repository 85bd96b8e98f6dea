"""`xcomposer adopt`: what it writes beside released weights, that it does so once, and what it refuses."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from xcomposer.checkpoints import adopt, tiny

REPO = Path(__file__).resolve().parents[1]

RANKS = {"plora_rank": 4, "plora_alpha": 4, "task_adapter_ranks": {"sft": 2, "dpo": 6, "web": 3}}
OURS = ("plora_rank", "plora_alpha", "task_adapter_ranks", "vision_config", "auto_map")
VIT = "vit.vision_tower.vision_model."


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A checkpoint without code, in one safetensors file."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("template") / "tiny", config=RANKS, code="none")


@pytest.fixture
def folder(template, tmp_path):
    return shutil.copytree(template, tmp_path / "IXC-2.5 test v1.0")


def edit_config(folder, drop=(), **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in drop}))


def as_released(folder):
    """Take out of config.json what the release does not say (the tiny tower's heads are no tensor's shape)."""
    edit_config(folder, OURS, architectures=["InternLMXComposer2ForCausalLM"], attn_implementation="flash_attention_2")
    edit_config(folder, vision_config={"num_attention_heads": 2}, rope_scaling={"type": "dynamic", "factor": 2.0})


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def snapshot(folder):
    """Names, bytes and times of everything in the folder, links included."""
    return {
        path.relative_to(folder): (path.lstat().st_mtime_ns, path.lstat().st_ino, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def refused(folder, capsys, *options):
    """The faults that adopt.py names; nothing may have changed."""
    before = snapshot(folder) if folder.is_dir() else None
    assert adopt.main([str(folder), *options]) == 1
    assert before == (snapshot(folder) if folder.is_dir() else None)
    out, err = capsys.readouterr()
    assert not out and "nothing was changed" in err and "Traceback" not in err
    return err


# What is written.


@pytest.mark.parametrize("layout", [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_a_release_without_ranks_gets_them_from_its_shapes_and_loads(tmp_path, layout, capsys):
    fmt, shards = layout
    folder = tiny.write_checkpoint(
        tmp_path / "IXC-2.5 test v1.0", RANKS, fmt=fmt, shards=shards, dtype="bf16", code="none"
    )
    as_released(folder)
    weights = {path: path.read_bytes() for path in folder.glob(f"*.{fmt}")}
    released = json.loads((folder / "config.json").read_text())
    assert adopt.main([str(folder)]) == 0
    screen = capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in RANKS} == RANKS
    assert config["vision_config"] == tiny.TINY["vision_config"]
    assert config["auto_map"] == json.loads((REPO / "config.json").read_text())["auto_map"]
    kept = {name for name in released if name not in ("vision_config", "architectures", "auto_map")}
    assert all(config[name] == released[name] for name in kept) and config["rope_scaling"].keys() == {"type", "factor"}
    assert json.loads((folder / "config.json.orig").read_text()) == released
    assert all(path.read_bytes() == data for path, data in weights.items())
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in REPO.glob("*.py")}
    assert not [*folder.glob(".*")]

    total = sum(math.prod(shape) for name, shape in tiny.released_shapes(config).items() if "post_layer" not in name)
    for text in (
        f"{shards} {fmt} file", f"{total / 1e3:.2f} k in 140 tensors, bfloat16", "rank 4, alpha 4",
        "sft 2 (7.2 kB)", "dpo 6 (21.5 kB)", "web 3 (10.8 kB)",
        "4 heads (2 key/value)", "56 px tiles of 4 tokens", "tokenizer.model (SentencePiece)",
        "config.json: auto_map, plora_alpha, plora_rank, task_adapter_ranks, vision_config", "config.json.orig",
        f"xcomposer chat --model '{folder}'",
    ):  # fmt: skip
        assert text in screen, text
    assert len(screen.splitlines()) <= 20

    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.task_adapter_ranks == RANKS["task_adapter_ranks"] and model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a").input_ids[0] == 1


@pytest.mark.parametrize("options", [[], ["--link"]])
def test_a_second_run_changes_nothing_and_says_so(folder, options, capsys):
    as_released(folder)
    assert adopt.main([str(folder), *options]) == 0
    assert "nothing to do" not in capsys.readouterr().out
    after_first = snapshot(folder)
    assert adopt.main([str(folder), *options]) == 0
    screen = capsys.readouterr().out
    assert "nothing to do" in screen and "no file was touched" in screen and "copied" not in screen
    assert snapshot(folder) == after_first


def test_a_dry_run_says_what_would_be_and_writes_nothing(folder, capsys):
    as_released(folder)
    before = snapshot(folder)
    assert adopt.main([str(folder), "--dry-run"]) == 0
    screen = capsys.readouterr().out
    assert "would be copied" in screen and "would be written config.json: auto_map, plora_alpha" in screen
    assert snapshot(folder) == before


def test_links_lead_to_this_clone_and_turn_into_copies_and_back(folder, capsys):
    name = "build_mlp.py"
    assert adopt.main([str(folder), "--link"]) == 0
    assert (folder / name).is_symlink() and (folder / name).resolve() == REPO / name
    assert not (folder / "config.json").is_symlink() and not (folder / "tokenizer_config.json").is_symlink()
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).plora_rank == 4
    assert adopt.main([str(folder)]) == 0
    assert not (folder / name).is_symlink() and (folder / name).read_bytes() == (REPO / name).read_bytes()
    assert adopt.main([str(folder), "--link"]) == 0
    assert (folder / name).is_symlink()
    assert not (folder / f"{name}.orig").exists()


def test_replaced_files_are_kept_once_and_a_cache_behind_links_stays_whole(folder, tmp_path):
    as_released(folder)
    blob = tmp_path / "blob"  # a hub cache: the folder holds links to its contents
    blob.write_text("# the release's own\n")
    (folder / "build_mlp.py").symlink_to(blob)
    assert adopt.main([str(folder)]) == 0
    assert blob.read_text() == "# the release's own\n" == (folder / "build_mlp.py.orig").read_text()
    assert (folder / "build_mlp.py").read_bytes() == (REPO / "build_mlp.py").read_bytes()
    released = (folder / "config.json.orig").read_bytes()
    edit_config(folder, ("plora_rank",))
    assert adopt.main([str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["plora_rank"] == 4
    assert (folder / "config.json.orig").read_bytes() == released


def test_a_config_that_says_all_is_left_byte_for_byte(folder):
    edit_config(folder, auto_map=json.loads((REPO / "config.json").read_text())["auto_map"])
    before = (folder / "config.json").read_bytes()
    assert adopt.main([str(folder)]) == 0
    assert (folder / "config.json").read_bytes() == before and not (folder / "config.json.orig").exists()


def test_wrong_ranks_in_the_config_give_way_to_the_weights(folder, capsys):
    edit_config(folder, plora_rank=256, plora_alpha=256, task_adapter_ranks={"web": 512, "sft": 2})
    assert adopt.main([str(folder)]) == 0
    screen = capsys.readouterr().out
    assert "plora_rank was 256 in config.json, the weights have 4" in screen and "web: the rank was 512" in screen
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in RANKS} == RANKS


def test_a_stated_alpha_stays(folder):
    edit_config(folder, ("plora_rank",), plora_alpha=8)
    assert adopt.main([str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["plora_alpha"] == 8


def test_sizes_that_the_config_leaves_out_are_read_from_the_weights(folder):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
    stated = json.loads((folder / "config.json").read_text())
    edit_config(folder, sizes)
    assert adopt.main([str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in sizes} == {name: stated[name] for name in sizes}


def test_no_task_adapters_no_post_layernorm_and_stray_buffers_are_fine(folder, capsys):
    def change(weights):
        for name in [name for name in weights if ".lora_" in name or "post_layernorm" in name]:
            del weights[name]
        weights[VIT + "embeddings.position_ids"] = torch.arange(17)[None]
        weights["model.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(folder, change)
    edit_config(folder, ("task_adapter_ranks",))
    assert adopt.main([str(folder)]) == 0
    screen = capsys.readouterr().out
    assert "task adapters    none" in screen and "2 tensors not used" in screen
    assert json.loads((folder / "config.json").read_text())["task_adapter_ranks"] == {}


def test_what_save_pretrained_writes_can_be_adopted(folder, tmp_path):
    adopt.main([str(folder)])
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    shutil.copy(folder / "tokenizer.model", tmp_path / "saved")
    assert adopt.main([str(tmp_path / "saved")]) == 0
    again = snapshot(tmp_path / "saved")
    assert adopt.main([str(tmp_path / "saved")]) == 0 and snapshot(tmp_path / "saved") == again
    info = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True, output_loading_info=True)[1]
    assert not info["missing_keys"] and not info["unexpected_keys"]


TOKENIZERS = {
    "absent": (None, True),
    "release": ({"auto_map": {"AutoTokenizer": ["tokenization_internlm_xcomposer2.InternLMXComposer2Tokenizer", None]},
                 "model_max_length": 77}, False),
    "no pair": ({"auto_map": {"AutoTokenizer": "tokenization_internlm_xcomposer2.InternLMXComposer2Tokenizer"}}, True),
    "other code": ({"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}, True),
    "fast without its file": ({"tokenizer_class": "PreTrainedTokenizerFast"}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_config_is_replaced_only_where_it_does_not_work(folder, name):
    content, replaced = TOKENIZERS[name]
    path = folder / "tokenizer_config.json"
    path.unlink()
    if content is not None:
        path.write_text(json.dumps(content))
    before = path.read_bytes() if content else None
    vocabulary = (folder / "tokenizer.model").read_bytes()
    assert adopt.main([str(folder)]) == 0
    assert (path.read_bytes() == (REPO / path.name).read_bytes()) == replaced == (path.read_bytes() != before)
    assert (folder / "tokenizer.model").read_bytes() == vocabulary
    assert (folder / "tokenizer_config.json.orig").exists() == (replaced and content is not None)


def test_a_fast_tokenizer_is_left_alone(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert adopt.main([str(folder)]) == 0
    assert (folder / "tokenizer_config.json").read_text() == '{"tokenizer_class": "PreTrainedTokenizerFast"}'


def test_stop_tokens_come_along_for_the_released_vocabulary_alone(folder):
    (folder / "generation_config.json").unlink()
    assert adopt.main([str(folder)]) == 0
    assert not (folder / "generation_config.json").exists()


# What is refused.


def llama(weights):
    weights.clear()
    for layer in range(2):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.zeros(4, 4)
    weights["model.norm.weight"] = torch.zeros(4)


def test_another_architecture_is_named(folder, capsys):
    edit_weights(folder, llama)
    edit_config(folder, architectures=["LlamaForCausalLM"])
    message = refused(folder, capsys)
    assert "not an InternLM-XComposer-2.5 checkpoint (config.json: LlamaForCausalLM)" in message
    assert "6 of 7 tensors are unknown to this code: model.layers.0.mlp.up_proj.weight, " in message
    assert "and 3 more" in message


def resize(pattern, shape):
    def change(weights):
        for name in [name for name in weights if pattern in name]:
            weights[name] = torch.zeros(shape(weights[name].shape))

    return change


def vl(weights):
    weights["vision_proj.0.weight"] = torch.zeros(64, 32)
    weights[VIT + "embeddings.position_embedding.weight"] = torch.zeros(35**2 + 1, 32)
    del weights["plora_glb_GN"], weights["plora_sub_GN"]


def four_khd(weights):
    resize("wqkv.Plora_A", lambda shape: (2, shape[1]))(weights)
    resize("wqkv.Plora_B", lambda shape: (shape[0], 2))(weights)
    resize("position_embedding", lambda shape: (577, 32))(weights)


def text_only(weights):
    for name in [name for name in weights if name.startswith(("vi", "plora")) or "lora_" in name or "Plora" in name]:
        del weights[name]


@pytest.mark.parametrize(
    "change, name",
    [
        (text_only, "this is a text-only InternLM2"),
    ],
)
def test_siblings_are_told_apart(folder, capsys, change, name):
    as_released(folder)
    edit_weights(folder, change)
    message = refused(folder, capsys)
    assert name in message and "this code" in message


@pytest.mark.parametrize(
    "change, title, fields",
    [
        (vl, "InternLM-XComposer2-VL in ", {"kind": "xcomposer2-vl"}),
        (four_khd, "InternLM-XComposer2-4KHD in ", {"kind": "xcomposer2-4khd", "plora_wqkv_alpha": 4}),
    ],
)
def test_siblings_are_adopted_as_what_they_are(folder, capsys, change, title, fields):
    as_released(folder)
    edit_config(folder, ("task_adapter_ranks",))
    edit_weights(folder, without("lora_sft", "lora_dpo", "lora_web"))
    edit_weights(folder, change)
    assert adopt.main([str(folder)]) == 0
    assert title in capsys.readouterr().out
    written = json.loads((folder / "config.json").read_text())
    assert fields.items() <= written.items()


def without(*patterns):
    def change(weights):
        for name in [name for name in weights if any(pattern in name for pattern in patterns)]:
            del weights[name]

    return change


def two_names(weights):
    weights["lm_head.weight"] = weights["output.weight"].clone()


def extra(weights):
    weights["v_head.weight"] = torch.zeros(1, 64)


WO_B = "model.layers.1.attention.wo.Plora_B.weight"
DAMAGES = {
    "missing": (without("layers.1.attention.wo."), "9 tensors missing: model.layers.1.attention.wo.weight, "
                f"model.layers.1.attention.wo.Plora_A.weight, {WO_B} and 6 more"),
    "last layer": (without("model.layers.1."), "num_hidden_layers is 2, but model.layers.* gives 1"),
    "last tower layer": (without("vision_model.encoder.layers.1."), "vision_config.num_hidden_layers is 2, but"),
    "whole adapter": (without("lora_web"), "names task adapters that the weights lack: web;"),
    "shape": (resize(WO_B, lambda shape: (64, 5)), f"1 tensor of the wrong shape: {WO_B} is (64, 5), not (64, 4)"),
    "embedding": (resize("tok_embeddings", lambda shape: (999, 64)), "vocab_size is 1000, but "
                  "model.tok_embeddings.weight gives 999"),
    "unknown": (extra, "1 tensor unknown to this code: v_head.weight"),
    "two names": (two_names, "1 parameter under two names: lm_head.weight and output.weight"),
    "no square": (resize("position_embedding", lambda shape: (19, 32)), "has 19 rows, which is no square"),
    "separator": (without("plora_glb_GN"), "1 tensor missing: plora_glb_GN"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_missing_wrong_and_unknown_tensors_are_named(folder, capsys, name):
    change, message = DAMAGES[name]
    edit_weights(folder, change)
    assert message in refused(folder, capsys)


def test_a_released_tower_without_its_last_layer_is_noticed(folder, capsys):
    """config.json of the release says nothing of the tower; width 1024 tells that it is the 24-layer one."""
    tower = {"num_hidden_layers": 23}
    shapes = tiny.released_shapes({**tiny.TINY, **RANKS, "vocab_size": 1000, "vision_config": tower})
    write_sparse(folder / "model.safetensors", dict.fromkeys(shapes, "BF16"), shapes)
    edit_config(folder, OURS)
    assert "vision_config.num_hidden_layers is 24, but" in refused(folder, capsys)


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def junk(folder):
    (folder / "model.safetensors").write_bytes(b"<html>404: not found</html>")


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")


def same_name_twice(folder):
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{entry}, {entry}}}".encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"hidden_size": 64,')


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


FILES = {
    cut_short: "model.safetensors is cut short: ",
    cut_in_header: "is cut short or no safetensors file",
    junk: "model.safetensors (27 bytes) is cut short or no safetensors file",
    pointer: "is a Git LFS pointer",
    empty_file: "model.safetensors (0 bytes) is cut short",
    same_name_twice: "1 name in it twice: a",
    no_config: "no config.json",
    broken_config: "config.json is no JSON",
    no_weights: "no weights: none of model.safetensors, ",
    no_index: "1 weight file (model-00001-of-00001.safetensors) but none of model.safetensors, ",
}


@pytest.mark.parametrize("damage", FILES, ids=lambda damage: damage.__name__)
def test_damaged_files_are_named(folder, capsys, damage):
    damage(folder)
    assert FILES[damage] in refused(folder, capsys)


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_damaged_shards_are_all_named(tmp_path, capsys, fmt):
    folder = tiny.write_checkpoint(tmp_path / "shards", shards=6, fmt=fmt, code="none")
    shards = sorted(folder.glob(f"*.{fmt}"))
    for shard in shards[1:3]:
        shard.write_bytes(shard.read_bytes()[:-300])
    message = refused(folder, capsys)
    assert shards[1].name in message and shards[2].name in message and shards[3].name not in message
    for shard in shards[1:]:
        shard.unlink()
    message = refused(folder, capsys)
    assert "5 of the 6 files named in" in message and "and 2 more; download them" in message


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path, capsys):
    folder = tiny.write_checkpoint(tmp_path / "shards", shards=2, code="none")
    first, second = sorted(folder.glob("*.safetensors"))
    weights = load_file(first)
    moved = dict(list(weights.items())[:5])
    save_file({**load_file(second), **moved}, second)
    assert "5 tensors in more than one file: " in refused(folder, capsys)
    save_file({name: tensor for name, tensor in weights.items() if name not in moved}, first)
    assert "5 tensors not in the file the index names: " in refused(folder, capsys)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first.name, f"../{first.name}"))
    assert "names files outside the folder" in refused(folder, capsys)


def test_a_bin_file_is_not_trusted(folder, capsys):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (folder / "ran",))

    (folder / "model.safetensors").unlink()
    torch.save({"a": Payload()}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read" in refused(folder, capsys)
    torch.save({"step": 3, "model": {}}, folder / "pytorch_model.bin")
    assert "holds 2 things that are no tensors: step, model" in refused(folder, capsys)


def test_an_old_bin_file_is_read(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert adopt.main([str(folder)]) == 0


@pytest.mark.parametrize(
    "drop, fields, message",
    [
        (["num_attention_heads"], {}, "num_attention_heads is None, and the weights do not tell it"),
        ([], {"num_attention_heads": 5}, "hidden_size (64) must be a multiple of num_attention_heads (5)"),
        ([], {"hidden_size": 4096}, "hidden_size is 4096, but model.tok_embeddings.weight gives 64"),
        ([], {"num_key_value_heads": 4}, "num_key_value_heads is 4, but model.layers.0.attention.wqkv.weight gives 2"),
        ([], {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ([], {"task_adapter_ranks": [1]}, "task_adapter_ranks is [1]"),
        (["vision_config"], {}, "vision_config.num_attention_heads is missing"),
    ],
)
def test_a_config_that_cannot_be_is_refused(folder, capsys, drop, fields, message):
    edit_config(folder, drop, **fields)
    assert message in refused(folder, capsys)


def test_folders_that_are_none(tmp_path, capsys):
    assert "no such folder" in refused(tmp_path / "absent", capsys)
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refused(tmp_path / "empty", capsys)


def test_a_failed_write_leaves_the_folder_as_it_was(folder, monkeypatch, capsys):
    as_released(folder)
    before = snapshot(folder)
    monkeypatch.setattr(adopt.os, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert adopt.main([str(folder)]) == 1
    assert "read-only" in capsys.readouterr().err
    assert snapshot(folder) == before


# The size of the release.


def write_sparse(path, dtypes, shapes):
    """A safetensors file with a true header over a hole of the right size."""
    header, end = {}, 0
    for name, dtype in dtypes.items():
        size = 2 * math.prod(shapes[name])
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)


def test_the_7b_release_is_read_from_its_headers_alone(tmp_path):
    folder = tmp_path / "internlm-xcomposer2d5-7b"
    folder.mkdir()
    shapes = tiny.released_shapes({"task_adapter_ranks": {"sft": 256, "dpo": 256, "web": 384}})
    names = list(shapes)
    where = {name: f"model-{1 + 4 * i // len(names):05d}-of-00004.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        write_sparse(folder / file, {name: "BF16" for name in names if where[name] == file}, shapes)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    released = {"model_type": "internlmxcomposer2", "num_attention_heads": 32, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(released))

    start = time.perf_counter()
    script = (
        "import pathlib, re, sys; from xcomposer.checkpoints import adopt; code = adopt.main(sys.argv[1:]); "
        "status = pathlib.Path('/proc/self/status'); "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', status.read_text())[1] if status.exists() else 0); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    taken = time.perf_counter() - start
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert done.returncode == 0, done.stderr
    *screen, peak = done.stdout.splitlines()
    screen = "\n".join(screen)
    total = sum(math.prod(shape) for name, shape in shapes.items() if "post_layernorm" not in name)
    assert f"4 safetensors files, {2 * total / 1e9:.1f} GB; 2 tensors not used" in screen
    assert f"{total / 1e9:.2f} B in 1,902 tensors, bfloat16" in screen and 10.7e9 < total < 11e9
    assert "32 layers, width 4096, feed-forward 14336, 32 heads (8 key/value), vocabulary 92544" in screen
    assert "24 layers, width 1024, feed-forward 4096, 16 heads, patch 14, 560 px tiles of 400 tokens" in screen
    assert "web 384 (1.8 GB)" in screen and "rank 256, alpha 256 (1.2 GB)" in screen
    assert config["task_adapter_ranks"] == {"sft": 256, "dpo": 256, "web": 384} and config["num_hidden_layers"] == 32
    assert config["vision_config"]["num_attention_heads"] == 16
    assert (folder / "generation_config.json").is_file() and (folder / "tokenizer_config.json").is_file()
    assert "NONE: download tokenizer.model" in screen
    assert on_disk < 5e6 and int(peak) < 1e6 and taken < 60, (on_disk, peak, taken)
