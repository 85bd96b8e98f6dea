"""Teach the demo checkpoint a shape it has never seen, the heart, with a LoRA; asks before and after.

    python -m toyworld.teach            draws, asks, trains for some minutes on two cores, asks again
    python -m toyworld.teach --out DIR  where the pictures, the rows and the LoRA go (default: build/teach)

The training is `xcomposer/finetune/run.py`'s, on rows any other trainer could read; half of them have no heart in the
picture, so that the old shapes stay.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import torch

from toyworld import scenes, views
from toyworld.world import COLOURS, SHAPES, Thing, draw_things

REPO = Path(__file__).resolve().parents[1]

NEW = "heart"
SETTINGS = [
    "--mode", "lora", "--lora_rank", "16", "--lora_alpha", "32", "--lora_dropout", "0", "--learning_rate", "2e-3",
    "--per_device_train_batch_size", "16", "--num_train_epochs", "1", "--hd_num", "1", "--bf16",
    "--logging_steps", "20", "--save_strategy", "no", "--report_to", "none",
]  # fmt: skip


def hearts(rng: random.Random) -> views.View:
    """A heart among up to two old shapes of other colours, and what may be asked of it."""
    things = [Thing(rng.choice(SHAPES), c, 0) for c in rng.sample(list(COLOURS), rng.randint(1, 3))]
    things[0] = things[0]._replace(shape=NEW)
    places = rng.sample(range(9), len(things))
    things = sorted((t._replace(place=p) for t, p in zip(things, places, strict=True)), key=lambda t: t.place)
    heart = next(t for t in things if t.shape == NEW)
    asked = [
        views.Question("shape", [(f"What shape is {heart.colour}?", NEW)]),
        views.Question("what", [(f"What is at the {views.PLACES[heart.place]}?", f"{heart.colour} {NEW}")]),
        views.Question("colour", [(f"What colour is the {NEW}?", heart.colour)]),
    ]
    return views.View("shapes", asked, (draw_things(rng, things),))


def rows(count: int, seed: int) -> list[tuple[views.View, views.Question]]:
    """As many questions, half of them on pictures with a heart, half on the world's own."""
    rng, found = random.Random(seed), []
    for number in range(count):
        view = hearts(rng) if number % 2 else scenes.view("shapes", scenes.TRAIN_SEEDS[rng.randrange(2**40)])
        asked = [q for q in view.questions if q.task in ("shape", "what", "colour", "caption", "exists")]
        found.append((view, rng.choice(asked)))
    return found


def write_rows(folder: Path, count: int, seed: int) -> Path:
    """Pictures and a file of JSON lines in the released format; returns that file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (view, question) in enumerate(rows(count, seed)):
        view.drawings[0].image.save(folder / f"{number}.png")
        ((query, answer),) = question.turns
        talk = [{"from": "human", "value": query}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"conversations": talk, "image": f"{number}.png"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.jsonl"


def ask(folder: Path, adapter: Path | None, count: int) -> dict[str, float]:
    """Per cent right on fresh pictures: what the heart is and has, and the old shapes."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.reuse.disable()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    rng = random.Random("asked")
    asked = [(f"heart: {q.task}", view, q) for view in (hearts(rng) for _ in range(count)) for q in view.questions]
    for task in ("shape", "what"):
        asked += [(f"old: {task}", None, scenes.scene(task, scenes.EVAL_SEEDS[k])) for k in range(count)]
    right: dict[str, list[bool]] = {}
    for start in range(0, len(asked), 25):
        part = asked[start : start + 25]
        queries = [found.turns[0][0] if view else found.query for _, view, found in part]
        images = [[view.drawings[0].image] if view else found.images for _, view, found in part]
        answers, _ = model.batch_chat(tokenizer, queries, images, do_sample=False, max_new_tokens=16)
        for (name, view, found), said in zip(part, answers, strict=True):
            right.setdefault(name, []).append(said == (found.turns[0][1] if view else found.answer))
    return {name: round(100 * sum(hits) / len(hits), 1) for name, hits in right.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=REPO / "demo")
    parser.add_argument("--out", type=Path, default=REPO / "build" / "teach")
    parser.add_argument("--rows", type=int, default=4800, help="to train on")
    parser.add_argument("--count", type=int, default=60, help="fresh pictures for each question")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    lora = options.out / "lora"
    if lora.exists():
        parser.error(f"{lora} holds an earlier lesson: remove it, or choose another --out")
    torch.set_num_threads(2)
    before = ask(options.model, None, options.count)
    data = write_rows(options.out / "pictures", options.rows, options.seed)
    place = [] if torch.cuda.is_available() else ["--use_cpu"]
    given = ["--model", str(options.model), "--data", str(data), "--output_dir", str(lora), "--seed", str(options.seed)]
    subprocess.run([sys.executable, "-m", "xcomposer", "finetune", *given, *SETTINGS, *place], check=True)
    after = ask(options.model, lora, options.count)
    print("\n| right, per cent | before | after |\n|---|---|---|")
    for name in before:
        print(f"| {name} | {before[name]:g} | {after[name]:g} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
