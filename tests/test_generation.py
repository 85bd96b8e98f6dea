"""Generation, training and loading in all the ways users run them: the same tokens each way, each argument heard."""

import copy
import inspect
import os
import subprocess
import sys

import pytest
import torch
from conftest import CLOSE, GOLDEN, MARK, OPEN, load, read_golden, tiny
from transformers import StaticCache, TextIteratorStreamer
from transformers.utils import is_flash_attn_2_available

PICTURES = [str(GOLDEN / f"images/small_{size}.png") for size in ("150x100", "56x56", "90x210", "300x60")]
QUERY = "Describe this image in detail"


class Spoken:
    """A tokenizer that notes what it is asked, and may be given the answers to say instead of the model's."""

    def __init__(self, tokenizer, answers=()):
        self.tokenizer, self.answers, self.heard, self.ids = tokenizer, list(answers), [], []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, *args, **kwargs):
        self.heard.append(text)
        return self.tokenizer(text, *args, **kwargs)

    def decode(self, ids, *args, **kwargs):
        self.ids.append([int(token) for token in ids])
        return self.answers.pop(0) if self.answers else self.tokenizer.decode(ids, *args, **kwargs)

    @property
    def prompt(self):
        return MARK.join(self.heard)


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self, fail_at=None):
        self.tokens, self.ended, self.fail_at = [], 0, fail_at

    def put(self, value):
        self.tokens += value.flatten().tolist()
        if self.fail_at is not None and len(self.tokens) >= self.fail_at:
            raise KeyboardInterrupt("the listener went away")

    def end(self):
        self.ended += 1


@pytest.fixture
def spoken(tiny_tokenizer):
    return Spoken(tiny_tokenizer)


def tokens_of(model, query=QUERY, image=PICTURES[0], **kwargs):
    """Tokens that `chat` generates, greedily unless told otherwise."""
    spoken = Spoken(model.tokenizer)
    kwargs = {"do_sample": False, "max_new_tokens": 12, **kwargs}
    model.chat(spoken, query, image, **kwargs)
    return spoken.ids[-1]


@pytest.fixture
def expected(tiny_model):
    return tokens_of(tiny_model)


@pytest.fixture
def no_compute(tiny_model, monkeypatch):
    """The tiny model, where any computation is a failure."""

    def computed(*args, **kwargs):
        pytest.fail("computed something before the arguments were checked")

    for module in (tiny_model.model.vision_tower, tiny_model.model.language_model, tiny_model.model.vision_proj):
        monkeypatch.setattr(module, "forward", computed)
    monkeypatch.setattr(tiny_model, "generate", computed)
    return tiny_model


# ------------------------------------------------------------------------------------------------- the same each way


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


# ------------------------------------------------------------------------------------------------------------ adapters


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


# ---------------------------------------------------------------------------------------------------- dtype and grads


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


# ---------------------------------------------------------------------------------------------------- where it is put


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


# ----------------------------------------------------------------------------------------------------------- arguments

