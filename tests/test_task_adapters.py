"""Task adapters: on disk until needed, released, written all the same, merged for a while."""

import pytest
import torch
from conftest import load

GREEDY = {"do_sample": False, "max_new_tokens": 10}


@pytest.fixture
def model(tiny_checkpoint, tiny_tokenizer):
    model = load(tiny_checkpoint)
    model.tokenizer = tiny_tokenizer
    return model


def test_they_stay_on_disk_until_a_method_needs_them(model):
    assert model.task_adapters_in_memory() == []
    model.chat(None, "hi", **GREEDY)
    assert model.task_adapters_in_memory() == []
    model.write_webpage("hi", output_path=None, **GREEDY)
    assert model.task_adapters_in_memory() == ["web"]
    model.release_task_adapters()
    assert model.task_adapters_in_memory() == []


@pytest.mark.parametrize("wanted, here", [("all", ["dpo", "sft", "web"]), (["web"], ["web"]), ("lazy", [])])
def test_how_many_are_loaded_at_once(tiny_checkpoint, wanted, here):
    assert sorted(load(tiny_checkpoint, task_adapters=wanted).task_adapters_in_memory()) == here


def test_another_word_is_refused(tiny_checkpoint):
    with pytest.raises(ValueError, match="task_adapters='some'"):
        load(tiny_checkpoint, task_adapters="some")


@pytest.mark.parametrize("mode", ["web", "write"])
def test_lazy_equals_resident(tiny_checkpoint, tiny_tokenizer, model, mode):
    resident = load(tiny_checkpoint, task_adapters="all")
    wanted = resident.chat(tiny_tokenizer, "hi", infer_mode=mode, **GREEDY)[0]
    assert model.chat(None, "hi", infer_mode=mode, **GREEDY)[0] == wanted
    model.release_task_adapters()
    assert model.chat(None, "hi", infer_mode=mode, **GREEDY)[0] == wanted


def test_saving_writes_those_on_disk_too(model, tmp_path):
    answer = model.chat(None, "hi", infer_mode="write", **GREEDY)[0]
    model.release_task_adapters()
    model.save_pretrained(tmp_path / "saved")
    assert model.task_adapters_in_memory() == []
    saved = load(tmp_path / "saved", task_adapters="all")
    assert sorted(saved.task_adapters_in_memory()) == ["dpo", "sft", "web"]
    assert saved.chat(model.tokenizer, "hi", infer_mode="write", **GREEDY)[0] == answer


@pytest.mark.parametrize("mode", ["web", "write"])
def test_merged_gives_the_same_tokens_and_comes_out_exactly(model, mode):
    wanted = model.chat(None, "hi", infer_mode=mode, **GREEDY)[0]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(KeyError, match="halfway"), model.merged_task_adapter(mode):
        assert model.chat(None, "hi", infer_mode=mode, **GREEDY)[0] == wanted
        other = "write" if mode == "web" else "web"
        with pytest.raises(ValueError, match="merged into the weights"):
            model.chat(None, "hi", infer_mode=other, **GREEDY)
        raise KeyError("halfway")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.chat(None, "hi", infer_mode=mode, **GREEDY)[0] == wanted
