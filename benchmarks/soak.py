"""Random conversations with one model, in turns: every answer against a recomputation, and what the process holds.

    python benchmarks/soak.py --conversations 300

Turns, streams left early, pages, articles, videos, drafts, batches and errors, by a seed. The last line is JSON; the
exit status is 1 where a token differs, or where threads, open files or memory grow.

oneDNN keeps compiled kernels for each shape it meets, 1,024 by default, and conversations bring ever new shapes: its
caches are made small here, as in any process that is to run for long.
"""

from xcomposer.machine import bound_kernel_caches

bound_kernel_caches()  # before torch computes

import argparse  # noqa: E402
import gc  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
MARK = "<ImageHere>"
WORDS = "what colour is the circle left of red square how many shapes are there and why small blue line page".split()
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SIZES = ((112, 56), (64, 64), (60, 130), (168, 100))
MIB = 2**20


def picture(number: int) -> Image.Image:
    """Small pictures of several shapes, no two of the first 24 alike."""
    image = Image.new("RGB", SIZES[number % 4], "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((5 + number % 7, 5, 40, 40), fill=COLOURS[number % 6])
    draw.rectangle((10, 30, 25 + number % 5, 50), fill=COLOURS[(number + 1) % 6])
    return image


class Stop(Exception):
    """Raised in the middle of a generation."""


class Talk:
    """One conversation: its history, its sources, and the next call by chance."""

    def __init__(self, model, seed: int, sources: list[Any]):
        self.model, self.random, self.choices = model, random.Random(seed), sources
        self.history: list[tuple[str, str]] = []
        self.sources: list[Any] = []
        self.system = self.random.choice([{}, {"use_meta": True}])

    def words(self) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(2, 9)))

    def query(self) -> str:
        if len(self.sources) < 3 and self.random.random() < 0.5:
            self.sources.append(self.random.choice(self.choices))
            return f"{MARK} {self.words()}"
        return self.words()

    def given(self, **more) -> dict[str, Any]:
        tokens = self.random.choice([1, 4, 10])
        settings = {"do_sample": False, "max_new_tokens": tokens, "hd_num": 4, **self.system, **more}
        return {"image": list(self.sources), "history": list(self.history), **settings}

    # Each returns a call; what it returns is compared, and the first one's outcome is what the conversation goes on by.

    def turn(self, **more) -> Callable[[], Any]:
        query = self.query()
        given = self.given(**more)
        return lambda: self.model.chat(query=query, **given)[1]

    def stream(self) -> Callable[[], Any]:
        query = self.query()
        given = self.given()
        return lambda: list(self.model.stream_chat(query=query, **given))[-1][1]

    def leave(self) -> Callable[[], Any]:
        """A stream that is left after a few steps."""
        query, steps = self.query(), self.random.randint(1, 4)
        given = self.given(max_new_tokens=20, repetition_penalty=1.0)

        def call():
            stream = self.model.stream_chat(query=query, **given)
            said = list(itertools.islice(stream, steps))
            stream.close()
            return said[-1][1]

        return call

    def batch(self) -> Callable[[], Any]:
        """This conversation beside another question."""
        query, other = self.query(), self.words()
        given = self.given()
        image, history = given.pop("image"), given.pop("history")
        return lambda: self.model.batch_chat(None, [query, other], [image, []], [history, []], **given)[1][0]

    def fail(self) -> Callable[[], Any]:
        """A call that is wrong, or breaks off in the middle; the conversation is as it was."""
        given = self.given()
        if self.random.random() < 0.5:
            wrong = {**given, "image": [*given["image"], picture(0), picture(1)]}
        else:
            steps = self.random.randint(1, 3)

            def stop(ids, scores, **_):
                if ids.shape[1] >= steps:
                    raise Stop
                return torch.zeros(len(ids), dtype=torch.bool)

            wrong = {**given, "stopping_criteria": [stop], "max_new_tokens": 5, "min_new_tokens": 5}

        def call():
            try:
                self.model.chat(query="go on", **wrong)
            except (ValueError, Stop) as error:
                return type(error).__name__, given["history"]
            raise AssertionError("a wrong call gave an answer")

        return lambda: call()[1]

    def beside(self, method: str, **more) -> Callable[[], Any]:
        """A page or an article, which is no turn of the conversation."""
        query, before = self.words(), list(self.history)
        settings = {"do_sample": False, "max_new_tokens": 8, **more}
        return lambda: (getattr(self.model, method)(query, **settings), before)[1]

    STEPS: dict[str, Callable] = {
        "turn": turn,
        "beams": lambda self: self.turn(num_beams=2),
        "sampled": lambda self: self.turn(do_sample=True, temperature=1.5, seed=self.random.randrange(99)),
        "web turn": lambda self: self.turn(infer_mode="web"),
        "drafts": lambda self: self.turn(prompt_lookup_num_tokens=3),
        "stream": stream,
        "stream left": leave,
        "batch": batch,
        "error": fail,
        "page": lambda self: self.beside("write_webpage", num_beams=1, output_path=None),
        "article": lambda self: self.beside("write_artical"),
    }
    WEIGHTS = (6, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1)


