"""The package `xcomposer`: one import, and a released folder loads as it is; the command; the wheel."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GOLDEN, REPO
from released import write_released
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, pipeline
from transformers.models.auto import image_processing_auto, video_processing_auto

from xcomposer import cli
from xcomposer.checkpoints import tiny
from xcomposer.family import is_family
from xcomposer.register import register

PICTURE = str(GOLDEN / "images/small_150x100.png")
AUTO_CLASSES = (
    "AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoVideoProcessor", "AutoProcessor", "AutoModel",
    "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
)  # fmt: skip
# The library hides these where torchvision is not installed, which they do not need here.
HIDDEN = {"AutoImageProcessor": image_processing_auto, "AutoVideoProcessor": video_processing_auto}
TRUST = {"trusting": {"trust_remote_code": True}, "unsaid": {}, "not trusting": {"trust_remote_code": False}}


@pytest.fixture(autouse=True)
def by_the_package(request):
    if request.config.getoption("--remote-code"):
        pytest.skip("what the package does; this run loads by remote code")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released") / "IXC-2.5 release v1.0", fmt="bin", shards=2)


def in_a_new_process(script, *arguments, cwd, **environment):
    """What a script prints, run as a user does: nothing of this process but the package's place is known to it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env.update(HF_HUB_OFFLINE="1", **environment)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=env
    )
    assert done.returncode == 0, done.stderr
    return done


# One import.


@pytest.mark.parametrize("trust", TRUST)
@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_a_release_opens_with_the_packages_classes(released, name, trust):
    found = getattr(HIDDEN.get(name, transformers), name).from_pretrained(released, **TRUST[trust])
    assert type(found).__module__.startswith("xcomposer.model."), type(found)


def test_a_release_answers_like_the_same_weights_with_the_code_beside_them(released, tmp_path):
    """Package and remote code, in one process."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    adopted = tiny.write_checkpoint(tmp_path / "adopted", fmt="bin", shards=2)
    reference = "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"
    remote = get_class_from_dynamic_module(reference, str(adopted)).from_pretrained(adopted).eval()
    ours = AutoModel.from_pretrained(released).eval()
    assert type(remote).__module__.startswith("transformers_modules.")
    assert type(ours).__module__.startswith("xcomposer.model.")
    tokenizer = AutoTokenizer.from_pretrained(released)
    for query, pictures in (("Hello", []), ("What is it?", [PICTURE]), ("<ImageHere> and <ImageHere>?", [PICTURE] * 2)):
        for mode in ("base", "web", "write"):
            said = [
                model.chat(tokenizer, query, pictures, do_sample=False, max_new_tokens=12, infer_mode=mode)[0]
                for model in (remote, ours)
            ]
            assert said[0] == said[1]


def test_the_processor_of_a_release_is_whole(released):
    processor = AutoProcessor.from_pretrained(released)
    assert processor.image_processor.tile == 56  # from config.json: the release has no processor files
    messages = [{"role": "user", "content": [{"type": "image", "path": PICTURE}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    again = AutoProcessor.from_pretrained(released, hd_num=1)
    assert again.image_processor.hd_num == 1


def test_a_pipeline_of_a_release(released):
    messages = [{"role": "user", "content": [{"type": "image", "path": PICTURE}, {"type": "text", "text": "What?"}]}]
    chat = pipeline("image-text-to-text", model=str(released))
    assert isinstance(chat(text=messages, max_new_tokens=3, return_full_text=False)[0]["generated_text"], str)


def test_a_model_from_a_config(released):
    config = AutoConfig.from_pretrained(released)
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)).__module__.startswith("xcomposer.model.")


def test_saving_names_no_file_that_is_not_there(released, tmp_path):
    """A saved model loads again by the package; its vocabulary goes along."""
    AutoModel.from_pretrained(released).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(released).save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    first = AutoModel.from_pretrained(released).eval()
    said = [
        m.chat(t, "Hello", do_sample=False, max_new_tokens=8)[0] for m, t in ((again, tokenizer), (first, tokenizer))
    ]
    assert said[0] == said[1]


def test_a_folder_that_is_not_ours_is_left_to_transformers(tmp_path):
    """A language model that shares the release's `model_type` runs its own code, where that is trusted."""
    folder = tmp_path / "internlm2"
    folder.mkdir()
    fields = {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    }
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "configuration_internlm2.py").write_text(
        "from transformers import PretrainedConfig\n\n\n"
        "class InternLM2Config(PretrainedConfig):\n    model_type = 'internlm2'\n"
    )
    assert not is_family(fields)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules.")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("path", ["no/such/folder", ""])
def test_a_missing_folder_is_told_by_transformers(path):
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(path)


LIGHT = """
import sys
import xcomposer
assert "torch" not in sys.modules and "transformers" not in sys.modules
finders = len(sys.meta_path)
xcomposer.register()
assert len(sys.meta_path) == finders
import importlib
importlib.import_module(sys.argv[2])
import xcomposer.family
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__)
"""


@pytest.mark.parametrize("first", ["transformers", "transformers.generation", "transformers.models.clip.modeling_clip"])
def test_the_import_is_light_and_quiet_and_comes_in_any_order(released, first, tmp_path):
    """Whatever of transformers is imported next: our modules import parts of it too."""
    done = in_a_new_process(LIGHT, released, first, cwd=tmp_path)
    assert done.stdout == "xcomposer.model.modeling_internlm_xcomposer2\n"
    assert "Error" not in done.stderr and "flash" not in done.stderr


def test_registering_after_transformers(released, tmp_path):
    script = (
        "import sys; from transformers import AutoModel, AutoProcessor; import xcomposer; "
        "print(type(AutoModel.from_pretrained(sys.argv[1])).__module__)"
    )
    done = in_a_new_process(script, released, cwd=tmp_path)
    assert done.stdout.startswith("xcomposer.model.")
    register()  # here too: nothing happens


# The command.


def test_every_command_has_help_with_an_example(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)




@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command(name, capsys):
    """The usage line says what was typed, and an example follows."""
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: xcomposer {name}")
    assert f"example: xcomposer {name}" in " ".join(shown.split())


def test_an_unknown_command(capsys):
    assert cli.main(["caht"]) == 2
    assert "no command 'caht'; there are chat, serve" in capsys.readouterr().err


# The wheel.


@pytest.mark.slow
def test_the_wheel_of_a_clean_clone(released, tmp_path):
    """It holds what runs and what a checkpoint folder holds, and loads a release from outside the clone."""
    clone = tmp_path / "clone"
    clone.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith(("tests/", "benchmarks/results", "demo/")) and (REPO / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, clone / name)
    (clone / "tests").mkdir()
    (clone / "tests" / "test_nothing.py").write_text("")
    (clone / "model.safetensors").write_bytes(b"")  # weights that somebody left at the top
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, clone], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"xcomposer/model/config.json", "xcomposer/model/chat_template.jinja", "xcomposer/cli.py"} <= set(names)
    assert {Path(name).name for name in names if name.startswith("xcomposer/model/")} >= {
        path.name for path in REPO.glob("*.py")
    }
    strange = [name for name in names if not name.startswith(("xcomposer/", "internlm_xcomposer2d5-"))]
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".model"))]
    assert not strange and not weights
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    script = (
        "import sys, xcomposer; from transformers import AutoModel, AutoTokenizer; "
        "model = AutoModel.from_pretrained(sys.argv[1]); tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "print(xcomposer.__file__); model.chat(tokenizer, 'Hello', do_sample=False, max_new_tokens=3)"
    )
    done = in_a_new_process(script, released, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout.strip().startswith(str(tmp_path / "site"))
