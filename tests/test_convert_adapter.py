"""A LoRA trained on the original model: renamed, it gives the logits of the weights it was made for."""

import json
import re
import shutil

import pytest
import torch
from conftest import REPO, load
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_imports

from xcomposer.checkpoints import convert_adapter as tool
from xcomposer.checkpoints import tiny
from xcomposer.model.adapter_names_internlm_xcomposer2 import adaptable_modules, released_module, renamed_module

peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")

RANK, ALPHA, WIDE = 4, 8, 6
TARGETS = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS,
    "base_model_name_or_path": "internlm/internlm-xcomposer2d5-7b", "bias": "none", "modules_to_save": ["output"],
    "rank_pattern": {r"layers\.0\.attention\.wqkv": WIDE}, "alpha_pattern": {}, "inference_mode": True,
}  # fmt: skip
KINDS = [
    *TARGETS, "vit.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "vision_proj.2",
    "attention.wqkv.lora_web_A", "tok_embeddings",
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("adapter") / "base")


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """An adapter as PEFT saved it beside the original, and the released weights with it merged by hand."""
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    adapter = {"base_model.model.output.weight": torch.randn(weights["output.weight"].shape, generator=generator)}
    merged = {**weights, "output.weight": adapter["base_model.model.output.weight"]}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or not any(module.endswith(kind) for kind in KINDS):
            continue
        rank = WIDE if module.endswith("layers.0.attention.wqkv") and module.startswith("model.") else RANK
        low = 0.1 * torch.randn(rank, weight.shape[1], generator=generator)
        high = 0.1 * torch.randn(weight.shape[0], rank, generator=generator)
        a, b = ("lora_A.weight", "lora_B.weight")
        merged[name] = weight + ALPHA / rank * high @ low
        if module.endswith("tok_embeddings"):  # PEFT keeps an embedding's the other way round
            a, b, low, high = "lora_embedding_A", "lora_embedding_B", high.T, low.T
        adapter[f"base_model.model.{module}.{a}"], adapter[f"base_model.model.{module}.{b}"] = low, high
    folder = tmp_path_factory.mktemp("lora") / "original"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter_model.safetensors")
    whole = tmp_path_factory.mktemp("merged") / "base"
    tiny.write_checkpoint(whole)
    merged = {name: tensor.contiguous() for name, tensor in merged.items()}
    save_file(merged, whole / "model.safetensors", {"format": "pt"})
    return folder, whole


@torch.no_grad()
def logits(model, mode="base"):
    generator = torch.Generator().manual_seed(1)
    config, side = model.config, model.config.tokens_per_side
    image = side * (side + 1) + 1 + side * (side + 1)
    ids = torch.randint(20, 900, (1, image + 12), generator=generator)
    ids[0, 4 : 4 + image] = config.image_token_id
    pixels = torch.randn(1, 3, config.tile, config.tile, generator=generator)
    return model(input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 1, 1]]), infer_mode=mode).logits


def with_config(folder, target, **changes):
    """A copy of an adapter, its config changed."""
    shutil.copytree(folder, target)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**fields, **changes}))
    return target


def by_peft(source, folder):
    return peft.PeftModel.from_pretrained(load(source, task_adapters="all"), folder)


def by_peft_as_a_second_one(source, folder):
    model = peft.get_peft_model(load(source, task_adapters="all"), lora_config(["attention.wo"]), "first")
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def by_transformers(source, folder):
    model = load(source, task_adapters="all")
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("loaded", [by_peft, by_peft_as_a_second_one, by_transformers])
def test_released_names_load_as_they_are(source, trained, tmp_path, loaded):
    original, whole = trained
    model = loaded(source, with_config(original, tmp_path / "lora", target_modules=KINDS))
    for mode in ("base", "web"):
        wanted = logits(load(whole), mode)
        assert (logits(model, mode) - wanted).abs().max() < 1e-5 * wanted.abs().max(), mode


def lora_config(targets, **fields):
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", **fields)


LINEARS = {"wqkv", "wo", "w1", "w2", "w3"}
TOWER = r"vit\.vision_tower\.vision_model\.encoder\.layers\.1\..*q_proj"


@pytest.mark.parametrize(
    ("fields", "kinds", "layers"),
    [
        ({"targets": TARGETS}, LINEARS, {0, 1}),
        ({"targets": ["wqkv"], "layers_to_transform": [1]}, {"wqkv"}, {1}),
        ({"targets": r"model\.layers\.\d+\.attention\.w(qkv|o)"}, {"wqkv", "wo"}, {0, 1}),
        ({"targets": ["w1", "wo.linear"], "exclude_modules": r".*layers\.0.*"}, {"w1", "wo"}, {1}),
        ({"targets": TOWER}, set(), {1}),
        ({"targets": ["wqkv.linear"]}, {"wqkv"}, {0, 1}),
        ({"targets": "all-linear"}, LINEARS, {0, 1}),
    ],
)
def test_released_targets(source, tmp_path, fields, kinds, layers):
    """A LoRA on released names sits on the linears alone, learns, is saved under this tree's names and loads again."""
    wrapped = peft.get_peft_model(load(source), lora_config(**fields, init_lora_weights=False))
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    found = {match[1] for name in trained if (match := re.search(r"\.(w\w+)\.linear\.lora_A", name))}
    assert found == kinds
    assert {int(match[1]) for name in trained if (match := re.search(r"\.layers\.(\d+)\.", name))} == layers
    wrapped.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(load(source), tmp_path / "lora")
    assert torch.equal(logits(again), logits(wrapped)) and not torch.equal(logits(again), logits(load(source)))


