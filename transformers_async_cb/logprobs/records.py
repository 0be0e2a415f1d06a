"""What tokens were given, of the requests that ask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


class Records:
    """Words of each token that running requests generated, int32 `[1 + 2 * n]` as `rank` returns them; a slot for each
    row that asks.

    Args:
        count (`int`): rows there are.
    """

    def __init__(self, count: int) -> None:
        self._slot_of = np.full(count, -1, np.int64)
        self._empty()

    def _empty(self) -> None:
        self._words = np.zeros((0, 64, 1), np.int32)  # [slots, tokens, words]
        self._free: list[int] = []

    def take(self, row: int, so_far: np.ndarray) -> None:
        """Give a row a slot that begins with what is known: int32 `[tokens, 1 + 2 * n]`."""
        slots = self._words.shape[0]
        if not self._free:
            self._free = list(range(max(8, 2 * slots) - 1, slots - 1, -1))
            slots += len(self._free)
        tokens, words = so_far.shape
        self._widen(slots, tokens, words)
        self._slot_of[row] = slot = self._free.pop()
        self._words[slot, :tokens, :words] = so_far

    def write(self, rows: np.ndarray, at: np.ndarray, words: np.ndarray) -> None:
        """Write the words of the `at`-th token of each of `rows`: no more than any row asked for."""
        if len(rows):
            self._widen(0, int(at.max()) + 1, 0)
            self._words[self._slot_of[rows], at] = words[:, : self._words.shape[2]]

    def read(self, row: int, tokens: int, words: int) -> np.ndarray:
        return self._words[self._slot_of[row], :tokens, :words].copy()

    def give_back(self, row: int) -> None:
        if self._slot_of[row] >= 0:
            self._free.append(int(self._slot_of[row]))
            self._slot_of[row] = -1
            if len(self._free) == len(self._words):
                self._empty()  # a long answer with many words a token leaves no memory behind

    def _widen(self, slots: int, tokens: int, words: int) -> None:
        have = self._words.shape
        tokens = max(tokens, 2 * have[1]) if tokens > have[1] else tokens
        extra = [(0, max(0, want - has)) for want, has in zip((slots, tokens, words), have, strict=True)]
        if any(more for _, more in extra):
            self._words = np.pad(self._words, extra)
