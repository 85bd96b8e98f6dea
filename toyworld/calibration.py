"""The rows that `xcomposer quantise` calibrates on where nobody gives it others, written into the package.

    python -m toyworld.calibration

A row is a picture, several or none, and a conversation about it with all sorts of the world's questions; pictures
stand in the file itself. Videos are left out: a file of JSON has none. Seeds are those of training.
"""

import argparse
import base64
import io
import json
import random
import sys
from pathlib import Path

from PIL import Image

from toyworld import scenes
from xcomposer.checkpoints.quantise import DEFAULT_CALIBRATION

ROWS = 128
QUESTIONS = 6  # of a row


def data_url(image: Image.Image) -> str:
    png = io.BytesIO()
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(png, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def row(kind: str, rng: random.Random) -> dict:
    """A view of this kind in the released format of training data."""
    view = scenes.view(kind, scenes.TRAIN_SEEDS[rng.randrange(len(scenes.TRAIN_SEEDS))])
    talk = []
    for question in rng.sample(view.questions, min(QUESTIONS, len(view.questions))):
        turns = [*question.turns[:-1], (question.turns[-1][0], question.begun + question.turns[-1][1])]
        for query, answer in turns:
            lead = "" if talk else view.lead
            talk += [{"from": "human", "value": lead + query}, {"from": "gpt", "value": answer}]
    images = {"image": [data_url(drawing.image) for drawing in view.drawings]} if view.drawings else {}
    return {**images, **({"system": view.system} if view.system else {}), "conversations": talk}


def write(path: Path, count: int = ROWS) -> Path:
    """Write `count` rows of all kinds in turn as JSON lines; returns `path`."""
    rng = random.Random("calibration")
    kinds = [kind for kind in scenes.KINDS if not kind.startswith("video")]
    rows = [row(kinds[number % len(kinds)], rng) for number in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_CALIBRATION)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args(arguments)
    print(write(options.out, options.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
