"""How often the demo checkpoint is right, on scenes it was never trained on.

    python -m toyworld.evaluate                              greedy, bf16 as saved, 200 scenes a task
    python -m toyworld.evaluate --all --out demo/evaluation  every way of running, as .json and .md
    python -m toyworld.evaluate --tasks colour tiles --hd-num 1 --beams 3 --dtype fp32

An answer counts when it is the expected one, character by character. `html parses`, `html name` and `html colours`
judge the pages of `html`, `resume` and `screen`; `right place`, `right caption`, `right picture` and `edits keep facts`
what the article API reads from an answer. "Defaults" are the methods' own: sampled, pages by one beam.
"""

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from html.parser import HTMLParser
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

from toyworld import articles, scenes
from toyworld.world import COLOURS
from xcomposer.article import prompts
from xcomposer.model.chat_internlm_xcomposer2 import ARTICLE_SETTINGS, CHAT_SETTINGS, PAGE_SETTINGS

REPO = Path(__file__).resolve().parents[1]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# With bitsandbytes: the decoder's own linears, as `quantization_config=` of the model has it.
QUANTISED = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
LONGEST = 160  # tokens of an answer
# Least accuracy in per cent, for the tasks that the repo's own bar names.
ASKED = {
    **dict.fromkeys(("talk", "identity", "count", "shape", "more"), 97),
    **dict.fromkeys(("colour", "exists", "count.zh", "shape.zh", "more.zh", "colour.zh", "exists.zh", "read12"), 90),
    **dict.fromkeys(("position", "which", "article", "html name"), 85),
    **dict.fromkeys(("html parses", "html colours"), 95),
    **dict.fromkeys(("caption", "follow", "screen"), 75),
    "tiles": 80,
    **dict.fromkeys(("right place", "right caption", "edits keep facts"), 85),
    "right picture": 90,
    **dict.fromkeys(("video", "read35"), 60),
}


class Way(NamedTuple):
    """One way of running the model; hd_num None is the default, mode None the task's own adapter.

    sampled: as the task's public method does it by default, but for the number of beams.
    """

    dtype: str = "bf16"
    beams: int = 1
    hd_num: int | None = None
    mode: str | None = None
    sampled: bool = False

    @property
    def name(self) -> str:
        parts = [self.dtype, "defaults" if self.sampled else "greedy" if self.beams == 1 else f"{self.beams} beams"]
        parts += [f"hd_num {self.hd_num}"] * (self.hd_num is not None) + [f"{self.mode} mode"] * (self.mode is not None)
        return ", ".join(parts)


WAYS = (Way(), Way(sampled=True), Way(beams=3), Way("fp32"), Way("int8"), Way(hd_num=1), Way(mode="base"))
GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
SAMPLED = {"base": CHAT_SETTINGS, "write": ARTICLE_SETTINGS, "web": PAGE_SETTINGS}
OTHERS = ("max_new_tokens", "max_length", "num_beams", "use_meta", "seed")  # that are not of the sampling


class Tags(HTMLParser):
    """Whether every tag is closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.whole, self.seen = True, 0

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen += 1

    def handle_endtag(self, tag):
        self.whole = self.whole and bool(self.open) and self.open.pop() == tag


def parses(html: str) -> bool:
    tags = Tags()
    tags.feed(html)
    tags.close()
    return tags.whole and not tags.open and tags.seen > 2


def colours_of(html: str) -> list[str]:
    """Colour words in the order in which a page's styles name them."""
    return [word for word in re.findall(r"(?:color|background):([^;}\"]*)", html) if word in COLOURS]


def page_checks(task: str, answer: str, said: str) -> dict[str, bool]:
    """What is right about a page."""
    found = {"html parses": parses(said), "html colours": colours_of(said) == colours_of(answer)}
    if task in ("html", "resume"):
        title = answer.split("</h1>")[0].rsplit("<h1>", 1)[1]
        found["html name"] = f"<h1>{title}</h1>" in said
    return found


def article_checks(task: str, answer: str, said: str) -> dict[str, bool]:
    """What is right about an answer as the article API reads it; nothing of what it never asks."""
    if task.startswith("edit_"):
        return {"edits keep facts": articles.facts(said) == articles.facts(answer)}
    reads = {
        "article_places": ("right place", lambda text: prompts.places_of(text, 100)),
        "article_caption": ("right caption", prompts.caption_of),
        "article_choice": ("right picture", lambda text: prompts.letter_of(text, prompts.LETTERS)),
    }
    if task not in reads:
        return {}
    name, read = reads[task]
    return {name: read(said) == read(answer)}


def checks(task: str, answer: str, said: str) -> dict[str, bool]:
    """What is asked of an answer beside that it is the very one."""
    if task in ("html", "resume", "screen"):
        return page_checks(task, answer, said)
    return article_checks(task, answer, said) if task.startswith(("article_", "edit_")) else {}


