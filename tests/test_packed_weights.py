"""Releases in 4 bits, GPTQ and AWQ: read as the weights that they stand for, and damage named."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, load
from packing import AWQ_NIBBLES, columns_to_ints, pack, packed_checkpoint, rows_to_ints
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, AwqConfig, GPTQConfig

from xcomposer.checkpoints import adopt, inspect, merge, tiny
from xcomposer.model.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from xcomposer.model.packed_weights_internlm_xcomposer2 import LAYOUTS, unpack, unpack_nibbles
from xcomposer.model.weight_files_internlm_xcomposer2 import Misfit, WeightFiles

KINDS = {"GPTQ": "xcomposer2-vl", "AWQ": "xcomposer2d5"}
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """layout -> a packed checkpoint and its plain twin."""
    made = {}

    def of(layout):
        if layout not in made:
            out = tmp_path_factory.mktemp(layout)
            source = tiny.write_checkpoint(out / "source v1.0", kind=KINDS[layout])
            made[layout] = packed_checkpoint(source, out, layout)
        return made[layout]

    return of


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(path)
    return str(path)


def random_weight(seed, out=96, inputs=128):
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_is_the_formulas_value_rounded_once(layout, group):
    parts, plain = pack(layout, random_weight(1), group)
    assert torch.equal(unpack(LAYOUTS[layout], **parts, dtype=torch.float32), plain)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(unpack(LAYOUTS[layout], **parts, dtype=dtype), plain.to(dtype))
    assert unpack(LAYOUTS[layout], **parts).dtype == torch.float16  # of the scales


def test_groups_may_lie_in_any_order():
    parts, plain = pack("GPTQ", random_weight(2), 32)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(3))
    moved = {part: parts[part][order] for part in ("scales", "qzeros")}
    parts.update(moved, g_idx=order.argsort()[parts["g_idx"].long()].int())
    assert torch.equal(unpack(LAYOUTS["GPTQ"], **parts, dtype=torch.float32), plain)
    parts["g_idx"] = parts["g_idx"] + 1
    with pytest.raises(ValueError, match="groups 1 to 4, of 4"):
        unpack(LAYOUTS["GPTQ"], **parts)


def test_the_layouts_are_those_of_vllm():
    """vLLM's own packers, where it is installed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack

    numbers = torch.randint(0, 16, (64, 48), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    theirs = {"GPTQ": gptq_pack(numbers, 4, 64, 48), "AWQ": awq_pack(numbers, 4, 64, 48)}
    ours = {"GPTQ": rows_to_ints(numbers.numpy()), "AWQ": columns_to_ints(numbers.numpy(), AWQ_NIBBLES)}
    for layout, row in LAYOUTS.items():
        assert torch.equal(ours[layout], theirs[layout])
        assert torch.equal(unpack_nibbles(theirs[layout], row.order, row.axis), numbers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_release_answers_as_its_plain_weights(folders, layout, picture):
    """Through the package: tokens, parameters, what is saved."""
    packed, plain = (load(folder, dtype=torch.float32) for folder in folders(layout))
    tokenizer = AutoTokenizer.from_pretrained(folders(layout)[0], trust_remote_code=True)
    theirs = dict(plain.named_parameters())
    assert {name for name, _ in packed.named_parameters()} == set(theirs)
    for name, values in packed.named_parameters():
        assert values.dtype == torch.float32 and torch.equal(values, theirs[name]), name
    asked = dict(do_sample=False, max_new_tokens=12)
    answers = [model.chat(tokenizer, QUESTION, [picture], **asked)[0] for model in (packed, plain)]
    assert answers[0] == answers[1]
    assert packed.generation_config.eos_token_id == plain.generation_config.eos_token_id
    assert not hasattr(packed.config, "quantization_config")


QUANTISERS = {"GPTQ": (GPTQConfig, "torch"), "AWQ": (AwqConfig, "torch_awq")}  # with a kernel that runs anywhere


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs gptqmodel")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gptqmodel_keeps_it_packed(folders, layout):
    """Through transformers' own quantiser, on a CPU; partial LoRA and task adapters stay as they are."""
    kind, backend = QUANTISERS[layout]
    settings = kind(bits=4, group_size=32, desc_act=False, backend=backend)
    packed = load(folders(layout)[0], dtype=torch.float16, quantization_config=settings)
    projection = packed.model.language_model.layers[0].attention.wqkv
    assert type(projection.linear).__module__.startswith("gptqmodel.") and type(projection.Plora_A) is torch.nn.Linear
    ids = torch.arange(5, 45)[None]
    twin = load(folders(layout)[1], dtype=torch.float16)
    for mode in ("base", "web") if twin.config.task_adapter_ranks else ("base",):
        with torch.no_grad():
            asked = dict(input_ids=ids, im_mask=ids > 20, infer_mode=mode)
            logits = [model(**asked).logits.float() for model in (packed, twin)]
        assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[1].std()
    assert not hasattr(packed.config, "transformers_weights")


@pytest.mark.parametrize(("layout", "other"), [("AWQ", "GPTQ"), ("GPTQ", "AWQ")])
def test_another_layouts_quantiser_is_refused(folders, layout, other):
    settings = QUANTISERS[other][0](bits=4, backend=QUANTISERS[other][1])
    with pytest.raises(ValueError, match=f"packed as {layout}, quantization_config is of {other.lower()}: take"):
        InternLMXComposer2ForCausalLM.from_pretrained(folders(layout)[0], quantization_config=settings)


def test_partial_lora_and_task_adapters_work_on_top(folders):
    packed, plain = (load(folder, dtype=torch.float32) for folder in folders("AWQ"))
    ids = torch.arange(5, 45)[None]
    mask = (ids > 20).long()
    for mode in ("base", "web", "write"):
        logits = [model(input_ids=ids, im_mask=mask, infer_mode=mode).logits for model in (packed, plain)]
        assert torch.equal(*logits), mode
    assert packed.task_adapters_in_memory()
    assert not torch.equal(logits[0], packed(input_ids=ids, im_mask=mask).logits)


WITHOUT_THE_PACKAGE = """
import sys, torch
from transformers import AutoModel
assert "xcomposer" not in sys.modules
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    torch.save(model.state_dict(), folder + "/seen.pt")
"""


def test_released_folders_load_by_their_own_code(folders, tmp_path):
    copies = [str(shutil.copytree(folders(layout)[0], tmp_path / f"{layout} v1.0")) for layout in LAYOUTS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *copies],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for layout, copy in zip(LAYOUTS, copies, strict=True):
        plain = load(folders(layout)[1], dtype=torch.float32).state_dict()
        seen = torch.load(Path(copy) / "seen.pt")
        assert all(torch.equal(values, plain[name].bfloat16()) for name, values in seen.items()), layout


def test_it_is_saved_as_plain_weights(folders, tmp_path):
    model = load(folders("AWQ")[0], dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    saved, plain = WeightFiles(tmp_path / "saved"), WeightFiles(folders("AWQ")[1])
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    lost = {name for name in plain.tensors if "post_layernorm" not in name} - set(saved.tensors)
    assert not lost
    name = "model.layers.0.attention.wo.weight"
    assert torch.equal(saved.read(name), plain.read(name))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_and_adopt_name_what_is_packed(folders, layout, capsys, tmp_path):
    folder = folders(layout)[0]
    assert inspect.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"4 bits ({layout}) in groups of 32: 10 linears, read as full precision" in shown
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert adopt.main([str(copy), "--link"]) == 0
    assert load(copy).config.kind == KINDS[layout]


def test_merge_takes_an_unpacked_weight(folders, tmp_path):
    merge.merge(folders("GPTQ")[0], tmp_path / "merged", "base", progress=False)
    assert WeightFiles(tmp_path / "merged").packing is None
    assert load(tmp_path / "merged")


STEM = "model.layers.0.attention.wqkv.linear"


def reshaped(part, cut):
    def change(tensors):
        tensors[f"{STEM}.{part}"] = cut(tensors[f"{STEM}.{part}"]).contiguous()

    return change


def without(part):
    return lambda tensors: tensors.pop(f"{STEM}.{part}")


# wqkv: 64 inputs, 128 outputs, groups of 32
DAMAGE = {
    "rows of qweight": (reshaped("qweight", lambda t: t[:6]), (f"{STEM}.g_idx is (64,), not (48,)", "48 inputs")),
    "columns of qweight": (
        reshaped("qweight", lambda t: t[:, :100]),
        (f"{STEM}.qweight is (8, 100)", "(2, 128)", "(inputs / 8, 128) of GPTQ", "(inputs, 16) of AWQ"),
    ),
    "flat qweight": (reshaped("qweight", lambda t: t.flatten()), (f"{STEM}.qweight is (1024,)", "not a matrix")),
    "qzeros": (reshaped("qzeros", lambda t: t[:, :3]), (f"{STEM}.qzeros is (2, 3), not (2, 16)",)),
    "scales": (reshaped("scales", lambda t: t[:1]), (f"{STEM}.scales is (1, 128), not (2, 128)",)),
    "g_idx": (reshaped("g_idx", lambda t: t[:9]), (f"{STEM}.g_idx is (9,), not (64,)",)),
    "floating qzeros": (reshaped("qzeros", lambda t: t.float()), (f"{STEM}.qzeros is float32, not int32",)),
    "no scales": (without("scales"), (f"{STEM}.qweight", f"lacks {STEM}.scales")),
    "no qzeros": (without("qzeros"), (f"{STEM}.qweight", f"lacks {STEM}.qzeros")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_impossible_shape_is_named(folders, damage, tmp_path, capsys):
    change, parts = DAMAGE[damage]
    folder = shutil.copytree(folders("GPTQ")[0], tmp_path / "damaged")
    path = folder / "gptq_model-4bit-32g.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        InternLMXComposer2ForCausalLM.from_pretrained(folder)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert inspect.main([str(folder)]) == 1
    assert parts[0] in capsys.readouterr().err


@pytest.mark.parametrize("said", [{"bits": 8}, {"bits": 4, "checkpoint_format": "marlin"}])
def test_another_packing_is_refused(folders, said, tmp_path):
    folder = shutil.copytree(folders("GPTQ")[0], tmp_path / "other")
    (folder / "quantize_config.json").write_text(json.dumps(said))
    with pytest.raises(Misfit, match=r"packed in \d bits \((gptq|marlin)\); this code reads 4 bits"):
        WeightFiles(folder)


def test_the_file_is_among_those_that_adopt_copies():
    name = "packed_weights_internlm_xcomposer2.py"
    assert (REPO / name).is_file() and (REPO / "demo" / name).resolve() == Path(REPO / name)
