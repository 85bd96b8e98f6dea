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


def write_logits(model):
    """Logits of the write mode, which adds up two adapters."""
    return model(torch.tensor([[5, 9, 20, 3]]), infer_mode="write").logits.detach()


def of_write(model):
    """Its adapted linears, and the weights that the mode uses."""
    linears = [module for _, module in model._adapted_linears()]
    pairs = [pairs[name].weight for m in linears for pairs in (m.task_A, m.task_B) for name in ("sft", "dpo")]
    return linears, pairs


def test_the_write_pair_is_one_pair_of_matmuls(model, monkeypatch):
    wanted = write_logits(model)  # with gradients each adapter runs for itself
    plain = [weight.clone() for weight in of_write(model)[1]]
    with torch.no_grad():
        torch.testing.assert_close(write_logits(model), wanted)
        linears, weights = of_write(model)
        assert all(linear.is_joint(("sft", "dpo")) for linear in linears)
        assert all(torch.equal(weight, before) for weight, before in zip(weights, plain, strict=True))
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 2 * len(linears)  # no second copy
        for linear in linears:  # neither adapter is called any more
            monkeypatch.setattr(linear.task_A["sft"], "forward", None)
            monkeypatch.setattr(linear.task_A["dpo"], "forward", None)
        torch.testing.assert_close(write_logits(model), wanted)


@pytest.mark.parametrize("change", ["in place", "by data", "by a new parameter", "by loading", "to bf16 and back"])
def test_a_joint_pair_follows_its_weights(model, change):
    with torch.no_grad():
        old = write_logits(model)
        _, weights = of_write(model)
        if change == "in place":
            weights[1].mul_(3)
        elif change == "by data":
            weights[1].data = weights[1].data * 3
        elif change == "by a new parameter":
            linear = of_write(model)[0][0].task_A["dpo"]
            linear.weight = torch.nn.Parameter(linear.weight * 3)
        elif change == "by loading":
            state = model.state_dict()
            model.load_state_dict({name: 3 * t if ".task_A.dpo" in name else t for name, t in state.items()})
        else:
            model.to(torch.bfloat16).float()
        new = write_logits(model)
    assert not torch.equal(new, old)
    torch.testing.assert_close(new, write_logits(model))  # with gradients: from the weights themselves


def test_a_joint_pair_parts_for_files_and_release(model, tmp_path):
    with torch.no_grad():
        wanted = write_logits(model)
        linears, weights = of_write(model)
        state = model.state_dict()
        assert all(tensor.is_contiguous() for tensor in state.values())
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == len(weights)
        write_logits(model)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(write_logits(load(tmp_path / "saved")), wanted)
        write_logits(model)
        model.to("cpu")  # moves nothing
        model.save_pretrained(tmp_path / "moved")
        assert torch.equal(write_logits(load(tmp_path / "moved")), wanted)
        write_logits(model)
        model.release_task_adapters(["sft"])
        assert all(linear.joint is None and list(linear.task_A) == ["dpo"] for linear in linears)
        torch.testing.assert_close(write_logits(model), wanted)


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
