"""Every tensor goes to where the module that reads it lives: public methods and clients' calls on stand-in cards.

The answers must be those of the CPU: it is the same arithmetic under another device's name.
"""

import copy

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from conftest import GOLDEN, MARK
from PIL import Image
from stand_in_cards import Cards, DeviceMismatch, to_card, to_cards

PICTURES = [str(GOLDEN / "images" / name) for name in ("small_150x100.png", "small_56x56.png")]
SHORT = {"max_new_tokens": 4, "do_sample": False}
# One card; and two, where the decoder's second half, its norm and the head lie on the other.
PLACES = {
    "one card": {"": "card:0"},
    "two cards": {
        "model.vision_tower": "card:0",
        "model.vision_proj": "card:0",
        "model.plora": "card:0",
        "model.language_model.tok_embeddings": "card:0",
        "model.language_model.layers.0": "card:0",
        "model.language_model.layers.1": "card:1",
        "model.language_model.norm": "card:1",
        "lm_head": "card:1",
    },
    "eyes on another card": {
        "model.vision_tower": "card:1",
        "model.vision_proj": "card:1",
        "model.plora": "card:1",
        "model.language_model": "card:0",
        "lm_head": "card:0",
    },
}


def place_by(table):
    def place(name):
        return next(device for prefix, device in table.items() if name.startswith(prefix))

    return place


@pytest.fixture
def cpu(tiny_model):
    """The model where it was loaded."""
    for name in ("web", "write"):
        tiny_model._need_task_adapters(name)
    tiny_model.reuse.clear()
    return tiny_model


@pytest.fixture(params=PLACES)
def card(request, cpu):
    """A copy of it on stand-in cards, spread as a device map does it."""
    table = PLACES[request.param]
    with torch.no_grad(), Cards():
        model = to_cards(copy.deepcopy(cpu), place_by(table))
        model.tokenizer = cpu.tokenizer
        if len(table) > 1:
            blocks = {name: device for name, device in table.items() if name != "model.plora"}
            kept = dict.fromkeys(blocks, False)  # nothing is offloaded
            attach_align_device_hook_on_blocks(model, {"": "card:0", **blocks}, offload=kept)
        yield model


def chats(model):
    said = [model.chat(None, "Hello", **SHORT)]
    said.append(model.chat(None, "What is it?", [PICTURES[0]], **SHORT))
    said.append(model.chat(None, "And why?", [PICTURES[0]], history=said[-1][1], **SHORT))
    said.append(model.chat(None, f"{MARK} or {MARK}?", PICTURES, num_beams=2, **SHORT))
    said.append(model.chat(None, "What is it?", [PICTURES[0]], use_meta=True, infer_mode="web", **SHORT))
    said.append(model.chat(None, "word " * 300, cache_implementation="static", **SHORT))
    return said


SEEDED = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_p": 1.0, "seed": 7}


def seeded(model):
    """Calls that sample: a conversation's, a stream's (in a thread of its own), a batch's, one of beams."""
    said = [model.chat(None, "Hello", [PICTURES[0]], **SEEDED), model.chat(None, "Hello", **{**SEEDED, "seed": 8})]
    said.append(list(model.stream_chat(None, "Hello", **SEEDED)))
    said.append(model.batch_chat(None, ["Hello", "What?"], **SEEDED))
    said.append(model.write_artical("Write.", num_beams=2, **SEEDED))
    return said


