"""The toy world's scenes: seeded pictures, videos and texts, with questions and exact answers.

    view("shapes", seed)      one picture with every question of it: what training uses
    scene("colour", seed)     one question with its picture and answer: what evaluation uses

Seeds of training and of evaluation come from ranges that do not meet: `TRAIN_SEEDS`, `EVAL_SEEDS`.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from PIL import Image

from toyworld import articles, pages, views
from toyworld.views import MARK, View

TRAIN_SEEDS = range(0, 2**40)
EVAL_SEEDS = range(2**40, 2**41)

# Every kind of view; views of one kind have the same number of tiles, so a batch of one kind needs little padding.
KINDS: dict[str, Callable[[random.Random], View]] = {
    "shapes": views.shapes,
    "presence": views.presence,
    "crowd": views.crowd,
    **{f"read{n}": partial(views.reading, count=n) for n in range(1, 6)},
    "code2x1": partial(views.code, cols=2, rows=1, count=0),
    "code3x2": partial(views.code, cols=3, rows=2, count=0),
    "code2x3": partial(views.code, cols=2, rows=3, count=0),
    **{f"several{n}": partial(views.several, count=n) for n in (2, 3)},
    **{f"video{n}": partial(views.video, count=n) for n in range(3, 7)},
    "talk": pages.talk,
    "echo": pages.echo,
    "web": pages.web,
    "screen": pages.screen,
    "write": pages.write,
    **articles.KINDS,
}
# Task -> the kinds it is asked of. code2x1 is a step towards the larger ones: only training uses it.
TASKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("talk", "identity", "next"), ("talk",)),
    "repeat": ("echo",),
    **dict.fromkeys(("shape", "colour", "position", "what", "caption", "list", "places"), ("shapes",)),
    **dict.fromkeys(("exists", "exists_shape", "exists_colour"), ("shapes", "presence")),
    **dict.fromkeys(("count", "count_of", "each", "more"), ("crowd",)),
    "follow": ("shapes",),
    "read12": ("read1", "read2"),
    "read35": ("read3", "read4", "read5"),
    "tiles": ("code3x2", "code2x3"),
    **dict.fromkeys(("which", "which_shape", "which_colour", "what_of", "list_of"), ("several2", "several3")),
    **dict.fromkeys(("video", "first", "last", "frames"), tuple(f"video{n}" for n in range(3, 7))),
    **dict.fromkeys(("html", "resume", "script"), ("web",)),
    "screen": ("screen",),
    "article": ("write",),
    **articles.TASKS,
}
CHINESE = (
    "shape", "colour", "position", "what", "exists", "exists_shape", "exists_colour", "caption", "list", "places",
    "count", "count_of", "each", "more", "read12", "read35", "tiles", "which", "which_shape", "which_colour", "what_of",
    "list_of", "video", "first", "last", "frames", "next", "repeat",
)  # fmt: skip
TASKS.update({f"{task}.zh": TASKS[task] for task in CHINESE})


class Scene(NamedTuple):
    """One question of the toy world.

    images: what `chat` takes as `image`; a video is one entry, the list of its frames.
    history, query: the conversation; with several pictures it holds their marks.
    begun, system: how the answer begins, and the system turn; "" where there is none.
    """

    task: str
    images: list[Image.Image | list[Image.Image]]
    history: list[tuple[str, str]]
    query: str
    answer: str
    mode: str
    begun: str = ""
    system: str = ""


def view(kind: str, seed: int) -> View:
    """The view of this kind and seed, always the same.

    Raises:
        ValueError: an unknown kind, or a seed of neither range.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; use one of {sorted(KINDS)}")
    if seed not in TRAIN_SEEDS and seed not in EVAL_SEEDS:
        raise ValueError(f"seed {seed} lies neither in {TRAIN_SEEDS} (training) nor in {EVAL_SEEDS} (evaluation)")
    return KINDS[kind](random.Random(f"{kind} {seed}"))


def sources(of: View) -> list[Image.Image | list[Image.Image]]:
    """The view's pictures, or its video."""
    return [list(of.frames)] if of.frames else [drawing.image for drawing in of.drawings]


def scene(task: str, seed: int) -> Scene:
    """A question of this task.

    Raises:
        ValueError: as `view`.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; use one of {sorted(TASKS)}")
    if seed not in TRAIN_SEEDS and seed not in EVAL_SEEDS:
        raise ValueError(f"seed {seed} lies neither in {TRAIN_SEEDS} (training) nor in {EVAL_SEEDS} (evaluation)")
    seeds = TRAIN_SEEDS if seed in TRAIN_SEEDS else EVAL_SEEDS
    rng = random.Random(f"{task} {seed}")
    while True:  # not every view has every question
        found = view(rng.choice(TASKS[task]), seeds[rng.randrange(len(seeds))])
        asked = [question for question in found.questions if question.task == task]
        if asked:
            break
    question = rng.choice(asked)
    turns = question.turns
    turns = [(found.lead + turns[0][0], turns[0][1]), *turns[1:]]
    query, answer = turns[-1]
    return Scene(task, sources(found), turns[:-1], query, answer, found.mode, question.begun, found.system)


__all__ = ["EVAL_SEEDS", "KINDS", "MARK", "TASKS", "TRAIN_SEEDS", "Scene", "View", "scene", "sources", "view"]
