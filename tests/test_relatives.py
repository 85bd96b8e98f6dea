"""Models of the zoo that another architecture reads: each is named, with where to look, whoever is asked."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from xcomposer import cli
from xcomposer.model.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM

# fields of config.json; names of tensors; what it is, and where to look
FIRST = {
    "model_type": "InternLMXComposer",
    "architectures": ["InternLMXComposerForCausalLM"],
    "auto_map": {"AutoModel": "modeling_InternLM_XComposer.InternLMXComposerForCausalLM"},
}
RELATIVES = {
    "internlm-xcomposer-7b": (
        FIRST,
        ["Qformer.bert.embeddings.LayerNorm.weight", "internlm_model.model.layers.0.self_attn.q_proj.weight"],
        "InternLM-XComposer 1.0 or ShareCaptioner .* transformers 4.33",
    ),
    "ShareCaptioner": (
        {**FIRST, "auto_map": {"AutoModelForCausalLM": "modeling_x.ShareCaptionerForCausalLM"}},
        ["ln_vision.weight", "internlm_model.model.norm.weight"],
        "InternLM-XComposer 1.0 or ShareCaptioner .* transformers 4.33",
    ),
    "ShareGPT4V-7B": (
        {"model_type": "share4v", "architectures": ["Share4VLlamaForCausalLM"]},
        ["model.mm_projector.0.weight", "model.layers.0.self_attn.q_proj.weight"],
        "ShareGPT4V or another LLaVA model.* LlavaForConditionalGeneration",
    ),
    "audio": (
        {"model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"]},
        ["audio_tower.conv1.weight", "language_model.model.norm.weight"],
        "OmniLive's audio part.* Qwen2AudioForConditionalGeneration",
    ),
    "memory": (
        {"model_type": "llava_qwen", "architectures": ["GroundQwenForCausalLM"]},
        ["model.compressor.0.weight", "model.norm.weight"],
        "OmniLive's memory part.*OmniLive repository runs it",
    ),
}


def write(folder, fields, tensors):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer_config.json").write_text("{}")
    save_file({name: torch.zeros(2, 2) for name in tensors}, folder / "model.safetensors")
    return folder


COMMANDS = {
    "inspect": ["{folder}"],
    "adopt": ["{folder}"],
    "chat": ["--model", "{folder}", "--text", "Hello"],
    "serve": ["{folder}", "--backend", "transformers"],
    "merge": ["{folder}", "{out}", "--task", "web"],
    "export": ["{folder}", "{out}", "--task", "web"],
    "quantise": ["{folder}", "{out}", "--scheme", "nf4"],
    "finetune": ["--model", "{folder}", "--data", "{data}", "--output_dir", "{out}", "--use_cpu"],
}
NEEDS = {"serve": "uvicorn", "finetune": "peft", "quantise": "bitsandbytes"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", RELATIVES)
def test_a_command_names_it_and_writes_nothing(tmp_path, capsys, name, command):
    if command in NEEDS:
        pytest.importorskip(NEEDS[command])
    fields, tensors, said = RELATIVES[name]
    folder = write(tmp_path / name, fields, tensors)
    rows = [{"id": "0", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Ho"}]}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    places = {"folder": folder, "out": tmp_path / "out", "data": tmp_path / "data.json"}
    before = sorted(path.read_bytes() for path in folder.iterdir())
    try:
        code = cli.main([command, *(argument.format(**places) for argument in COMMANDS[command])])
        told = capsys.readouterr().err
    except SystemExit as stop:
        code, told = 1, str(stop)
    assert code == 1
    with pytest.raises(ValueError, match=said):
        raise ValueError(told)
    assert sorted(path.read_bytes() for path in folder.iterdir()) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RELATIVES)
def test_loading_names_it(tmp_path, name):
    fields, tensors, said = RELATIVES[name]
    folder = write(tmp_path / name, fields, tensors)
    with pytest.raises(ValueError, match=said):
        InternLMXComposer2ForCausalLM.from_pretrained(folder)
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM) if name != "audio" else ():  # the library has that one
        with pytest.raises(ValueError, match=said):
            auto.from_pretrained(folder)


def test_strangers_keep_the_librarys_errors(tmp_path):
    folder = write(tmp_path / "stranger", {"model_type": "no-such-model", "architectures": ["NoSuch"]}, ["x"])
    for auto in (AutoConfig, AutoModel):
        with pytest.raises(ValueError, match="no-such-model"):
            auto.from_pretrained(folder)
    with pytest.raises(SystemExit, match="is no checkpoint of this family: its config.json names NoSuch"):
        cli.main(["chat", "--model", str(folder)])
    with pytest.raises(OSError):
        AutoTokenizer.from_pretrained(tmp_path / "nowhere")


def test_a_download_of_all_parts_says_which_folder(tmp_path):
    for part in ("audio", "base", "memory"):
        (tmp_path / "omnilive" / part).mkdir(parents=True)
        (tmp_path / "omnilive" / part / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="its folders audio, base, memory have one: pass --model .*omnilive/base"):
        cli.main(["chat", "--model", str(tmp_path / "omnilive")])
