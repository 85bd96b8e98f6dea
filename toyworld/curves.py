"""`log.jsonl` of a training run -> `curves.json` and `curves.png`: losses and running accuracy by task.

    python -m toyworld.curves build/demo/run/log.jsonl demo/curves

Training never shows a picture twice, so the accuracy of its batches is an estimate on unseen pictures; the table of
`evaluate.py` is the one that counts.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, EDGE = 460, 250, 40
INKS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf", "#e377c2", "#7f7f7f")
PANELS = {
    "shapes": ("shape", "colour", "position", "what", "exists", "caption", "follow"),
    "counting": ("count", "count_of", "more", "count.zh", "more.zh"),
    "reading": ("read12", "read35", "tiles", "read12.zh", "tiles.zh"),
    "several pictures, video": ("which", "what_of", "video", "first", "last", "frames"),
    "text": ("talk", "identity", "next", "repeat", "script", "article"),
    "Chinese": ("shape.zh", "colour.zh", "position.zh", "exists.zh", "caption.zh", "which.zh", "video.zh"),
    "pages": ("html", "resume", "screen"),
    "articles": ("story", "article_places", "article_caption", "article_choice"),
    "edits": ("edit_expand", "edit_rewrite", "edit_shorten", "edit_insert"),
    "vision tower": ("collage dense class", "collage dense colour", "dense class", "dense colour"),
}
Curve = list[tuple[float, float]]


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curves_of(log: list[dict], window: int = 4) -> dict[str, dict[str, Curve]]:
    """Loss by kind and accuracy (per cent) by task over minutes; accuracy over the last few lines together."""
    losses: dict[str, Curve] = {}
    right: dict[str, list[tuple[float, int, int]]] = {}
    for line in log:
        for kind, loss in line["loss"].items():
            losses.setdefault(kind, []).append((line["minutes"], loss))
        for task, (hits, asked) in line["right"].items():
            right.setdefault(task, []).append((line["minutes"], hits, asked))
    accuracy: dict[str, Curve] = {}
    for task, points in right.items():
        for end in range(1, len(points) + 1):
            part = points[max(0, end - window) : end]
            share = 100 * sum(hits for _, hits, _ in part) / max(1, sum(asked for _, _, asked in part))
            accuracy.setdefault(task, []).append((points[end - 1][0], round(share, 1)))
    return {"loss": losses, "accuracy": accuracy}


def panel(title: str, lines: dict[str, Curve], last: float) -> Image.Image:
    """One plot: minutes to the right, per cent upwards."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    wide, high = WIDTH - 2 * EDGE - 90, HEIGHT - 2 * EDGE
    for percent in (0, 25, 50, 75, 100):
        y = HEIGHT - EDGE - high * percent / 100
        draw.line((EDGE, y, EDGE + wide, y), fill="#dddddd")
        draw.text((EDGE - 6, y), str(percent), font=font, fill="black", anchor="rm")
    draw.text((EDGE, 14), title, font=ImageFont.load_default(14), fill="black", anchor="lm")
    draw.text((EDGE + wide, HEIGHT - 20), f"{last:.0f} min", font=font, fill="black", anchor="rm")
    for k, (name, points) in enumerate(lines.items()):
        spots = [(EDGE + wide * x / last, HEIGHT - EDGE - high * y / 100) for x, y in points]
        draw.line(spots, fill=INKS[k % len(INKS)], width=2)
        draw.text((EDGE + wide + 8, EDGE + 16 * k), name, font=font, fill=INKS[k % len(INKS)], anchor="lm")
    return image


def draw_curves(log: list[dict], stem: Path) -> None:
    """Write STEM.json and STEM.png."""
    curves = curves_of(log)
    stem.with_suffix(".json").write_text(json.dumps(curves, ensure_ascii=False) + "\n", encoding="utf-8")
    last = max(line["minutes"] for line in log)
    sheet = Image.new("RGB", (2 * WIDTH, HEIGHT * ((len(PANELS) + 1) // 2)), "white")
    for k, (title, tasks) in enumerate(PANELS.items()):
        lines = {task: curves["accuracy"][task] for task in tasks if task in curves["accuracy"]}
        sheet.paste(panel(title, lines, last), (WIDTH * (k % 2), HEIGHT * (k // 2)))
    sheet.save(stem.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    draw_curves(read_log(Path(sys.argv[1])), Path(sys.argv[2]))
