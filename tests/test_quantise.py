"""Checkpoints in fewer bits: they load, answer as their dequantised selves, and nothing half written is left."""

import importlib.util
import json
import shutil

import pytest
import torch
from conftest import load
from packing import packed_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from toyworld import calibration
from xcomposer import cli
from xcomposer.checkpoints import quantise, tiny
from xcomposer.model.ixc_utils import PictureLayout
from xcomposer.model.packed_weights_internlm_xcomposer2 import unpack_nibbles
from xcomposer.model.weight_files_internlm_xcomposer2 import WeightFiles

needs_llmcompressor = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="needs llm-compressor"
)
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
LINEAR = ".feed_forward.w2"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("source") / "tiny v1.0", dtype="bfloat16")


@pytest.fixture
def data(tmp_path):
    Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(tmp_path / "picture.png")
    rows = [
        {
            "id": str(number),
            "image": ["picture.png"] * (number % 2),
            "conversations": [
                {"from": "user", "value": "<ImageHere>" * (number % 2) + "What is in the picture?"},
                {"from": "assistant", "value": "A small tile, and a sign in the rain. " * (number + 1)},
            ],
        }
        for number in range(6)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def answer(folder, picture):
    model = load(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    asked = dict(do_sample=False, max_new_tokens=12)
    return model.chat(tokenizer, "What is in the picture?", [str(picture)], **asked)[0], model


def dequantised(folder, source, out):
    """The checkpoint `source` with the weights that the compressed-tensors of `folder` stand for."""
    packed, tensors = WeightFiles(folder), {}
    for name in WeightFiles(source).tensors:
        stem = name.removesuffix(".weight") + ".linear"
        if f"{stem}.weight_scale" not in packed.tensors:
            tensors[name] = packed.read(name) if name in packed.tensors else WeightFiles(source).read(name)
            continue
        scale = packed.read(f"{stem}.weight_scale").float()
        if f"{stem}.weight_packed" in packed.tensors:
            numbers = unpack_nibbles(packed.read(f"{stem}.weight_packed"), tuple(range(8)), 1) - 8
        else:
            numbers = packed.read(name)
        size = numbers.shape[1] // scale.shape[1]
        tensors[name] = (numbers.float() * scale.repeat_interleave(size, 1)).bfloat16()
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tiny.write_weights(out, tensors)
    return out


@needs_llmcompressor
def test_w4a16_answers_as_its_dequantised_self(source, data, tmp_path, capsys):
    out = tmp_path / "w4a16"
    arguments = [str(source), str(out), "--scheme", "w4a16", "--calibration", str(data), "--group-size", "32"]
    assert cli.main(["quantise", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    seen, model = answer(out, data.parent / "picture.png")
    plain, twin = answer(dequantised(out, source, tmp_path / "plain"), data.parent / "picture.png")
    assert seen == plain
    packed = [name for name, tensor in WeightFiles(out).tensors.items() if name.endswith("weight_packed")]
    assert len(packed) == 10 and all(".linear." in name for name in packed)
    ids = torch.arange(5, 45)[None]
    for mode in ("web", "write"):  # adapters are there, and in full precision
        assert torch.equal(*(m(input_ids=ids, infer_mode=mode).logits for m in (model, twin)))


@needs_llmcompressor
def test_calibrated_rounding_beats_rounding_to_nearest(source, data, tmp_path):
    """On what a linear gives for the calibration rows, which is what GPTQ minimises."""
    schemes = {"w4a16": data, "w4a16-rtn": None}
    for scheme, rows in schemes.items():
        out = quantise.quantise(source, tmp_path / scheme, scheme, rows, group_size=32)
        dequantised(out, source, tmp_path / f"{scheme} plain")
    full, *rounded = (load(folder) for folder in (source, *(tmp_path / f"{scheme} plain" for scheme in schemes)))
    request = quantise.Request(source, data, None, 6, 2048, 32, 0)
    rows, seen = quantise.calibration_rows(full, quantise.read_calibration(request), request), []
    name = "model.language_model.layers.0.attention.wqkv"
    full.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for row in rows:
        full.model.language_model(**row)
    weight, *others = (m.get_submodule(name).linear.weight.float() for m in (full, *rounded))
    inputs = torch.cat([states.flatten(0, -2) for states in seen]).float()
    errors = [((inputs @ (weight - other).T) ** 2).sum() for other in others]
    assert errors[0] < errors[1]


@needs_llmcompressor
def test_fp8_answers_close_to_full_precision(source, tmp_path, data):
    out = quantise.quantise(source, tmp_path / "fp8", "fp8")
    stored = WeightFiles(out).tensors
    assert {t.dtype for name, t in stored.items() if name.endswith(f"{LINEAR}.weight")} == {"float8_e4m3fn"}
    ids = torch.arange(5, 45)[None]
    logits = [load(folder, dtype="auto")(input_ids=ids).logits.float() for folder in (out, source)]
    assert (logits[0] - logits[1]).abs().mean() < 0.2 * logits[1].std()


@needs_bitsandbytes
def test_nf4_answers_as_when_quantised_while_loading(source, tmp_path):
    from transformers import BitsAndBytesConfig

    out = quantise.quantise(source, tmp_path / "nf4", "nf4")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    model, loaded = load(out, dtype="auto"), load(source, dtype="auto", quantization_config=settings)
    theirs = loaded.state_dict()
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, theirs[name])} == set()
    ids = torch.arange(5, 45)[None]
    for mode in ("base", "web", "write"):
        logits = [m(input_ids=ids, infer_mode=mode).logits for m in (model, loaded)]
        assert torch.equal(*logits), (mode, (logits[0] - logits[1]).abs().max())
    assert (out / "tokenizer.model").is_file() and not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors")
@pytest.mark.parametrize("part, cut", [("weight_packed", (slice(None), slice(3))), ("weight_scale", (slice(5),))])
def test_a_written_tensor_of_an_impossible_shape_is_named(part, cut, source, tmp_path):
    folder, _ = packed_checkpoint(source, tmp_path, "w4a16")
    tensors, name = load_file(folder / "model.safetensors"), f"model.layers.0.attention.wqkv.linear.{part}"
    due = tuple(tensors[name].shape)
    tensors[name] = tensors[name][cut].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load(folder, dtype="auto")
    assert f"{name} is {tuple(tensors[name].shape)}, not {due}" in str(error.value)


def refused(capsys, *arguments):
    assert quantise.main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("quantise: ") and message.count("\n") == 1
    return message


@pytest.fixture
def everything_installed(monkeypatch):
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: True)


WRONG = {
    "no such data": (("--scheme", "w4a16", "--calibration", "lost.json"), "No such file or directory: 'lost.json'"),
    "data for nothing": (("--scheme", "nf4", "--calibration", "x.json"), "nf4 is computed from the weights alone"),
    "no rows": (("--scheme", "w4a16", "--rows", "0"), "above 0, got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unusable_arguments(case, source, tmp_path, capsys, everything_installed):
    arguments, message = WRONG[case]
    assert message in refused(capsys, source, tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", quantise.SCHEMES)
def test_a_package_that_is_missing_is_named(scheme, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: None)
    row = quantise.SCHEMES[scheme]
    wanted = ["--calibration", str(tmp_path / "rows.json")] if scheme == "w4a16" else []
    said = refused(capsys, source, tmp_path / "out", "--scheme", scheme, *wanted)
    assert f"needs {row.package}: {row.install}" in said


def test_a_quantised_source_is_refused(source, tmp_path, capsys, everything_installed):
    packed, _ = packed_checkpoint(source, tmp_path, "GPTQ")
    assert "quantised already: 4 bits (GPTQ)" in refused(capsys, packed, tmp_path / "out", "--scheme", "nf4")
    packed, _ = packed_checkpoint(source, tmp_path, "AWQ")
    assert "is quantised" in refused(capsys, packed, tmp_path / "out", "--scheme", "nf4")


def test_a_group_size_that_does_not_fit_is_named(source):
    with pytest.raises(ValueError, match=r"128 does not fit linears of 64 inputs.*try --group-size 64"):
        quantise.check_group_size(quantise.load(source), 128)
    quantise.check_group_size(quantise.load(source), 32)


def test_nothing_is_left_of_a_run_that_fails(source, tmp_path, capsys, monkeypatch, everything_installed):
    def fail(request):
        raise ValueError("the disk is full")

    monkeypatch.setitem(quantise.SCHEMES, "nf4", quantise.SCHEMES["nf4"]._replace(run=fail))
    assert "the disk is full" in refused(capsys, source, tmp_path / "out", "--scheme", "nf4")
    assert not list(tmp_path.iterdir())


def test_without_data_the_rows_that_the_package_brings_are_used(source, monkeypatch):
    """Pictures and texts, made by `toyworld.calibration`; all fit, on a checkpoint of any tile."""
    model = quantise.load(source)
    request = quantise.Request(source, quantise.DEFAULT_CALIBRATION, None, quantise.ROWS, quantise.MAX_TOKENS, 32, 0)
    rows = quantise.calibration_rows(model, quantise.read_calibration(request), request)
    assert len(rows) == calibration.ROWS == quantise.ROWS
    with_pictures = sum(bool(row["image_mask"].any()) for row in rows)
    assert 60 < with_pictures < 100
    seen = []
    scheme = quantise.SCHEMES["w4a16"]._replace(run=lambda request: seen.append(request) or model)
    monkeypatch.setitem(quantise.SCHEMES, "w4a16", scheme)
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: True)
    for name in ("name_what_is_spared", "name_beside_linears"):
        monkeypatch.setattr(quantise, name, lambda path: None)
    quantise.quantise(source, source.parent / "default", "w4a16")
    assert seen[0].calibration == quantise.DEFAULT_CALIBRATION


def test_the_toy_world_makes_these_rows_again(tmp_path):
    """But for the bytes of the pictures, which depend on Pillow's zlib."""
    texts = []
    for path in (quantise.DEFAULT_CALIBRATION, calibration.write(tmp_path / "again.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        texts.append([{**row, "image": len(row.get("image", ()))} for row in rows])
    assert texts[0] == texts[1]


def test_pictures_leave_room_for_their_text():
    for tile, hd_num in ((84, 24), (560, 2), (1120, 1)):
        assert quantise.tiles_that_fit(PictureLayout(tile=tile, side=tile // 28), 2048) == hd_num


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quantise", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "usage: xcomposer quantise" in shown and "example: " in shown
