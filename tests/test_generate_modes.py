"""`generate` in the modes that transformers has: every cache, every output, drafts, and settings from every place."""

import sys

import pytest
import torch
from chats import GREEDY, told
from conftest import load
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

# --------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("place", ["keyword", "positional", "the model's own"])
def test_a_static_cache_from_each_place(model, ids, place, beams):
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    wanted = model.generate(ids, **settings)
    static = GenerationConfig(**settings, cache_implementation="static")
    if place == "keyword":
        got = model.generate(ids, generation_config=static)
    elif place == "positional":
        got = model.generate(ids, static)
    else:
        model.generation_config.cache_implementation = "static"
        got = model.generate(ids, **settings)
    assert got.tolist() == wanted.tolist()


def test_a_generation_config_without_a_cache_has_the_growing_one(model, ids, monkeypatch):
    seen = []
    prefill = type(model)._prefill
    monkeypatch.setattr(
        type(model), "_prefill", lambda self, *args, **kw: (seen.append(args[2]), prefill(self, *args, **kw))[1]
    )
    model.generate(ids, GenerationConfig(max_new_tokens=2))
    assert type(seen[0]["past_key_values"]).__name__ == "GrowingCache"


@pytest.mark.parametrize("place", ["keyword", "config", "the model's own"])
def test_without_a_cache(model, ids, place):
    wanted = model.generate(ids, **GREEDY)
    if place == "keyword":
        got = model.generate(ids, use_cache=False, **GREEDY)
    elif place == "config":
        got = model.generate(ids, GenerationConfig(use_cache=False, **GREEDY))
    else:
        model.generation_config.use_cache = False
        got = model.generate(ids, **GREEDY)
    assert got.tolist() == wanted.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="layers leave a GPU for the host")
@pytest.mark.parametrize("beams", [1, 2])
def test_an_offloaded_cache(tiny_checkpoint, ids, beams):
    model, settings = load(tiny_checkpoint).cuda(), {**GREEDY, "num_beams": beams}
    wanted = model.generate(ids.cuda(), **settings)
    for kind in ("offloaded", "offloaded_static"):
        assert model.generate(ids.cuda(), cache_implementation=kind, **settings).tolist() == wanted.tolist()


REFUSED = {
    "offloaded": "it is for models on a GPU, this one is on the CPU",  # the library fails in the midst, without a name
    "offloaded_static": "it is for models on a GPU, this one is on the CPU",
    "paged": "no pictures and no infer_mode; for plain text call generate_batch",  # the library drops both in silence
}


@pytest.mark.parametrize("said", ["by name", "in the model's config"])
@pytest.mark.parametrize("kind", REFUSED)
def test_caches_that_are_refused(model, ids, kind, said, monkeypatch):
    settings = {"cache_implementation": kind}
    if said != "by name":
        monkeypatch.setattr(model.generation_config, "cache_implementation", kind)
        settings = {}
    with pytest.raises(ValueError, match=f"cache_implementation is '{kind}': .*{REFUSED[kind]}"):
        model.generate(ids, **settings, **GREEDY)


@pytest.mark.parametrize("kind", ["quanto", "hqq"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_quantised_cache(model, kind, beams):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[kind])
    config = {"backend": kind, "nbits": 8 if kind == "hqq" else 4, "axis_key": 0, "axis_value": 0}
    if kind == "hqq":
        config |= {"axis_key": 1, "axis_value": 1}
    answer = told(model, cache_implementation="quantized", cache_config=config, num_beams=beams)
    assert isinstance(answer, str) and answer


@pytest.mark.parametrize("length", ["all ids", "the last alone"])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_cache_that_covers_all_ids_but_the_last(model, ids, cache, length):
    """As stock Llama takes it: the whole conversation's ids, or the new ones with a mask over all."""
    wanted = model.generate(ids, **GREEDY)
    config = model.config.get_text_config()
    past = cache(config=config) if cache is DynamicCache else cache(config=config, max_cache_len=80)
    model(input_ids=ids[:, :-1], past_key_values=past, use_cache=True)
    new = ids if length == "all ids" else ids[:, -1:]
    got = model.generate(new, attention_mask=torch.ones_like(ids), past_key_values=past, **GREEDY)
    assert got[0, new.shape[1] :].tolist() == wanted[0, ids.shape[1] :].tolist()


def test_a_returned_cache_continues(model, ids):
    whole = model.generate(ids, **{**GREEDY, "max_new_tokens": 16})
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY)
    assert rest.tolist() == whole.tolist()


def test_a_cache_longer_than_the_prompt(model, ids):
    past = model.generate(ids, return_dict_in_generate=True, **GREEDY).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values hold 47 positions.*last 5 of 5.*attention_mask"):
        model.generate(ids[:, :5], past_key_values=past, **GREEDY)


