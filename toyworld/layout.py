"""Views -> training batches: one picture, several questions in one row.

A row is a prefix (BOS and the pictures) and branches, one for each question. A branch attends to the prefix and to
itself, and its positions go on from the prefix's end: to each question the row looks as `chat` lays it out, but the
picture is computed once.

Legend: B rows, T tokens, P prefix tokens, N tiles, n pictures.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from toyworld.scenes import sources
from toyworld.views import MARK, Question, View
from toyworld.world import dense_labels
from xcomposer.model.ixc_utils import default_hd_num, image_tokens, overview, stack_tiles, to_pixels
from xcomposer.model.prompting_internlm_xcomposer2 import TURN_CLOSE, TURN_OPEN, chat_prompt, tokenize_with, turn

IGNORE = -100


class Row(NamedTuple):
    """Tokens of one view; `tasks` names each branch, in order."""

    ids: list[int]
    targets: list[int]  # the token that follows, where an answer is learned, else IGNORE
    branch: list[int]  # 0 in the prefix, k in the k-th branch
    positions: list[int]
    tasks: list[str]


class Batch(NamedTuple):
    """Rows of one kind, padded on the right.

    tiles: (N, 3, tile, tile); grid: (rows, cols) of every picture, None without pictures. Where a picture is one tile
    it is its own global view, and stands in `tiles` once.
    classes, colours: dense labels of the tiles' patches (N, P * P).
    """

    kind: str
    mode: str
    ids: Tensor
    targets: Tensor
    branch: Tensor
    positions: Tensor
    tasks: list[list[str]]
    tiles: Tensor | None
    grid: tuple[int, int] | None
    classes: Tensor | None
    colours: Tensor | None

    def to(self, device: str) -> "Batch":
        return Batch(*(value.to(device) if isinstance(value, Tensor) else value for value in self))


class Layout:
    """Lays views out for a model's tokenizer and sizes."""

    def __init__(self, config, tokenizer):
        self.tile, self.side = config.tile, config.tokens_per_side
        self.patches = 2 * self.side
        self.image_token_id, self.pad_token_id = config.image_token_id, tokenizer.pad_token_id
        cached: Callable[[str, bool], tuple] = lru_cache(100_000)(lambda s, b: tuple(tokenize_with(tokenizer)(s, b)))
        self.tokenize = lambda text, begins: list(cached(text, begins))
        self.close = self.tokenize(f"{TURN_CLOSE}\n", False)

    def branch(self, question: Question, lead: str) -> tuple[list[int], list[int]]:
        """Ids after the last picture, and which of them the answer's loss is on: every turn's answer and its close."""
        ids: list[int] = []
        learned: list[int] = []
        for k, (query, answer) in enumerate(question.turns):
            asked = chat_prompt(query if k else lead + query)
            if not k and MARK in asked:
                asked = asked.rsplit(MARK, 1)[1]
            if k == len(question.turns) - 1:
                asked += question.begun
            for text, counts in ((asked, False), (answer, True)):
                tokens = self.tokenize(text, False)
                ids += tokens
                learned += tokens if counts else [IGNORE] * len(tokens)
            ids += self.close
            learned += [self.close[0], *[IGNORE] * (len(self.close) - 1)]
        return ids, [*learned[1:], IGNORE]

    def row(
        self, view: View, questions: Sequence[Question], tokens: int, marked: bool = False, system: str = ""
    ) -> Row:
        """A view's row. `tokens`: of each picture. marked: one picture stands at a mark in the question's turn."""
        lead, system = MARK if marked else view.lead, view.system or system
        opening = turn("system", system) if system else ""
        pieces = f"{opening}{TURN_OPEN}user\n{lead}".split(MARK)[:-1] if lead else [""][: len(view.drawings)]
        ids: list[int] = [] if pieces else self.tokenize(opening, True)
        for k, piece in enumerate(pieces):
            ids += self.tokenize(piece, k == 0) + [self.image_token_id] * tokens
        if pieces and not lead:  # an unmarked picture stands in front of all text
            ids += self.tokenize(opening, False)
        prefix = len(ids)
        targets, branch, positions = [IGNORE] * prefix, [0] * prefix, list(range(prefix))
        for k, question in enumerate(questions, start=1):
            more, learned = self.branch(question, lead)
            ids, targets = ids + more, targets + learned
            branch += [k] * len(more)
            positions += range(prefix, prefix + len(more))
        return Row(ids, targets, branch, positions, [question.task for question in questions])

    def batch(
        self, views: Sequence[View], asked: Sequence[Sequence[Question]], marked: bool = False, system: str = ""
    ) -> Batch:
        """Views of one kind, and the questions of each -> a batch; `system`: the system turn's text."""
        tiles, grid, labels = self.see(views)
        tokens = image_tokens(*grid, self.side) if grid else 0
        marked = marked and len(views[0].drawings) == 1 and not views[0].lead
        rows = [self.row(v, questions, tokens, marked, system) for v, questions in zip(views, asked, strict=True)]
        columns = [row[:-1] for row in rows]
        fills = (self.pad_token_id, IGNORE, -1, 0)
        width = max(len(row.ids) for row in rows)
        padded = [
            torch.tensor([[*column, *[fill] * (width - len(column))] for column in values])
            for values, fill in zip(zip(*columns, strict=True), fills, strict=True)
        ]
        return Batch(views[0].kind, views[0].mode, *padded, [row.tasks for row in rows], tiles, grid, *labels)

    def see(self, views: Sequence[View]) -> tuple[Tensor | None, tuple[int, int] | None, tuple]:
        """Tiles, grid and dense labels of the views' pictures."""
        if not views[0].drawings:
            return None, None, (None, None)
        hd_num = default_hd_num(len(views[0].drawings))
        pixels = [to_pixels(source, hd_num, self.tile) for v in views for source in sources(v)]
        rows, cols = (length // self.tile for length in pixels[0].shape[1:])
        sizes = [(cols * self.tile, rows * self.tile)] * len(pixels)
        drawings = [drawing for v in views for drawing in v.drawings]
        if rows * cols == 1:
            tiles = torch.stack(pixels)
        else:
            parts = [stack_tiles([picture], self.tile)[0] for picture in pixels]
            tiles = torch.cat([torch.cat([overview(part, rows, cols)[None], part]) for part in parts])
        found = [self.labels(d.items, size, rows, cols) for d, size in zip(drawings, sizes, strict=True)]
        return tiles, (rows, cols), tuple(torch.cat(part) for part in zip(*found, strict=True))

    def labels(self, items, size: tuple[int, int], rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """Dense labels of a picture's tiles in the order of `see`: (tiles, P * P) each."""
        p, whole, cut = self.patches, dense_labels(items, size, 1, 1), dense_labels(items, size, rows, cols)
        parts = []
        for small, detail in zip(whole, cut, strict=True):
            patches = torch.tensor(detail).view(rows, p, cols, p).transpose(1, 2).reshape(-1, p * p)
            parts.append(patches if rows * cols == 1 else torch.cat([torch.tensor(small)[None], patches]))
        return parts[0], parts[1]


def attention_mask(branch: Tensor) -> Tensor:
    """(B, T) branches -> (B, 1, T, T), True where a query may look: back, at the prefix and its own branch."""
    same = branch[:, :, None] == branch[:, None, :]
    allowed = (same | (branch[:, None, :] == 0)).tril()
    return allowed[:, None]
