"""The model with a score head: recorded scores, batches, refusals, and how it is loaded."""

import copy
import json
import shutil
import sys

import pytest
import torch
from conftest import BOS_ID, CLOSE, GOLDEN, MARK, OPEN, Encoding, load
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from xcomposer.checkpoints import tiny
from xcomposer.model.kinds_internlm_xcomposer2 import METHODS_OF_HEAD
from xcomposer.model.prompting_internlm_xcomposer2 import reward_text

REWARD = GOLDEN / "family" / "reward"
CASES = json.loads((REWARD / "reward_cases.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4
PICTURE = str(REWARD / "images" / "small_90x60.png")
TALK = [{"role": "user", "content": "What is a tile?"}, {"role": "assistant", "content": "A square."}]
LONGER = [*TALK, {"role": "user", "content": "And a picture?"}, {"role": "assistant", "content": "Many of them."}]
ABOUT = [{"role": "user", "content": f"{MARK}Look."}, {"role": "assistant", "content": "A tile."}]


def text_of(conversation):
    """The text of a recorded conversation, written out here once more."""
    if isinstance(conversation, str):
        return conversation
    turns = [f"{OPEN}{message['role']}\n{message['content']}{CLOSE}\n" for message in conversation]
    return "".join(turns) + "</s>[UNUSED_TOKEN_130]"


class RewardTokenizer:
    """Knows the texts of the recorded cases by their ids."""

    bos_token_id = BOS_ID

    def __init__(self):
        self.pieces = {}
        for case in CASES:
            if "piece_ids" not in case:
                continue
            pieces = text_of(case["args"]["conversation"]).split(MARK)
            if len(pieces) == 1 and case["image_spans"]:
                pieces = ["", *pieces]
            for number, (piece, ids) in enumerate(zip(pieces, case["piece_ids"], strict=True)):
                self.pieces[piece] = ids if number else ids[1:]

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        return Encoding([BOS_ID] * add_special_tokens + self.pieces[text])


@pytest.fixture(scope="module")
def recorded_model(tmp_path_factory):
    """Changed fields -> the recorded model, loaded by AutoModel."""
    made = {}

    def model_of(**changes):
        key = json.dumps(changes)
        if key not in made:
            folder = tmp_path_factory.mktemp("reward") / "IXC-2.5 reward v1.0"
            tiny.write_checkpoint(folder, vocab_size=92544, kind="xcomposer2d5-reward")
            auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
            fields = json.loads((REWARD / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**fields, **changes, "auto_map": auto_map}))
            made[key] = load(folder)
            made[key].tokenizer = RewardTokenizer()
        return made[key]

    return model_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("scores") / "IXC tiny reward v1.0", kind="xcomposer2d5-reward")


@pytest.fixture(scope="module")
def model(folder):
    model = load(folder)
    model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model


def in_place(arguments):
    """Arguments of a case with the paths of its pictures made whole."""
    lists = ("image", "images", "image1", "image2")

    def whole(value):
        return [whole(v) for v in value] if isinstance(value, list) else str(REWARD / value)

    return {name: whole(value) if name in lists else value for name, value in arguments.items()}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded(recorded_model, case):
    model = recorded_model(**case.get("config_overrides", {}))
    found = getattr(model, case["call"])(**in_place(case["args"]))
    if case["call"] == "compare" and isinstance(case["out"], list):
        assert found[0] is case["out"][0] and found[1] == pytest.approx(case["out"][1], abs=TOLERANCE)
    elif case["call"] == "rank" and case["args"].get("return_logits"):
        assert found[0] == case["out"][0] and found[1] == pytest.approx(case["out"][1], abs=TOLERANCE)
    elif case["call"] in ("compare", "rank"):
        assert found == case["out"]
    else:
        assert type(found) is type(case["out"]) and found == pytest.approx(case["out"], abs=TOLERANCE)


@pytest.mark.parametrize(
    "name", ["text", "multi_turn_picture", "picture_middle", "two_pictures", "no_template_picture"]
)
def test_the_recorded_prompt(recorded_model, name):
    case = next(case for case in CASES if case["name"] == name)
    arguments = in_place(case["args"])
    rows = recorded_model()._open_rows(
        [arguments["conversation"]], [arguments["image"]], 16384, 24, arguments.get("apply_template", True)
    )
    assert [list(span) for span in rows[0].prompt.image_spans] == case["image_spans"]
    assert len(rows[0].prompt.input_ids) == case["prompt_tokens"]


