"""What research code calls on the released model beside the public methods: its module tree and its training steps.

`model.vit`, `model.output`, `forward(samples=...)`, `interleav_wrap`, `text2emb` and their like, under the public
spellings. New code takes the processor and `labels=` instead.

Legend: B texts, T tokens, D decoder width, L image tokens of one picture, V vision width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.utils import logging

from .build_mlp import in_own_type
from .generation_internlm_xcomposer2 import PromptEmbeddings
from .ixc_utils import get_font, stack_tiles
from .media_internlm_xcomposer2 import load_media
from .prompting_internlm_xcomposer2 import (
    IGNORE_INDEX,
    IMAGE_MARK,
    TURN_CLOSE,
    TURN_OPEN,
    answer_labels,
    chat_prompt,
    place_images,
    tokenize_prompt,
    tokenize_with,
)

logger = logging.get_logger(__name__)


class ReleasedTower(nn.Module):
    """`vit.vision_tower` of the released tree, around the same tower."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.vision_model = tower

    def forward(self, pixel_values: Tensor, **kwargs):
        """Tiles (N, 3, tile, tile) -> the tower's output."""
        return self.vision_model(pixel_values, **kwargs)


class ReleasedVision(nn.Module):
    """`vit` of the released tree: its parameters have the released names, and are the model's own.

    It is made anew each time somebody asks for it, and so never part of the model's tree.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vision_tower = ReleasedTower(model.vision_tower)
        self._arrange, self._tile = model.arrange_pictures, model.config.tile

    def forward(self, images: list[Tensor], glb_GN: Tensor, sub_GN: Tensor) -> tuple[Tensor, list[int]]:
        """Pixels (1, 3, H, W) of several pictures -> merged patches (1, sum of L, 4 V) and each picture's L.

        Args:
            glb_GN, sub_GN: separator and newline, as `plora_glb_GN` and `plora_sub_GN`.
        """
        tiles, grids = stack_tiles([image.squeeze(0) for image in images], self._tile)
        with in_own_type(self.vision_tower.vision_model):
            sequences = self._arrange(tiles, grids.tolist(), glb_GN, sub_GN)
            return torch.cat(sequences)[None], [len(sequence) for sequence in sequences]


def flat(groups: Sequence[Any]) -> list[Any]:
    """A list, or the list of lists that the release's collator makes of it, as one list."""
    nested = bool(groups) and isinstance(groups[0], list | tuple)
    return [item for group in groups for item in group] if nested else list(groups)


