"""The model's own log-probabilities: of tokens, and of the likeliest in their place."""

from __future__ import annotations

import torch

from ..gpu import runs_triton
from . import reference
from .entries import ENTRY_WORDS, MOST_LIKELIEST, MOST_SCORED, RANKED_WORDS
from .records import PromptScores, Records, Words, no_words


__all__ = [
    "ENTRY_WORDS", "MOST_LIKELIEST", "MOST_SCORED", "RANKED_WORDS", "PromptScores", "Records", "Words", "no_words",
    "rank",
]  # fmt: skip


def rank(logits: torch.Tensor, entries: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens: by Triton kernels on CUDA where triton is installed, by the reference
    elsewhere, which waits for the device.

    Args:
        logits (`torch.Tensor`): `[R, V]` as the model gave them, any float dtype.
        entries (`torch.Tensor`): int32 `[E * ENTRY_WORDS]`; -1 in place of a row for none.
        picked (`torch.Tensor`): int32 `[B]`, the token picked from each of the first rows.

    Returns:
        int32 `[E, RANKED_WORDS]`: the log-probability of the entry's token as float32 bits, then the ids of the
        likeliest tokens, as many as were asked for, each with its own; of equals, the lowest id first. What is left of
        the words, and entries that are none, hold anything.
    """
    if runs_triton(logits):
        from . import triton

        return triton.rank(logits, entries, picked)
    return reference.rank(logits, entries, picked)
