"""One training step: a batch through the real model, answers' loss, dense loss, and how many answers were right.

Legend: N tiles, P patches along a tile's side, S = P / 2, V vision width, B rows, T tokens, n pictures.
"""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.layout import IGNORE, Batch, attention_mask
from demo.recipe import LENGTH_POWER
from demo.world import CLASSES, COLOUR_NAMES


class DenseHeads(nn.Module):
    """What each patch shows, read from the vision tower; used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.classes, self.colours = nn.Linear(width, len(CLASSES)), nn.Linear(width, len(COLOUR_NAMES))

    def loss(self, features: Tensor, classes: Tensor, colours: Tensor) -> tuple[Tensor, dict[str, tuple[int, int]]]:
        """Features (N, P * P, V) and labels (N, P * P) -> loss, and (right, asked) by sort of label.

        Background weighs a tenth.
        """
        total, right = features.new_zeros(()), {}
        for head, labels, sort in ((self.classes, classes, "dense class"), (self.colours, colours, "dense colour")):
            logits = head(features).float()
            weight = torch.where(labels == 0, 0.1, 1.0) * (labels != IGNORE)
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
            total = total + (losses * weight.flatten()).sum() / weight.sum().clamp(min=1)
            asked = labels > 0
            right[sort] = (int((logits.argmax(-1) == labels)[asked].sum()), int(asked.sum()))
        return total, right


class Result(NamedTuple):
    """Losses of one batch and (right, asked) of each task."""

    answers: Tensor
    dense: Tensor
    right: dict[str, tuple[int, int]]


def patch_features(model, tiles: Tensor) -> Tensor:
    """Tiles (N, 3, tile, tile) -> (N, P * P, V)."""
    return model.model.vision_tower(tiles).last_hidden_state[:, 1:]


def picture_tokens(model, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch features (N, P * P, V) of pictures of one grid -> embeddings (n, tokens, D), as the model arranges them.

    A picture of one tile is its own global view and stands in `features` once.
    """
    body, (rows, cols) = model.model, grid
    code = sys.modules[type(body).__module__]  # the remote code's module, with the functions that it arranges by
    maps = code.merge_patches(features)
    per_picture = 1 if rows * cols == 1 else 1 + rows * cols
    sequences = []
    for picture in maps.split(per_picture):
        detail = code.join_tiles(picture[-rows * cols :], rows, cols)
        newline, separator = body.plora_sub_GN.to(maps), body.plora_glb_GN.to(maps)
        sequences.append(torch.cat([code.end_rows(picture[0], newline), separator[0], code.end_rows(detail, newline)]))
    return body.vision_proj(torch.stack(sequences))


def learn(model, heads: DenseHeads, batch: Batch) -> Result:
    """Forward of one batch."""
    embeds = model.get_input_embeddings()(batch.ids)
    image_mask = batch.ids == model.config.image_token_id
    dense, right = embeds.new_zeros(()), {}
    if batch.tiles is not None:
        features = patch_features(model, batch.tiles)
        dense, right = heads.loss(features, batch.classes, batch.colours)
        if batch.kind == "screen":  # its labels say nothing
            dense, right = embeds.new_zeros(()), {}
        pictures = picture_tokens(model, features, batch.grid)
        embeds = embeds.masked_scatter(image_mask[..., None], pictures.to(embeds))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=attention_mask(batch.branch),
        position_ids=batch.positions,
        image_mask=image_mask if batch.tiles is not None else None,
        infer_mode=batch.mode,
        use_cache=False,
    ).last_hidden_state
    learned = batch.targets != IGNORE
    logits = model.lm_head(hidden[learned]).float()
    targets = batch.targets[learned]
    row, _ = learned.nonzero(as_tuple=True)
    answer = row * 64 + batch.branch[learned]
    _, answer, length = answer.unique(return_inverse=True, return_counts=True)
    weights = length[answer].float() ** LENGTH_POWER
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / len(length)
    wrong = torch.zeros_like(length).index_add_(0, answer, (logits.argmax(-1) != targets).long())
    for task, misses in zip((task for tasks in batch.tasks for task in tasks), wrong.tolist(), strict=True):
        hits, asked = right.get(task, (0, 0))
        right[task] = (hits + (misses == 0), asked + 1)
    return Result(loss, dense, right)
