"""Draw the pictures in `demo/pictures/`, things to ask the demo checkpoint about: `python -m toyworld.pictures`.

All come from the evaluation's seeds, so training has never seen them. `ask.md` lists what each can be asked and the
right answer.
"""

import random
from pathlib import Path

from PIL import Image

from toyworld import scenes
from toyworld.pages import RESUME_QUERY
from toyworld.world import Thing, draw_things

REPO = Path(__file__).resolve().parents[1]

FOLDER = REPO / "demo" / "pictures"
# File's name -> task, and the seed (counted from the first of evaluation) whose scene it shows.
SHOWN = {
    "shapes": ("colour", 10), "crowd": ("count", 3), "code": ("tiles", 5), "page": ("screen", 2), "pair": ("which", 4),
}  # fmt: skip
RESUME = ("resume", 1)
# What an article is written about, and the pictures it may choose from; the first two are right.
STORY = "Write a story about Miro, who saw a red circle and a blue star."
CANDIDATES = ("red circle", "blue star", "green ring", "yellow square")


def save(name: str, images: list[Image.Image]) -> list[str]:
    """Write a scene's pictures as PNG; returns their file names."""
    names = [f"{name}.png"] if len(images) == 1 else [f"{name}{k}.png" for k in range(1, len(images) + 1)]
    for file, image in zip(names, images, strict=True):
        image.save(FOLDER / file)
    return names


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    lines = ["| pictures | question | right answer |", "|---|---|---|"]
    for name, (task, number) in SHOWN.items():
        scene = scenes.scene(task, scenes.EVAL_SEEDS[number])
        files = save(name, scene.images)
        if scene.mode == "base":
            query = scene.query.replace("\n", " ")
            lines.append(f"| {', '.join(files)} | {query} | {scene.answer} |")
    resume = scenes.scene(RESUME[0], scenes.EVAL_SEEDS[RESUME[1]]).query.removeprefix(RESUME_QUERY)
    (FOLDER / "resume.md").write_text(resume, encoding="utf-8")
    (FOLDER / "candidates").mkdir(exist_ok=True)
    for number, name in enumerate(CANDIDATES):
        colour, shape = name.split()
        rng = random.Random(f"{name} {scenes.EVAL_SEEDS[number]}")
        image = draw_things(rng, [Thing(shape, colour, rng.randrange(9))]).image
        image.save(FOLDER / "candidates" / f"{colour}-{shape}.png")
    lines.append(f"| candidates/ | {STORY} | an article; pictures belong after its second and its fourth line |")
    (FOLDER / "ask.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