def test_the_released_vocabulary_has_the_token_that_is_read(released_tokenizer):
    for case in CASES:
        if case["name"] in ("text", "system", "no_template"):
            ids = released_tokenizer(text_of(case["args"]["conversation"])).input_ids
            assert ids == case["piece_ids"][0] and ids[-1] == 92527


def test_neighbours_change_nothing(model, monkeypatch):
    """Nor does dynamic rope stretch for a short conversation because the one beside it is long."""
    long = [{"role": "user", "content": "What is a tile? " * 60}, TALK[1]]
    rows, images = [TALK, long, ABOUT, LONGER], [[], None, [PICTURE], []]
    alone = [model.get_score(row, image) for row, image in zip(rows, images, strict=True)]
    tokens = [len(row.prompt.input_ids) for row in model._open_rows(rows, images, 16384, 24, True)]
    assert max(tokens) > model.config.max_position_embeddings > min(tokens)
    assert model.get_scores(rows, images) == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr(sys.modules[type(model).__module__], "BATCH_TOKENS", 200)
    sizes, padded = [], type(model)._padded

    def noted(self, part):
        sizes.append(len(part))
        return padded(self, part)

    monkeypatch.setattr(type(model), "_padded", noted)
    assert model.get_scores(rows, images) == pytest.approx(alone, abs=1e-5)
    assert len(sizes) > 1 and sum(sizes) == len(rows)


def test_lists_stay_lists(model):
    assert isinstance(model.get_score(TALK), float)
    assert isinstance(model.get_scores([TALK]), list) and model.get_scores([]) == []
    order, scores = model.rank([TALK, LONGER, ABOUT], [[], [], PICTURE], return_logits=True)
    assert [scores[i] for i in order] == sorted(scores, reverse=True)


def test_typed_content_is_its_text_and_marks():
    typed = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A tile."}]},
    ]
    assert reward_text(typed) == reward_text(ABOUT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_reads_the_last_attended_token(model, side):
    rows = [row.prompt.input_ids for row in model._open_rows([TALK, LONGER], None, 16384, 24, True)]
    width = max(map(len, rows)) + 3
    ids, mask = torch.full((2, width), 2), torch.zeros(2, width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0.5, -1.0]))
    assert isinstance(out, SequenceClassifierOutputWithPast) and out.logits.shape == (2, 1)
    scores = model.get_scores([TALK, LONGER])
    assert out.logits.flatten().tolist() == pytest.approx(scores, abs=1e-5)
    assert out.loss.item() == pytest.approx(((scores[0] - 0.5) ** 2 + (scores[1] + 1) ** 2) / 2, rel=1e-3)