@contextmanager
def recorded(model) -> Iterator[list]:
    """Token ids of each `generate`."""
    rows, generate = [], model.generate

    def record(*args, **kwargs):
        out = generate(*args, **kwargs)
        rows.append(out.tolist())
        return out

    model.generate = record
    try:
        yield rows
    finally:
        del model.generate


def compared(model, call: Callable[[], Any], exact: bool = True) -> tuple[Any, bool]:
    """A call with what is kept and without: its outcome, and whether outcome and tokens were the same.

    Args:
        exact: False where the number of tokens depends on the reader's pace.
    """
    with recorded(model) as rows:
        got = call()
        ours = list(rows)
        store, model.reuse = model.reuse, type(model.reuse)(0, 0)
        try:
            expected = call()
        finally:
            model.reuse = store
    return got, got == expected and (not exact or ours == rows[len(ours) :])


def holdings() -> dict[str, float]:
    """What this process holds now."""
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "threads": int(fields["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
        "rss_mib": int(fields["VmRSS"].split()[0]) * 1024 / MIB,
    }


def soak(
    model, conversations: int, seed: int = 0, turns: int = 4, open_at_once: int = 4, sources=(), note=None
) -> dict[str, Any]:
    """So many random conversations, a few of them open at a time.

    Args:
        sources: what a turn may be about, besides pictures and a video of frames.
        note: called with (conversations so far, what the process holds and how many calls differed) now and then.

    Returns:
        Numbers of calls of each kind, the calls that differed, and what the process held on the way.
    """
    chance = random.Random(seed)
    choices = [*map(picture, range(12)), [picture(4), picture(8), picture(12)], *sources]
    calls: Counter = Counter()
    different, held, begun = [], [], 0
    every = max(1, conversations // 20)
    talks: list[tuple[Talk, int]] = []
    while talks or begun < conversations:
        while len(talks) < open_at_once and begun < conversations:
            talks.append((Talk(model, seed * 10**6 + begun, choices), chance.randint(1, turns)))
            begun += 1
            if begun % every == 0:
                held.append(holdings())
                if note:
                    note(begun, {**held[-1], "different": len(different)})
        at = chance.randrange(len(talks))
        talk, left = talks.pop(at)
        (kind,) = chance.choices(list(Talk.STEPS), Talk.WEIGHTS)
        sources_before = list(talk.sources)
        call = Talk.STEPS[kind](talk)
        outcome, same = compared(model, call, exact=kind != "stream left")
        if kind == "error":
            talk.sources = sources_before
        talk.history = outcome
        calls[kind] += 1
        if not same:
            different.append({"call": sum(calls.values()), "kind": kind})
        if left > 1:
            talks.append((talk, left - 1))
    held.append(holdings())
    return {"calls": dict(calls), "different": different, "held": held}


def growth(held: list[dict[str, float]]) -> dict[str, float]:
    """How much more was held in the last quarter than in the second one, by the medians."""
    quarter = max(1, len(held) // 4)
    early, late = held[quarter : 2 * quarter], held[-quarter:]
    return {
        name: statistics.median(entry[name] for entry in late) - statistics.median(entry[name] for entry in early)
        for name in held[0]
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=REPO / "demo", help="checkpoint folder (default: demo)")
    parser.add_argument("--conversations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=4, help="most turns of a conversation")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 rounds more")
    parser.add_argument("--memory", type=float, default=64, help="MiB that may be held more at the end")
    options = parser.parse_args()
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=getattr(torch, options.dtype)).eval()
    model.tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    # Small limits, so that the oldest must go again and again.
    model.reuse.prefix_bytes, model.reuse.picture_bytes = 8 * MIB, MIB // 2
    files = sorted((REPO / "tests" / "golden" / "images").glob("small_*.png"))
    start = time.perf_counter()

    def note(count: int, held: dict[str, float]) -> None:
        kept = round(model.reuse.nbytes() / MIB, 2)
        print(json.dumps({"conversations": count, "kept_mib": kept, **held}), flush=True)

    sources = [str(file) for file in files]
    result = soak(model, options.conversations, options.seed, options.turns, sources=sources, note=note)
    grown = growth(result.pop("held"))
    flat = grown["threads"] <= 0 and grown["files"] <= 0 and grown["rss_mib"] <= options.memory
    about = {"conversations": options.conversations, "dtype": options.dtype, "seconds": time.perf_counter() - start}
    print(json.dumps({"benchmark": "soak", **about, **result, "grown": grown, "flat": flat}))
    return int(bool(result["different"]) or not flat)


if __name__ == "__main__":
    sys.exit(main())
