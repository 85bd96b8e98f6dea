"""The model of lmms-eval (entry point `lmms_eval.models`): `lmms-eval --model xcomposer2d5` runs this one.

    lmms-eval --model xcomposer2d5 --model_args pretrained=FOLDER,hd_num=24 --tasks docvqa_val --batch_size 4

It takes the place of the class of that name in lmms-eval, which needs CUDA and the release's own code.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

import xcomposer  # noqa: F401  (registers the Auto classes)
from xcomposer.model.prompting_internlm_xcomposer2 import IMAGE_MARK

MANIFEST = ModelManifest(model_id="xcomposer2d5", simple_class_path="xcomposer.lmms_model.XComposer2D5")
SWITCH = {"true": True, "false": False}


def mark_images(context: str, count: int) -> str:
    """The question with a place for each of its pictures, as the release's examples write them.

    One picture goes unmarked, as in `chat`; a question that has its marks keeps them.
    """
    if count < 2 or IMAGE_MARK in context:
        return context
    return "".join(f"Image{number} {IMAGE_MARK}; " for number in range(1, count + 1)) + context


def cut(answer: str, stops: Iterable[str]) -> str:
    """The answer up to the first of the task's stop strings."""
    ends = [re.escape(stop) for stop in stops if stop]
    return re.split("|".join(ends), answer, maxsplit=1)[0] if ends else answer


def generation_settings(wanted: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as arguments of `batch_chat`; greedy unless it asks for a temperature."""
    settings = {
        "max_new_tokens": wanted.get("max_new_tokens") or 1024,
        "num_beams": wanted.get("num_beams") or 1,
        "infer_mode": wanted.get("infer_mode", "base"),
        "repetition_penalty": 1.0,
        "do_sample": bool(wanted.get("do_sample")) and bool(wanted.get("temperature")),
    }
    if settings["do_sample"]:
        settings.update(temperature=wanted["temperature"], top_p=wanted.get("top_p") or 1.0)
    return settings


class XComposer2D5(lmms):
    """Pictures and videos with questions, several at once.

    Args:
        pretrained: a folder, or a name on a hub.
        batch_size: questions answered at once.
        device: default: this process's card, else the CPU.
        dtype: "auto" as the weights were saved, else a torch dtype's name.
        hd_num: most tiles of a picture; default: `chat`'s own (24, or 6 where there are several).
        use_meta: whether the released system text stands in front, as in the release's examples.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "internlm/internlm-xcomposer2d5-7b",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        hd_num: int | None = None,
        use_meta: bool | str = True,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if str(batch_size).startswith("auto"):
            raise ValueError(f"batch_size={batch_size}: give a number; what fits depends on the pictures")
        if str(use_meta).lower() not in SWITCH:
            raise ValueError(f"use_meta must be true or false, got {use_meta!r}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        if max_batch_size is not None:
            self.batch_size = min(self.batch_size, int(max_batch_size))
        self.hd_num = None if hd_num is None else int(hd_num)
        self.use_meta = SWITCH[str(use_meta).lower()]
        asked_for = device if device is not None and self._world_size == 1 else self.accelerator.device
        self.device = torch.device(asked_for)
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self.model = AutoModel.from_pretrained(pretrained, dtype=dtype).eval().to(self.device)
        self.model.reuse.prefix_bytes = 0  # questions are not turns of one conversation

    def answer(self, questions: Sequence[tuple[str, list[Any]]], wanted: dict[str, Any]) -> list[str]:
        """Answers to questions, each with its pictures and videos (a path, or a list of frames)."""
        stops = wanted.get("until") or ()
        said, _ = self.model.batch_chat(
            self.tokenizer,
            [mark_images(context, len(visuals)) for context, visuals in questions],
            [visuals for _, visuals in questions],
            hd_num=self.hd_num,
            use_meta=self.use_meta,
            **generation_settings(wanted),
        )
        return [cut(text, [stops] if isinstance(stops, str) else stops) for text in said]

    def generate_until(self, requests) -> list[str]:
        """Answers, in the requests' order."""
        answers: list[str] = []
        bar = tqdm(total=len(requests), disable=self._rank != 0, desc="xcomposer2d5")
        for _, same in groupby((request.args for request in requests), key=lambda args: (repr(args[1]), args[4])):
            rows = list(same)
            wanted = rows[0][1]
            for start in range(0, len(rows), self.batch_size):
                questions = []
                for context, _, visuals_of, number, task, split in rows[start : start + self.batch_size]:
                    visuals = visuals_of(self.task_dict[task][split][number]) or []
                    questions.append((context, list(visuals)))
                answers += self.answer(questions, wanted)
                bar.update(len(questions))
        bar.close()
        return answers

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        raise NotImplementedError("xcomposer2d5 answers questions (generate_until); this task asks for likelihoods")

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError("xcomposer2d5 answers questions (generate_until); this task asks in several rounds")