# -------------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("beams", [1, 3])
def test_hidden_states_and_attentions_are_whole(model, ids, monkeypatch, beams):
    settings = {**GREEDY, "num_beams": beams, "return_dict_in_generate": True, "max_new_tokens": 3}
    settings |= {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    try:
        monkeypatch.setattr(model, "share_prefill", False)
        monkeypatch.setattr(model, "prefill_chunk", 0)
        wanted = model.generate(ids, **settings)
        monkeypatch.setattr(model, "share_prefill", True)
        monkeypatch.setattr(model, "prefill_chunk", 7)
        got = model.generate(ids, **settings)
    finally:
        model.set_attn_implementation("sdpa")
    assert got.sequences.tolist() == wanted.sequences.tolist()
    for name in ("hidden_states", "attentions"):
        for step, other in zip(getattr(got, name), getattr(wanted, name), strict=True):
            torch.testing.assert_close(step, other)
    assert got.hidden_states[0][0].shape == (beams, 40, 64)
    assert got.attentions[0][0].shape[0] == beams and got.attentions[0][0].shape[-2:] == (40, 40)


# ------------------------------------------------------------------------------------------------------- drafts, stops


def test_a_placeholder_is_never_drafted(model, ids):
    """The prompt ends as it begins, before a picture: the draft would be its placeholders."""
    picture = torch.full((1, 6), model.config.image_token_id)
    prompt = torch.cat([ids[:, :5], picture, ids[:, 5:9], ids[:, :5]], dim=1)
    types = (prompt == model.config.image_token_id).long()
    drafted = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: drafted.append(kwargs["input_ids"]), with_kwargs=True
    )
    settings = {**GREEDY, "mm_token_type_ids": types}
    got = model.generate(prompt, prompt_lookup_num_tokens=5, **settings)
    hook.remove()
    assert len(drafted) > 1 and drafted[0].shape[1] >= prompt.shape[1]
    assert int((drafted[0] == model.config.image_token_id).sum()) == 6
    assert got.tolist() == model.generate(prompt, **settings).tolist()


def test_leaving_layers_early_is_refused_and_changes_nothing(model, ids):
    layers, wanted = model.config.num_hidden_layers, model.generate(ids, **GREEDY)
    for call in (
        lambda: model.generate(ids, assistant_early_exit=1, **GREEDY),
        lambda: model.generate(ids, GenerationConfig(assistant_early_exit=1)),
        lambda: told(model, assistant_early_exit=1),
    ):
        with pytest.raises(ValueError, match="assistant_early_exit is 1.*prompt_lookup_num_tokens"):
            call()
    assert model.config.num_hidden_layers == layers
    assert model.generate(ids, **GREEDY).tolist() == wanted.tolist()


# --------------------------------------------------------------------------------------------------- a caller's tensors


@torch.no_grad()
def test_positions_given_by_the_caller(model, ids):
    wanted = model(input_ids=ids, position_ids=torch.arange(40)[None] + 5).logits[:, -1]
    got = model.generate(
        ids, position_ids=torch.arange(40)[None] + 5, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(got.logits[0], wanted)


# ------------------------------------------------------------------------------------------------------------- adapters


def test_merged_weights_answer_in_their_mode_alone(model):
    with model.merged_task_adapter("web"):
        for call in (lambda: told(model), lambda: model.generate(torch.ones(1, 4, dtype=torch.long), **GREEDY)):
            with pytest.raises(ValueError, match="'web' are merged.*infer_mode='base'"):
                call()
        assert told(model, infer_mode="web")
    assert told(model)


def test_adapters_are_looked_at_once_a_call(model, monkeypatch):
    linear = type(next(model._adapted_linears())[1])
    told(model, infer_mode="write", max_new_tokens=2)
    looked = []
    walk = type(model)._adapted_linears
    monkeypatch.setattr(type(model), "_adapted_linears", lambda self: (looked.append(1), walk(self))[1])
    steps = []
    hook = model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    counts = []
    for length in (4, 16):
        looked.clear()
        told(model, infer_mode="write", max_new_tokens=length)
        counts.append(len(looked))
    hook.remove()
    assert counts[0] == counts[1] and len(steps) >= 20
    assert all(module.is_joint(("sft", "dpo")) for module in model.modules() if isinstance(module, linear))


def test_adapters_of_a_sharded_model_are_not_lazy(tiny_checkpoint, monkeypatch):
    """Loaded later they would lie whole beside weights that are cut up."""
    built = []
    code = type(load(tiny_checkpoint))
    resident = sys.modules[code.__module__.rsplit(".", 1)[0] + ".build_mlp"]._RESIDENT.get

    def stop(cls, *args, **kwargs):
        built.append(resident())
        raise InterruptedError

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(stop))
    for sharded in ({"tp_plan": "auto"}, {"tp_size": 2}, {"distributed_config": object()}, {"device_mesh": object()}):
        with pytest.raises(InterruptedError):
            code.from_pretrained(tiny_checkpoint, **sharded)
    assert built == [None] * 4


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("loads", [True, False])
def test_flash_attention_of_the_hub(tiny_checkpoint, monkeypatch, loads):
    """Where only `kernels` is installed: its build if it can be loaded ("eager" stands for it here), else SDPA."""
    code = type(load(tiny_checkpoint))
    package = code.__module__.rsplit(".", 1)[0]
    for name in ("configuration_internlm_xcomposer2", "modeling_internlm_xcomposer2"):
        monkeypatch.setattr(sys.modules[f"{package}.{name}"], "is_kernels_available", lambda: True)
        monkeypatch.setattr(sys.modules[f"{package}.{name}"], "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    check, asked = PreTrainedModel._check_and_adjust_attn_implementation, []

    def checked(self, attn_implementation, *args, **kwargs):
        if attn_implementation != "flash_attention_2":
            return check(self, attn_implementation, *args, **kwargs)
        asked.append(type(self).__name__)
        if not loads:
            raise OSError("offline")
        return "eager"

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", checked)
    model = code.from_pretrained(tiny_checkpoint)
    found = "eager" if loads else "sdpa"
    for config in (model.config, model.config.text_config, model.config.vision_config):
        assert config._attn_implementation == found
    assert asked == ["InternLMXComposer2ForCausalLM"]
    assert model.generate(torch.full((1, 5), 400), max_new_tokens=2, do_sample=False).shape == (1, 7)
