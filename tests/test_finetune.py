"""Training runs on a tiny checkpoint: each mode, resuming, refusals, two processes, and what is saved."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import MARK, REPO, load, tiny
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer

from xcomposer import chat
from xcomposer.finetune import modes, training
from xcomposer.finetune import run as finetune
from xcomposer.finetune.data import Collator, Encoder
from xcomposer.finetune.formats import Row, row_of

DATA = REPO / "examples" / "data"
HOUSE, SHAPES = str(DATA / "house.png"), str(DATA / "shapes.png")
RECORDS = [
    {"query": f"<img>{HOUSE}</img>What is it?", "response": "a house"},
    {"query": "hello", "response": "hi there"},
    {"conversations": [{"from": "human", "value": f"{MARK} and {MARK}: compare"},
                       {"from": "gpt", "value": "They differ."}], "image": [HOUSE, SHAPES]},
    {"query": "1 + 1?", "response": "2"},
]  # fmt: skip
COMMON = ("--use_cpu --disable_tqdm True --dataloader_num_workers 0 --hd_num 2 --learning_rate 5e-3 "
          "--per_device_train_batch_size 2 --max_steps 6").split()  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Without dropout, so that a loss can be computed again."""
    config = {"plora_dropout": 0.0}
    return tiny.write_checkpoint(tmp_path_factory.mktemp("base") / "IXC-2.5 base v1.0", config=config)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.fixture
def run(base, data, tmp_path, capsys):
    """Runs the script in this process: (exit status, losses, stderr)."""

    def run(*argv, out="out", model=base, rows=data):
        out = tmp_path / out
        capsys.readouterr()
        argv = ["--model", str(model), "--data", str(rows), "--output_dir", str(out), *COMMON, *map(str, argv)]
        status = finetune.main(argv)
        return status, losses(out), capsys.readouterr().err

    return run


def losses(out):
    file = out / "loss.json"
    return [entry["loss"] for entry in json.loads(file.read_text()) if "loss" in entry] if file.exists() else []


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})
    return found


def changed(folder, base):
    """Names of the base's tensors that a saved model has other values for."""
    old, new = tensors(base), tensors(folder)
    assert {name for name in old if "post_layernorm" not in name} <= new.keys()
    return {name for name in new if name not in old or not torch.equal(old[name], new[name])}