@lru_cache(maxsize=1)
def load(folder: Path, dtype: str):
    """Model and tokenizer of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder has no weights.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors: run python -m toyworld.train --out {folder} first")
    quantised = QUANTISED.get(dtype)
    config = {"quantization_config": BitsAndBytesConfig(**quantised)} if quantised else {}
    settings = {"dtype": DTYPES.get(dtype, torch.bfloat16), "trust_remote_code": True, "task_adapters": "all", **config}
    model = AutoModel.from_pretrained(folder, **settings).eval()
    model.reuse.prefix_bytes = 0
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def answer_all(model, tokenizer, asked: Sequence[scenes.Scene], way: Way, rows: int = 25) -> list[str]:
    """The model's answers, several conversations at once."""
    said: list[str] = []
    mode = way.mode or asked[0].mode
    settings = GREEDY
    if way.sampled:
        settings = {name: value for name, value in SAMPLED[mode].items() if name not in OTHERS}
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        answers, _ = model.batch_chat(
            tokenizer,
            [s.query for s in part],
            [s.images for s in part],
            [s.history for s in part],
            hd_num=way.hd_num,
            infer_mode=mode,
            use_meta=bool(part[0].system),
            meta_instruction=part[0].system or None,
            answer_start=part[0].begun,
            num_beams=way.beams,
            max_new_tokens=LONGEST,
            seed=start if way.sampled else -1,
            **settings,
        )
        said += answers
    return said


def evaluate(folder: Path, way: Way, task: str, count: int, seed: int) -> dict[str, list[int]]:
    """(right, asked) of a task, and of what is checked on its pages."""
    found: dict[str, list[int]] = {}

    def note(name: str, right: bool) -> None:
        pair = found.setdefault(name, [0, 0])
        pair[0] += right
        pair[1] += 1

    asked = [scenes.scene(task, scenes.EVAL_SEEDS[seed + i]) for i in range(count)]
    for scene, said in zip(asked, answer_all(*load(folder, way.dtype), asked, way), strict=True):
        note(task, said == scene.answer)
        for name, right in checks(task, scene.answer, said).items():
            note(name, right)
    print(f"{way.name} | {task}: {found[task][0]} of {found[task][1]}", file=sys.stderr, flush=True)
    return found


def evaluate_all(
    folder: Path, jobs: Sequence[tuple[Way, str]], count: int, seed: int, processes: int
) -> dict[str, dict[str, list[int]]]:
    """The jobs, shared among processes of one thread each: way -> task -> (right, asked)."""
    found: dict[str, dict[str, list[int]]] = {}
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running = [(way, pool.submit(evaluate, folder, way, task, count, seed)) for way, task in jobs]
        for way, job in running:
            of_way = found.setdefault(way.name, {})
            for name, (right, asked) in job.result().items():
                before = of_way.get(name, (0, 0))
                of_way[name] = [before[0] + right, before[1] + asked]
    return found


def table(found: dict[str, dict[str, list[int]]]) -> str:
    """Markdown: a row for each task, a column for each way, per cent; the last column says what is asked."""
    names = list(dict.fromkeys(task for of_way in found.values() for task in of_way))
    lines = ["| task | " + " | ".join(found) + " | asked |", "|---" * (len(found) + 2) + "|"]
    for name in names:
        cells = [f"{100 * w[name][0] / w[name][1]:.1f}" if name in w else "" for w in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ASKED.get(name, '')} |")
    return "\n".join(lines)


def tasks_of(way: Way, tasks: Sequence[str]) -> list[str]:
    """Tasks for which a way says something of its own; beyond the first way, those that the bar names."""
    if way.hd_num is not None:
        return [task for task in tasks if task.startswith("tiles")]
    if way.mode is not None:
        return [task for task in tasks if scenes.TASKS[task][0] in ("web", "screen", "write", "story")]
    named = {*ASKED, "html", "resume", *articles.TASKS}
    return [task for task in tasks if way == WAYS[0] or task in named]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=REPO / "demo")
    tasks = [task for task in scenes.TASKS if task not in articles.PARTS]
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks, metavar="TASK")
    parser.add_argument("--count", type=int, default=200, help="scenes a task")
    parser.add_argument("--seed", type=int, default=0, help="where in the evaluation seeds to begin")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--dtype", choices=[*DTYPES, *QUANTISED], default="bf16")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--hd-num", type=int)
    parser.add_argument("--mode", help="an infer_mode for every task (default: the task's own)")
    parser.add_argument("--sampled", action="store_true", help="as the task's public method samples by default")
    parser.add_argument("--all", action="store_true", help="every way of running")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], metavar="WAY", help="columns of --all")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args(arguments)
    ways = WAYS if options.all else tuple(way for way in WAYS if way.name in (options.ways or ()))
    options.all = bool(ways)
    ways = ways or (Way(options.dtype, options.beams, options.hd_num, options.mode, options.sampled),)
    if any(way.dtype in QUANTISED for way in ways) and find_spec("bitsandbytes") is None:
        parser.error("int8 and nf4 need bitsandbytes: pip install bitsandbytes")
    started = time.monotonic()
    load(options.model, "fp32")  # a folder without weights is said here
    jobs = [(way, task) for way in ways for task in (tasks_of(way, options.tasks) if options.all else options.tasks)]
    found = evaluate_all(options.model, jobs, options.count, options.seed, options.processes)
    print(table(found))
    if options.out:
        facts = {"count": options.count, "seed": options.seed, "minutes": round((time.monotonic() - started) / 60, 1),
                 "python": platform.python_version(), "torch": torch.__version__,
                 "transformers": transformers.__version__, "right_and_asked": found}  # fmt: skip
        options.out.with_suffix(".json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")
        options.out.with_suffix(".md").write_text(table(found) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
