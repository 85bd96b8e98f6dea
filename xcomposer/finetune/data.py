"""Rows -> batches, through the prompting and image code that `chat` uses; and the check pass.

Legend: B rows, T tokens, N tiles of all pictures, n pictures.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from xcomposer.finetune.formats import BadRow, Pair, Row
from xcomposer.model.ixc_utils import BAND, check_count, get_font, load_media
from xcomposer.model.prompting_internlm_xcomposer2 import (
    IGNORE_INDEX,
    TURN_CLOSE,
    TURN_OPEN,
    answer_labels,
    place_images,
    reward_text,
    tokenize_prompt,
    tokenize_with,
    training_text,
    turn,
)

TRAIN_HD_NUM = 18  # tiles of a conversation's only picture, as the release was fine-tuned


class Conversation(NamedTuple):
    """A row with its pictures opened and its tokens laid out; no pixel is computed yet."""

    input_ids: list[int]
    labels: list[int]
    pictures: list[Any]
    hd_num: int


class Encoder:
    """Rows -> features of one training sequence.

    Args:
        config: the model's config, for tile, token ids and lengths.
        hd_num: most tiles of a picture, for rows that do not say; None: 18 for a row's only picture, 6 each for more.
        num_frm: most frames of a video.
        max_length: longest sequence in tokens; None: the model's.

    Raises:
        ValueError: a number below 1.
    """

    bos_on_text = True  # a picture in front of all text stands before BOS, as in the released training

    def __init__(self, config, tokenizer, hd_num: int | None = None, num_frm: int = 32, max_length: int | None = None):
        self.tokenize = tokenize_with(tokenizer)
        self.layout, self.tile = config.layout, config.tile
        self.image_token_id, self.pad_token_id = config.image_token_id, tokenizer.pad_token_id
        for name, value in (("hd_num", hd_num), ("num_frm", num_frm), ("max_length", max_length)):
            if value is not None:  # 0 is a number to refuse, not a default to ask for
                check_count(name, value, "leave it out for the default")
        self.max_length = config.context_length if max_length is None else max_length
        self.hd_num, self.num_frm = hd_num, num_frm
        self.header = self.tokenize(f"{TURN_OPEN}assistant\n", False)
        self.close_id = tokenizer.convert_tokens_to_ids(TURN_CLOSE)
        folder = Path(config.name_or_path)
        self.font_folder = folder if folder.is_dir() else None

    def choose_hd_num(self, row: Row) -> int:
        """The row's own, else the run's, else by the number of pictures."""
        return row.hd_num or self.hd_num or min(TRAIN_HD_NUM, self.layout.default_hd_num(len(row.media)))

    def open(self, row: Row) -> Conversation:
        """Open a row's pictures and lay out its tokens.

        Raises:
            ValueError: a picture that cannot be read, marks and pictures that differ in number, too many tokens, or
                nothing left to learn. FileNotFoundError, ImportError: as `load_media`.
        """
        if not isinstance(row, Row):
            raise ValueError("a pair of conversations among rows of single ones; train on them in a run of their own")
        pieces = place_images(self.text_of(row), len(row.media))
        hd_num = self.choose_hd_num(row)
        pictures = [load_media(source, num_frm=self.num_frm, tile=self.tile) for source in row.media]
        lengths = [self.layout.tokens(*self.layout.grid(picture, hd_num)) for picture in pictures]
        placeholders = [self.image_token_id] * len(lengths)
        prompt = tokenize_prompt(pieces, lengths, placeholders, self.tokenize, bos_on_text=self.bos_on_text)
        if len(prompt.input_ids) > self.max_length:
            raise ValueError(
                f"{len(prompt.input_ids)} tokens, {sum(lengths)} of them image tokens, but at most {self.max_length} "
                f"fit; shorten it, or lower its hd_num ({hd_num})"
            )
        return Conversation(prompt.input_ids, self.labels_of(prompt.input_ids), pictures, hd_num)

    def text_of(self, row: Row) -> str:
        """A row's text, with marks."""
        turns, opening = list(row.turns), ""
        if turns[0][0] == "system":
            opening = turn("system", turns.pop(0)[1])
        return opening + training_text(turns)

    def labels_of(self, input_ids: list[int]) -> list[int]:
        """What is learned of a row's tokens."""
        labels = answer_labels(input_ids, self.header, self.close_id)
        if all(label == IGNORE_INDEX for label in labels):
            raise ValueError("every label is masked: no answer is left to learn from")
        return labels

    def __call__(self, row: Row) -> dict[str, Any]:
        """`input_ids` and `labels` (T), and with pictures `pixel_values` (N, 3, tile, tile), `image_grid_thw` (n, 3).

        Raises:
            ValueError: as `open`, and names the row.
        """
        try:
            conversation = self.open(row)
        except (ValueError, OSError) as error:
            raise ValueError(f"{row.name}: {error}") from error
        features: dict[str, Any] = {"input_ids": conversation.input_ids, "labels": conversation.labels}
        if conversation.pictures:
            font = get_font(BAND, self.font_folder) if any(map(is_video, conversation.pictures)) else None
            tiles, grids = self.layout.tiles(conversation.pictures, conversation.hd_num, font)
            features["pixel_values"], features["image_grid_thw"] = tiles, grids
        return features


class _ScoredEncoder(Encoder):
    """One conversation of a pair, as `get_scores` reads it; no token of it is learned."""

    bos_on_text = False

    def text_of(self, row: Row) -> str:
        return reward_text([{"role": role, "content": text.strip()} for role, text in row.turns])

    def labels_of(self, input_ids: list[int]) -> list[int]:
        return [IGNORE_INDEX] * len(input_ids)


