"""The recorded outputs of the original: token ids, image spans, embeddings, logits, labels and losses."""

import shutil

import numpy as np
import pytest
import torch
from conftest import CLOSE_ID, EOS_ID, GOLDEN, MARK, golden_prompt, load, read_golden
from safetensors import safe_open

from xcomposer.model.ixc_utils import image_tokens, load_media, media_grid, stack_tiles, to_pixels
from xcomposer.model.prompting_internlm_xcomposer2 import (
    answer_labels,
    place_images,
    tokenize_prompt,
    tokenize_with,
    training_text,
)

CASES = read_golden("chat_cases.json")
TRAIN = read_golden("train_cases.json")
WAYS = ("eager", "sdpa", "flex_attention", "saved again")
SCALE = 1e-4  # of the greatest absolute value


@pytest.fixture(scope="module")
def saved_again(golden_model, golden_checkpoint, tmp_path_factory):
    """The model saved by transformers, with the code beside it."""
    folder = tmp_path_factory.mktemp("saved") / "IXC-2.5 saved v1.0"
    golden_model.save_pretrained(folder)
    for file in golden_checkpoint.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module", params=WAYS)
def model(request, golden_checkpoint):
    if request.param == "saved again":
        yield load(request.getfixturevalue("saved_again"))
        return
    model = load(golden_checkpoint, attn_implementation=request.param)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        assert config._attn_implementation == request.param
    # transformers compiles flex attention, a minute of C++ for each new shape; test_flex_compiled does that once
    torch.compiler.set_stance("force_eager")
    yield model
    torch.compiler.set_stance("default")


def pictures(names):
    return [str(GOLDEN / name) for name in names]


def close(actual, recorded):
    actual, recorded = torch.as_tensor(actual).float(), torch.as_tensor(recorded).float()
    assert actual.shape == recorded.shape
    return float((actual - recorded).abs().max() / recorded.abs().max()) < SCALE