def test_peft_imported_after_the_model(source, monkeypatch):
    """Whatever PEFT was when the model was loaded, it learns the names when it looks for targets."""
    model = load(source)
    plain = peft.LoraModel._prepare_adapter_config
    while hasattr(plain, "__wrapped__"):
        plain = plain.__wrapped__
    monkeypatch.setattr(peft.LoraModel, "_prepare_adapter_config", plain)
    wrapped = peft.get_peft_model(model, lora_config(["attention.wqkv"]))
    assert all(name.endswith("wqkv.linear") for name in wrapped.base_model.targeted_module_names)


def test_remote_code_loads_without_peft():
    """transformers refuses remote code whose files import what is not installed, inside functions too."""
    files = list(REPO.glob("*.py"))
    assert len(files) > 20 and not [path.name for path in files if "peft" in get_imports(path)]


def test_other_models_keep_their_names(source):
    load(source).named_modules()
    tree = torch.nn.ModuleDict({"output": torch.nn.Linear(2, 2), "attention": torch.nn.Linear(2, 2)})
    config = peft.LoraConfig(target_modules=["output"], modules_to_save=["attention"])
    assert peft.get_peft_model(tree, config).base_model.targeted_module_names == ["output"]
    assert config.target_modules == {"output"} and config.modules_to_save == ["attention"]


@pytest.mark.parametrize("mode", ["base", "web"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_same_logits(source, trained, tmp_path, mode, suffix):
    original, whole = trained
    if suffix == "bin":
        older = tmp_path / "older"
        older.mkdir()
        (older / "adapter_config.json").write_text((original / "adapter_config.json").read_text())
        torch.save(load_file(original / "adapter_model.safetensors"), older / "adapter_model.bin")
        original = older
    folder = tool.convert_adapter(original, tmp_path / "converted")
    wrapped = peft.PeftModel.from_pretrained(load(source, task_adapters="all"), folder)
    wanted, plain = logits(load(whole), mode), logits(load(source), mode)
    assert (wanted - plain).abs().max() > 1
    assert (logits(wrapped, mode) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_names_of_modules_go_both_ways(source):
    for name in adaptable_modules(load(source, task_adapters="all")):
        assert renamed_module(released_module(name)) == name


LAYER, HERE = "model.layers.3", "model.language_model.layers.3"


@pytest.mark.parametrize(
    ("released", "here"),
    [
        (f"{LAYER}.attention.wqkv.lora_A.weight", f"{HERE}.attention.wqkv.linear.lora_A.weight"),
        (f"{LAYER}.feed_forward.w2.Plora_A.lora_B.weight", f"{HERE}.feed_forward.w2.Plora_A.lora_B.weight"),
        (f"{LAYER}.feed_forward.w2.lora_sft_B.lora_B.weight", f"{HERE}.feed_forward.w2.task_B.sft.lora_B.weight"),
        ("vision_proj.0.lora_A.weight", "model.vision_proj.0.lora_A.weight"),
        ("model.tok_embeddings.lora_embedding_A", "model.language_model.tok_embeddings.lora_embedding_A"),
        ("output.weight", "lm_head.weight"),
    ],
)
def test_names(released, here):
    assert tool.converted_key(f"base_model.model.{released}") == f"base_model.model.{here}"


def broken(folder, **changes):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def test_what_is_no_such_adapter_is_refused(source, trained, tmp_path, capsys):
    converted = tool.convert_adapter(trained[0], tmp_path / "converted")
    ia3, bare, damaged = broken(tmp_path / "ia3", peft_type="IA3"), broken(tmp_path / "bare"), broken(tmp_path / "cut")
    (ia3 / "adapter_model.safetensors").write_bytes((trained[0] / "adapter_model.safetensors").read_bytes())
    (damaged / "adapter_model.safetensors").write_bytes(b"cut")
    for folder, reason in (
        (converted, "loads as it is"),
        (ia3, "peft_type is 'IA3'"),
        (bare, "neither adapter_model.safetensors"),
        (damaged, "cannot be read"),
        (source, "no adapter_config.json"),
    ):
        assert tool.main([str(folder), str(tmp_path / "new")]) == 1
        assert reason in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert tool.main([str(trained[0]), str(converted)]) == 1
    assert "not an empty folder" in capsys.readouterr().err
