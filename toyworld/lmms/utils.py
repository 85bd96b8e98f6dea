"""The toy world as tasks of lmms-eval: the scenes, questions and marks of `python -m toyworld.evaluate`.

    python -m lmms_eval --model xcomposer2d5 --model_args pretrained=demo,use_meta=False \\
        --include_path toyworld/lmms --tasks 'toyworld_*' --batch_size 25

Run from the clone's root. Nothing is downloaded: a document is a task's name and a scene's number, and pictures are
drawn when they are asked for. `--limit N` takes as many scenes of each task as N holds.
"""

from functools import cache, partial
from typing import Any

from datasets import Dataset

from toyworld.evaluate import checks
from toyworld.scenes import EVAL_SEEDS, Scene, scene
from xcomposer.model.prompting_internlm_xcomposer2 import chat_prompt

SCENES = 200  # of each task, as many as `evaluate` asks
HEAD, TAIL = chat_prompt("|").split("|")  # what stands around a conversation's only question

scene_of = cache(scene)


def documents(tasks: Dataset, mode: str) -> Dataset:
    """Scenes of the tasks that run in this mode, one of each task after the other."""
    names = [row["task"] for row in tasks if row["mode"] == mode]
    return Dataset.from_list([{"task": name, "number": number} for number in range(SCENES) for name in names])


base_documents = partial(documents, mode="base")
web_documents = partial(documents, mode="web")
write_documents = partial(documents, mode="write")


def read(doc: dict[str, Any]) -> Scene:
    return scene_of(doc["task"], EVAL_SEEDS[doc["number"]])


def visuals(doc: dict[str, Any]) -> list[Any]:
    """The scene's pictures; a video is one entry, the list of its frames."""
    return read(doc).images


def question(doc: dict[str, Any]) -> str:
    """The question; earlier turns stand before it as the prompt has them, since lmms-eval hands over one text."""
    asked = read(doc)
    return chat_prompt(asked.query, asked.history).removeprefix(HEAD).removesuffix(TAIL)


def answer(doc: dict[str, Any]) -> str:
    return read(doc).answer


def score(doc: dict[str, Any], said: list[str]) -> dict[str, bool]:
    """1 where the answer is right, under the task's name; what else `evaluate` checks of it, too."""
    expected = answer(doc)
    right = said[0] == expected
    return {"right": right, doc["task"]: right, **checks(doc["task"], expected, said[0])}
