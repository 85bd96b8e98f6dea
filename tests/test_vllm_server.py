"""Serving on vLLM, as far as it goes without vLLM: the adapter cache, the command, refusals."""

import shutil
import sys

import pytest
import torch
from packing import packed_checkpoint
from released import write_released
from safetensors.torch import load
from transformers import AutoConfig

from xcomposer.checkpoints.export import export
from xcomposer.checkpoints.merge import Checkpoint, merge
from xcomposer.serving import adapter_cache, vllm_server
from xcomposer.serving.adapter_cache import cache_folder, exported, holds, tasks_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released") / "IXC-2.5 v1.0")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XCOMPOSER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapters"


def tensors_of(folder):
    return load((folder / "adapter_model.safetensors").read_bytes())  # not mapped: the tests change the file


def count_exports(monkeypatch):
    made = []

    def counting(source, target, task, **kwargs):
        made.append(task)
        return export(source, target, task, **kwargs)

    monkeypatch.setattr(adapter_cache, "export", counting)
    return made


def test_adapters_are_written_once(folder, cache, monkeypatch):
    made = count_exports(monkeypatch)
    written = {task: exported(folder, task, progress=False) for task in ("web", "write")}
    assert {task: exported(folder, task) for task in written} == written
    assert made == ["web", "write"]
    assert all(path.is_relative_to(cache) and holds(path, Checkpoint(folder), task) for task, path in written.items())
    assert {path.name for path in written["web"].parent.iterdir()} == {"web", "write"}  # nothing half written


def cut_file(target):
    path = target / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_bits(target):
    path = target / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def no_config(target):
    (target / "adapter_config.json").unlink()


@pytest.mark.parametrize("spoil", [cut_file, other_bits, no_config])
def test_a_spoilt_folder_is_written_anew(folder, monkeypatch, spoil):
    whole = tensors_of(exported(folder, "web", progress=False))
    spoil(exported(folder, "web"))
    made = count_exports(monkeypatch)
    again = tensors_of(exported(folder, "web", progress=False))
    assert made == ["web"]
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_other_weights_under_the_same_name(tmp_path, folder, monkeypatch):
    same_place = shutil.copytree(folder, tmp_path / "model")
    before = tensors_of(exported(same_place, "web", progress=False))
    shutil.rmtree(same_place)
    write_released(same_place, config={"task_adapter_ranks": {"web": 4}})
    after = tensors_of(exported(same_place, "web", progress=False))
    assert before.keys() == after.keys()
    assert any(before[name].shape != after[name].shape for name in before)
    assert tasks_of(Checkpoint(same_place).adapter_pairs()) == ["web"]


def test_a_failed_export_leaves_nothing(folder, monkeypatch):
    def failing(source, target, task, **kwargs):
        target.mkdir()
        (target / "adapter_config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(adapter_cache, "export", failing)
    with pytest.raises(OSError, match="No space"):
        exported(folder, "web")
    assert [path for path in cache_folder().rglob("*") if path.is_file() or path.name == "web"] == []


def test_what_a_checkpoint_offers(folder, tmp_path):
    assert list(vllm_server.task_adapters(folder)) == ["web", "write"]
    merged = merge(folder, tmp_path / "merged", "web", progress=False)
    assert vllm_server.task_adapters(merged) == {}


@pytest.mark.parametrize("layout", ["AWQ", "w4a16"])
def test_a_quantised_checkpoint_offers_its_adapters(layout, folder, tmp_path):
    """They are not quantised, and the same as those of its full-precision twin."""
    offered = [vllm_server.task_adapters(path) for path in packed_checkpoint(folder, tmp_path, layout)]
    for task in ("web", "write"):
        packed, plain = (tensors_of(folders[task]) for folders in offered)
        assert packed.keys() == plain.keys() and all(torch.equal(packed[name], plain[name]) for name in plain)


def test_options_of_adapters(folder):
    assert vllm_server.adapter_options({}, spare=True) == []
    folders = vllm_server.task_adapters(folder)
    rank = max(vllm_server.rank_of(path) for path in folders.values())
    options = vllm_server.adapter_options(folders, spare=True)
    assert options[options.index("--max-loras") + 1] == "3"
    assert int(options[options.index("--max-lora-rank") + 1]) >= rank
    assert [f"{task}={path}" for task, path in folders.items()] == options[options.index("--lora-modules") + 1 :][:2]


@pytest.mark.parametrize("entry", ["web", "=x", "web=nowhere"])
def test_refuses_an_adapter(entry):
    with pytest.raises(ValueError, match="NAME=FOLDER"):
        vllm_server.given_adapters([entry])


def test_refuses_a_rank_that_vllm_does_not_take(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 1024}')
    with pytest.raises(ValueError, match="rank 1024, but vLLM takes at most 512"):
        vllm_server.given_adapters([f"mine={tmp_path}"])


def test_says_what_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setattr(vllm_server, "entry_points", lambda group: [])
    assert vllm_server.serve(str(folder)) == 1
    assert "pip install -e ." in capsys.readouterr().err
    monkeypatch.setattr(vllm_server, "check_plugin", lambda: None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    assert vllm_server.serve(str(folder)) == 1
    assert "vLLM is not installed" in capsys.readouterr().err


def test_a_sibling_that_names_a_language_model(tmp_path):
    """4KHD's config does; vLLM goes by this name."""
    folder = write_released(tmp_path / "model", config={"architectures": ["InternLM2ForCausalLM"]})
    assert AutoConfig.from_pretrained(folder).architectures == ["InternLMXComposer2ForCausalLM"]
