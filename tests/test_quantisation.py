"""Quantised loading: what is quantised, what is spared, adapters, memory, files, refusals, and the error report."""

import gc
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from xcomposer.checkpoints import quantisation_error as report
from xcomposer.checkpoints import tiny

REPO = Path(__file__).resolve().parents[1]

HAS = {package: importlib.util.find_spec(package) is not None for package in ("bitsandbytes", "torchao")}
# Method of the report -> class of a quantised weight.
METHODS = {"nf4": "Params4bit", "int8": "Int8Params", "ao-int8": "Int8Tensor", "ao-int4": "IntxUnpackedToInt8Tensor"}
NF4_KERNEL_BF16 = 0.02  # the CPU kernel rounds scales to bf16


def needs(method):
    package = report.PACKAGE_OF.get(method, "torchao")
    return pytest.mark.skipif(not HAS[package], reason=f"{method} needs {package}: pip install {package}")


every_method = pytest.mark.parametrize("method", [pytest.param(name, marks=needs(name)) for name in METHODS])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("quantised") / "released", shards=3)


@pytest.fixture(scope="module")
def full(source):
    return load(source, task_adapters="all")


@pytest.fixture(scope="module")
def quantised(source):
    """Models by method, each loaded once."""
    models = {}

    def get(method):
        if method not in models:
            config = report.quantisation_config(method, torch.float32, "cpu")
            models[method] = load(source, config, task_adapters="all")
        return models[method]

    return get


def load(path, config=None, **kwargs):
    if config is not None:
        kwargs["quantization_config"] = config
    kwargs.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs).eval()


def inputs(model):
    """Text, a picture of two tiles, text."""
    generator = torch.Generator().manual_seed(0)
    side, tile = model.config.tokens_per_side, model.config.tile
    image = [model.config.image_token_id] * (side * (side + 1) + 1 + side * (2 * side + 1))
    text = torch.randint(20, 900, (12,), generator=generator).tolist()
    return {
        "input_ids": torch.tensor([text[:4] + image + text[4:]]),
        "pixel_values": torch.randn(2, 3, tile, tile, generator=generator),
        "image_grid_thw": torch.tensor([[1, 1, 2]]),
    }


@torch.no_grad()
def logits(model, mode="base"):
    return model(**inputs(model), infer_mode=mode).logits.float()


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def is_base(name):
    return name.endswith(".linear")


@torch.no_grad()
def dequantised_twin(source, model):
    """A full-precision model that carries the values `model` has quantised."""
    twin = load(source)
    for name, module in linears(model).items():
        if not is_base(name):
            continue
        weight = module.weight
        kind = type(weight).__name__
        if kind == "Params4bit":
            import bitsandbytes.functional as bnb

            values = bnb.dequantize_4bit(weight.data, weight.quant_state)
        elif kind == "Int8Params":
            scale = weight.SCB if weight.SCB is not None else module.state.SCB
            values = weight.data.float() * scale[:, None] / 127
        else:
            values = weight.dequantize()
        twin.get_submodule(name).weight.copy_(values)
    return twin


@every_method
def test_only_the_decoders_own_linears_are_quantised(full, quantised, method):
    model = quantised(method)
    plain = linears(full)
    for name, module in linears(model).items():
        if is_base(name):
            assert type(module.weight).__name__ == METHODS[method], name
        else:
            assert type(module) is torch.nn.Linear and type(module.weight) is torch.nn.Parameter, name
            assert module.weight.dtype == torch.float32 and torch.equal(module.weight, plain[name].weight), name
    assert sum(map(is_base, linears(model))) == 5 * model.config.num_hidden_layers
    assert torch.equal(model.model.plora_sub_GN, full.model.plora_sub_GN)
    assert torch.equal(model.get_input_embeddings().weight, full.get_input_embeddings().weight)


