"""What evaluation kits, demos and notebooks call on the released model: these calls and no others.

The recorded chats are the original's: a client that builds the same embeddings by hand must get the same tokens.
"""

import numpy as np
import pytest
import torch
from conftest import CLOSE, CLOSE_ID, EOS_ID, GOLDEN, MARK, OPEN, golden_prompt, read_golden
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CASES = {case["name"]: case for case in read_golden("chat_cases.json")}
STOP = {"eos_token_id": [EOS_ID, CLOSE_ID], "pad_token_id": EOS_ID}


@pytest.fixture
def model(golden_model, golden_tokenizer):
    golden_model.tokenizer = golden_tokenizer
    yield golden_model
    golden_model.tokenizer = None
    golden_model.hd_num = 24


@torch.no_grad()
def by_hand(model, case):
    """Embeddings (1, T, D) and image mask (1, T) as clients join them: text, picture, text, ..."""
    text = golden_prompt(case)
    pieces = text.split(MARK) if MARK in text else ["", text]
    if "hd_num" in case["kwargs"] or len(case["images"]) > 1:
        model.hd_num = case["kwargs"].get("hd_num", 6)
    parts = [model.encode_text(pieces[0], add_special_tokens=True)]
    masks = [torch.zeros(parts[0].shape[:2])]
    for name, piece in zip(case["images"], pieces[1:], strict=True):
        parts.append(model.encode_img(str(GOLDEN / name)))
        masks.append(torch.ones(parts[-1].shape[:2]))
        if piece:
            parts.append(model.encode_text(piece))
            masks.append(torch.zeros(parts[-1].shape[:2]))
    return torch.cat(parts, dim=1), torch.cat(masks, dim=1).bool()


@pytest.mark.parametrize("name", ["beam3", "beam3_meta_zh", "two_images", "placeholder_inside", "hd_num_1", "history"])
def test_embeddings_by_hand(model, name):
    case = CASES[name]
    embeds, mask = by_hand(model, case)
    outputs = model.generate(
        inputs_embeds=embeds,
        im_mask=mask,
        num_beams=case["kwargs"].get("num_beams", 1),
        max_new_tokens=len(case["output_ids"]),
        do_sample=False,
        repetition_penalty=1.005,
        **STOP,
    )
    assert outputs[0].tolist() == case["output_ids"]


def test_infer_mode_in_generate(model):
    for name in ("web", "write_image"):
        case = CASES[name]
        embeds, mask = by_hand(model, case)
        outputs = model.generate(
            inputs_embeds=embeds, im_mask=mask, infer_mode=case["mode"], max_new_tokens=16, do_sample=False,
            repetition_penalty=1.005, **STOP,
        )  # fmt: skip
        assert outputs[0].tolist() == case["output_ids"]


def left_padded(prompts):
    """Prompts (embeddings, mask) -> one batch with an attention mask; what stands in the padding must not matter."""
    length = max(mask.shape[1] for _, mask in prompts)
    width = prompts[0][0].shape[-1]
    embeds, images = torch.randn(len(prompts), length, width), torch.zeros(len(prompts), length)
    attention = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, (own, mask) in enumerate(prompts):
        embeds[row, length - own.shape[1] :] = own[0]
        images[row, length - own.shape[1] :] = mask[0].float()
        attention[row, length - own.shape[1] :] = 1
    return embeds, images.bool(), attention


@pytest.mark.parametrize("beams", [1, 3])
def test_padded_batch(model, beams):
    prompts = [by_hand(model, CASES[name]) for name in ("single", "beam3_meta_zh", "hd_num_1")]
    settings = {"num_beams": beams, "max_new_tokens": 12, "do_sample": False, **STOP}
    alone = [model.generate(inputs_embeds=embeds, im_mask=mask, **settings)[0].tolist() for embeds, mask in prompts]
    embeds, mask, attention = left_padded(prompts)
    together = model.generate(inputs_embeds=embeds, im_mask=mask, attention_mask=attention, **settings)
    assert together.tolist() == alone
    assert len({tuple(row) for row in alone}) == len(prompts)


def picture(name="images/small_90x210.png"):
    return Image.open(GOLDEN / name).convert("RGB")


@torch.no_grad()
def test_vis_processor_and_img2emb(model):
    """A picture that the client has padded itself to whole tiles."""
    transform = model_file(model, "ixc_utils.Image_transform")
    pixels = model.vis_processor(transform(picture(), 24, tile=56)).unsqueeze(0)
    assert pixels.shape == (1, 3, 4 * 56, 2 * 56)
    embeds, attention, labels = model.img2emb(pixels)
    recorded = np.load(GOLDEN / "image_embeds.npz")["images__small_90x210.png"]
    assert embeds.shape == (1, *recorded.shape)
    assert np.abs(embeds[0].numpy() - recorded).max() < 1e-4 * np.abs(recorded).max()
    assert attention.shape == labels.shape == embeds.shape[:2]
    assert bool((attention == 1).all()) and bool((labels == -100).all())
    assert torch.equal(embeds, model.encode_img(str(GOLDEN / "images/small_90x210.png")))


