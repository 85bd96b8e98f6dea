"""Questions about the demo's pictures as a task of lm-eval."""

import json
import os
from pathlib import Path

import datasets
from PIL import Image

QUESTIONS = Path(__file__).parents[1] / "questions.jsonl"


def load(**_):
    """The questions as lm-eval's test split."""
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return {"test": datasets.Dataset.from_list(rows)}


def pictures(doc):
    return [Image.open(Path(os.environ["DEMO"]) / "pictures" / name).convert("RGB") for name in doc["pictures"]]


def question(doc):
    return "<image>" * len(doc["pictures"]) + doc["question"]