USER = {"role": "user", "content": "x"}
WRONG = [
    ({"conversation": TALK, "max_length": 10}, r"conversation 0: the prompt has \d+ tokens .* max_length is 10"),
    ({"conversation": ABOUT, "image": PICTURE, "max_length": 60}, r"hd_num=\d would fit"),
    ({"conversation": "What is a tile?"}, "must be a list of .* apply_template=False takes text"),
    ({"conversation": []}, "must be a list of"),
    ({"conversation": TALK, "apply_template": False}, "apply_template=False must be text"),
    ({"conversation": [{"role": "judge", "content": "x"}]}, "message 0: unknown role 'judge'"),
    ({"conversation": [USER, {"role": "assistant"}]}, "message 1: a message must be"),
    ({"conversation": [USER, {"role": "assistant", "content": 5}]}, "content must be text, got int"),
    ({"conversation": [{"role": "user", "content": [{"type": "audio"}]}]}, "content of types"),
    ({"conversation": ABOUT}, "1 <ImageHere> slots but 0 images"),
    ({"conversation": TALK, "image": [PICTURE, PICTURE]}, "0 <ImageHere> slots but 2 images"),
    ({"conversation": TALK, "image": "nowhere.png"}, "conversation 0: .*nowhere.png"),
    ({"conversation": ABOUT, "image": PICTURE, "hd_num": 0}, "hd_num"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_calls(model, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model.get_score(**arguments)


def test_wrong_lists(model):
    with pytest.raises(ValueError, match="2 conversations, but images for 1"):
        model.get_scores([TALK, TALK], [[]])
    with pytest.raises(ValueError, match="conversation 1: "):
        model.get_scores([TALK, []])
    with pytest.raises(ValueError, match="get_score takes a single one"):
        model.get_scores("What is a tile?")


def test_a_conversation_may_fill_max_length(model):
    length = len(model._open_rows([TALK], None, 16384, 24, True)[0].prompt.input_ids)
    assert model.get_score(TALK, max_length=length) == model.get_score(TALK)
    with pytest.raises(ValueError, match="max_length"):
        model.get_score(TALK, max_length=length - 1)


def test_methods_of_the_other_head_say_whose_they_are(model, tiny_model):
    for one, head, title in ((model, "vocabulary", "2.5"), (tiny_model, "score", "2.5-Reward")):
        for name in METHODS_OF_HEAD[head]:
            said = f"{name} needs a checkpoint with a {head} head, as InternLM-XComposer-{title} has"
            with pytest.raises(ValueError, match=said):
                getattr(one, name)(None, TALK)


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_each_auto_class_loads_it_and_it_saves(folder, model, tmp_path, auto, fmt):
    if fmt == "bin":
        folder = tiny.write_checkpoint(tmp_path / "bin", kind="xcomposer2d5-reward", fmt="bin", shards=2)
    found = auto.from_pretrained(folder, trust_remote_code=True).eval()
    found.tokenizer = model.tokenizer
    assert type(found).__name__ == "InternLMXComposer2ForSequenceClassification"
    score = model.get_score(ABOUT, PICTURE)
    assert found.get_score(ABOUT, PICTURE) == score
    found.save_pretrained(tmp_path / "saved")
    for source in folder.glob("*.py"):
        shutil.copyfile(source, tmp_path / "saved" / source.name)
    again = load(tmp_path / "saved")
    again.tokenizer = model.tokenizer
    assert again.config.kind == "xcomposer2d5-reward" and again.get_score(ABOUT, PICTURE) == score


def test_a_new_head_is_asked_for(tiny_checkpoint, tiny_tokenizer, folder):
    options = {"trust_remote_code": True}
    with pytest.raises(ValueError, match="has a vocabulary head and no score.weight; .* new_head=True"):
        AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, **options)
    begun = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, new_head=True, **options).eval()
    begun.tokenizer = tiny_tokenizer
    assert begun.config.head == "score" and begun.get_scores([TALK, LONGER]) == [0.0, 0.0]
    assert not any(".task_" in name for name, _ in begun.named_parameters())
    trained = AutoModelForSequenceClassification.from_pretrained(folder, new_head=True, **options)
    assert trained.score.weight.any()


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_new_model_of_its_config_has_its_head(model, auto):
    made = auto.from_config(copy.deepcopy(model.config), trust_remote_code=True)
    assert type(made).__name__ == type(model).__name__ and made.config.kind == model.config.kind
    assert {name: p.shape for name, p in made.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_new_score_head_of_a_chat_config(tiny_model):
    config = copy.deepcopy(tiny_model.config)
    made = AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)
    assert made.score.weight.shape == (1, config.text_config.hidden_size) and made.config.head == "score"
    assert not any(".task_" in name for name, _ in made.named_parameters())
    assert config.head == "vocabulary" and config.task_adapter_ranks == tiny_model.config.task_adapter_ranks
    assert type(AutoModel.from_config(config, trust_remote_code=True)).__name__ == type(tiny_model).__name__


@pytest.mark.parametrize("items", [["What is a tile?"], [None, "Look."], ["First ", None, ", second ", None, "."]])
def test_the_processor_lays_a_conversation_out_as_get_score_does(folder, model, items):
    """By the chat template, which ends with the token that is read; TRL and servers go this way."""
    content = [{"type": "text", "text": item} if item else {"type": "image", "path": PICTURE} for item in items]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "A."}]}]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")
    asked = "".join(item or MARK for item in items)
    plain = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A."}]
    with torch.no_grad():
        score = model(**inputs).logits.item()
    assert score == pytest.approx(model.get_score(plain, [PICTURE] * items.count(None)), abs=1e-5)
