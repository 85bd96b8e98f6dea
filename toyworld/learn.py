"""One training step: a batch through the real model, answers' loss, dense loss, and how many answers were right.

Legend: N tiles, P patches along a tile's side, S = P / 2, V vision width, B rows, T tokens, n pictures.
"""

import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toyworld.layout import IGNORE, Batch, attention_mask
from toyworld.recipe import LENGTH_POWER, NAMED, PENALTY, WORTH
from toyworld.world import (
    CHARACTERS,
    CLASSES,
    COLOUR_NAMES,
    COLOUR_ZH,
    COLOURS,
    PATCH,
    PLACE_ZH,
    PLACES,
    SHAPE_ZH,
    SHAPES,
    TILE,
)


class DenseHeads(nn.Module):
    """What each patch shows and where in its tile it is, read from the vision tower; used in training only.

    The place is what the decoder needs for "where": its own positions run through the rows of a picture, and it
    learns to count them slowly.
    """

    def __init__(self, width: int, vocab_size: int, patches: int = (TILE // PATCH) ** 2):
        super().__init__()
        self.classes, self.colours = nn.Linear(width, len(CLASSES)), nn.Linear(width, len(COLOUR_NAMES))
        self.places = nn.Linear(width, patches)
        # What every word loses or gains alike: without it the projector adds one large vector to every image token.
        self.word_bias = nn.Parameter(torch.zeros(vocab_size))

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
        where = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
        total = total + F.cross_entropy(self.places(features).float().flatten(0, 1), where.flatten())
        return total, right


class Names:
    """Which tokens name what a patch, or a place, shows: the projector is taught to speak the decoder's language.

    Image tokens whose embeddings are sums of the embeddings of their names can be looked up by attention as words can.
    """

    def __init__(self, tokenizer, vocab_size: int, device: str = "cpu"):
        def table(words_of: Iterable[tuple[str, ...]]) -> Tensor:
            rows = []
            for words in words_of:
                row = torch.zeros(vocab_size)
                for word in words:
                    ids = tokenizer(word, add_special_tokens=False).input_ids
                    row[ids] += 1 / len(ids)
                rows.append(row / max(1, len(words)))
            return torch.stack(rows).to(device)

        def both(word: str) -> tuple[str, str]:
            return word, f" {word}"

        shapes = [(*both(shape), SHAPE_ZH[shape]) for shape in SHAPES]
        self.classes = table([(), *shapes, *((character,) for character in CHARACTERS)])  # (classes, vocabulary)
        self.colours = table([(), *((*both(c), COLOUR_ZH[c], f"{COLOUR_ZH[c]}色") for c in COLOURS)])
        self.places = table([(*both(place), zh) for place, zh in zip(PLACES, PLACE_ZH, strict=True)])
        # Of a blank spot: not its place either, or every place is always named.
        self.nothing = torch.zeros(vocab_size, device=device)
        self.nothing[tokenizer.eos_token_id] = 1

    def loss(
        self, tokens: Tensor, embedding: Tensor, bias: Tensor, classes: Tensor, colours: Tensor, placed: bool
    ) -> Tensor:
        """Projected tokens (N, S * S, D), the word embeddings, labels (N, P * P) -> cross entropy over the vocabulary.

        placed: the picture is one tile, so that tokens have places too.
        """
        side = int(classes.shape[1] ** 0.5) // 2
        wanted = tokens.new_zeros(*tokens.shape[:2], len(embedding))
        for table, labels in ((self.classes, classes), (self.colours, colours)):
            grid = cells(labels.clamp(min=0), side)
            wanted = wanted + table[grid].sum(2) / (grid > 0).sum(-1, keepdim=True).clamp(min=1)
        filled = (cells(classes, side) != 0).any(-1, keepdim=True)
        legible = (cells(classes, side) >= 0).all(-1, keepdim=True)
        wanted = torch.where(filled, wanted + self.places * placed, self.nothing) * legible
        mass = wanted.sum(-1)
        logits = (tokens @ embedding.detach().t()).float() + bias
        losses = -(logits.log_softmax(-1) * wanted).sum(-1) / mass.clamp(min=1e-6)
        return (losses * (mass > 0)).sum() / (mass > 0).sum().clamp(min=1)


def cells(labels: Tensor, side: int) -> Tensor:
    """Labels of patches (N, P * P) -> of the four patches of each merged token (N, S * S, 4)."""
    return labels.view(-1, side, 2, side, 2).transpose(2, 3).reshape(-1, side * side, 4)


class Result(NamedTuple):
    """Losses of one batch and (right, asked) of each task."""

    answers: Tensor
    dense: Tensor
    right: dict[str, tuple[int, int]]


def patch_features(model, tiles: Tensor) -> Tensor:
    """Tiles (N, 3, tile, tile) -> (N, P * P, V)."""
    return model.model.vision_tower(tiles).last_hidden_state[:, 1:]


def project(model, features: Tensor) -> Tensor:
    """Patch features (N, P * P, V) -> embeddings of their merged tokens (N, S, S, D)."""
    return model.model.vision_proj(code_of(model).merge_patches(features))


def code_of(model):
    """The remote code's module, with the functions by which it arranges pictures."""
    return sys.modules[type(model.model).__module__]


def picture_tokens(model, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Token maps (N, S, S, D) of pictures of one grid -> embeddings (n, tokens, D), as the model arranges them.

    The projector works on each token alone, so here it may come first. A picture of one tile is its own global view
    and stands in `maps` once.
    """
    body, code, (rows, cols) = model.model, code_of(model), grid
    newline, separator = body.vision_proj(body.plora_sub_GN), body.vision_proj(body.plora_glb_GN)
    per_picture = 1 if rows * cols == 1 else 1 + rows * cols
    sequences = []
    for picture in maps.split(per_picture):
        detail = code.join_tiles(picture[-rows * cols :], rows, cols)
        parts = [code.end_rows(picture[0], newline), separator[0], code.end_rows(detail, newline)]
        sequences.append(torch.cat([part.to(maps) for part in parts]))
    return torch.stack(sequences)


def see(model, heads: DenseHeads, names: Names, tiles: Tensor, classes: Tensor, colours: Tensor, placed: bool):
    """Tiles and their dense labels -> token maps, loss of labels and names, (right, asked)."""
    features = patch_features(model, tiles)
    loss, right = heads.loss(features, classes, colours)
    maps = project(model, features)
    words = model.get_input_embeddings().weight
    named = names.loss(maps.flatten(1, 2), words, heads.word_bias, classes, colours, placed)
    return maps, loss + NAMED * named, right


def penalised(logits: Tensor, targets: Tensor, answer: Tensor, penalty: float = PENALTY) -> Tensor:
    """Logits as `repetition_penalty` leaves them when each answer has been written up to each token.

    Args:
        logits: (n, vocabulary), one row a token of the answers.
        targets, answer: (n,) the tokens, and which answer each is of; an answer's tokens stand in their order.
    """
    written = torch.zeros_like(logits)
    written[torch.arange(len(targets), device=targets.device), targets] = 1
    written = written.cumsum(0) - written  # of all answers before this token
    first = torch.ones_like(answer, dtype=torch.bool)
    first[1:] = answer[1:] != answer[:-1]
    start = torch.where(first, torch.arange(len(answer), device=answer.device), 0).cummax(0).values
    seen = written - written[start] > 0
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def learn(model, heads: DenseHeads, names: Names, batch: Batch, looking: bool = True) -> Result:
    """Forward of one batch. looking: vision tower and projector learn too; else they only serve."""
    embeds = model.get_input_embeddings()(batch.ids)
    image_mask = batch.ids == model.config.image_token_id
    dense, right = embeds.new_zeros(()), {}
    if batch.tiles is not None:
        placed = batch.grid == (1, 1)
        if looking and batch.kind != "screen":  # whose labels say nothing
            maps, dense, right = see(model, heads, names, batch.tiles, batch.classes, batch.colours, placed)
        else:
            with torch.set_grad_enabled(looking):
                maps = project(model, patch_features(model, batch.tiles))
        pictures = picture_tokens(model, maps, batch.grid)
        embeds = embeds.masked_scatter(image_mask[..., None], pictures.to(embeds))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=torch.where(attention_mask(batch.branch), 0.0, -1e9),  # added to scores: attention is eager
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
    tasks = [task for of_row in batch.tasks for task in of_row]
    worth = torch.tensor([WORTH.get(task.removesuffix(".zh"), 1.0) for task in tasks], device=length.device)
    weights = length[answer].float() ** LENGTH_POWER * worth[answer]
    losses = F.cross_entropy(logits, targets, reduction="none")
    if batch.mode == "web":  # pages are sampled under a penalty that a title of two equal syllables must survive
        strict = penalised(logits, targets, answer)
        losses = (losses + F.cross_entropy(strict, targets, reduction="none")) / 2
    loss = (losses * weights).sum() / len(length)
    wrong = torch.zeros_like(length).index_add_(0, answer, (logits.argmax(-1) != targets).long())
    for task, misses in zip(tasks, wrong.tolist(), strict=True):
        hits, asked = right.get(task, (0, 0))
        right[task] = (hits + (misses == 0), asked + 1)
    return Result(loss, dense, right)