class PairEncoder:
    """Pairs -> features of both conversations. Arguments: see `Encoder`."""

    def __init__(self, *args, **kwargs):
        self.one = _ScoredEncoder(*args, **kwargs)

    def open(self, pair: Pair) -> Conversation:
        """The longer of both conversations, opened.

        Raises:
            ValueError, FileNotFoundError, ImportError: as `Encoder.open`, or a row that is no pair.
        """
        if not isinstance(pair, Pair):
            raise ValueError("a single conversation among pairs; train on them in a run of their own")
        return max(map(self.one.open, pair), key=lambda opened: len(opened.input_ids))

    def __call__(self, pair: Pair) -> list[dict[str, Any]]:
        """Features of the chosen and of the rejected conversation."""
        return [self.one(row) for row in pair]


def is_video(picture: Any) -> bool:
    return isinstance(picture, list)


class RowDataset(Dataset):
    """Rows, encoded when asked for: nothing is kept, so workers share nothing but the rows' texts."""

    def __init__(self, rows: Sequence[Row] | Sequence[Pair], encoder: Encoder | PairEncoder):
        self.rows, self.encoder = list(rows), encoder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.encoder(self.rows[index])


class Collator:
    """Features of several rows, with pictures or without -> a batch, padded on the right.

    `mm_token_type_ids` is always there: it keeps partial LoRA in the graph of a batch without pictures.

    Args:
        touch_vision: give a batch without pictures a blank one, in padding that no token attends to and no label
            reads. It adds nothing to loss or gradients, but takes the vision tower through forward and backward. With
            several processes this is needed wherever another's batch may have a picture: DDP waits for every trained
            parameter's gradient, FSDP and ZeRO-3 for every layer's turn.
    """

    def __init__(self, encoder: Encoder, touch_vision: bool = False):
        self.pad_token_id, self.image_token_id = encoder.pad_token_id, encoder.image_token_id
        self.layout = encoder.layout
        self.touch_vision = touch_vision

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids, labels = [list(row["input_ids"]) for row in rows], [list(row["labels"]) for row in rows]
        mask = [[1] * len(row) for row in ids]
        pictures = [row for row in rows if row.get("pixel_values") is not None]
        if self.touch_vision and not pictures:
            length = self.layout.tokens(1, 1)
            shortest = min(ids, key=len)
            mask[next(i for i, row in enumerate(ids) if row is shortest)] += [0] * length
            shortest += [self.image_token_id] * length
            tiles, grid = torch.zeros(1, 3, self.layout.tile, self.layout.tile), torch.ones(1, 3, dtype=torch.long)
            pictures = [{"pixel_values": tiles, "image_grid_thw": grid}]
        input_ids = pad(ids, self.pad_token_id)
        width = input_ids.shape[1]
        batch = {
            "input_ids": input_ids,
            "attention_mask": pad(mask, 0, width),
            "labels": pad(labels, IGNORE_INDEX, width),
            "mm_token_type_ids": (input_ids == self.image_token_id).long(),
        }
        for name in ("pixel_values", "image_grid_thw") if pictures else ():
            batch[name] = torch.cat([row[name] for row in pictures])
        return batch


class PairCollator(Collator):
    """Features of pairs -> a batch (2 B, T): all chosen conversations, then all rejected ones. Without labels."""

    def __init__(self, encoder: PairEncoder, touch_vision: bool = False):
        super().__init__(encoder.one, touch_vision)

    def __call__(self, pairs: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        batch = super().__call__([row for side in zip(*pairs, strict=True) for row in side])
        del batch["labels"]
        return batch


def pad(rows: Sequence[Sequence[int]], value: int, width: int = 0) -> Tensor:
    """Rows of different lengths -> (B, T), filled on the right; T is at least `width`."""
    width = max(width, *map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


class _Measured(Dataset):
    """The tokens of each row, or the reason why it is bad."""

    def __init__(self, rows: Sequence[Row | Pair | BadRow], encoder: Encoder | PairEncoder):
        self.rows, self.encoder = rows, encoder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> int | BadRow:
        row = self.rows[index]
        if isinstance(row, BadRow):
            return row
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of what is reported here
                return len(self.encoder.open(row).input_ids)
        except (ValueError, OSError, ImportError, TypeError) as error:
            return BadRow(row.name, str(error))


class Checked(NamedTuple):
    """What the check pass found: rows to train on, the tokens of each, and the bad ones."""

    rows: list[Row] | list[Pair]
    lengths: list[int]
    bad: list[BadRow]


def check_rows(
    rows: Sequence[Row | Pair | BadRow], encoder: Encoder | PairEncoder, workers: int = 0, progress: bool = True
) -> Checked:
    """Open every row's pictures and count its tokens, before any weight is loaded.

    With several processes each checks its share, and all learn the whole.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    share = range(state.process_index, len(rows), state.num_processes)
    measured = _Measured([rows[i] for i in share], encoder)
    loader = DataLoader(measured, batch_size=None, num_workers=workers)
    shown = tqdm(loader, desc="check", unit="row", disable=not (progress and state.is_main_process))
    found = dict(gather_object(list(zip(share, shown, strict=True))))
    good = [i for i in range(len(rows)) if not isinstance(found[i], BadRow)]
    bad = [found[i] for i in range(len(rows)) if isinstance(found[i], BadRow)]
    return Checked([rows[i] for i in good], [found[i] for i in good], list(dict.fromkeys(bad)))