@every_method
@pytest.mark.parametrize("mode", ["base", "web", "write"])
def test_quantised_computes_what_its_values_say(source, method, mode):
    """Beside a model that holds the dequantised values: adapters and partial LoRA act in full precision."""
    model = load(source, report.quantisation_config(method, torch.float32, "cpu"))
    twin = dequantised_twin(source, model)
    got, want, base = logits(model, mode), logits(twin, mode), logits(twin)
    limit = {"nf4": NF4_KERNEL_BF16, "int8": 0.05}.get(method, 1e-4)  # int8 rounds its inputs too
    assert (got - want).abs().mean() < limit * want.abs().mean()
    if mode != "base":
        assert (got - base).abs().mean() > 4 * (got - want).abs().mean()


@every_method
def test_error_lies_where_the_method_promises(full, quantised, method):
    want = logits(full)
    error = (logits(quantised(method)) - want).abs().mean() / want.abs().mean()
    assert 0.001 < error < (0.5 if "4" in method else 0.05)


@every_method
def test_prefill_keeps_no_dequantised_weights(quantised, method):
    model = quantised(method)
    logits(model)  # some kernels repack their weights once
    weights = report.weight_bytes(model)
    peak, kept = report.traced_bytes(lambda: logits(model))
    assert report.weight_bytes(model) == weights
    smallest = 2 * min(
        module.in_features * module.out_features for name, module in linears(model).items() if is_base(name)
    )
    assert kept < smallest / 4 and peak > 0


@every_method
def test_weights_shrink(full, quantised, method):
    model = quantised(method)
    logits(model)
    saved = report.weight_bytes(full) - report.weight_bytes(model)
    base = sum(module.weight.nbytes for name, module in linears(full).items() if is_base(name))
    assert (0.75 if method == "nf4" else 0.65) * base < saved < 0.9 * base


@every_method
def test_greedy_answer_and_batches(quantised, method):
    model = quantised(method)
    one = inputs(model)
    two = {name: torch.cat([tensor, tensor]) for name, tensor in one.items()}
    answer = model.generate(**one, max_new_tokens=4, do_sample=False)
    batch = model.generate(**two, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] == one["input_ids"].shape[1] + 4 and torch.equal(batch[1], batch[0])
    assert torch.equal(batch[0], answer[0])


@every_method
def test_saved_and_loaded_again(source, tmp_path, method):
    """Before its first call on a processor that repacks weights: bitsandbytes cannot undo that for single-scale nf4."""
    model = load(source, report.quantisation_config(method, torch.float32, "cpu"))
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", dtype="auto")
    assert {name for name, module in linears(again).items() if type(module.weight).__name__ == METHODS[method]} == {
        name for name in linears(model) if is_base(name)
    }
    for mode in ("base", "web"):
        assert torch.equal(logits(again, mode), logits(model, mode))


@pytest.mark.skipif(not HAS["bitsandbytes"], reason="needs bitsandbytes: pip install bitsandbytes")
def test_callers_config_is_theirs(source):
    """A plain config comes back as it went in; modules named in it replace the default; a dict will do."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = load(source, config)
    type(model).from_pretrained(source, quantization_config=config)
    assert config.llm_int8_skip_modules is None

    everything = load(source, BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]))
    spared = {name for name, module in linears(everything).items() if type(module) is torch.nn.Linear}
    assert "lm_head" in spared and not any("Plora" in name or "vision" in name for name in spared)

    from_dict = load(source, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert type(from_dict.model.vision_proj[0]) is torch.nn.Linear
    assert type(from_dict.model.language_model.layers[0].attention.wo.linear).__name__ == "Linear8bitLt"


@pytest.mark.skipif(not HAS["bitsandbytes"], reason="needs bitsandbytes: pip install bitsandbytes")
def test_half_precision_around_int8(source):
    for dtype in (torch.bfloat16, torch.float16):
        model = load(source, BitsAndBytesConfig(load_in_8bit=True), dtype=dtype)
        kept = {module.weight.dtype for name, module in linears(model).items() if not is_base(name)}
        assert kept == {dtype}, kept


MISSING = """
import importlib.machinery, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("bitsandbytes", "torchao"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Hidden())
import importlib.metadata
version = importlib.metadata.version
def hidden(name):
    if name in ("bitsandbytes", "torchao"):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("bitsandbytes", "torchao") else find(name, *rest)
