"""What tokens were given, of the requests that ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


# Tokens that are written side by side before they get memory of their own.
CHUNK = 32


@dataclass(slots=True, eq=False)
class PromptScores:
    """What the tokens of a prompt after the first were given. Sequences of one request have the same."""

    words: np.ndarray  # int32 [prompt - 1, 1 + 2 * n] as `rank` returns them
    known: int = 0  # of the first so many

    @property
    def complete(self) -> bool:
        return self.known == len(self.words)


def no_words(tokens: int, likeliest: int) -> np.ndarray:
    """Room for what `rank` says of tokens, with so many of the likeliest each."""
    return np.empty((tokens, 1 + 2 * likeliest), np.int32)


class Words(NamedTuple):
    """Words of the tokens that a request has generated so far."""

    chunks: list[np.ndarray]  # int32 [CHUNK, 1 + 2 * n]; more may come
    full: int  # the first so many chunks belong here
    last: np.ndarray  # int32 [tokens behind those, 1 + 2 * n]

    def since(self, first: int) -> np.ndarray:
        """Those of the tokens from the `first` on: int32 `[tokens, 1 + 2 * n]`."""
        begin = min(first // CHUNK, self.full)
        return np.concatenate([*self.chunks[begin : self.full], self.last])[first - begin * CHUNK :]


class Records:
    """Words of each token that running requests generated, int32 `[1 + 2 * n]` as `rank` returns them. Memory is taken
    as tokens come, for as many words as the row asked for.

    Args:
        count (`int`): rows there are.
    """

    def __init__(self, count: int) -> None:
        self._chunks: list[list[np.ndarray]] = [[] for _ in range(count)]  # full ones of each row, [CHUNK, words]
        self._last = np.zeros((count, CHUNK, 0), np.int32)  # [rows, tokens, words] behind those
        self._words = np.zeros(count, np.int64)

    def take(self, row: int, so_far: np.ndarray) -> None:
        """Begin a row with what is known: int32 `[tokens, 1 + 2 * n]`."""
        tokens, words = so_far.shape
        if words > self._last.shape[2]:
            self._last = np.pad(self._last, ((0, 0), (0, 0), (0, words - self._last.shape[2])))
        full = tokens - tokens % CHUNK
        self._words[row] = words
        self._chunks[row] = [so_far[first : first + CHUNK] for first in range(0, full, CHUNK)]
        self._last[row, : tokens - full, :words] = so_far[full:]

    def write(self, rows: np.ndarray, at: np.ndarray, words: np.ndarray) -> None:
        """Write the words of the `at`-th token of each of `rows`, the next of each: at least as many as it asked
        for."""
        within = at % CHUNK
        self._last[rows, within] = words[:, : self._last.shape[2]]
        for row in rows[within == CHUNK - 1].tolist():
            self._chunks[row].append(self._last[row, :, : self._words[row]].copy())

    def read(self, row: int, tokens: int) -> Words:
        """What is known of a row's `tokens`, which stays as it is."""
        full = tokens // CHUNK
        return Words(self._chunks[row], full, self._last[row, : tokens % CHUNK, : self._words[row]].copy())

    def give_back(self, row: int) -> None:
        self._chunks[row] = []