def spans_of(mask):
    """[start, end) of each run of ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.int().numpy(), [0]])))
    return edges.reshape(-1, 2).tolist()


@torch.no_grad()  # flex attention on a CPU has no backward pass
def wrap(model, case):
    return model.interleav_wrap_chat(
        case["query"],
        pictures(case["images"]),
        history=case["kwargs"].get("history", []),
        meta_instruction=read_golden("system_prompt.json")["chat"] if case["kwargs"].get("use_meta") else "",
        hd_num=case["kwargs"].get("hd_num"),
    )


def run_chat(model, tokenizer, case):
    return model.chat(
        tokenizer,
        case["query"],
        pictures(case["images"]),
        do_sample=False,
        max_new_tokens=len(case["output_ids"]),
        infer_mode=case["mode"],
        **case["kwargs"],
    )


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_chat(model, golden_tokenizer, case):
    answer, history = run_chat(model, golden_tokenizer, case)
    assert golden_tokenizer.decoded[-1] == case["output_ids"]
    assert answer == case["response"]
    assert history == [*case["kwargs"].get("history", []), (case["query"], case["response"])]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_chat_on_device(on_device, golden_tokenizer, case):
    """By default on the CPU with SDPA; `benchmarks/gpu.py` runs it on a card in every mode."""
    run_chat(on_device, golden_tokenizer, case)
    assert golden_tokenizer.decoded[-1] == case["output_ids"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_first_step(model, golden_tokenizer, monkeypatch, case):
    monkeypatch.setattr(model, "tokenizer", golden_tokenizer)
    inputs, mask, length = wrap(model, case)
    assert length == case["prompt_tokens"] == inputs["inputs_embeds"].shape[1] == mask.shape[1]
    assert spans_of(mask[0]) == case["image_spans"]
    with torch.no_grad():
        logits = model(**inputs, im_mask=mask, infer_mode=case["mode"], logits_to_keep=1).logits[0, -1]
    assert close(logits[::97], case["logits_every_97"])
    assert float(logits.norm()) == pytest.approx(case["logits_norm"], rel=SCALE)
    assert logits.topk(5).indices.tolist() == case["top5"]


def test_image_embeddings(model):
    recorded = np.load(GOLDEN / "image_embeds.npz")
    assert len(recorded.files) == 4
    for name in recorded.files:
        with torch.no_grad():
            embeds = model.encode_img(str(GOLDEN / name.replace("__", "/")))
        assert close(embeds[0], recorded[name])


def pad(rows, value):
    """Rows of ids padded on their right."""
    length = max(map(len, rows))
    return [row + [value] * (length - len(row)) for row in rows]


def header_of(tokenizer):
    return tokenizer("[UNUSED_TOKEN_146]assistant\n", add_special_tokens=False).input_ids


def text_batch(tokenizer):
    ids = [tokenizer(text).input_ids for text in TRAIN["text"]["texts"]]
    return ids, [answer_labels(row, header_of(tokenizer), CLOSE_ID) for row in ids]


def test_training_labels(golden_tokenizer):
    ids, labels = text_batch(golden_tokenizer)
    assert pad(ids, EOS_ID) == TRAIN["text"]["input_ids"]
    assert pad(labels, -100) == TRAIN["text"]["labels"]


def test_training_text():
    turns = [[("human", "hello"), ("bot", "hi there")]]
    turns += [[("user", " 第一个问题\n"), ("assistant", "答案"), ("human", "second question"),
               ("gpt", "a much longer second answer, with commas ")]]  # fmt: skip
    assert [training_text(one) for one in turns] == TRAIN["text"]["texts"]


def test_text_loss(model, golden_tokenizer):
    ids, labels = text_batch(golden_tokenizer)
    attended = pad([[1] * len(row) for row in ids], 0)
    with torch.no_grad():
        loss = model(
            input_ids=torch.tensor(pad(ids, EOS_ID)),
            attention_mask=torch.tensor(attended),
            labels=torch.tensor(pad(labels, -100)),
        ).loss
    assert float(loss) == pytest.approx(TRAIN["text"]["loss"], rel=SCALE)


def mixed_batch(model, tokenizer):
    """ids, labels, tiles, grids of the mixed batch, through the code's own steps.

    The loss was recorded with an unmarked picture in front of BOS, as the original trains (it chats with BOS first).
    """
    case, tile, side = TRAIN["multi"], model.config.tile, model.config.tokens_per_side
    rows, labels, pixels = [], [], []
    for text, names in zip(case["texts"], case["images"], strict=True):
        images = [load_media(path) for path in pictures(names)]
        lengths = [image_tokens(*media_grid(image, case["hd_num"], tile), side) for image in images]
        holder = model.config.image_token_id
        if MARK in text:
            pieces = place_images(text, len(images))
            row = tokenize_prompt(pieces, lengths, [holder] * len(images), tokenize_with(tokenizer)).input_ids
        else:
            row = [holder] * lengths[0] + tokenizer(text).input_ids
        rows.append(row)
        labels.append(answer_labels(row, header_of(tokenizer), CLOSE_ID))
        pixels += [to_pixels(image, case["hd_num"], tile) for image in images]
    return rows, labels, *stack_tiles(pixels, tile)


def test_mixed_loss(model, golden_tokenizer):
    rows, labels, tiles, grids = mixed_batch(model, golden_tokenizer)
    with torch.no_grad():
        loss = model(
            input_ids=torch.tensor(pad(rows, EOS_ID)),
            attention_mask=torch.tensor(pad([[1] * len(row) for row in rows], 0)),
            labels=torch.tensor(pad(labels, -100)),
            pixel_values=tiles,
            image_grid_thw=grids,
        ).loss
    assert float(loss) == pytest.approx(TRAIN["multi"]["loss"], rel=SCALE)


def names_on_disk(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}


def test_saved_names_are_the_released(saved_again, golden_checkpoint):
    recorded = read_golden("tiny_shapes.json")
    assert names_on_disk(golden_checkpoint) == recorded
    unused = {name for name in recorded if ".post_layernorm." in name}
    assert len(unused) == 2
    assert names_on_disk(saved_again) == {name: shape for name, shape in recorded.items() if name not in unused}


def test_saved_weights_are_the_same(saved_again, golden_checkpoint):
    with (
        safe_open(saved_again / "model.safetensors", "pt") as new,
        safe_open(golden_checkpoint / "model.safetensors", "pt") as old,
    ):
        for name in new.keys():
            assert torch.equal(new.get_tensor(name), old.get_tensor(name)), name


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["name"] in ("single", "two_images", "history_new_image")], ids=lambda c: c["name"]
)
def test_cached_is_full(model, golden_tokenizer, monkeypatch, case):
    """A decode step with a cache gives the logits of one pass over everything (below max_position_embeddings)."""
    monkeypatch.setattr(model, "tokenizer", golden_tokenizer)
    inputs, mask, length = wrap(model, case)
    answer = torch.tensor([case["output_ids"][:6]])
    if length + 6 > model.config.max_position_embeddings:  # beyond it, each key keeps the angles it was made with
        inputs["inputs_embeds"], mask = inputs["inputs_embeds"][:, :240], mask[:, :240]
    embeds = torch.cat([inputs["inputs_embeds"], model.model.tok_embeddings(answer)], dim=1)
    mask_all = torch.cat([mask, torch.zeros_like(answer, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        full = model(inputs_embeds=embeds, im_mask=mask_all).logits[0, -7:]
        outputs = model(**inputs, im_mask=mask, use_cache=True)
        steps = [outputs.logits[0, -1]]
        for token in answer[0]:
            outputs = model(input_ids=token.view(1, 1), past_key_values=outputs.past_key_values, use_cache=True)
            steps.append(outputs.logits[0, -1])
    assert close(torch.stack(steps), full)


@pytest.mark.slow
def test_flex_compiled(golden_checkpoint, golden_tokenizer):
    """Flex attention as it runs for its users: compiled."""
    (case,) = [case for case in CASES if case["name"] == "single"]
    run_chat(load(golden_checkpoint, attn_implementation="flex_attention"), golden_tokenizer, case)
    assert golden_tokenizer.decoded[-1] == case["output_ids"]


def test_a_long_chat_leaves_a_short_one_alone(model, golden_tokenizer):
    cases = {case["name"]: case for case in CASES}
    for name in ("text_only", "long_dynamic_rope", "text_only", "single"):
        run_chat(model, golden_tokenizer, cases[name])
        assert golden_tokenizer.decoded[-1] == cases[name]["output_ids"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_released_vocabulary(released_tokenizer, golden_tokenizer, case):
    """The stand-in vocabulary of the other tests says what the released one says."""
    for number, (piece, ids) in enumerate(
        zip(place_images(golden_prompt(case), len(case["images"])), case["piece_ids"], strict=True)
    ):
        assert released_tokenizer(piece, add_special_tokens=number == 0).input_ids == ids
    assert (
        released_tokenizer.decode(case["output_ids"], skip_special_tokens=True).split("[UNUSED_TOKEN_145]")[0]
        == case["response"]
    )


def test_released_vocabulary_of_the_training_texts(released_tokenizer, golden_tokenizer):
    for text, ids in golden_tokenizer.pieces.items():
        assert released_tokenizer(text, add_special_tokens=False).input_ids == (ids if text else [])


@pytest.mark.parametrize("name", ["single_meta", "history_new_image"])
def test_chat_with_the_released_vocabulary(golden_model, released_tokenizer, name):
    (case,) = [case for case in CASES if case["name"] == name]
    assert run_chat(golden_model, released_tokenizer, case)[0] == case["response"]
