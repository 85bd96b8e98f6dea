"""Released checkpoints load as they are: every file layout, dtype and spelling of the config, and are saved back so."""

import importlib
import importlib.util
import json
import logging
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from xcomposer.checkpoints import tiny

REPO = Path(__file__).resolve().parents[1]

NAME = "IXC-2.5 test v1.0"
LAYOUTS = [("safetensors", 1), ("safetensors", 4), ("bin", 1), ("bin", 4)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPORTS = ("newly initialized", "MISSING", "UNEXPECTED", "MISMATCH")  # how transformers words them
VIT = "vit.vision_tower.vision_model."
LAYER, INSIDE = "model.layers.1.", "model.language_model.layers.1."

# One tensor of each kind, released name -> name in the module tree; written out here so that no mapping checks itself.
KINDS = {
    "model.tok_embeddings.weight": "model.language_model.tok_embeddings.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "output.weight": "lm_head.weight",
    **{f"{LAYER}{norm}.weight": f"{INSIDE}{norm}.weight" for norm in ("attention_norm", "ffn_norm")},
    **{
        f"{LAYER}{linear}.{released}": f"{INSIDE}{linear}.{inside}"
        for linear in ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        for released, inside in {
            "weight": "linear.weight",
            "Plora_A.weight": "Plora_A.weight",
            "Plora_B.weight": "Plora_B.weight",
            **{f"lora_{task}_{s}.weight": f"task_{s}.{task}.weight" for task in ("sft", "dpo", "web") for s in "AB"},
        }.items()
    },
    **{
        f"{VIT}{name}": f"model.vision_tower.{name}"
        for name in (
            "embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
            "pre_layrnorm.weight", "pre_layrnorm.bias", "encoder.layers.1.self_attn.q_proj.weight",
            "encoder.layers.1.self_attn.out_proj.bias", "encoder.layers.1.mlp.fc1.weight",
            "encoder.layers.1.mlp.fc2.bias", "encoder.layers.1.layer_norm2.weight",
        )
    },
    **{f"vision_proj.{i}.{part}": f"model.vision_proj.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")},
    **{name: f"model.{name}" for name in ("plora_glb_GN", "plora_sub_GN")},
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    path.write_bytes(tiny.train_tokenizer())
    return path


@pytest.fixture(scope="module")
def template(vocabulary, tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("template") / NAME, tokenizer_model=vocabulary)


@pytest.fixture
def folder(template, tmp_path):
    return shutil.copytree(template, tmp_path / NAME)


def edit_config(folder, drop=(), **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in drop}))


@contextmanager
def log_of_transformers():
    """Every record of level INFO and above while inside."""
    records: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def load(folder, auto=AutoModel, **kwargs):
    """The model with all its adapters, after a look at what loading reported."""
    with log_of_transformers() as records:
        model, info = auto.from_pretrained(
            folder, trust_remote_code=True, task_adapters="all", output_loading_info=True, **kwargs
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], (kind, info[kind])
    assert not [record for record in records if any(report in record for report in REPORTS)], records
    return model.eval()


def assert_values(model, dtype, kinds=KINDS):
    shapes = tiny.released_shapes(json.loads((Path(model.config._name_or_path) / "config.json").read_text()))
    state = model.state_dict()
    for released, inside in kinds.items():
        written = torch.from_numpy(tiny.seeded(released, shapes[released])).to(dtype)
        assert torch.equal(state[inside], written), released


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 300, 400, 500, 600]])).logits