PUBLIC_DEFAULTS = {
    "chat": dict(
        image=None, max_new_tokens=1024, do_sample=True, num_beams=1, temperature=1.0, top_p=0.8,
        repetition_penalty=1.005, infer_mode="base", use_meta=False, streamer=None,
    ),
    "write_artical": dict(
        image=None, do_sample=True, num_beams=1, temperature=1.0, top_p=0.8, top_k=40, repetition_penalty=1.005,
        max_length=8192, seed=-1, use_meta=False,
    ),
    "write_webpage": dict(
        image=None, max_new_tokens=4800, do_sample=True, num_beams=2, temperature=1.0, repetition_penalty=3.0, seed=-1,
        use_meta=False, task="Instruction-aware Webpage Generation",
    ),
    "resume_2_webpage": dict(
        image=None, max_new_tokens=4800, do_sample=True, num_beams=2, temperature=1.0, repetition_penalty=3.0, seed=-1,
        use_meta=False, task="Resume-to-Personal Page",
    ),
    "screen_2_webpage": dict(
        image=None, max_new_tokens=4800, do_sample=True, num_beams=2, temperature=1.0, repetition_penalty=3.0, seed=-1,
        use_meta=False, task="Screenshot-to-Webpage",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", PUBLIC_DEFAULTS)
def test_public_defaults(tiny_model, method):
    parameters = inspect.signature(getattr(tiny_model, method)).parameters
    said = {name: parameters[name].default for name in PUBLIC_DEFAULTS[method]}
    assert said == PUBLIC_DEFAULTS[method]


CALLS = {
    "chat": lambda model, **kw: model.chat(kw.pop("tokenizer", None), QUERY, **kw)[0],
    "write_artical": lambda model, **kw: model.write_artical(QUERY, **kw),
    "write_webpage": lambda model, **kw: model.write_webpage(QUERY, output_path=None, **kw),
    "screen_2_webpage": lambda model, **kw: model.screen_2_webpage(
        QUERY, kw.pop("image", PICTURES[:1]), output_path=None, **kw
    ),
    "resume_2_webpage": lambda model, **kw: model.resume_2_webpage(kw.pop("resume"), output_path=None, **kw),
}


@pytest.fixture(params=CALLS)
def call(request, tiny_model, tmp_path):
    """Each public method, called with keyword arguments alone."""
    fixed = {}
    if request.param == "resume_2_webpage":
        resume = tmp_path / "resume.md"
        resume.write_text("# 张三\n\n- drew maps\n", encoding="utf-8")
        fixed["resume"] = resume
    run = lambda **kwargs: CALLS[request.param](tiny_model, **fixed, **{"max_new_tokens": 3, **kwargs})  # noqa: E731
    run.name = request.param
    return run


def spy(model, monkeypatch):
    """What reaches `generate`, which runs as ever."""
    seen, generate = [], model.generate

    def spying(*args, **kwargs):
        seen.append(kwargs)
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", spying)
    return seen


def test_generation_settings_reach_generate(call, tiny_model, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    settings = dict(
        do_sample=True, num_beams=2, temperature=0.7, top_p=0.55, top_k=11, repetition_penalty=1.3, max_new_tokens=2,
        length_penalty=0.5, no_repeat_ngram_size=5,
    )  # fmt: skip
    call(**settings)
    assert seen
    for kwargs in seen:  # the penalty goes as a processor: it spares the prompt, and transformers would warn of that
        (penalty,) = kwargs["logits_processor"]
        assert {**{name: kwargs.get(name) for name in settings}, "repetition_penalty": penalty.penalty} == settings


def test_the_mode_of_each_method(call, tiny_model, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    call()
    mode = {"chat": "base", "write_artical": "write"}.get(call.name, "web")
    assert [kwargs.get("infer_mode") for kwargs in seen] == [mode] * (2 if call.name == "resume_2_webpage" else 1)


def test_streamer(call, spoken):
    streamer = Collector()
    call(tokenizer=spoken, streamer=streamer, num_beams=1, do_sample=False, max_new_tokens=6)
    assert streamer.tokens == [token for ids in spoken.ids for token in ids]
    assert streamer.ended == len(spoken.ids) >= 1


def test_text_streamer(tiny_model, tiny_tokenizer):
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer, _ = tiny_model.chat(None, QUERY, PICTURES[0], do_sample=False, max_new_tokens=8, streamer=streamer)
    assert "".join(streamer).split(CLOSE)[0] == answer


def test_max_new_tokens(call, spoken):
    for number in (1, 4):
        call(tokenizer=spoken, max_new_tokens=number, do_sample=False, num_beams=1, eos_token_id=-1)
        assert len(spoken.ids[-1]) == number


def test_tokenizer_argument_and_attribute(call, tiny_model, spoken):
    call(tokenizer=spoken)
    assert spoken.ids
    other = Spoken(spoken.tokenizer)
    tiny_model.tokenizer = other
    call()
    assert other.ids


def test_use_meta(call, spoken):
    call(tokenizer=spoken)
    assert f"{OPEN}system" not in spoken.prompt
    spoken.heard.clear()
    call(tokenizer=spoken, use_meta=True)
    kind = "write_artical" if call.name == "write_artical" else "chat"
    assert f"{OPEN}system\n{read_golden('system_prompt.json')[kind]}{CLOSE}\n{OPEN}user" in spoken.prompt
    spoken.heard.clear()
    call(tokenizer=spoken, use_meta=True, meta_instruction="Be brief.")
    assert f"{OPEN}system\nBe brief.{CLOSE}\n{OPEN}user" in spoken.prompt


def test_history(call, spoken):
    call(tokenizer=spoken, history=[("Who are you?", "A model.")])
    past = f"{OPEN}user\nWho are you?{CLOSE}\n{OPEN}assistant\nA model.{CLOSE}\n{OPEN}user\n"
    assert past in spoken.prompt


def test_hd_num(call, tiny_model, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    lengths = {}
    for number in (None, 1, 2, 24):
        call(image=PICTURES[3:], hd_num=number)
        lengths[number] = int(seen[-1]["mm_token_type_ids"].sum())
    assert lengths[1] == 13 and lengths[None] == lengths[24] == 59
    assert 13 < lengths[2] < 59


def test_default_hd_num(tiny_model, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    for images, hd_num in ((PICTURES[3:], 24), ([PICTURES[3]] * 2, 6)):
        query = MARK * len(images) + QUERY
        for number in (None, hd_num):
            tiny_model.chat(None, query, images, hd_num=number, do_sample=False, max_new_tokens=1)
        one, other = (kwargs["mm_token_type_ids"] for kwargs in seen[-2:])
        assert torch.equal(one, other)


def test_num_beams(tiny_model):
    greedy, beams = (tokens_of(tiny_model, num_beams=number, eos_token_id=-1) for number in (1, 4))
    assert greedy != beams


@pytest.mark.parametrize("method", [name for name in CALLS if name not in ("chat", "resume_2_webpage")])
def test_seed(tiny_model, method):
    run = lambda seed: CALLS[method](tiny_model, seed=seed, max_new_tokens=6, num_beams=1, temperature=2.0)  # noqa: E731
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = run(3)
    assert torch.equal(torch.get_rng_state(), state), "a seed of the call's own moved the caller's"
    torch.rand(7)
    assert run(3) == first
    assert run(4) != first
    torch.manual_seed(11)
    unseeded = run(-1)
    torch.manual_seed(11)
    assert run(-1) == unseeded, "without a seed the caller's own counts"


def force(token, at):
    """A logits processor that has `token` come as number `at`."""

    def process(ids, scores):
        if ids.shape[1] == at:
            scores = torch.full_like(scores, float("-inf"))
            scores[:, token] = 0.0
        return scores

    return [process]


def test_stops_at_the_closing_token(call, spoken):
    for token in (CLOSE, "</s>"):
        close_id = spoken.convert_tokens_to_ids(token)
        call(
            tokenizer=spoken, max_new_tokens=30, num_beams=1, do_sample=False, logits_processor=force(close_id, 3)
        )  # fmt: skip
        assert spoken.ids[-1][-1] == close_id and len(spoken.ids[-1]) <= 4


def test_the_answer_is_cut(tiny_model, tiny_tokenizer):
    answer, history = tiny_model.chat(
        Spoken(tiny_tokenizer, [f"a cat{CLOSE}\nand more"]), QUERY, PICTURES[:1], history=[("a", "b")], max_new_tokens=1
    )
    assert answer == "a cat" and history == [("a", "b"), (QUERY, "a cat")]


def test_history_is_not_changed(tiny_model):
    mine = [("a", "b")]
    _, history = tiny_model.chat(None, QUERY, history=mine, max_new_tokens=1)
    assert mine == [("a", "b")] and len(history) == 2
    _, longer = tiny_model.chat(None, "And now?", history=history, max_new_tokens=1)
    assert len(longer) == 3


def test_max_length_of_articles(tiny_model, spoken, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    tiny_model.write_artical(QUERY, tokenizer=spoken, max_length=40, do_sample=False, eos_token_id=-1)
    assert seen[-1]["inputs_embeds"].shape[1] + len(spoken.ids[-1]) == 40
    with pytest.raises(ValueError, match="max_length is 5"):
        tiny_model.write_artical(QUERY, max_length=5)


# ------------------------------------------------------------------------------------------------------------ webpages

PAGE = (
    '<html><body><img src="https://source.unsplash.com/random/300x200/?cat,dog"><p>你好</p>'
    "<img src='https://source.unsplash.com/random/64x48/?sea'></body></html>"
)
SCRIPT = r"<script>let s = 'a\n\1\g<0> C:\\temp'; if (/\d+/.test(s)) { console.log(`\u4f60 ${s}`); }</script>"


def test_page_is_written_where_told(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for target in (tmp_path / "page one.html", "two.html"):
        page = tiny_model.write_webpage(
            "a page", tokenizer=Spoken(tiny_tokenizer, [PAGE]), output_path=target, max_new_tokens=1
        )
        assert 'https://picsum.photos/300/200"' in page and "https://picsum.photos/64/48'" in page
        assert "unsplash" not in page and "你好" in page
        assert (tmp_path / target).read_bytes().decode("utf-8") == page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page one.html", "two.html"]


def test_public_file_names(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resume.md").write_text("# Someone", encoding="utf-8")
    settings = {"max_new_tokens": 1}
    tiny_model.write_webpage("a page", tokenizer=Spoken(tiny_tokenizer, [PAGE]), **settings)
    tiny_model.screen_2_webpage("", PICTURES[:1], tokenizer=Spoken(tiny_tokenizer, [PAGE]), **settings)
    tiny_model.resume_2_webpage("resume.md", tokenizer=Spoken(tiny_tokenizer, [PAGE, SCRIPT]), **settings)
    tiny_model.write_webpage("a page", tokenizer=Spoken(tiny_tokenizer, [PAGE]), task="My own Page", **settings)
    assert sorted(path.name for path in tmp_path.glob("*.html")) == [
        "Instruction-aware_Webpage_Generation.html",
        "My_own_Page.html",
        "Resume-to-Personal_Page.html",
        "Screenshot-to-Webpage.html",
    ]


def test_no_file(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tiny_model.write_webpage(
        "a page", tokenizer=Spoken(tiny_tokenizer, [PAGE]), output_path=None, max_new_tokens=1
    )
    assert page.startswith("<html>") and not list(tmp_path.iterdir())


def test_second_pass_of_a_resume(tiny_model, tiny_tokenizer, tmp_path):
    resume = tmp_path / "resume.md"
    resume.write_text("# 张三\n\n- drew maps\n", encoding="utf-8")
    spoken = Spoken(tiny_tokenizer, [PAGE, f"Here it is:\n{SCRIPT}\nDone."])
    page = tiny_model.resume_2_webpage(resume, tokenizer=spoken, output_path=tmp_path / "out.html", max_new_tokens=1)
    first, second = (text for text in spoken.heard if OPEN in text)
    assert "user\n Generate a personal page using the content in the resume:# 张三\n\n- drew maps" in first
    assert f"user\n Generate JavaScript events for the html code:{PAGE}" in second
    assert page.count(SCRIPT) == 1 and "['" not in page and "Here it is" not in page
    assert page.index("<p>你好</p>") < page.index(SCRIPT) < page.index("</body>")
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == page


def test_screenshot_prompts(tiny_model, spoken):
    tiny_model.screen_2_webpage("", PICTURES[:1], tokenizer=spoken, output_path=None, max_new_tokens=1)
    assert f"user\n Generate the HTML code of this web image with Tailwind CSS.{CLOSE}" in spoken.prompt
    spoken.heard.clear()
    tiny_model.screen_2_webpage("Plain HTML.", PICTURES[0], tokenizer=spoken, output_path=None, max_new_tokens=1)
    assert f"user\nPlain HTML.{CLOSE}" in spoken.prompt


@pytest.mark.parametrize("task", ["../x", "a/b", "/etc/x", "", "a\\b"])
def test_task_names_cannot_leave_the_folder(no_compute, tmp_path, monkeypatch, task):
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    with pytest.raises(ValueError, match="task"):
        no_compute.write_webpage("a page", task=task)
    with pytest.raises(ValueError, match="task"):
        no_compute.screen_2_webpage("a page", PICTURES[:1], task=task)
    assert not list(tmp_path.glob("**/*.html"))


def test_missing_folder_and_missing_resume(no_compute, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        no_compute.write_webpage("a page", output_path=tmp_path / "nowhere" / "page.html")
    with pytest.raises(ValueError, match="folder"):
        no_compute.write_webpage("a page", output_path=tmp_path)
    with pytest.raises(FileNotFoundError, match="missing.md"):
        no_compute.resume_2_webpage(tmp_path / "missing.md", output_path=None)
    (tmp_path / "resume.md").write_bytes("名".encode("gbk"))
    with pytest.raises(ValueError, match="UTF-8"):
        no_compute.resume_2_webpage(tmp_path / "resume.md", output_path=None)
    (tmp_path / "empty.md").write_text(" \n")
    with pytest.raises(ValueError, match="empty"):
        no_compute.resume_2_webpage(tmp_path / "empty.md", output_path=None)
    with pytest.raises(ValueError, match="image"):
        no_compute.screen_2_webpage("a page", [], output_path=None)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "query, images, said",
    [
        (f"{MARK}{MARK} which?", 3, ["2 <ImageHere> slots", "3 images"]),
        (f"{MARK}{MARK} which?", 1, ["2 <ImageHere> slots", "1 image"]),
        (f"{MARK} which?", 0, ["1 <ImageHere> slot", "0 images"]),
        ("which?", 2, ["0 <ImageHere> slots", "2 images"]),
    ],
)
def test_slots_and_images(no_compute, query, images, said):
    with pytest.raises(ValueError) as error:
        no_compute.chat(None, query, PICTURES[:images])
    for part in said:
        assert part in str(error.value)
    with pytest.raises(ValueError, match="slots"):
        no_compute.write_artical(query, PICTURES[:images])
    with pytest.raises(ValueError, match="slots"):
        no_compute.interleav_wrap_chat(query, PICTURES[:images], [], "")


def test_slots_in_history_count(no_compute):
    with pytest.raises(ValueError, match="2 <ImageHere> slots but 1 images?"):
        no_compute.chat(None, f"{MARK} and this?", PICTURES[:1], history=[(f"{MARK} what?", "a cat")])


def test_over_long_prompts(no_compute, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(no_compute.config, "context_length", 60)
    text = len(tiny_tokenizer(f"{OPEN}user\n{QUERY}{CLOSE}\n{OPEN}assistant\n").input_ids)
    with pytest.raises(ValueError) as error:
        no_compute.chat(None, QUERY, PICTURES[3])
    said = str(error.value)
    assert str(text + 59) in said and "60" in said
    fits = int(said.split("hd_num=")[1].split()[0])

    def length(hd_num):
        pictures = sys.modules[type(no_compute).__module__.rsplit(".", 1)[0] + ".ixc_utils"]
        grid = pictures.media_grid(pictures.load_media(PICTURES[3]), hd_num, 56)
        return text + pictures.image_tokens(*grid, 2)

    assert length(fits) < 60 <= length(fits + 1)


def test_over_long_text_is_not_cut(no_compute, monkeypatch):
    monkeypatch.setattr(no_compute.config, "context_length", 60)
    with pytest.raises(ValueError, match=r"60.*shorten") as error:
        no_compute.chat(None, "word " * 100)
    assert "hd_num=" not in str(error.value)


@pytest.mark.parametrize("hd_num", [0, -1, 2.5, "6"])
def test_hd_num_below_one(no_compute, hd_num):
    for run in (
        lambda: no_compute.chat(None, QUERY, PICTURES[:1], hd_num=hd_num),
        lambda: no_compute.write_artical(QUERY, PICTURES[:1], hd_num=hd_num),
        lambda: no_compute.write_webpage(QUERY, PICTURES[:1], hd_num=hd_num, output_path=None),
        lambda: no_compute.encode_img(PICTURES[0], hd_num=hd_num),
    ):
        with pytest.raises(ValueError, match="hd_num") as error:
            run()
        assert str(hd_num) in str(error.value)


@pytest.mark.parametrize("image", [None, PICTURES[0]])
def test_hd_num_is_checked_with_and_without_pictures(no_compute, image):
    with pytest.raises(ValueError, match="hd_num is 0"):
        no_compute.chat(None, QUERY, image, hd_num=0)


def test_unknown_adapter(no_compute):
    with pytest.raises(ValueError, match="'poetry'.*base.*web.*write"):
        no_compute.chat(None, QUERY, infer_mode="poetry")


def test_adapters_this_checkpoint_lacks(tmp_path):
    model = load(tiny.write_checkpoint(tmp_path / "without", config={"task_adapter_ranks": {"web": 16}}))
    model.tokenizer = object()
    for run in (
        lambda: model.chat(None, QUERY, infer_mode="write"),
        lambda: model.write_artical(QUERY),
        lambda: model.generate(inputs_embeds=torch.zeros(1, 3, 64), infer_mode="write"),
    ):
        with pytest.raises(ValueError, match="sft.*dpo") as error:
            run()
        assert "web" in str(error.value) and "base" in str(error.value)


@pytest.mark.parametrize(
    "history",
    [
        ["not a pair"],
        [("a", "b", "c")],
        [("a",)],
        [("a", None)],
        [{"role": "user", "content": "a"}],
        "a string",
        {"a": "b"},
        [["ok", "ok"], 3],
        5,
    ],
)
def test_history_of_the_wrong_shape(no_compute, history):
    for run in (
        lambda: no_compute.chat(None, QUERY, history=history),
        lambda: no_compute.write_artical(QUERY, history=history),
        lambda: no_compute.write_webpage(QUERY, history=history, output_path=None),
    ):
        with pytest.raises(ValueError, match=r"history.*\(query, answer\)"):
            run()


def test_no_tokenizer(no_compute):
    no_compute.tokenizer = None
    for run in (
        lambda: no_compute.chat(None, QUERY),
        lambda: no_compute.write_artical(QUERY),
        lambda: no_compute.write_webpage(QUERY, output_path=None),
        lambda: no_compute.encode_text(QUERY),
        lambda: no_compute.interleav_wrap_chat(QUERY, []),
    ):
        with pytest.raises(ValueError, match="tokenizer.*AutoTokenizer.from_pretrained"):
            run()


def test_missing_picture(no_compute, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png"):
        no_compute.chat(None, QUERY, [str(tmp_path / "missing.png")])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("empty.png", "text.png"):
        with pytest.raises(ValueError, match=name):
            no_compute.chat(None, f"{MARK}{MARK}{QUERY}", [PICTURES[0], str(tmp_path / name)])


def test_nothing_is_printed(tiny_model, capsys):
    tokens_of(tiny_model)
    assert capsys.readouterr().out == ""