def batch(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    encoder = Encoder(config, AutoTokenizer.from_pretrained(folder, trust_remote_code=True), hd_num=2)
    return Collator(encoder)([encoder(row_of(record)) for record in RECORDS])


@torch.no_grad()
def loss_of(model, folder, mode="base"):
    return model(**batch(folder), infer_mode=mode).loss.item()


# What each mode trains, and what it saves.


def test_full(run, base, tmp_path, capsys):
    status, found, _ = run("--mode", "full", "--eval_data", tmp_path.parent / "none.json")
    assert status == 1 and not found
    status, found, _ = run("--mode", "full", "--gradient_checkpointing")
    assert status == 0 and len(found) == 6 and found[-1] < found[0]
    out = tmp_path / "out"
    moved = changed(out, base)
    assert not any(".lora_" in name for name in moved)
    still = {name for name in tensors(out) if ".lora_" not in name} - moved
    # behind the last attention an image token is read by nobody
    assert all(re.search(r"layers\.1\..*(wo|w1|w2|w3)\.Plora_", name) for name in still), still
    assert loss_of(load(out), out) < loss_of(load(base), base)
    assert loss_of(load(out), out, "web") > 0  # the task adapters came along
    assert chat.main(["--model", str(out), "--text", "hello", "--greedy", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("hello\n")


@pytest.mark.parametrize("part", modes.PARTS)
def test_frozen_parts(base, part):
    model = modes.load_model(base, "full")
    modes.prepare_full(model)
    every = set(modes.trainable_names(model))
    modes.prepare_full(model, (part,))
    frozen = every - set(modes.trainable_names(model))
    words = {"vision_tower": ["vision_tower"], "projector": ["vision_proj", "_GN"], "partial_lora": ["Plora_"]}[part]
    assert frozen == {name for name in every if any(word in name for word in words)} != set()
    assert every == {name for name, _ in model.named_parameters()}


def test_lora(run, base, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    status, found, _ = run("--mode", "lora", "--lora_rank", 4, "--lora_alpha", 8, "--gradient_checkpointing")
    assert status == 0 and found[-1] < found[0]
    out = tmp_path / "out"
    names = tensors(out)
    assert len(names) == 2 * 5 * 2 and all(".linear.lora_" in name for name in names)
    before = loss_of(load(base), base)
    trained = loss_of(peft.PeftModel.from_pretrained(load(base), out), base)
    assert trained < before
    assert chat.main(["--model", str(base), "--adapter", str(out), "--text", "hello", "--greedy",
                              "--max_new_tokens", "5"]) == 0  # fmt: skip
    status, more, _ = run("--mode", "lora", "--start", out, out="more")
    assert status == 0 and more[0] < found[0] - 0.1
    assert tensors(tmp_path / "more").keys() == names.keys()


def test_qlora(run, base, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    status, found, _ = run("--mode", "qlora", "--lora_rank", 4, "--bf16")
    assert status == 0 and found[-1] < found[0]
    assert all(".linear.lora_" in name for name in tensors(tmp_path / "out"))
    model = modes.load_model(base, "qlora")
    kinds = {name: type(p).__name__ for name, p in model.named_parameters() if type(p).__name__ != "Parameter"}
    assert set(kinds.values()) == {"Params4bit"} and all(name.endswith(".linear.weight") for name in kinds)


@pytest.mark.parametrize("task, adapters", [("web", {"web"}), ("write", {"sft", "dpo"}), ("poem", {"poem"})])
def test_adapter(run, base, tmp_path, task, adapters):
    status, found, _ = run("--mode", "adapter", "--task", task, *(["--task_rank", 4] if task == "poem" else []))
    out = tmp_path / "out"
    assert status == 0 and len(found) == 6
    moved = changed(out, base)
    assert {name.split(".lora_")[1].split("_")[0] for name in moved} == adapters
    assert len(moved) == 2 * 5 * 2 * len(adapters)
    ranks = AutoConfig.from_pretrained(out, trust_remote_code=True).task_adapter_ranks
    assert ranks == {"sft": 8, "dpo": 8, "web": 16, **({"poem": 4} if task == "poem" else {})}
    before = loss_of(load(base), base, "base" if task == "poem" else task)
    model = load(out)
    assert loss_of(model, out, task) < before
    assert loss_of(model, out) == pytest.approx(loss_of(load(base), base), abs=1e-6)
    kept = tensors(out / "checkpoint-6")
    assert set(kept) == moved and all(torch.equal(kept[name], tensors(out)[name]) for name in kept)


def test_a_released_bf16_checkpoint_stays_bf16(run, tmp_path):
    model = tiny.write_checkpoint(tmp_path / "bf16", config={"task_adapter_ranks": {}}, dtype="bfloat16")
    for mode in (["full"], ["adapter", "--task", "web", "--task_rank", 4]):
        status, found, _ = run("--mode", *mode, "--bf16", model=model, out=mode[0])
        assert status == 0
        saved = tensors(tmp_path / mode[0])
        assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
        assert AutoConfig.from_pretrained(tmp_path / mode[0], trust_remote_code=True).dtype == torch.bfloat16


def test_only_the_adapter_is_trainable(base):
    model = modes.load_model(base, "adapter")
    assert modes.prepare_adapter(model, "write") == ("sft", "dpo")
    assert all(".task_" in name and (".sft." in name or ".dpo." in name) for name in modes.trainable_names(model))
    assert len(modes.trainable_names(model)) == 2 * 5 * 2 * 2
    with pytest.raises(ValueError, match="rank 16 in this checkpoint, but rank 4 is asked for"):
        modes.prepare_adapter(model, "web", rank=4)
    for name in ("base", "My Task", "a_b"):
        with pytest.raises(ValueError, match="cannot be called"):
            modes.prepare_adapter(model, name)


# Going on, and refusing to.


@pytest.mark.parametrize("mode", [["full"], ["lora"], ["adapter", "--task", "web"]], ids=lambda mode: mode[0])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(run, tmp_path, mode):
    if mode == ["lora"]:
        pytest.importorskip("peft")
    argv = ["--mode", *mode, "--save_steps", 2, "--save_total_limit", 9, "--gradient_accumulation_steps", 2,
            "--per_device_train_batch_size", 1, "--train_sampling_strategy", "group_by_length"]  # fmt: skip
    status, whole, _ = run(*argv)
    assert status == 0
    out = tmp_path / "out"
    result = tensors(out)
    status, _, error = run(*argv)
    assert status == 1 and "holds a run; add --resume" in error
    status, _, error = run(*argv, "--seed", 1, "--resume")
    assert status == 1 and "another run (seed 42 -> 1)" in error
    for checkpoint in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(out / checkpoint)
    for file in (*out.glob("*.safetensors"), out / "loss.json"):
        file.unlink()
    status, again, _ = run(*argv, "--resume")
    assert status == 0 and again == pytest.approx(whole, rel=1e-6)
    for name, tensor in tensors(out).items():
        torch.testing.assert_close(tensor, result[name], rtol=1e-5, atol=1e-6)


def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    status, _, error = run("--resume")
    assert status == 1 and "no run of this script" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_bad_rows_stop_the_run_before_the_weights(run, tmp_path, monkeypatch):
    rows = tmp_path / "bad.json"
    rows.write_text(json.dumps([*RECORDS, {"query": "<img>gone.png</img>", "response": "x"}, {"x": 1}]))
    with monkeypatch.context() as patch:
        patch.setattr(modes, "load_model", None)
        status, _, error = run("--mode", "full", rows=rows)
    assert status == 1 and not (tmp_path / "out").exists()
    assert "bad row: bad.json row 5: no file" in error and "bad row: bad.json row 6: unknown format" in error
    assert "2 bad rows" in error
    status, found, error = run("--mode", "full", "--skip-bad", rows=rows)
    assert status == 0 and "2 bad rows left out, 4 remain" in error


def test_wrong_switches(run):
    for argv, words in (
        (["--mode", "adapter"], "--task NAME"),
        (["--mode", "full", "--start", "x"], "full begins from --model"),
        (["--mode", "adapter", "--task", "My Task"], "cannot be called"),
    ):
        status, _, error = run(*argv)
        assert status == 1 and words in error


def test_out_of_memory_says_what_to_lower(run, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(finetune, "build_trainer", full)
    status, _, error = run("--mode", "full")
    assert status == 1
    for advice in ("per_device_train_batch_size 1 (it is 2", "--gradient_checkpointing", "--bf16", "--hd_num", "lora"):
        assert advice in error


def test_an_adapter_of_another_base(run, base, tmp_path):
    other = tiny.write_checkpoint(
        tmp_path / "other", config={"num_hidden_layers": 1, "hidden_size": 32, "plora_dropout": 0.0}
    )
    status, _, error = run("--mode", "adapter", "--task", "web", "--start", other)
    assert status == 1 and "trained on another base" in error
    assert "model.layers.0.attention.wqkv.lora_web_A.weight is (16, 32) there, (16, 64) here" in error
    assert "and" in error and "more" in error
    pytest.importorskip("peft")
    assert run("--mode", "lora", model=other, out="lora")[0] == 0
    status, _, error = run("--mode", "lora", "--start", tmp_path / "lora")
    assert status == 1 and "trained on another base" in error and "is 32 there, 64 here" in error


def test_evaluation_and_curve(run, data, tmp_path):
    status, _, _ = run("--mode", "full", "--eval_data", data, "--eval_strategy", "steps", "--eval_steps", 3)
    assert status == 0
    history = json.loads((tmp_path / "out" / "loss.json").read_text())
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_from_scratch_on_a_stream(base, tmp_path, monkeypatch):
    """The parts by themselves, as another script uses them: random weights, rows made on the way."""
    monkeypatch.chdir(tmp_path)
    config = AutoConfig.from_pretrained(base, trust_remote_code=True)
    encoder = Encoder(config, AutoTokenizer.from_pretrained(base, trust_remote_code=True), hd_num=1)
    model = AutoModel.from_config(config, trust_remote_code=True)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            for number in range(1000):
                name = ("red", "blue")[number % 2]
                picture = Image.new("RGB", (30, 30), name)
                yield encoder(Row([("user", f"{MARK}Which colour?"), ("assistant", name)], [picture]))

    arguments = training.Arguments("out", max_steps=12, learning_rate=3e-3, per_device_train_batch_size=4,
                                   use_cpu=True, dataloader_num_workers=0, save_strategy="no")  # fmt: skip
    trainer = training.IXCTrainer(model, arguments, train_dataset=Stream(), data_collator=Collator(encoder), base=base)
    trainer.train()
    trainer.save_model()
    found = losses(tmp_path / "out")
    assert found[-1] < 0.8 * found[0]
    saved = tensors(tmp_path / "out")
    assert saved.keys() == {name for name in tensors(base) if "post_layernorm" not in name}
    with torch.no_grad():
        ids = torch.tensor([[1, 5, 9]])
        assert torch.equal(load(tmp_path / "out")(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# Two processes.


def test_two_processes(base, tmp_path):
    """Ranks with pictures beside ranks with text alone, and steps of text alone; what they save loads alike."""
    rows = tmp_path / "rows.json"
    text = [{"query": f"{i} + {i}?", "response": str(2 * i)} for i in range(5)]
    rows.write_text(json.dumps([RECORDS[0], *text]))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(REPO / "finetune" / "finetune.py"), "--model", base, "--data", rows, "--output_dir", out,
               *COMMON, "--per_device_train_batch_size", "1", "--mode", "full"]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    found = losses(out)
    assert len(found) == 6 and found[-1] < found[0]
    model = load(out)
    assert loss_of(model, out) < loss_of(load(base), base)
    moved = changed(out, base)
    assert any("Plora_A" in name for name in moved) and any("vision_tower" in name for name in moved)
    trainer_state = tensors(out / "checkpoint-6")
    final = {name: tensor for name, tensor in tensors(out).items()}
    assert all(torch.equal(trainer_state[name], final[name]) for name in final)
    model.save_pretrained(tmp_path / "again")
    assert all(torch.equal(tensor, final[name]) for name, tensor in tensors(tmp_path / "again").items())
