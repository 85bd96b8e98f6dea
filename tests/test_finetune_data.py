"""Training rows from every format, the check pass, and batches that hold what `chat` would see."""

import base64
import io
import json

import pytest
import torch
from conftest import CLOSE, GOLDEN, MARK, OPEN, REPO, read_golden
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig

from xcomposer.finetune.data import Collator, Encoder, RowDataset, check_rows
from xcomposer.finetune.formats import BadRow, Row, read_rows, row_of
from xcomposer.finetune.training import GroupedSampler, answers_only
from xcomposer.model.ixc_utils import BAND, get_font, load_media
from xcomposer.model.prompting_internlm_xcomposer2 import chat_prompt

DATA = REPO / "examples" / "data"
SHAPES, HOUSE, CLIP = (str(DATA / name) for name in ("shapes.png", "house.png", "rolling_ball.mp4"))
TRAIN = read_golden("train_cases.json")


def talk(*turns):
    return [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * len(turns), turns, strict=False)]


@pytest.fixture(scope="module")
def config(tiny_checkpoint):
    return AutoConfig.from_pretrained(tiny_checkpoint, trust_remote_code=True)


@pytest.fixture(scope="module")
def encoder(config, tiny_tokenizer):
    return Encoder(config, tiny_tokenizer, hd_num=4)


def write(folder, rows, name="rows.json"):
    path = folder / name
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return path


# Formats.

WHAT = {"type": "text", "text": "What is it?"}
ONE = Row([("user", f"{MARK}What is it?"), ("assistant", "a house")], [HOUSE])


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": talk(f"{MARK}What is it?", "a house"), "image": HOUSE},
        {"conversations": talk(f"{MARK}What is it?", "a house"), "image": [HOUSE]},
        {"conversations": talk(f"<img>{HOUSE}</img>What is it?", "a house")},
        {"query": f"<img> {HOUSE} </img>What is it?", "response": "a house"},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": HOUSE}, WHAT]},
                      {"role": "assistant", "content": "a house"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, WHAT]},
                      {"role": "assistant", "content": [{"type": "text", "text": "a house"}]}], "images": [HOUSE]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": HOUSE}}, WHAT]},
                      {"role": "assistant", "content": "a house"}]},
    ],
)  # fmt: skip
def test_formats_say_the_same(record):
    assert row_of(record) == ONE


def test_pictures_in_the_order_of_their_places():
    turns = talk(f"<img>{SHAPES}</img> or {MARK}, or {MARK}?", "this")
    row = row_of({"conversations": turns, "image": HOUSE, "video": CLIP})
    assert row.media == [SHAPES, HOUSE, CLIP]
    assert row.turns[0] == ("user", f"{MARK} or {MARK}, or {MARK}?")
    content = [{"type": "video"}, {"type": "text", "text": "or"}, {"type": "image"}]
    row = row_of({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "so"}],
                  "images": [HOUSE], "videos": [CLIP]})  # fmt: skip
    assert row.media == [CLIP, HOUSE]


def test_frames_shrink_as_they_are_read(encoder):
    row = Row([("user", f"{MARK}What is it?"), ("assistant", "a ball")], [CLIP])
    whole = load_media(CLIP)
    (frames,) = encoder.open(row).pictures
    assert len(frames) == len(whole)
    assert all(small.width < big.width for small, big in zip(frames, whole, strict=True))
    wanted, _ = encoder.layout.tiles([whole], 4, get_font(BAND, encoder.font_folder))
    assert torch.equal(encoder(row)["pixel_values"], wanted)


def test_an_answer_may_hold_html():
    answer = '<img src="a.png"> and <img>b.png</img>'
    assert row_of({"query": "page?", "response": answer}) == Row([("user", "page?"), ("assistant", answer)], [])


