"""Questions about the demo's pictures as a task of lmms-eval's chat models."""

import os
from pathlib import Path

from PIL import Image


def pictures(doc):
    return [Image.open(Path(os.environ["DEMO"]) / "pictures" / name).convert("RGB") for name in doc["pictures"]]


def question(doc):
    return doc["question"]


def messages(doc):
    items = [{"type": "image", "url": picture} for picture in pictures(doc)]
    return [{"role": "user", "content": [*items, {"type": "text", "text": doc["question"]}]}]


def score(doc, said):
    return {"right": said[0] == doc["answer"]}
