"""Preference data and fine-tuning of a score head: formats, refusals, and runs on tiny checkpoints."""

import json

import pytest
import torch
from conftest import MARK, REPO, load, tiny
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from xcomposer.finetune import run as finetune
from xcomposer.finetune.data import PairCollator, PairEncoder
from xcomposer.finetune.formats import BadRow, Pair, read_rows

HOUSE = str(REPO / "examples" / "data" / "house.png")
COMMON = ("--use_cpu --disable_tqdm True --dataloader_num_workers 0 --hd_num 2 --learning_rate 5e-3 "
          "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 6").split()  # fmt: skip


def talk(query, answer):
    return [{"from": "human", "value": query}, {"from": "gpt", "value": answer}]


def messages(query, answer):
    return [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]


TYPED = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
RECORDS = [
    {"id": 1, "image": [HOUSE], "conversations_a": talk(f"{MARK}What is it?", " a house\n"),
     "conversations_b": talk(f"{MARK}What is it?", "no idea")},
    {"image": HOUSE, "chosen": messages(TYPED, "a house"), "rejected": messages(TYPED, "no idea")},
    {"prompt": "1 + 1?", "chosen": "2", "rejected": "a fish"},
    {"prompt": messages("x", "y")[:1], "chosen": messages("x", "right")[1:], "rejected": messages("x", "no idea")[1:]},
]  # fmt: skip
SAID = [("a house", "no idea"), ("a house", "no idea"), ("2", "a fish"), ("right", "no idea")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("chat") / "chat v1.0", config={"plora_dropout": 0.0})


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("reward") / "reward v1.0", {"plora_dropout": 0.0}
    return tiny.write_checkpoint(folder, kind="xcomposer2d5-reward", config=config)


@pytest.fixture
def run(data, tmp_path, capsys):
    """Runs the script in this process: (exit status, losses, stderr)."""

    def run(model, *argv, rows=data, out="out"):
        argv = ["--model", str(model), "--data", str(rows), "--output_dir", str(tmp_path / out), *COMMON, *argv]
        status = finetune.main([str(arg) for arg in argv])
        file = tmp_path / out / "loss.json"
        found = json.loads(file.read_text()) if file.exists() else []
        return status, [entry["loss"] for entry in found if "loss" in entry], capsys.readouterr().err

    return run


def with_tokenizer(model, folder):
    model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model.eval()


def margins(model):
    """Score of the chosen less that of the rejected answer, pair by pair."""
    turns = [(f"{MARK}What is it?", [HOUSE]), (f"{MARK}What is it?", [HOUSE]), ("1 + 1?", []), ("x", [])]
    pairs = zip(turns, SAID, strict=True)
    compared = [
        model.compare(messages(query, good), image, messages(query, bad), image, hd_num=2, return_logits=True)[1]
        for (query, image), (good, bad) in pairs
    ]
    return [good - bad for good, bad in compared]


def test_every_format_gives_its_pair(data):
    rows = read_rows(data)
    assert all(isinstance(row, Pair) for row in rows)
    assert [tuple(side.turns[-1][1].strip() for side in row) for row in rows] == SAID
    assert [len(row.chosen.media) for row in rows] == [1, 1, 0, 0]
    assert rows[0].chosen.turns[0] == rows[1].rejected.turns[0] == ("user", f"{MARK}What is it?")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations_a": talk("x", "y")}, "conversations_a without conversations_b"),
        ({"rejected": "y", "prompt": "x"}, "rejected without chosen"),
        ({"prompt": "x", "chosen": "y", "rejected": " "}, "rejected: empty answer"),
        ({"prompt": "x", "chosen": 5, "rejected": "y"}, "chosen: "),
        ({"image": HOUSE, "chosen": messages(TYPED * 2, "a"), "rejected": messages(TYPED, "b")}, "chosen: more"),
    ],
)
def test_a_bad_pair_says_which_half(tmp_path, record, reason):
    (tmp_path / "bad.json").write_text(json.dumps([record]))
    (row,) = read_rows(tmp_path / "bad.json")
    assert isinstance(row, BadRow) and reason in row.reason


def test_a_batch_of_pairs_scores_as_get_scores_does(data, reward_model):
    model = with_tokenizer(load(reward_model), reward_model)
    config = AutoConfig.from_pretrained(reward_model, trust_remote_code=True)
    encoder = PairEncoder(config, model.tokenizer, hd_num=2)
    batch = PairCollator(encoder)([encoder(row) for row in read_rows(data)])
    with torch.no_grad():
        chosen, rejected = model(**batch).logits.flatten().chunk(2)
    assert (chosen - rejected).tolist() == pytest.approx(margins(model), abs=1e-5)


def test_full_from_a_reward_checkpoint(run, data, reward_model, tmp_path):
    status, found, _ = run(reward_model, "--mode", "full", "--eval_data", data, "--eval_strategy", "steps",
                           "--eval_steps", "3")  # fmt: skip
    assert status == 0 and found[-1] < found[0]
    before, after = (with_tokenizer(load(folder), reward_model) for folder in (reward_model, tmp_path / "out"))
    assert sum(margins(after)) > sum(margins(before))
    first = -torch.nn.functional.logsigmoid(torch.tensor(margins(before))).mean().item()
    assert found[0] == pytest.approx(first, rel=1e-3)  # two batches of two are the four pairs
    log = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert all(entry["eval_loss"] < first for entry in log if "eval_loss" in entry)
    assert any("eval_loss" in entry for entry in log)


def test_lora_from_a_chat_checkpoint(run, chat_model, tmp_path):
    peft = pytest.importorskip("peft")
    status, found, _ = run(chat_model, "--mode", "lora", "--lora_rank", 4, "--gradient_checkpointing")
    assert status == 0 and found[0] == pytest.approx(0.6931, abs=1e-3) and found[-1] < 0.6
    base = AutoModelForSequenceClassification.from_pretrained(chat_model, new_head=True, trust_remote_code=True)
    model = peft.PeftModel.from_pretrained(with_tokenizer(base, chat_model), tmp_path / "out").eval()
    assert min(margins(model)) > 0
    status, more, _ = run(chat_model, "--mode", "lora", "--start", tmp_path / "out", out="more")
    assert status == 0 and more[0] < found[-1] + 0.1


def test_rows_head_and_mode_go_together(run, data, chat_model, reward_model, tmp_path):
    single = {"query": "1 + 1?", "response": "2"}
    for name, records in (("single", [single]), ("mixed", [*RECORDS, single])):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    for model, argv, rows, said in (
        (reward_model, [], tmp_path / "single.json", "has a score head, which learns from pairs"),
        (chat_model, [], tmp_path / "mixed.json", "mixed.json row 5: a single conversation among pairs"),
        (chat_model, ["--mode", "adapter", "--task", "web"], data, "pairs, which train a score head"),
    ):
        status, _, err = run(model, *argv, rows=rows)
        assert status == 1 and said in err
        assert not (tmp_path / "out").exists()