def test_history_and_system():
    row = row_of({"system": "Be short.", "query": "and?", "response": "no", "history": [["hi", "hello"]]})
    assert [role for role, _ in row.turns] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"text": "x"}, "unknown format: none of conversations, messages, query"),
        (["x"], "must be an object"),
        ({"conversations": talk("hi", " \n")}, "empty answer in turn 2"),
        ({"conversations": talk("hi")}, "no answer"),
        ({"conversations": talk("hi", "ho", "why?")}, "the last turn is the user's"),
        ({"conversations": [{"from": "bird", "value": "x"}]}, "unknown role 'bird'"),
        ({"conversations": talk(f"{MARK}?", "x")}, f"more {MARK} places than pictures"),
        ({"conversations": talk(f"{CLOSE}?", "x")}, "which the prompt itself is made of"),
        ({"conversations": talk("<img>a.png?", "x")}, "<img> without </img>"),
        ({"messages": [{"content": "x"}]}, "not as its format has it"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type 'audio'"),
        ({"conversations": talk("hi", "x"), "hd_num": 0}, "hd_num is 0"),
    ],
)  # fmt: skip
def test_a_bad_row_says_why(record, reason):
    with pytest.raises(ValueError, match=reason.replace("?", r"\?")):
        row_of(record)


def test_json_and_json_lines(tmp_path):
    records = [{"conversations": talk("a", "b")}, {"query": "c", "response": "d"}]
    listed = read_rows(write(tmp_path, records))
    lines = read_rows(write(tmp_path, records, "rows.jsonl"))
    assert [row[:3] for row in listed] == [row[:3] for row in lines]
    assert [row.name for row in lines] == ["rows.jsonl row 1", "rows.jsonl row 2"]
    (tmp_path / "bad.json").write_text('{"query": "c"\n"x')
    with pytest.raises(ValueError, match=r"tried JSON .* JSON lines .* list of files"):
        read_rows(tmp_path / "bad.json")


def test_a_list_of_files_with_counts(tmp_path):
    write(tmp_path, [{"query": f"a{i}", "response": "x"} for i in range(10)], "a.json")
    write(tmp_path, [{"query": f"b{i}", "response": "x"} for i in range(4)], "b b.jsonl")
    (tmp_path / "mix.txt").write_text("a.json 0.003\n\n# all of it, twice and a half\nb b.jsonl 0.01\na.json\n")
    rows = read_rows(tmp_path / "mix.txt", seed=1)
    assert rows == read_rows(tmp_path / "mix.txt", seed=1) != read_rows(tmp_path / "mix.txt", seed=2)
    queries = [row.turns[0][1] for row in rows]
    assert len(queries) == 3 + 10 + 10 and len(set(queries[:3])) == 3
    assert {queries[3:13].count(f"b{i}") for i in range(4)} == {2, 3}
    assert sorted(queries[13:]) == [f"a{i}" for i in range(10)]


