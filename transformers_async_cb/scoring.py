"""Log-probabilities that requests ask for: which tokens of a step get them, and where they go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .request import Rows


if TYPE_CHECKING:
    from .scheduler import Plan


class Scoring:
    """The prompt's tokens are scored as they are computed, in the order they come; a generated one when it is picked.

    Args:
        rows (`Rows`): the running requests.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def within(self, row: int, count: int, scores: int) -> tuple[int, int]:
        """How many of the next `count` tokens of a row need at most `scores` log-probabilities, and how many they
        need."""
        if not self._rows.unscored[row]:
            return count, 0
        request, start = self._rows.request[row], int(self._rows.computed[row])
        known = max(0, request.prompt_scores.known - start)
        to_score = max(0, min(count, request.prompt_length - 1 - start) - known)
        return (count, to_score) if to_score <= scores else (known + scores, scores)

    def of_prompts(
        self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, decodes: int
    ) -> list[tuple[int, int, int]]:
        """What `Plan.scored` says. The logits at a position are those of the next token."""
        scored = []
        for sequence in decodes + np.flatnonzero(self._rows.unscored[rows[decodes:]]):
            request = self._rows.request[rows[sequence]]
            first = max(int(starts[sequence]), request.prompt_scores.known)
            if (count := min(int(ends[sequence]), request.prompt_length - 1) - first) > 0:
                scored.append((int(sequence), first, count))
        return scored

    def note(self, plan: Plan, live: np.ndarray, ranked: np.ndarray) -> None:
        """Take what `rank` has to say of the plan's `ranked`, as far as their sequences are `live` (bool `[S]`), then
        of its `scored`; before the tokens themselves are appended."""
        r, own = self._rows, live[plan.ranked]
        rows = plan.rows[plan.ranked[own]]
        r.records.write(rows, r.known[rows] - r.prompt_length[rows], ranked[: len(own)][own])
        at = len(own)
        for sequence, first, count in plan.scored:
            scores = r.request[plan.rows[sequence]].prompt_scores
            scores.words[first : first + count] = ranked[at : at + count, : scores.words.shape[1]]
            scores.known = max(scores.known, first + count)  # a sequence that took over may lag behind
            at += count