METHODS = {
    "chat": chats,
    "stream": lambda model: list(model.stream_chat(None, "What is it?", [PICTURES[0]], **SHORT)),
    "batch": lambda model: model.batch_chat(None, ["Hello", "What?"], [None, [PICTURES[0]]], **SHORT),
    "drafted": lambda model: model.chat(None, "a b a b a b", prompt_lookup_num_tokens=2, **SHORT),
    "seeded": seeded,
    "article": lambda model: model.write_artical("Write.", [PICTURES[0]], **SHORT),
    "page": lambda model: model.write_webpage("A page", output_path=None, **SHORT),
    "screen": lambda model: model.screen_2_webpage("", [PICTURES[0]], output_path=None, **SHORT),
    "resume": lambda model: model.resume_2_webpage(
        str(GOLDEN.parents[1] / "examples/data/resume.md"), output_path=None, **SHORT
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_public_method_answers_as_on_the_cpu(cpu, card, method):
    with torch.no_grad():
        assert METHODS[method](card) == METHODS[method](cpu)


def pixels(model):
    return model.vis_processor(Image.open(PICTURES[0]))[None]


# Calls that hand over tensors: (what the client calls, given the model and a function that puts a tensor somewhere).
CALLS = {
    "img2emb": lambda model, put: model.img2emb(put(pixels(model)))[0],
    "encode_img": lambda model, put: model.encode_img(put(pixels(model)[0])),
    "vit": lambda model, put: model.vit([put(pixels(model))], model.plora_glb_GN, model.plora_sub_GN)[0],
    "interleav_wrap_chat": lambda model, put: model.interleav_wrap_chat("What?", [put(pixels(model)[0])])[0][
        "inputs_embeds"
    ],
    "forward": lambda model, put: model(
        input_ids=put(torch.tensor([[1, 5, 6, 7]])), attention_mask=put(torch.ones(1, 4, dtype=torch.long))
    ).logits,
    "forward with embeddings": lambda model, put: model(
        inputs_embeds=put(torch.linspace(-1, 1, 4 * 64).view(1, 4, 64)),
        im_mask=put(torch.tensor([[False, True, True, False]])),
        position_ids=put(torch.arange(4)[None]),
    ).logits,
    "generate": lambda model, put: model.generate(
        input_ids=put(torch.tensor([[1, 5, 6, 7]])), max_new_tokens=3, do_sample=False
    ),
    "generate with im_mask": lambda model, put: model.generate(
        inputs_embeds=put(torch.linspace(-1, 1, 4 * 64).view(1, 4, 64)),
        im_mask=put(torch.tensor([[False, True, True, False]])),
        max_new_tokens=3,
        do_sample=False,
    ),
    "generate with pictures": lambda model, put: model.generate(
        **{name: put(value) for name, value in processed(model).items()}, max_new_tokens=3, do_sample=False
    ),
}


def processed(model):
    """Inputs as the processor returns them, on the CPU."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model.config.name_or_path, trust_remote_code=True)
    return processor(text=f"{MARK}What is it?", images=[PICTURES[0]], return_tensors="pt")


@pytest.mark.parametrize("given_on", ["cpu", "card:0", "card:1"])
@pytest.mark.parametrize("call", CALLS)
def test_a_clients_tensors_may_lie_anywhere(cpu, card, call, given_on):
    def put(value):
        return value if given_on == "cpu" else to_card(value, given_on)

    with torch.no_grad():
        expected = CALLS[call](cpu, lambda value: value)
        found = CALLS[call](card, put)
    torch.testing.assert_close(found.cpu(), expected)


def test_the_stand_in_sees_two_devices_meet():
    with torch.no_grad(), Cards():
        one, other = to_card(torch.ones(2), "card:0"), to_card(torch.ones(2), "card:1")
        assert (one + one).device == torch.device("card:0") and float((one * 2).sum()) == 4
        for wrong in (torch.ones(2), other):
            with pytest.raises(DeviceMismatch, match="card:0"):
                one + wrong
        assert (other + one.to("card:1")).device == torch.device("card:1")
        drawn = [torch.multinomial(one, 1, generator=torch.Generator("card:0").manual_seed(3)) for _ in range(2)]
        assert torch.equal(*drawn) and drawn[0].device == torch.device("card:0")
        for device in ("cpu", "card:1"):
            with pytest.raises(DeviceMismatch, match="generator of"):
                torch.multinomial(one, 1, generator=torch.Generator(device))
    assert torch.Generator("cpu").device == torch.device("cpu") and torch.Generator.__module__ == "torch._C"


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("context", [torch.float16, torch.bfloat16])
def test_autocast_of_another_type(cpu, weights, context):
    """The published model card loads bfloat16, halves it, and calls under autocast."""
    model = copy.deepcopy(cpu).to(weights)
    model.tokenizer = cpu.tokenizer
    with torch.autocast("cpu", dtype=context):
        answer, _ = model.chat(None, "What is it?", [PICTURES[0]], **SHORT)
        assert isinstance(answer, str)
        assert isinstance(model.write_artical("Write.", [PICTURES[0]], num_beams=2, **SHORT), str)