def test_relative_paths(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    path = write(tmp_path, [{"query": "<img>a.png</img>?", "response": "x"}])
    assert read_rows(path, tmp_path / "pictures")[0].media == [str(tmp_path / "pictures" / "a.png")]
    assert read_rows(path)[0].media == [str(tmp_path / "a.png")]  # not there: the check says so


# The check pass.


def test_the_check_lists_every_bad_row(tmp_path, encoder):
    (tmp_path / "broken.png").write_bytes((DATA / "house.png").read_bytes()[:400])
    records = [
        {"query": "fine", "response": "yes"},
        {"query": "<img>gone.png</img>", "response": "yes"},
        {"query": "<img>broken.png</img>", "response": "yes"},
        {"conversations": talk(f"{MARK} and {MARK}", "two"), "image": [HOUSE, SHAPES, HOUSE]},
        {"query": "empty", "response": ""},
        {"query": "word " * 20000, "response": "long"},
        {"query": f"<img>{HOUSE}</img>fine", "response": "yes"},
    ]
    checked = check_rows(read_rows(write(tmp_path, records)), encoder, workers=2, progress=False)
    reasons = dict(checked.bad)
    assert list(reasons) == [f"rows.json row {number}" for number in (2, 3, 4, 5, 6)]
    for number, words in ((2, "no file"), (3, "broken or cut short"), (4, "2 <ImageHere> slots but 3 images"),
                          (5, "empty answer"), (6, "at most 16384 fit")):  # fmt: skip
        assert words in reasons[f"rows.json row {number}"]
    assert [row.turns[0][1] for row in checked.rows] == ["fine", f"{MARK}fine"]
    assert checked.lengths == [len(encoder(row)["input_ids"]) for row in checked.rows]


def test_a_row_without_labels_is_no_row(encoder, monkeypatch):
    row = row_of({"query": "a", "response": "b"}, "x.json row 7")
    monkeypatch.setattr(encoder, "header", [*encoder.header, 5])
    with pytest.raises(ValueError, match="x.json row 7: every label is masked"):
        encoder(row)
    assert "every label is masked" in check_rows([row], encoder, progress=False).bad[0].reason
    with pytest.raises(ValueError, match="every label of this batch is masked"):
        answers_only({"labels": torch.full((2, 5), -100)})


# Encoding.


def test_golden_labels_and_loss(golden_model, golden_tokenizer):
    turns = [[("human", "hello"), ("bot", "hi there")]]
    turns += [[("user", " 第一个问题\n"), ("assistant", "答案"), ("human", "second question"),
               ("gpt", "a much longer second answer, with commas ")]]  # fmt: skip
    records = [{"conversations": [{"from": role, "value": text} for role, text in one]} for one in turns]
    encoder = Encoder(golden_model.config, golden_tokenizer)
    batch = Collator(encoder)([encoder(row_of(record)) for record in records])
    assert batch["input_ids"].tolist() == TRAIN["text"]["input_ids"]
    assert batch["labels"].tolist() == TRAIN["text"]["labels"]
    with torch.no_grad():
        loss = golden_model(**answers_only(batch)).loss
    assert float(loss) == pytest.approx(TRAIN["text"]["loss"], rel=1e-4)


def test_golden_loss_with_pictures(golden_model, golden_tokenizer):
    """One picture without a mark, two with marks and a second turn; as recorded, the first stands before BOS."""
    dialogues = [
        [("user", "what is it?"), ("assistant", "a picture")],
        [("user", f"Image1 {MARK}; Image2 {MARK}; compare"), ("assistant", "They differ."),
         ("user", "why?"), ("assistant", "colour")],
    ]  # fmt: skip
    encoder = Encoder(golden_model.config, golden_tokenizer, hd_num=TRAIN["multi"]["hd_num"])
    images = [[str(GOLDEN / image) for image in row] for row in TRAIN["multi"]["images"]]
    features = [encoder(Row(turns, media)) for turns, media in zip(dialogues, images, strict=True)]
    assert features[0]["input_ids"][0] == golden_model.config.image_token_id
    with torch.no_grad():
        loss = golden_model(**answers_only(Collator(encoder)(features))).loss
    assert float(loss) == pytest.approx(TRAIN["multi"]["loss"], rel=1e-4)


@pytest.mark.parametrize("media", [[], [HOUSE], [HOUSE, SHAPES], [CLIP]])
def test_a_row_is_what_chat_sees(tiny_model, tiny_tokenizer, media):
    encoder = Encoder(tiny_model.config, tiny_tokenizer, hd_num=3)
    query = MARK * len(media) + "What is it?"
    features = encoder(Row([("user", query), ("assistant", "a house")], media))
    asked = tiny_model._open(tiny_tokenizer, chat_prompt(query), media, 3)
    ids, labels = features["input_ids"], features["labels"]
    prompt = asked.prompt.input_ids
    assert ids[: len(prompt)] == prompt
    assert set(labels[: len(prompt)]) == {-100} and labels[len(prompt) :] == ids[len(prompt) :]
    assert tiny_tokenizer.decode(ids[len(prompt) :]) == f"a house{CLOSE}\n</s>"
    tiles = 0 if not media else int(features["image_grid_thw"].prod(-1).sum())
    assert len(features.get("pixel_values", [])) == tiles
    if media:
        from xcomposer.model.ixc_utils import stack_tiles

        wanted = stack_tiles([tiny_model._pixels(picture, 3) for picture in asked.pictures], encoder.tile)
        assert torch.equal(features["pixel_values"], wanted[0])


def test_a_system_turn_is_no_answer(encoder, tiny_tokenizer):
    features = encoder(row_of({"system": "Be short.", "query": "a", "response": "b"}))
    assert tiny_tokenizer.decode(features["input_ids"]).startswith(f"<s>{OPEN}system\nBe short.{CLOSE}\n{OPEN}user\na")
    learned = [token for token in features["labels"] if token != -100]
    assert tiny_tokenizer.decode(learned) == f"b{CLOSE}\n</s>"


def test_hd_num_of_row_run_and_count(config, tiny_tokenizer):
    one, two = Row(ONE.turns, [HOUSE]), Row(ONE.turns, [HOUSE, HOUSE])
    assert [Encoder(config, tiny_tokenizer).choose_hd_num(row) for row in (one, two)] == [18, 6]
    run = Encoder(config, tiny_tokenizer, hd_num=9)
    assert [run.choose_hd_num(row) for row in (one, two, one._replace(hd_num=2))] == [9, 9, 2]


def test_pictures_in_data_addresses(encoder):
    held = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(held, "PNG")
    address = "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
    features = encoder(row_of({"query": f"<img>{address}</img>?", "response": "red"}))
    assert features["image_grid_thw"].tolist() == [[1, 2, 2]]


# Batches.


@pytest.fixture(scope="module")
def rows():
    return [
        row_of({"query": "1 + 1?", "response": "2"}),
        row_of({"query": f"<img>{HOUSE}</img>What?", "response": "a house", "hd_num": 1}),
        row_of({"query": f"<img>{SHAPES}</img><img>{HOUSE}</img>Same?", "response": "They differ."}),
    ]


def test_text_and_pictures_in_one_batch(rows, encoder, tiny_model):
    features = [encoder(row) for row in rows]
    batch = Collator(encoder)(features)
    assert batch["image_grid_thw"].shape == (3, 3) and batch["mm_token_type_ids"].any(1).tolist() == [False, True, True]
    alone = [Collator(encoder)([one]) for one in features]
    with torch.no_grad():
        losses = [float(tiny_model(**answers_only(one)).loss) for one in alone]
        loss = float(tiny_model(**answers_only(batch)).loss)
    counts = [int((one["labels"] != -100).sum()) for one in alone]
    mean = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    assert loss == pytest.approx(mean, rel=1e-4)
    with torch.no_grad():
        assert float(tiny_model(**batch).loss) == pytest.approx(loss, rel=1e-5)


def test_a_blank_picture_changes_nothing(encoder, tiny_checkpoint):
    """It takes the vision tower through the backward pass of a text batch; loss and gradients stay."""
    from conftest import load

    model = load(tiny_checkpoint)
    model.model.language_model.dense_partial_lora = True  # as in training, but without dropout
    features = [encoder(row_of({"query": "1 + 1?", "response": answer})) for answer in ("2", "two, as ever")]
    gradients, losses = [], []
    for touch in (False, True):
        batch = Collator(encoder, touch_vision=touch)([dict(one) for one in features])
        assert ("pixel_values" in batch) == touch
        loss = model(**answers_only(batch)).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, parameter in gradients[1].items():
        if ".vision_" in name or name.endswith("_GN"):
            assert gradients[0][name] is None and parameter is not None and not parameter.any(), name
        else:
            assert parameter is not None and gradients[0][name] is not None, name  # partial LoRA too
            torch.testing.assert_close(parameter, gradients[0][name], rtol=1e-4, atol=1e-6)


def test_workers_give_the_same_batches(rows, encoder):
    def epoch(workers):
        loader = DataLoader(RowDataset(rows, encoder), 2, num_workers=workers, collate_fn=Collator(encoder))
        return list(loader)

    for one, other in zip(epoch(0), epoch(2), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_length_groups_hold_each_row_once():
    lengths = [i * 37 % 101 for i in range(200)]
    sampler = GroupedSampler(lengths, 4, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(200)) and order == list(sampler)
    spread = [max(lengths[i] for i in order[at : at + 4]) - min(lengths[i] for i in order[at : at + 4])
              for at in range(0, 200, 4)]  # fmt: skip
    assert sum(spread) / len(spread) < 15
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_bad_rows_need_no_dataset(encoder):
    bad = BadRow("x row 1", "why")
    assert check_rows([bad, ONE], encoder, progress=False).bad == [bad]
