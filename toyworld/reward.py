"""Give the demo checkpoint a score head of its own: right answers above wrong ones, by a head and a LoRA.

    python -m toyworld.reward --minutes 6      trains on one thread, writes demo/reward/
    python -m toyworld.reward --examine        ranks 400 fresh pairs

A pair is a question of the toy world with its right answer, and the same with an answer that is right elsewhere.
The demo's own weights stay as they are, and are not stored again.
"""

import argparse
import itertools
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import peft
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from toyworld import scenes
from xcomposer.finetune.data import pad
from xcomposer.finetune.modes import LORA_TARGETS
from xcomposer.model.reward_internlm_xcomposer2 import own_positions

REPO = Path(__file__).resolve().parents[1]

TASKS = ("shape", "colour", "position", "what", "exists", "count")
RANK, RATE, WARMUP = 16, 3e-3, 10
QUESTIONS, WRONG = 18, 3  # of a step, and wrong answers to each
TRIES = 60  # scenes that are asked for wrong answers
POOL = 60  # latest answers of a task, out of which wrong ones are taken


class Asked(NamedTuple):
    """One conversation with the right answer, then the same with wrong ones."""

    talks: list[list[dict]]
    images: list


class Asker:
    """Questions of every task in turn, with answers that would be right elsewhere.

    Args:
        wrong: how many; of a question of two answers there is one, and it stands again.
    """

    def __init__(self, seed: int, seeds: range, wrong: int):
        self.rng, self.seeds, self.wrong, self.turn = random.Random(f"asked {seed}"), seeds, wrong, 0
        self.answers: dict[str, list[str]] = {task: [] for task in TASKS}

    def scene(self, task: str) -> scenes.Scene:
        asked = scenes.scene(task, self.seeds[self.rng.randrange(len(self.seeds))])
        self.answers[task] = [*self.answers[task], asked.answer][-POOL:]
        return asked

    def others(self, task: str, answer: str) -> list[str]:
        for _ in range(TRIES):
            other = sorted({found for found in self.answers[task] if found != answer})
            if len(other) >= (1 if task == "exists" else 5):
                break
            self.scene(task)
        return [self.rng.choice(other) for _ in range(self.wrong)]

    def next(self) -> Asked:
        task, self.turn = TASKS[self.turn % len(TASKS)], self.turn + 1
        asked = self.scene(task)
        turns = [
            {"role": role, "content": text}
            for query, answer in (*asked.history, (asked.query, ""))
            for role, text in (("user", query), ("assistant", answer))
        ][:-1]
        answers = [asked.answer, *self.others(task, asked.answer)]
        return Asked([[*turns, {"role": "assistant", "content": said}] for said in answers], asked.images)


def load(folder: Path, adapter: Path | None = None, trained: bool = False):
    """The demo with a score head and a LoRA: those of `adapter`, or new ones.

    Args:
        trained: they are to be trained.
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, new_head=True, trust_remote_code=True
    )
    model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.reuse.disable()
    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=trained).eval()
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=LORA_TARGETS, modules_to_save=["score"], task_type="SEQ_CLS"
    )
    return peft.get_peft_model(model, lora).eval()  # without dropout


def shared_prefix(rows: list[list[int]]) -> int:
    """How many ids all rows begin with; each keeps one at least."""
    same = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*(row[:-1] for row in rows), strict=False))
    return len(list(same))


def loss_of(model, batch: list[Asked]) -> torch.Tensor:
    """Bradley-Terry: mean of -log sigmoid(right - wrong). Picture and question run once for all their answers."""
    base = model.get_base_model()
    prefixes, tails = [], []
    for asked in batch:
        rows = base._open_rows(asked.talks, [asked.images] * len(asked.talks), 4096, 1, True)
        ids = [row.prompt.input_ids for row in rows]
        shared = shared_prefix(ids)
        prefixes.append(rows[0]._replace(prompt=rows[0].prompt._replace(input_ids=ids[0][:shared])))
        tails += [row[shared:] for row in ids]
    with torch.no_grad():
        inputs = base._padded(prefixes)
    cache = base.model(**inputs, position_ids=own_positions(inputs["attention_mask"]), use_cache=True).past_key_values
    copies = len(tails) // len(prefixes)
    cache.batch_repeat_interleave(copies)
    tail, real = pad(tails, 2), pad([[1] * len(row) for row in tails], 0)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(copies, 0), real], dim=1)
    positions = own_positions(mask)[:, -tail.shape[1] :]
    scores = base(input_ids=tail, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    scores = scores.view(len(batch), copies)
    return -F.logsigmoid(scores[:, :1] - scores[:, 1:]).mean()


def train(folder: Path, out: Path, minutes: float, seed: int, start: Path | None = None) -> None:
    """Train for so long, from new weights or those of `start`, and write head and LoRA to `out`."""
    torch.manual_seed(seed)
    model = load(folder, start, trained=True)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    asker, started, step, mean = Asker(seed, scenes.TRAIN_SEEDS, WRONG), time.monotonic(), 0, 0.69
    while (spent := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP) * min(1, 2 * (1 - spent) + 0.02)
        loss = loss_of(model, [asker.next() for _ in range(QUESTIONS)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, mean = step + 1, 0.9 * mean + 0.1 * loss.item()
        if step % 10 == 0:
            print(f"step {step}, {spent:.0%}: loss {mean:.3f}", file=sys.stderr, flush=True)
    for parameter in weights:
        parameter.data = parameter.data.bfloat16()
    config = model.peft_config["default"]
    config.base_model_name_or_path = folder.name
    config.modules_to_save = sorted(set(config.modules_to_save))  # PEFT adds its names at each start
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)


def examine(folder: Path, adapter: Path, count: int) -> tuple[int, dict[str, list[int]]]:
    """How many of `count` fresh pairs have the right answer above, in all and (right, asked) by task."""
    model = load(folder, adapter)
    asker = Asker(0, scenes.EVAL_SEEDS, wrong=1)
    fresh = [asker.next() for _ in range(count)]
    scores = model.get_scores(
        [talk for found in fresh for talk in found.talks],
        [found.images for found in fresh for _ in range(2)],
        hd_num=1,
    )
    by_task: dict[str, list[int]] = {}
    for number, (right, wrong) in enumerate(zip(scores[::2], scores[1::2], strict=True)):
        hits = by_task.setdefault(TASKS[number % len(TASKS)], [0, 0])
        hits[0] += right > wrong
        hits[1] += 1
    return sum(hits for hits, _ in by_task.values()), by_task


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=REPO / "demo")
    parser.add_argument("--out", type=Path, help="folder of head and LoRA (default: reward/ in the model's)")
    parser.add_argument("--examine", action="store_true", help="rank fresh pairs; trains nothing")
    parser.add_argument("--count", type=int, default=400, help="fresh pairs")
    parser.add_argument("--minutes", type=float, default=6, help="of training")
    parser.add_argument("--start", type=Path, help="head and LoRA to go on from")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    out = options.out or options.model / "reward"
    torch.set_num_threads(1)
    if not options.examine:
        train(options.model, out, options.minutes, options.seed, options.start)
    right, by_task = examine(options.model, out, options.count)
    print("| task | right above wrong | pairs |\n|---|---|---|")
    for task, (hits, asked) in by_task.items():
        print(f"| {task} | {hits} | {asked} |")
    print(f"| all | {right} ({right / options.count:.1%}) | {options.count} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