@torch.no_grad()
def test_several_pictures_in_one_vit_call(model):
    names = ["small_150x100.png", "small_56x56.png", "small_300x60.png"]
    transform = model_file(model, "ixc_utils.Image_transform")
    pixels = [model.vis_processor(transform(picture(f"images/{n}"), 24, tile=56)).unsqueeze(0) for n in names]
    embeds, split = model.vit(pixels, model.plora_glb_GN, model.plora_sub_GN)
    embeds = model.vision_proj(embeds)
    recorded = np.load(GOLDEN / "image_embeds.npz")
    assert list(split) == [len(recorded[f"images__{name}"]) for name in names]
    assert embeds.shape[:2] == (1, sum(split))
    for name, own in zip(names, embeds[0].split(list(split)), strict=True):
        own, wanted = own.numpy(), recorded[f"images__{name}"]
        assert np.abs(own - wanted).max() < 1e-4 * np.abs(wanted).max()


@torch.no_grad()
def test_newline_and_separator_are_arguments(model):
    pixels = [torch.zeros(1, 3, 56, 56)]
    usual, _ = model.vit(pixels, model.plora_glb_GN, model.plora_sub_GN)
    other, _ = model.vit(pixels, model.plora_glb_GN + 1, model.plora_sub_GN + 2)
    moved = (other - usual).mean(-1)[0].tolist()
    assert moved == pytest.approx([0, 0, 2, 0, 0, 2, 1, 0, 0, 2, 0, 0, 2], abs=1e-5)


def test_interleav_wrap_chat(model):
    case = CASES["history_new_image"]
    system = read_golden("system_prompt.json")["chat"]
    with torch.no_grad():
        inputs, mask, length = model.interleav_wrap_chat(
            case["query"],
            [str(GOLDEN / name) for name in case["images"]],
            history=case["kwargs"]["history"],
            meta_instruction=system,
            hd_num=6,
        )
    embeds, expected = by_hand(model, case)
    assert length == embeds.shape[1]
    assert torch.equal(mask, expected) and mask.dtype == torch.bool
    assert torch.equal(inputs["inputs_embeds"], embeds)
    outputs = model.generate(
        **inputs, im_mask=mask, max_new_tokens=16, do_sample=False, repetition_penalty=1.005, infer_mode="base", **STOP
    )
    assert outputs[0].tolist() == case["output_ids"]


def test_attributes(model, golden_tokenizer):
    assert model.tokenizer is golden_tokenizer
    assert model.hd_num == 24
    assert model.model.tok_embeddings.weight.shape == (92544, 64)
    assert model.output.weight.shape == (92544, 64)
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(model.model.tok_embeddings(ids), model.get_input_embeddings()(ids))
    with torch.no_grad():
        hidden = model.model(inputs_embeds=model.model.tok_embeddings(ids)).last_hidden_state
        assert torch.equal(model.output(hidden), model(input_ids=ids).logits)
    assert model.font.getbbox("<IMAGE 1>")[2] > 0
    assert model.plora_glb_GN.shape == (1, 1, 128) and model.plora_sub_GN.shape == (1, 1, 1, 128)


@torch.no_grad()
def test_encode_text(model):
    text = f"{OPEN}assistant\n"
    assert model.encode_text(text).shape == (1, 4, 64)
    with_bos = model.encode_text(text, add_special_tokens=True)
    assert torch.equal(with_bos[:, 1:], model.encode_text(text))
    assert torch.equal(with_bos[0, 0], model.model.tok_embeddings.weight[1])


@torch.no_grad()
def test_encode_img(model):
    assert model.encode_img(None) is None
    path = str(GOLDEN / "images/small_300x60.png")
    assert model.encode_img(path).shape == (1, 59, 64)
    assert model.encode_img(path, hd_num=1).shape == (1, 13, 64)
    model.hd_num = 1
    assert model.encode_img(path).shape == (1, 13, 64)


def model_file(model, reference):
    return get_class_from_dynamic_module(reference, model.config.name_or_path)


def test_functions_of_the_checkpoint_folder(model, golden_checkpoint):
    load_video = get_class_from_dynamic_module("ixc_utils.load_video", str(golden_checkpoint))
    frame2img = get_class_from_dynamic_module("ixc_utils.frame2img", str(golden_checkpoint))
    transform = get_class_from_dynamic_module("ixc_utils.Video_transform", str(golden_checkpoint))
    frames = load_video(str(GOLDEN / "videos/clip_90f_30fps_320x240.mp4"))
    assert [frame.size for frame in frames] == [(320, 240)] * 3
    stitched = transform(frame2img(frames, model.font))
    assert stitched.size[0] == 560 and stitched.size[1] % 560 == 0


def test_decoding_as_clients_do(tiny_model):
    """Text embeddings, generate, `model.tokenizer.decode(..., add_special_tokens=False)`, cut at the closing token."""
    query = f"{OPEN}user\nDescribe the picture{CLOSE}\n{OPEN}assistant\n"
    with torch.no_grad():
        embeds = tiny_model.encode_text(query, add_special_tokens=True)
    outputs = tiny_model.generate(inputs_embeds=embeds, max_new_tokens=8, num_beams=3, do_sample=False)
    text = tiny_model.tokenizer.decode(outputs[0], add_special_tokens=False).split(CLOSE)[0]
    assert isinstance(text, str) and 1 <= outputs.shape[1] <= 8
