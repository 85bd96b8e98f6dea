"""Merged and exported task adapters: the logits of the adapter switched on, memory by the shard, clear refusals."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from xcomposer.checkpoints import export as exporter
from xcomposer.checkpoints import merge as merger
from xcomposer.checkpoints import tiny

REPO = Path(__file__).resolve().parents[1]

TASKS = ("web", "write", "dpo")
LAYOUTS = {"one": (1, "safetensors"), "five": (5, "safetensors"), "bin": (1, "bin"), "bins": (4, "bin")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def sources(folder):
    """The same weights in every layout."""
    return {
        name: tiny.write_checkpoint(folder / f"src {name}", shards=shards, fmt=fmt)
        for name, (shards, fmt) in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def reference(sources):
    return load(sources["one"])


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True).eval()


def inputs(model, rows=1):
    """A prompt of text, a picture of two tiles, and text."""
    generator = torch.Generator().manual_seed(0)
    side = model.config.tokens_per_side
    image = [model.config.image_token_id] * (side * (side + 1) + 1 + side * (2 * side + 1))
    text = torch.randint(20, 900, (12,), generator=generator).tolist()
    tile = model.config.tile
    pixels = torch.randn(2 * rows, 3, tile, tile, generator=generator)
    return {
        "input_ids": torch.tensor([text[:4] + image + text[4:]] * rows),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 1, 2]] * rows),
    }


@torch.no_grad()
def logits(model, mode="base"):
    batch = inputs(model)
    batch["pixel_values"] = batch["pixel_values"].to(next(model.parameters()).dtype)
    return model(**batch, infer_mode=mode).logits.float()


def weights_of(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("task", TASKS)
def test_logits_equal_the_adapter_switched_on(sources, reference, tmp_path, task):
    merged = load(merger.merge(sources["five"], tmp_path / "out.v2 model", task, progress=False))
    want = logits(reference, task)
    assert (logits(merged) - want).abs().max() < 1e-5 * want.abs().max()
    assert (want - logits(reference)).abs().max() > 0.1  # the adapter does change the answer
    assert merged.config.task_adapter_ranks == {}
    with pytest.raises(ValueError, match="lacks"):
        logits(merged, "web")


def test_base_only_leaves_the_adapters_out(sources, reference, tmp_path):
    stripped = merger.merge(sources["one"], tmp_path / "out", "base", progress=False)
    assert torch.equal(logits(load(stripped)), logits(reference))
    assert not any(".lora_" in name for name in weights_of(stripped))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_weights(sources, tmp_path, layout):
    out = merger.merge(sources[layout], tmp_path / "out", "write", progress=False)
    weights = weights_of(out)
    want = {
        name for name in tiny.released_shapes(json.loads((out / "config.json").read_text())) if ".lora_" not in name
    }
    assert set(weights) == want and any("Plora_A" in name for name in want)
    index = out / "model.safetensors.index.json"
    assert index.is_file() == (LAYOUTS[layout][0] > 1)
    if index.is_file():
        parsed = json.loads(index.read_text())
        for file in set(parsed["weight_map"].values()):
            held = set(safe_open(out / file, "pt").keys())
            assert held == {name for name, where in parsed["weight_map"].items() if where == file}
        assert parsed["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    expected = merged_by_hand(sources["one"], "model.layers.1.feed_forward.w2", ("sft", "dpo"))
    torch.testing.assert_close(weights["model.layers.1.feed_forward.w2.weight"], expected, rtol=1e-6, atol=1e-6)


def merged_by_hand(source, linear, adapters):
    weights = load_file(source / "model.safetensors")
    weight = weights[f"{linear}.weight"].double()
    for name in adapters:
        weight += (
            weights[f"{linear}.lora_{name}_B.weight"].double() @ weights[f"{linear}.lora_{name}_A.weight"].double()
        )
    return weight.float()


def test_bf16_within_its_rounding_and_another_dtype(sources, folder, tmp_path):
    source = tiny.write_checkpoint(tmp_path / "bf16", dtype="bfloat16", shards=3)
    out = merger.merge(source, tmp_path / "out", "web", progress=False)
    full = merger.merge(source, tmp_path / "full", "web", dtype="float32", progress=False)
    merged, exact = (
        {n: t for f in path.glob("*.safetensors") for n, t in load_file(f).items()} for path in (out, full)
    )
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    for name, tensor in merged.items():  # added in fp32 and rounded once
        assert torch.equal(tensor, exact[name].bfloat16()), name
    assert load(full, "auto").dtype == torch.float32 and load(out, "auto").dtype == torch.bfloat16
    want = logits(load(source, torch.bfloat16), "web")
    assert (logits(load(out, torch.bfloat16)) - want).abs().mean() < 0.02 * want.abs().mean()


def test_a_checkpoint_saved_by_this_model(reference, tmp_path):
    """`save_pretrained` writes a nested config; the merge reads that too."""
    saved = tmp_path / "saved"
    reference.save_pretrained(saved)
    out = merger.merge(saved, tmp_path / "out", "write", progress=False)
    assert json.loads((out / "config.json").read_text())["text_config"]["task_adapter_ranks"] == {}
    want = logits(reference, "write")
    assert (logits(load(out)) - want).abs().max() < 1e-5 * want.abs().max()


def test_files_beside_the_weights(sources, tmp_path):
    source = tmp_path / "src"
    shutil.copytree(sources["five"], source)
    (source / "configuration_internlm_xcomposer2.py").write_text("# the release's: adapters for granted\n")
    (source / "pytorch_model.bin").write_bytes(b"stale")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    out = merger.merge(source, tmp_path / "out", "web", progress=False)
    beside = {path.name for path in source.iterdir() if not path.name.startswith(("model", "pytorch_model"))}
    assert beside <= {path.name for path in out.iterdir()}
    assert not (out / "pytorch_model.bin").exists()
    ours = REPO / "configuration_internlm_xcomposer2.py"
    assert (out / ours.name).read_text() == ours.read_text()
    assert load(out).config.task_adapter_ranks == {}


def test_memory_stays_within_a_shard_and_one_linears_adapters(sources, tmp_path, monkeypatch):
    living: list = []
    peak = 0
    read = merger.Checkpoint.read

    def counted(self, name):
        nonlocal peak
        tensor = read(self, name)
        living.append(weakref.ref(tensor))
        peak = max(peak, sum(alive().nbytes for alive in living if alive() is not None))
        return tensor

    monkeypatch.setattr(merger.Checkpoint, "read", counted)
    merger.merge(sources["five"], tmp_path / "out", "write", progress=False)
    shards = [path.stat().st_size for path in sources["five"].glob("*.safetensors")]
    text = tiny.TINY
    one_linear = 4 * (8 + 8) * (text["hidden_size"] + text["intermediate_size"])
    assert 0 < peak <= max(shards) + 2 * one_linear < sum(shards) / 3


@pytest.mark.parametrize("tool", [merger.merge, exporter.export])
def test_refusals_leave_nothing_behind(sources, tmp_path, tool):
    source = sources["five"]
    out = tmp_path / "out"

    def refused(error, match, source=source, target=out, task="web"):
        with pytest.raises(error, match=match):
            tool(source, target, task, progress=False)

    refused(ValueError, r"'math'.*it has dpo, sft, web", task="math")
    refused(FileNotFoundError, "is no folder", source=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, "holds no weights", source=tmp_path / "empty")
    refused(ValueError, "same folder", target=source)
    refused(ValueError, "same folder", target=source / ".." / source.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]

    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("keep me")
    refused(FileExistsError, "not an empty folder", target=full)
    refused(FileExistsError, "not an empty folder", target=full / "notes.txt")
    assert (full / "notes.txt").read_text() == "keep me"

    part = tmp_path / "out.part"
    part.mkdir()
    refused(FileExistsError, "remove it")
    part.rmdir()
    tool(source, tmp_path / "empty", "web", progress=False)  # an empty folder is fine
    if tool is merger.merge:
        refused(ValueError, "it has none", source=tmp_path / "empty")


def test_broken_sources(sources, tmp_path):
    def broken(change):
        source = tmp_path / f"src{len(list(tmp_path.iterdir()))}"
        shutil.copytree(sources["five"], source)
        change(source)
        return source

    def drop_file(source):
        (source / "model-00003-of-00005.safetensors").unlink()

    def truncate(source):
        file = source / "model-00003-of-00005.safetensors"
        file.write_bytes(file.read_bytes()[:4000])

    def quantised(source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))

    def lose_a_side(source):
        weights = weights_of(source)
        for file in source.glob("model*"):
            file.unlink()
        del weights["model.layers.0.attention.wo.lora_web_B.weight"]
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

    for change, error, match in (
        (drop_file, ValueError, "are missing, with .*: model-00003-of-00005"),
        (truncate, ValueError, "model-00003-of-00005.safetensors .* is cut short"),
        (quantised, ValueError, "is quantised"),
        (lose_a_side, ValueError, "adapter 'web' of model.layers.0.attention.wo is incomplete"),
        (lambda source: (source / "config.json").unlink(), FileNotFoundError, "no config.json"),
    ):
        source = broken(change)
        with pytest.raises(error, match=match):
            merger.merge(source, tmp_path / "out", "web", progress=False)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists(), change.__name__


def test_bin_files_are_mapped_not_read(sources, tmp_path, monkeypatch):
    load_file_of_torch, mapped = torch.load, []

    def noted(*args, **kwargs):
        mapped.append(kwargs.get("mmap") and kwargs.get("weights_only"))
        return load_file_of_torch(*args, **kwargs)

    monkeypatch.setattr(torch, "load", noted)
    merger.merge(sources["bins"], tmp_path / "out", "web", progress=False)
    assert mapped == [True] * 2 * LAYOUTS["bins"][0]  # the headers of each, then its tensors


def test_an_interrupted_run_leaves_nothing(sources, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merger, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        merger.merge(sources["five"], tmp_path / "out", "web", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_command_line(sources, tmp_path, capfd):
    source, out = str(sources["five"]), tmp_path / "out"
    assert merger.main([source, str(out), "--task", "web"]) == 0
    printed = capfd.readouterr()
    assert printed.out.strip() == str(out) and "100%" in printed.err and "tensor" in printed.err
    assert merger.main([source, str(out), "--task", "web"]) == 1
    assert "not an empty folder" in capfd.readouterr().err
    assert exporter.main([source, str(tmp_path / "lora"), "--task", "write"]) == 0
    assert exporter.main([source, str(tmp_path / "lora2"), "--task", "base"]) == 1
    assert "nothing to export" in capfd.readouterr().err


def test_exported_folder(sources, tmp_path):
    out = exporter.export(sources["five"], tmp_path / "lora", "write", base="some/name", progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16 and config["base_model_name_or_path"] == "some/name"
    assert config["target_modules"] == ["w1.linear", "w2.linear", "w3.linear", "wo.linear", "wqkv.linear"]
    tensors = load_file(out / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers.0.attention.wqkv.linear"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (16, 64)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (128, 16)
    assert len(tensors) == 2 * 5 * 2


@pytest.mark.parametrize("task", TASKS)
def test_peft_loads_the_export(sources, tmp_path, task):
    peft = pytest.importorskip("peft", reason="PEFT loads exported adapters: pip install peft")
    model = load(sources["one"])
    want, base = logits(model, task), logits(model)
    wrapped = peft.PeftModel.from_pretrained(model, exporter.export(sources["five"], tmp_path / "lora", task))
    assert (logits(wrapped) - want).abs().max() < 1e-5 * want.abs().max()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), base)
    merged = wrapped.merge_and_unload()
    assert (logits(merged) - want).abs().max() < 1e-5 * want.abs().max()


def test_peft_on_the_checkpoint_without_adapters(sources, reference, tmp_path):
    """What a LoRA server does: one stripped base, both exports side by side."""
    peft = pytest.importorskip("peft", reason="PEFT loads exported adapters: pip install peft")
    stripped = load(merger.merge(sources["five"], tmp_path / "base", "base", progress=False))
    exports = {task: exporter.export(sources["five"], tmp_path / task, task) for task in ("web", "write")}
    wrapped = peft.PeftModel.from_pretrained(stripped, exports["web"], adapter_name="web")
    wrapped.load_adapter(exports["write"], adapter_name="write")
    for task in ("web", "write", "web"):
        wrapped.set_adapter(task)
        want = logits(reference, task)
        assert (logits(wrapped) - want).abs().max() < 1e-5 * want.abs().max()