"""
TRY = """
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
for make in (lambda: BitsAndBytesConfig(load_in_4bit=True), lambda: BitsAndBytesConfig(load_in_8bit=True), lambda: TorchAoConfig(None)):
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, quantization_config=make())
    except Exception as error:
        print(type(error).__name__, error)
"""  # noqa: E501
TRY_REPORT = """
sys.path.insert(0, sys.argv[2])
from xcomposer.checkpoints import quantisation_error
for method in ("nf4", "ao-int8"):
    print(quantisation_error.main([sys.argv[1], "--methods", method]))
"""


def test_a_backend_that_is_not_installed(source):
    """transformers' own errors name the package; the hook lets them through, and the report says so before loading."""
    run = subprocess.run(
        [sys.executable, "-c", MISSING + TRY + TRY_REPORT, str(source), str(REPO)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(lines) == 5 and all("bitsandbytes" in line for line in lines[:2]), lines
    assert "torchao" in lines[2] and "install" in lines[2] and lines[3:] == ["1", "1"]
    assert "pip install bitsandbytes" in run.stderr and "pip install torchao" in run.stderr


@pytest.mark.skipif(not all(HAS.values()), reason="needs bitsandbytes and torchao: pip install bitsandbytes torchao")
def test_report(source, capsys):
    methods = ["nf4", "int8", "ao-int8"]
    image = str(REPO / "examples" / "data" / "shapes.png")
    assert (
        report.main([str(source), "--image", image, "--methods", *methods, "--steps", "6", "--dtype", "float32"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    rows = {row["method"]: row for row in result["methods"]}
    assert list(rows) == ["full", *methods] and result["steps"] == 6 and result["prompt_tokens"] > 60
    for method in methods:
        row = rows[method]
        assert row["weights"] < rows["full"]["weights"] and row["kl"] >= 0 and 0 <= row["top1"] <= 1
        assert 0 < row["mean"] <= row["max"] and row["prefill"] < 3 * rows["full"]["prefill"]
    assert rows["ao-int8"]["mean"] < rows["nf4"]["mean"]
    gc.collect()


def test_report_compares_where_the_answer_is_predicted(source, full):
    measure = report.Measure(str(source), torch.float32, "cpu", "base", steps=5)
    prompt = inputs(full)
    measure.full_precision(prompt)
    answer = measure.inputs["input_ids"][0, prompt["input_ids"].shape[1] :]
    assert measure.reference.shape[0] == 5 and torch.equal(measure.reference.argmax(-1)[:-1], answer)


def test_report_refuses_early(source, capsys):
    for arguments, message in (
        (["--methods", "int3"], "unknown method 'int3'"),
        (["--methods", "--steps", "0"], "expected at least one argument"),
    ):
        try:
            code = report.main([str(source), *arguments])
        except SystemExit as stop:
            code = stop.code
        assert code and message in capsys.readouterr().err


@pytest.mark.skipif(not HAS["torchao"], reason="needs torchao: pip install torchao")
def test_report_names_what_is_wrong(source, capsys):
    for arguments, message in (
        (["--steps", "0"], "--steps must be at least 1"),
        (["--infer-mode", "math"], "unknown infer_mode 'math'"),
        (["--image", "nowhere.png"], "nowhere.png"),
    ):
        assert report.main([str(source), "--methods", "ao-int8", *arguments]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not HAS["torchao"], reason="needs torchao: pip install torchao")
def test_torchao_config_skips_what_it_is_told(source):
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=["lm_head", ".*attention"])
    model = load(source, config)
    kinds = {name: type(module.weight).__name__ for name, module in linears(model).items()}
    assert not any(kind == "Int8Tensor" for name, kind in kinds.items() if "attention" in name)
    assert kinds["model.vision_proj.0"] == "Int8Tensor"
