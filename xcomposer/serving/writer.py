"""An answer as it grows, token by token: whole characters, stop texts cut, log-probabilities beside them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.generation import BaseStreamer

from xcomposer.model.chat_internlm_xcomposer2 import settled

SPACE = "▁"  # SentencePiece's


class Piece(NamedTuple):
    """A stretch of an answer.

    Args:
        index: which of the answers.
        logprobs: OpenAI's entries for the tokens of this stretch.
        finish_reason: "stop" or "length" with the last piece.
    """

    index: int
    text: str
    logprobs: list[dict]
    finish_reason: str | None = None


class Writer(BaseStreamer):
    """Takes one answer's tokens from `generate` and emits its pieces, in the computing thread.

    Args:
        close_ids: tokens that end an answer; no part of its text.
        stops: texts that end it; cut off with whatever follows.
        emit: takes each piece.
        top: log-probabilities of so many likeliest tokens a step, and of the one taken; None: none.
    """

    def __init__(
        self,
        tokenizer,
        close_ids: Sequence[int],
        stops: Sequence[str],
        index: int,
        emit: Callable[[Piece], None],
        top: int | None = None,
    ):
        self.tokenizer, self.close_ids, self.stops = tokenizer, close_ids, stops
        self.index, self.emit, self.top = index, emit, top
        self.tokens = 0  # taken, the closing one among them
        self.stopped = False
        self.text, self.sent = "", 0  # all text so far, and how much of it was emitted
        self._unsettled: list[int] = []  # ids that are not text yet
        self._waiting: list[tuple[int, dict]] = []  # where a token begins in the text, and its entry
        self._row: torch.Tensor | None = None
        self._prompt_is_next = True

    def observe(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor that looks on: logits (1, vocabulary) before anything changes them."""
        if self.top is not None:
            self._row = scores[0].float().log_softmax(-1)
        return scores

    def put(self, value: torch.Tensor) -> None:
        """The prompt's ids first (none: it is given as embeddings), then each step's."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            if not self.stopped:
                self._take(token)

    def _take(self, token: int) -> None:
        self.tokens += 1
        if token in self.close_ids:
            self.stopped = True
            return
        if self._row is not None:
            self._waiting.append((len(self.text), self._entry(token)))
        self._unsettled.append(token)
        self._grow(settled(self._unsettled, self.tokenizer))
        if not self.stopped:
            self._emit(len(self.text) - self._kept_back())

    def end(self) -> None:
        """`generate` is done; `finish` says so to the client, once nothing can fail any more."""

    def finish(self) -> None:
        """Emit what is left, and why the answer ended."""
        self._grow(len(self._unsettled))
        self._emit(len(self.text), "stop" if self.stopped else "length")

    def _grow(self, count: int) -> None:
        """Let the first `count` unsettled ids be text; cut it at the first stop."""
        if not count:
            return
        ids, self._unsettled = self._unsettled[:count], self._unsettled[count:]
        searched = max(0, len(self.text) - max(map(len, self.stops)) + 1)
        self.text += self.tokenizer.decode(ids, skip_special_tokens=True)
        found = [place for stop in self.stops if (place := self.text.find(stop, searched)) >= 0]
        if found:
            self.text, self.stopped, self._unsettled = self.text[: min(found)], True, []

    def _kept_back(self) -> int:
        """Characters at the end that may be the beginning of a stop."""
        longest = min(len(self.text) - self.sent, max(map(len, self.stops)) - 1)
        tails = range(longest, 0, -1)
        return next((n for n in tails if any(stop.startswith(self.text[-n:]) for stop in self.stops)), 0)

    def _emit(self, end: int, reason: str | None = None) -> None:
        """Emit the text up to `end` and the entries of the tokens that begin before it."""
        ready = [entry for start, entry in self._waiting if start < end]
        self._waiting = self._waiting[len(ready) :]
        if end > self.sent or ready or reason:
            self.emit(Piece(self.index, self.text[self.sent : end], ready, reason))
            self.sent = max(self.sent, end)

    def _entry(self, token: int) -> dict[str, Any]:
        """OpenAI's entry for the token taken in the last step."""
        row = self._row
        assert row is not None
        values, likeliest = row.topk(self.top or 0)
        top = [self._scored(*pair) for pair in zip(likeliest.tolist(), values.tolist(), strict=True)]
        return {**self._scored(token, float(row[token])), "top_logprobs": top}

    def _scored(self, token: int, value: float) -> dict[str, Any]:
        piece = self.tokenizer.convert_ids_to_tokens(token) or ""
        if settled([token], self.tokenizer):
            text = piece.replace(SPACE, " ")
            content = text.encode()
        else:  # a byte, named like <0xE4>
            content = bytes([int(piece[3:5], 16)])
            text = content.decode(errors="replace")
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(content)}