# Files.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt, shards", LAYOUTS)
def test_every_file_layout_and_dtype(tmp_path, vocabulary, fmt, shards, dtype):
    folder = tiny.write_checkpoint(
        tmp_path / NAME, fmt=fmt, shards=shards, dtype=dtype, tokenizer_model=vocabulary, code="link"
    )
    model = load(folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    assert_values(model, DTYPES[dtype])


@pytest.mark.parametrize("stray", [False, True], ids=["plain", "stray buffers"])
@pytest.mark.parametrize("fmt, shards", LAYOUTS)
def test_without_post_layernorm_and_with_stray_buffers(folder, fmt, shards, stray):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights = {name: tensor for name, tensor in weights.items() if "post_layernorm" not in name}
    if stray:
        weights[f"{VIT}embeddings.position_ids"] = torch.arange(17)[None]
        for layer in range(2):
            weights[f"model.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.full((8,), 7.0)
    tiny.write_weights(folder, weights, shards=shards, fmt=fmt)
    model = load(folder)
    assert_values(model, torch.float32)
    assert logits(model).isfinite().all()


def test_what_is_missing_is_reported(folder):
    """So that the silence of the other tests says something."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.attention.wo.Plora_B.weight"], weights["plora_sub_GN"]
    weights["model.layers.1.attention.wo.other"] = torch.zeros(1)
    tiny.write_weights(folder, weights)
    with pytest.raises(AssertionError, match="missing_keys"):
        load(folder)
    with log_of_transformers() as records:
        info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)[1]
    assert len(info["missing_keys"]) == 2 and len(info["unexpected_keys"]) == 1
    assert any(report in record for record in records for report in REPORTS)


def test_dtype_of_the_caller_and_of_the_config(tmp_path, vocabulary):
    folder = tiny.write_checkpoint(tmp_path / NAME, dtype="bf16", tokenizer_model=vocabulary)
    assert load(folder, dtype=torch.float32).dtype == torch.float32
    assert load(folder, torch_dtype=torch.float16).dtype == torch.float16
    edit_config(folder, ["torch_dtype"])
    model = load(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert_values(model, torch.bfloat16)


def test_a_checkpoint_without_task_adapters(tmp_path, vocabulary):
    folder = tiny.write_checkpoint(tmp_path / NAME, {"task_adapter_ranks": {}}, tokenizer_model=vocabulary)
    model = load(folder)
    assert_values(model, torch.float32, {r: inside for r, inside in KINDS.items() if ".lora_" not in r})
    assert not [name for name, _ in model.named_parameters() if "task_" in name]
    with pytest.raises(ValueError, match="web"):
        model(input_ids=torch.tensor([[1]]), infer_mode="web")


def test_other_adapters_and_ranks(tmp_path, vocabulary):
    fields = {"plora_rank": 4, "plora_alpha": 8, "task_adapter_ranks": {"web": 3, "mine2": 5}}
    model = load(tiny.write_checkpoint(tmp_path / NAME, fields, tokenizer_model=vocabulary))
    wo = model.model.language_model.layers[0].attention.wo
    assert {name: module.out_features for name, module in wo.task_A.items()} == {"web": 3, "mine2": 5}
    assert wo.Plora_A.out_features == 4 and wo.plora_scale == 2


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_every_auto_class_gives_the_model_that_chats(template, auto):
    model = load(template, auto)
    assert type(model).__name__ == "InternLMXComposer2ForCausalLM" and callable(model.chat)
    assert_values(model, torch.float32)


def test_the_base_model_alone_loads_from_the_whole_checkpoint(template):
    base = get_class_from_dynamic_module("modeling_internlm_xcomposer2.InternLMXComposer2Model", str(template))
    model, info = base.from_pretrained(template, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    kinds = {released: inside.removeprefix("model.") for released, inside in KINDS.items()}
    del kinds["output.weight"]
    assert_values(model, torch.float32, kinds)


def test_the_class_imported_from_a_clone(template, tmp_path, monkeypatch):
    (tmp_path / "ixc_clone").symlink_to(REPO)
    monkeypatch.syspath_prepend(str(tmp_path))
    modeling = importlib.import_module("ixc_clone.modeling_internlm_xcomposer2")
    model_class = modeling.InternLMXComposer2ForCausalLM
    model, info = model_class.from_pretrained(template, task_adapters="all", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_values(model, torch.float32)


# Configs.


@pytest.mark.parametrize("model_type", ["internlmxcomposer2", "internlm2", "internlm", "internlm2_xcomposer"])
def test_every_spelling_of_model_type(folder, model_type):
    edit_config(folder, model_type=model_type)
    model = load(folder)
    assert type(model.config).__name__ == "InternLMXcomposer2Config"
    assert_values(model, torch.float32)


ROPES = {
    "null": ({"rope_scaling": None}, ("default", None)),
    "absent": ({}, ("default", None)),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("dynamic", 2.0)),
    "factor 1": ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, ("dynamic", 1.0)),
    "new spelling": ({"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}, ("dynamic", 3.0)),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_of_the_flat_config(folder, name):
    fields, (kind, factor) = ROPES[name]
    edit_config(folder, ["rope_scaling"])
    edit_config(folder, rope_theta=500000, **fields)
    rope = AutoConfig.from_pretrained(folder, trust_remote_code=True).text_config.rope_parameters
    assert (rope["rope_type"], rope.get("factor"), rope["rope_theta"]) == (kind, factor, 500000)
    rotary = load(folder).model.language_model.rotary_emb
    assert rotary.factor == factor and rotary.base == 500000


def test_flat_fields_are_read_where_released_and_flash_attention_is_not_forced(folder):
    edit_config(folder, max_length=8192, use_cache=False, torch_dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["attn_implementation"] == "flash_attention_2"
    model = load(folder, dtype="auto")
    config = model.config
    assert config.context_length == 8192 and config.text_config.use_cache is False and model.dtype == torch.bfloat16
    assert config.hidden_size == config.text_config.hidden_size == 64
    assert config.get_text_config().num_key_value_heads == 2
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    if not importlib.util.find_spec("flash_attn"):
        assert config._attn_implementation == config.text_config._attn_implementation == "sdpa"
    assert model.generation_config.max_length != 8192  # no setting of `generate`


def test_a_config_without_ranks_and_vision_is_the_7b(folder):
    released = {
        "architectures": ["InternLMXComposer2ForCausalLM"], "model_type": "internlmxcomposer2", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 92544, "hidden_act": "silu", "rope_theta": 1000000, "rms_norm_eps": 1e-5, "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 1.0}, "max_position_embeddings": 24576, "max_length": 16384,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "attn_implementation": "flash_attention_2",
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "use_cache": False, "initializer_range": 0.02,
        "auto_map": {"AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
                     "AutoModel": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(released))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.task_adapter_ranks == {"sft": 256, "dpo": 256, "web": 512}
    assert (config.plora_rank, config.plora_alpha, config.tile, config.tokens_per_side) == (256, 256, 560, 20)
    assert (config.image_token_id, config.video_token_id, config.context_length) == (92537, 92536, 16384)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    renamings = sys.modules[type(model).__module__].RENAMINGS
    backwards = [WeightRenaming(*pair).reverse_transform() for pair in reversed(renamings)]

    def released_name(name):
        for renaming in backwards:
            name, _ = renaming.rename_source_key(name)
        return name

    shapes = {released_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {name: shape for name, shape in tiny.released_shapes({}).items() if "post_layernorm" not in name}
    assert shapes == expected and len(shapes) == 1902
    assert shapes["model.layers.31.attention.wqkv.weight"] == (6144, 4096)
    assert shapes["model.layers.31.feed_forward.w2.lora_web_A.weight"] == (512, 14336)
    assert shapes[f"{VIT}embeddings.position_embedding.weight"] == (1601, 1024)
    assert shapes[f"{VIT}encoder.layers.23.mlp.fc1.weight"] == (4096, 1024)
    assert shapes["plora_sub_GN"] == (1, 1, 1, 4096) and shapes["plora_glb_GN"] == (1, 1, 4096)
    own = AutoConfig.from_pretrained(REPO, trust_remote_code=True)
    assert tiny.released_shapes(own.to_dict()) == tiny.released_shapes({})


BAD = {
    "heads": ({"num_attention_heads": 5}, r"hidden_size \(64\) must be a multiple of num_attention_heads \(5\)"),
    "key/value heads": ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of .* \(3\)"),
    "hidden": ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
    "rank": ({"plora_rank": 0}, "plora_rank must be a positive integer, got 0"),
    "task rank": ({"task_adapter_ranks": {"web": 0}}, r"task_adapter_ranks\['web'\] must be a positive integer, got 0"),
    "tile": ({"vision_config": {"image_size": 50}}, r"image_size \(50\) must be an even number of patches of 14"),
    "odd tile": ({"vision_config": {"image_size": 42}}, r"image_size \(42\) must be an even number of patches"),
    "rope": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn' is unknown here; use 'default'"),
    "rope name": ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope type 'ntk' is unknown here; use 'default'"),
    "image token": ({"image_token_id": 1000}, r"image_token_id \(1000\) lies outside the vocabulary of 1000"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_cannot_be_is_named_with_its_value(folder, name):
    fields, message = BAD[name]
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


# Saving.


@pytest.mark.parametrize("size", ["5GB", "200KB"])
def test_save_pretrained_writes_released_names_and_loads_to_the_same_logits(template, tmp_path, size):
    model = load(template)
    saved = tmp_path / "saved v1.0"
    model.save_pretrained(saved, max_shard_size=size)
    files = sorted(saved.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "200KB")
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    written = {n: t for n, t in load_file(template / "model.safetensors").items() if "post_layernorm" not in n}
    assert weights.keys() == written.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in written.items())
    for source in template.glob("*.py"):
        shutil.copy(source, saved / source.name)
    again = load(saved)
    assert torch.equal(logits(again), logits(model))
    for name in ("plora_alpha", "task_adapter_ranks", "rope_parameters", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(again.config.text_config, name) == getattr(model.config.text_config, name), name
    assert again.config.vision_config.to_dict() == model.config.vision_config.to_dict()
    assert again.config.context_length == model.config.context_length
    assert again.config.image_token_id == model.config.image_token_id