class ReleaseClientsMixin:
    """The released tree's attributes, and the training steps of the released fine-tuning code."""

    max_length: int  # longest row of `forward(samples=...)`; what is beyond is cut

    @property
    def output(self) -> nn.Module:
        """The released tree's name of the head."""
        return self.lm_head

    @property
    def vision_proj(self) -> nn.Module:
        """The released tree's name of the projector."""
        return self.model.vision_proj

    @property
    def plora_glb_GN(self) -> Tensor | None:
        """Separator between global view and tiles (1, 1, 4 V)."""
        return self.model.held("plora_glb_GN")

    @property
    def plora_sub_GN(self) -> Tensor | None:
        """Newline that ends each row of image tokens (1, 1, 1, 4 V)."""
        return self.model.held("plora_sub_GN")

    @property
    def vit(self) -> ReleasedVision:
        """The released tree's vision part, called as `vit([pixels], plora_glb_GN, plora_sub_GN)`."""
        return ReleasedVision(self.model)

    @property
    def vis_processor(self):
        """PIL picture -> normalised pixels (3, H, W)."""
        return self.config.layout.normalised

    @property
    def font(self):
        """Label font of stitched videos: a font file in the model folder, else Pillow's own."""
        folder = self.config.name_or_path
        return get_font(folder=folder if Path(folder).is_dir() else None)

    def build_inputs(self, tokenizer, query: str, history: Sequence[tuple[str, str]] = (), meta_instruction: str = ""):
        """Token ids and mask (1, T) of a conversation without pictures, as `chat` lays it out."""
        return tokenizer([chat_prompt(query, history, meta_instruction)], return_tensors="pt")

    def prompt_wrap(self, img_embeds: Tensor, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """The text before the mark in `prompt`, then a picture: embeddings, mask of ones, labels of -100.

        Args:
            img_embeds: (B, L, D), see `encode_img`.

        Raises:
            ValueError: `prompt` has no mark, or several.
        """
        before, _ = place_images(prompt if IMAGE_MARK in prompt else IMAGE_MARK * 2, 1)
        text = self.encode_text(before, add_special_tokens=True).to(img_embeds)
        embeds = torch.cat([text.expand(len(img_embeds), -1, -1), img_embeds], dim=1)
        ones = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return embeds, ones, IGNORE_INDEX * ones

    def mask_human_targets(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) of training texts -> labels (B, T): answers, their ends, and -100 elsewhere."""
        tokenizer = self._tokenizer(None)
        header = tokenize_with(tokenizer)(f"{TURN_OPEN}assistant\n", False)
        close, end = (tokenizer.convert_tokens_to_ids(TURN_CLOSE), tokenizer.eos_token_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for row, ids in zip(labels, input_ids.tolist(), strict=True):
            real = ids[: ids.index(end) + 1] if end in ids else ids  # what follows a text's end is padding
            row[: len(real)] = torch.tensor(answer_labels(real, header, close))
        return labels

    def text2emb(self, text: Sequence[str], add_special_tokens: bool = False) -> tuple[BatchEncoding, Tensor]:
        """Training texts -> their tokens (`input_ids`, `attention_mask`, both (B, T)) and labels (B, T).

        Padded on the right, and cut at `max_length`.
        """
        tokenizer = self._tokenizer(None)
        rows = [tokenize_with(tokenizer)(one, add_special_tokens) for one in text]
        tokens = self._padded_rows(rows)
        return tokens, self.mask_human_targets(tokens["input_ids"])

    def _padded_rows(self, rows: list[list[int]]) -> BatchEncoding:
        """Token ids of several lengths as `input_ids` and `attention_mask` (B, T), on the embedding's device."""
        longest = max(map(len, rows))
        if longest > self.max_length:
            logger.warning_once(f"a training text of {longest} tokens is cut at model.max_length={self.max_length}")
        width, pad = min(longest, self.max_length), self._tokenizer(None).pad_token_id
        rows = [row[:width] for row in rows]
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask}).to(self.get_input_embeddings().weight.device)

    def interleav_wrap(
        self, img_list: Sequence[Any], text_list: Sequence[Any], image_nums: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training texts with pictures -> embeddings (B, T, D), attention mask, labels and image mask (B, T).

        Args:
            img_list: the pictures of all texts in order, pixels (1, 3, H, W) of whole tiles, or whatever `chat` takes.
            text_list: B texts with a mark for each picture (the only one may go unmarked), or a list around them.
            image_nums: pictures of each text.

        Raises:
            ValueError: marks and pictures differ in number.
        """
        texts = flat(text_list)
        if len(texts) != len(image_nums) or sum(image_nums) != len(img_list):
            raise ValueError(f"{len(img_list)} pictures for {len(texts)} texts, but image_nums is {list(image_nums)}")
        pixels = [one if isinstance(one, Tensor) else self._pixels(load_media(one), self.hd_num) for one in img_list]
        features, counts = self.vit(pixels, self.plora_glb_GN, self.plora_sub_GN)
        features, lengths = self.vision_proj(features)[0], iter(counts)
        place, tokenize = self.config.image_token_id, tokenize_with(self._tokenizer(None))
        rows = []
        for text, number in zip(texts, image_nums, strict=True):
            pieces, taken = place_images(text, number), [next(lengths) for _ in range(number)]
            rows.append(tokenize_prompt(pieces, taken, [place] * number, tokenize, bos_on_text=True))
        tokens = self._padded_rows([row.input_ids for row in rows])
        input_ids = tokens["input_ids"]
        im_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for mask, row in zip(im_mask, rows, strict=True):
            for start, end in row.image_spans:
                mask[start:end] = True
        embeds = PromptEmbeddings(self.get_input_embeddings(), input_ids)
        embeds.place(im_mask, self._uncut(features, rows, input_ids.shape[1]))
        targets = self.mask_human_targets(input_ids.masked_fill(im_mask, IGNORE_INDEX))
        return embeds.read(), tokens["attention_mask"], targets, im_mask

    @staticmethod
    def _uncut(features: Tensor, rows: Sequence[Any], width: int) -> Tensor:
        """The rows of `features` (all L, D) whose tokens stand before `width` in their text."""
        stands = [index < width for row in rows for start, end in row.image_spans for index in range(start, end)]
        return features if all(stands) else features[torch.tensor(stands, device=features.device)]

    def _inputs_of_samples(self, samples: dict[str, Any]) -> dict[str, Any]:
        """`samples` of the released data code as arguments of `forward`.

        Args:
            samples: `data_type`, ["text"] or ["multi"]; `text_input`, training texts; for "multi" `image`, for each
                text its picture or the list of its pictures; `infer_mode`, default "base".

        Raises:
            ValueError: another data type, or texts and pictures that differ in number.
        """
        kind, texts = samples["data_type"][0], flat(samples["text_input"])
        mode = {"infer_mode": samples.get("infer_mode", "base")}
        if kind == "text":
            tokens, labels = self.text2emb(texts, add_special_tokens=True)
            return {**tokens, "labels": labels, **mode}
        if kind != "multi":
            raise ValueError(f"data_type {kind!r}: use 'text', or 'multi' for texts with pictures")
        images = samples["image"]
        if len(images) != len(texts) or isinstance(samples["text_input"][0], list | tuple):
            images = flat(images)
        rows = [list(row) if isinstance(row, list | tuple) else [row] for row in images]
        pictures, counts = [picture for row in rows for picture in row], [len(row) for row in rows]
        embeds, mask, labels, im_mask = self.interleav_wrap(pictures, texts, counts)
        return {"inputs_embeds": embeds, "attention_mask": mask, "labels": labels, "im_mask": im_mask, **mode}
