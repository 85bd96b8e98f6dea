"""The siblings of 2.5: their recorded outputs (test_kinds.py has what every kind must do)."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import BOS_ID, CLOSE, CLOSE_ID, GOLDEN, MARK, OPEN, RecordedTokenizer, load
from PIL import Image, ImageDraw

from xcomposer.checkpoints import tiny
from xcomposer.model import ixc_utils as pictures
from xcomposer.model.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Model
from xcomposer.model.prompting_internlm_xcomposer2 import SYSTEM_TEXTS

FAMILY = GOLDEN / "family"
SCALE = 1e-4  # of the greatest absolute value
FOLDERS = {"xc2": "xcomposer2", "xc2vl": "xcomposer2-vl", "4khd": "xcomposer2-4khd", "reward": "xcomposer2d5-reward"}
SYSTEM_OF = {"xc2": SYSTEM_TEXTS["write"], "xc2vl": SYSTEM_TEXTS["chat"], "4khd": SYSTEM_TEXTS["chat"]}


def recorded(folder, name):
    return json.loads((FAMILY / folder / name).read_text(encoding="utf-8"))


CASES = [(folder, case) for folder in SYSTEM_OF for case in recorded(folder, "chat_cases.json")]
NAMES = [f"{folder}-{case['name']}" for folder, case in CASES]


def prompt_of(folder, case):
    """The prompt of a recorded chat, written out here once more."""
    if case.get("call") == "client":
        return case["query"]
    said = case["kwargs"].get("meta_instruction", SYSTEM_OF[folder])
    opening = f"{OPEN}system\n{said}{CLOSE}\n" if said else ""
    turns = case["kwargs"].get("history", [])
    past = "".join(f"{OPEN}user\n{asked}{CLOSE}\n{OPEN}assistant\n{answer}{CLOSE}\n" for asked, answer in turns)
    return f"{opening}{past}{OPEN}user\n{case['query']}{CLOSE}\n{OPEN}assistant\n"


class FamilyTokenizer(RecordedTokenizer):
    """Knows the texts of one kind's cases by their recorded ids."""

    def __init__(self, folder):
        super().__init__()
        for case in recorded(folder, "chat_cases.json"):
            if "error" in case:
                continue
            pieces = [piece for piece in prompt_of(folder, case).split(MARK) if piece]
            for piece, ids in zip(pieces, case["piece_ids"], strict=True):
                while ids[0] == BOS_ID:
                    ids = ids[1:]
                self.pieces[piece] = ids
            self.texts[tuple(case["output_ids"])] = case["response"]


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory):
    """(folder of cases, changed fields) -> a checkpoint as recorded: the released config, and seeded weights."""
    made = {}

    def folder_of(folder, **changes):
        key = folder, json.dumps(changes)
        if key not in made:
            out = tmp_path_factory.mktemp(folder) / f"IXC {folder} v1.0"
            config = {**recorded(folder, "config.json"), **changes}
            made[key] = tiny.write_checkpoint(out, vocab_size=92544, kind=FOLDERS[folder])
            auto_map = json.loads((out / "config.json").read_text())["auto_map"]
            (out / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
        return made[key]

    return folder_of


@pytest.fixture(scope="module")
def family_model(family_folder):
    made = {}

    def model_of(folder, **changes):
        key = folder, json.dumps(changes)
        if key not in made:
            made[key] = load(family_folder(folder, **changes))
            made[key].tokenizer = FamilyTokenizer(folder)
        return made[key]

    return model_of


def stored(folder, names):
    return [str(FAMILY / folder / name) for name in names]


def close(actual, expected):
    actual, expected = torch.as_tensor(actual).float(), torch.as_tensor(expected).float()
    return actual.shape == expected.shape and float((actual - expected).abs().max() / expected.abs().max()) < SCALE


@pytest.mark.parametrize("folder", FOLDERS)
def test_parameters_are_the_released_ones(folder):
    fields = {**recorded(folder, "config.json"), "kind": FOLDERS[folder]}
    shapes = {name: list(shape) for name, shape in tiny.released_shapes(fields).items() if "post_layernorm" not in name}
    assert shapes == {n: s for n, s in recorded(folder, "tiny_shapes.json").items() if "post_layernorm" not in n}


@pytest.mark.parametrize(("folder", "case"), CASES, ids=NAMES)
def test_chat(family_model, folder, case):
    model = family_model(folder, **case.get("config_overrides", {}))
    images = stored(folder, case["images"])
    if "error" in case:  # the original has no place for an unmarked picture; here it stands in front, as in 2.5
        model.tokenizer.pieces[prompt_of(folder, case)] = [5, 6]
        conversation = model._open(model.tokenizer, prompt_of(folder, case), images, None)
        assert conversation.prompt.image_spans[0][0] == 1 and conversation.prompt.input_ids[-3:] == [BOS_ID, 5, 6]
        return
    if case.get("call") == "client":
        check_client(model, folder, case, images)
        return
    if len(images) > 1 and folder != "4khd":
        images = torch.stack([model.vis_processor(Image.open(path)) for path in images])
    settings = {"do_sample": False, "max_new_tokens": 14, **case["kwargs"]}
    answer, history = model.chat(None, case["query"], images if len(images) else None, **settings)
    assert model.tokenizer.decoded[-1] == case["output_ids"] and answer == case["response"]
    assert list(map(tuple, history)) == [*map(tuple, case["kwargs"].get("history", [])), (case["query"], answer)]
    check_first_step(model, folder, case, images)


def check_first_step(model, folder, case, images):
    conversation = model._open(model.tokenizer, prompt_of(folder, case), images, case["kwargs"].get("hd_num"))
    assert len(conversation.prompt.input_ids) == case["prompt_tokens"]
    assert [list(span) for span in conversation.prompt.image_spans] == case["image_spans"]
    embeds, mask = model._embed(conversation)
    with torch.no_grad():
        logits = model(inputs_embeds=embeds.read(), mm_token_type_ids=mask, logits_to_keep=1).logits[0, -1]
    assert close(logits[::97], case["logits_every_97"])
    assert float(logits.norm()) == pytest.approx(case["logits_norm"], rel=SCALE)
    assert logits.topk(5).indices.tolist() == case["top5"]


def check_client(model, folder, case, images):
    """How public clients call these models: pieces, a picture between, embeddings to `generate`."""
    first, last = case["query"].split(MARK)
    with torch.no_grad():
        parts = [
            model.encode_text(first, add_special_tokens=True),
            model.encode_img(images[0], **case["kwargs"]),
            model.encode_text(last),
        ]
    mask = torch.cat([torch.full(part.shape[:2], index == 1) for index, part in enumerate(parts)], dim=1)
    settings = {"do_sample": False, "max_new_tokens": 14, "eos_token_id": [2, CLOSE_ID]}
    ids = model.generate(inputs_embeds=torch.cat(parts, dim=1), im_mask=mask, **settings)
    assert ids[0].tolist() == case["output_ids"]


@pytest.mark.parametrize("folder", SYSTEM_OF)
def test_image_embeddings(family_model, folder):
    model = family_model(folder)
    expected = np.load(FAMILY / folder / "image_embeds.npz")
    for name in expected.files:
        path, _, hd_num = name.replace("__", "/").partition("@")
        with torch.no_grad():
            embeds = model.encode_img(str(FAMILY / folder / path), hd_num=int(hd_num) if hd_num else None)
        assert close(embeds[0], expected[name]), name


def pic(w, h, k, seed):
    """The pictures of the transform cases."""
    y, x = np.mgrid[0:h, 0:w]
    g = np.random.default_rng(1000 * seed + k)
    bands = [x * 255 / max(w - 1, 1), y * 255 / max(h - 1, 1), (x + 2 * y + 37 * k) % 256]
    im = Image.fromarray(np.stack(bands, -1).astype(np.uint8))
    d = ImageDraw.Draw(im)
    for _ in range(6):
        x0, y0 = int(g.integers(0, w)), int(g.integers(0, h))
        r = int(g.integers(3, max(4, min(w, h) // 3)))
        d.ellipse([x0 - r, y0 - r, x0 + r, y0 + r], fill=tuple(int(c) for c in g.integers(0, 255, 3)))
    return im


TRANSFORMS = [(folder, case) for folder in SYSTEM_OF for case in recorded(folder, "transform_cases.json")]


@pytest.mark.parametrize(("folder", "case"), TRANSFORMS, ids=[f"{f}-{i}" for i, (f, _) in enumerate(TRANSFORMS)])
def test_transforms(folder, case):
    stored_in = FAMILY / folder / case["image"] if "image" in case else None
    source = Image.open(stored_in) if stored_in else pic(*case["size"], case["pic_index"], case["seed"])
    source = source.convert("RGB")
    if folder == "4khd":
        made = pictures.HD_transform(source, case["hd_num"], case["tile"])
        grid = pictures.hd_grid(*source.size, case["hd_num"], case["tile"], "uncapped")
        assert grid == (case["rows"], case["cols"])
        assert pictures.image_tokens(*grid, case["tile"] // 28) == case["tokens"]
        layout = pictures.PictureLayout(tile=case["tile"], side=case["tile"] // 28, tiling="uncapped")
        assert torch.equal(layout.pixels(source, case["hd_num"]), pictures.normalize(made, case["tile"]))
    else:
        made = pictures._sized(source, 1, case["img_size"], None, "none")
    assert list(made.size) == case["out"]["size"]
    assert np.asarray(made).reshape(-1, 3).mean(0) == pytest.approx(case["out"]["mean"], abs=1e-3)
    assert hashlib.sha256(made.tobytes()).hexdigest() == case["out"]["sha256"]


def test_reward_embeds_pictures_and_leaves_the_head_to_its_class(family_folder):
    folder = family_folder("reward")
    with pytest.raises(ValueError, match="lacks 1 tensor: output.weight; it has score.weight in its place"):
        InternLMXComposer2ForCausalLM.from_pretrained(folder)
    model = InternLMXComposer2Model.from_pretrained(folder).eval()
    assert model.config.head == "score" and model.config.kind == "xcomposer2d5-reward"
    expected = np.load(FAMILY / "reward" / "image_embeds.npz")
    for name in expected.files:
        path, _, hd_num = name.replace("__", "/").partition("@")
        tiles, grids = model.config.layout.tiles([Image.open(FAMILY / "reward" / path)], int(hd_num))
        with torch.no_grad():
            embeds = model.get_image_features(tiles, grids, return_dict=True).pooler_output[0]
        assert close(embeds, expected[name]), name
