"""The same tokens however the model is run: attention, batches, caches, adapters, precision, gradients, places."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from chats import PICTURES, QUERY, Collector, tokens_of
from conftest import load
from transformers import StaticCache
from transformers.utils import is_flash_attn_2_available


@pytest.fixture
def expected(tiny_model):
    return tokens_of(tiny_model)


# ---------------------------------------------------------------------------------------------------- the same each way


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations(tiny_checkpoint, tiny_tokenizer, expected, attention):
    model = load(tiny_checkpoint, attn_implementation=attention)
    model.tokenizer = tiny_tokenizer
    torch.compiler.set_stance("force_eager")  # flex is compiled for its users; test_golden does that once
    try:
        assert tokens_of(model) == expected
        if attention != "eager":
            model.set_attn_implementation("eager")
            assert tokens_of(model) == expected
    finally:
        torch.compiler.set_stance("default")


@torch.no_grad()
def prompts_of(model, lengths):
    """Prompts of the given lengths, embeddings (1, T, D) and image mask (1, T), each with a picture inside."""
    picture = model.encode_img(PICTURES[0])
    prompts = []
    for row, length in enumerate(lengths):
        ids = torch.randint(300, 900, (1, length), generator=torch.Generator().manual_seed(row))
        embeds, mask = model.model.tok_embeddings(ids), torch.zeros(1, length, dtype=torch.long)
        embeds[:, 4 : 4 + picture.shape[1]] = picture
        mask[:, 4 : 4 + picture.shape[1]] = 1
        prompts.append((embeds, mask))
    return prompts


def stack(prompts, side="left"):
    length = max(mask.shape[1] for _, mask in prompts)
    embeds = torch.full((len(prompts), length, prompts[0][0].shape[-1]), 7.0)
    images, attention = (torch.zeros(len(prompts), length, dtype=torch.long) for _ in range(2))
    for row, (own, mask) in enumerate(prompts):
        at = slice(length - own.shape[1], None) if side == "left" else slice(0, own.shape[1])
        embeds[row, at], images[row, at], attention[row, at] = own[0], mask[0], 1
    return embeds, images, attention


# 256 is max_position_embeddings: beyond it, dynamic rope goes by each row's own length. 250 crosses it while decoding.
@pytest.mark.parametrize("lengths", [(60, 45, 90), (60, 250, 300, 500)], ids=["short", "beyond max_position"])
@pytest.mark.parametrize("beams", [1, 3])
def test_batched_is_single(tiny_model, lengths, beams):
    prompts = prompts_of(tiny_model, lengths)
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": 2}
    alone = [tiny_model.generate(inputs_embeds=e, im_mask=m, **settings)[0].tolist() for e, m in prompts]
    embeds, images, attention = stack(prompts)
    together = tiny_model.generate(inputs_embeds=embeds, im_mask=images, attention_mask=attention, **settings)
    assert together.tolist() == alone


@pytest.mark.parametrize("devices", [("cpu",), ()])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_masked_attention_shares_keys(tiny_model, monkeypatch, tokens, devices):
    """Against a copy of the keys for each query, in both ways of doing without."""
    code = sys.modules[type(tiny_model.model.language_model).__module__]
    monkeypatch.setattr(code, "SHARES_KEYS_UNDER_A_MASK", devices)
    query, key, value = torch.randn(2, 6, tokens, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.rand(2, 1, tokens, 9) > 0.3
    mask[..., 0] = True
    copies = (heads.repeat_interleave(3, dim=1) for heads in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *copies, attn_mask=mask, scale=0.4)
    torch.testing.assert_close(code.grouped_attention(query, key, value, mask, 0.4), wanted.transpose(1, 2))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_padded_is_unpadded(tiny_model, attention):
    prompts = prompts_of(tiny_model, (60, 45, 90))
    tiny_model.set_attn_implementation(attention)
    try:
        alone = [tiny_model(inputs_embeds=e, im_mask=m).logits[0] for e, m in prompts]
        for side in ("left", "right"):
            embeds, images, attended = stack(prompts, side)
            positions = attended.cumsum(-1).sub(1).clamp(min=0)
            together = tiny_model(
                inputs_embeds=embeds, im_mask=images, attention_mask=attended, position_ids=positions
            ).logits
            for row, logits in enumerate(alone):
                torch.testing.assert_close(together[row][attended[row].bool()], logits, rtol=1e-4, atol=1e-4)
    finally:
        tiny_model.set_attn_implementation("sdpa")


def test_static_cache(tiny_model):
    for embeds, images in prompts_of(tiny_model, (60, 250)):
        settings = {"inputs_embeds": embeds, "im_mask": images, "max_new_tokens": 12, "do_sample": False}
        dynamic = tiny_model.generate(**settings)
        static = tiny_model.generate(**settings, cache_implementation="static")
        assert static.tolist() == dynamic.tolist()


@torch.no_grad()
def decode(model, step, embeds, images, steps=5):
    """Greedy tokens and logits through a static cache, each step after the prompt by `step`."""
    length = embeds.shape[1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + steps + 3)
    outputs = model(inputs_embeds=embeds, im_mask=images, past_key_values=cache, use_cache=True)
    tokens, logits = [], []
    for index in range(steps):
        token = outputs.logits[:, -1:].argmax(-1)
        tokens.append(int(token))
        positions = torch.tensor([[length + index]])
        outputs = step(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True)
        outputs.logits = outputs.logits.clone()
        logits.append(outputs.logits)
    return tokens, torch.cat(logits)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_decode_step(tiny_model, backend):
    ((embeds, images),) = prompts_of(tiny_model, [60])
    expected, expected_logits = decode(tiny_model, tiny_model, embeds, images)
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend(backend)
    step = torch.compile(tiny_model.forward, fullgraph=True, backend=counted)
    tokens, logits = decode(tiny_model, step, embeds, images)
    assert tokens == expected
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert counted.frame_count <= 2  # not once a token
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------- adapters


@torch.no_grad()
def test_partial_lora_changes_image_rows_alone(tiny_model):
    linear = tiny_model.model.language_model.layers[0].attention.wqkv
    x = torch.randn(2, 7, 64)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]]).bool()
    plain = linear.linear(x)
    for route in (mask.flatten().nonzero().squeeze(1), mask[..., None].float()):
        out = linear(x, route)
        assert torch.equal(out[~mask], plain[~mask])
        expected = plain + linear.Plora_B(linear.Plora_A(x))
        torch.testing.assert_close(out[mask], expected[mask])
        assert bool((out[mask] != plain[mask]).any(-1).all())


@torch.no_grad()
def test_partial_lora_is_not_run_on_no_rows(tiny_model):
    """As in a later turn, whose mask is there and empty."""
    ids, widths = torch.arange(5, 25)[None], []
    low = tiny_model.model.language_model.layers[0].attention.wqkv.Plora_A
    hook = low.register_forward_pre_hook(lambda module, inputs: widths.append(len(inputs[0])))
    try:
        tiny_model(input_ids=ids, im_mask=torch.zeros_like(ids))
        assert widths == []
        tiny_model(input_ids=ids, im_mask=(ids > 20).long())
        assert widths == [4]
    finally:
        hook.remove()


@torch.no_grad()
def test_image_mask_reaches_image_rows_alone(tiny_model):
    ((embeds, images),) = prompts_of(tiny_model, [60])
    first = int(images[0].nonzero()[0])
    plain = tiny_model(inputs_embeds=embeds).logits
    masked = tiny_model(inputs_embeds=embeds, im_mask=images).logits
    assert torch.equal(plain[:, :first], masked[:, :first])
    assert bool((plain[:, first:] - masked[:, first:]).abs().amax(-1).gt(1e-3).all())
    assert torch.equal(masked, tiny_model(inputs_embeds=embeds, mm_token_type_ids=images).logits)
    assert torch.equal(plain, tiny_model(inputs_embeds=embeds, im_mask=torch.zeros_like(images)).logits)


def test_each_mode_has_its_adapters(tiny_model):
    answers = {mode: tuple(tokens_of(tiny_model, infer_mode=mode)) for mode in ("base", "web", "write", "sft", "dpo")}
    assert len(set(answers.values())) == 5


def test_the_adapter_is_on_inside_the_call_only(tiny_model, expected, tmp_path):
    tiny_model.write_artical("Write", max_new_tokens=3, do_sample=False)
    assert tokens_of(tiny_model) == expected
    tiny_model.write_webpage("Write", max_new_tokens=3, output_path=None)
    assert tokens_of(tiny_model) == expected
    with pytest.raises(KeyboardInterrupt):
        tiny_model.write_artical("Write", max_new_tokens=9, do_sample=False, streamer=Collector(fail_at=3))
    assert tokens_of(tiny_model) == expected
    with pytest.raises(KeyboardInterrupt):
        tiny_model.chat(None, "Write", infer_mode="web", do_sample=False, streamer=Collector(fail_at=3))
    assert tokens_of(tiny_model) == expected


# ------------------------------------------------------------------------------------------------------ dtype and grads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(tiny_checkpoint, tiny_model, tiny_tokenizer, dtype):
    loaded = load(tiny_checkpoint, torch_dtype=dtype)
    cast = copy.deepcopy(tiny_model).to(dtype)
    for model in (loaded, cast):
        assert {p.dtype for p in model.parameters()} == {dtype}
        model.tokenizer = tiny_tokenizer
        assert len(tokens_of(model, eos_token_id=-1)) == 12
    assert tokens_of(loaded) == tokens_of(cast)


def test_half_as_notebooks_write_it(tiny_model):
    model = copy.deepcopy(tiny_model).half().eval()
    answer, history = model.chat(tiny_model.tokenizer, QUERY, PICTURES[:1], do_sample=False, max_new_tokens=4)
    assert history == [(QUERY, answer)]


def test_grad_disabled_for_good(tiny_model, expected):
    was = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        assert tokens_of(tiny_model) == expected
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(was)
    assert tokens_of(tiny_model) == expected


# torch on a CPU cannot mix fp16 weights with bf16 autocast
@pytest.mark.parametrize(
    "dtype, lower",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
    ids=["fp32 weights", "bf16 weights", "fp16 weights"],
)
def test_autocast(tiny_model, expected, dtype, lower):
    model = copy.deepcopy(tiny_model).to(dtype)
    model.tokenizer = tiny_model.tokenizer
    with torch.autocast("cpu", lower):
        assert len(tokens_of(model, eos_token_id=-1)) == 12
        assert len(tokens_of(model, eos_token_id=-1, num_beams=3)) == 12
        assert len(tokens_of(model, infer_mode="write", eos_token_id=-1)) == 12
        assert tiny_model.encode_img(PICTURES[0]).shape == (1, 35, 64)
        # autocast belongs to the caller, and is still on
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == lower
    assert tokens_of(tiny_model) == expected


def training_step(model, **kwargs):
    """Loss and gradients by name of one batch of text with a picture."""
    model.zero_grad()
    ids = torch.randint(300, 900, (2, 70), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters()}


def test_gradient_checkpointing(tiny_model):
    model = copy.deepcopy(tiny_model).train()
    images = torch.zeros(2, 70, dtype=torch.long)
    images[0, 3:30] = 1
    loss, grads = training_step(model, mm_token_type_ids=images)
    grads = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        if reentrant:
            model.enable_input_require_grads()
        again, checkpointed = training_step(model, mm_token_type_ids=images)
        assert again == pytest.approx(loss, rel=1e-6)
        for name, grad in grads.items():
            assert (grad is None) == (checkpointed[name] is None), name
            if grad is not None:
                torch.testing.assert_close(checkpointed[name], grad, msg=name)
    assert grads["model.language_model.layers.0.attention.wqkv.Plora_A.weight"].abs().sum() > 0


@pytest.mark.parametrize("told", [True, False])
def test_text_only_batches_leave_gradients_on_partial_lora(tiny_model, told):
    """Data-parallel training waits for each gradient: a batch without pictures gives zeros, not None."""
    model = copy.deepcopy(tiny_model).train()
    mask = {"mm_token_type_ids": torch.zeros(2, 70, dtype=torch.long)} if told else {}
    _, grads = training_step(model, **mask)
    partial = {name: grad for name, grad in grads.items() if "Plora" in name}
    assert len(partial) == 2 * 2 * 5
    for name, grad in partial.items():
        assert grad is not None and not grad.any(), name


# ------------------------------------------------------------------------------------------------------ where it is put


def test_all_on_one_device(tiny_checkpoint, tiny_tokenizer, expected):
    model = load(tiny_checkpoint, device_map={"": "cpu"})
    model.tokenizer = tiny_tokenizer
    assert tokens_of(model) == expected


def check_offloaded(model, tokenizer, resident):
    """The tokens of the same model in memory, each way."""
    assert any(device == "disk" for device in model.hf_device_map.values()), model.hf_device_map
    model.tokenizer = tokenizer
    for settings in ({}, {"num_beams": 3}, {"infer_mode": "write"}, {"image": None, "infer_mode": "web"}):
        assert tokens_of(model, **settings) == tokens_of(resident, **settings)
    with torch.no_grad():
        assert model.encode_img(PICTURES[0]).shape == (1, 35, 64)
        assert model.encode_text("picture").shape[-1] == 64


@pytest.mark.parametrize("room", ["150KB", "300KB", "450KB"])
def test_automatic_map_with_disk(tiny_checkpoint, tiny_model, tiny_tokenizer, tmp_path, room):
    model = load(tiny_checkpoint, device_map="auto", max_memory={"cpu": room}, offload_folder=str(tmp_path))
    check_offloaded(model, tiny_tokenizer, tiny_model)


@pytest.mark.parametrize("on_disk", ["vision", "decoder", "ends"])
def test_handmade_map_with_disk(tiny_checkpoint, tiny_model, tiny_tokenizer, tmp_path, on_disk):
    parts = {
        "vision": ["model.vision_tower", "model.vision_proj"],
        "decoder": ["model.language_model.layers.0", "model.language_model.layers.1", "model.language_model.norm"],
        "ends": ["model.language_model.tok_embeddings", "lm_head"],
        "none": ["model.language_model.rotary_emb", "model.plora_glb_GN", "model.plora_sub_GN"],
    }
    device_map = {name: "disk" if part == on_disk else "cpu" for part, names in parts.items() for name in names}
    model = load(tiny_checkpoint, device_map=device_map, offload_folder=str(tmp_path))
    check_offloaded(model, tiny_tokenizer, tiny_model)


FALLBACK = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
again = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
for config in (model.config, model.config.text_config, model.config.vision_config):
    assert config._attn_implementation == "sdpa", config._attn_implementation
"""


def test_flash_attention_falls_back(tiny_checkpoint):
    """The released config asks for flash-attn; without it: SDPA, and no warning that a newcomer could not use."""
    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    assert '"attn_implementation": "flash_attention_2"' in (tiny_checkpoint / "config.json").read_text()
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK, str(tiny_checkpoint)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "flash" in line.lower()]
    assert not said, done.stderr
