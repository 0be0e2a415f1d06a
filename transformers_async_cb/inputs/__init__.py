"""The packed inputs of a step: their layout, and what the device makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..gpu import runs_triton
from ..logits import SHAPING_WORDS, Tables
from ..logprobs import ENTRY_WORDS
from ..request import MOST_FRESH, MOST_MASKED
from ..sampling import PARAMETER_WORDS, TRUNCATED_WORDS, Flavour


# Parts that the keys of one sequence may be cut into, to be looked at side by side.
MOST_PARTS = 32

# Pages that the requests which begin with a step may find filled, all together.
SPARE_CELLS = 2048


class StepArrays(NamedTuple):
    """The packed int32 inputs of a step, as views of one buffer: numpy on the host, torch on the device."""

    ids: np.ndarray | torch.Tensor  # [T] token id, or -1 - row: the row's last token, which is on the device
    positions: np.ndarray | torch.Tensor  # [T]
    token_rows: np.ndarray | torch.Tensor  # [T]
    rows: np.ndarray | torch.Tensor  # [B]
    query_starts: np.ndarray | torch.Tensor  # [B + 1]
    lengths: np.ndarray | torch.Tensor  # [B]
    counts: np.ndarray | torch.Tensor  # [2] decoding sequences, sequences without the padding
    work: np.ndarray | torch.Tensor  # [W] see `share_out`
    stores: np.ndarray | torch.Tensor  # [B] row whose last token the sample becomes, or the padding row
    cells: np.ndarray | torch.Tensor  # [P] entries of the flat page tables to write
    pages: np.ndarray | torch.Tensor  # [P]
    fresh: np.ndarray | torch.Tensor  # [F] rows whose parameters to write
    parameters: np.ndarray | torch.Tensor  # [F * PARAMETER_WORDS]
    shaped: np.ndarray | torch.Tensor  # [B] sequences whose logits to shape, then -1; none where nobody's are
    newly_shaped: np.ndarray | torch.Tensor  # [G] rows whose shapings to write
    shapings: np.ndarray | torch.Tensor  # [G * SHAPING_WORDS]
    masked: np.ndarray | torch.Tensor  # [M] sequences of which only some tokens may come, then -1
    masks: np.ndarray | torch.Tensor  # [M * mask_words] a bit for each token that may
    truncated: np.ndarray | torch.Tensor  # [C * TRUNCATED_WORDS] see `truncate`
    scored: np.ndarray | torch.Tensor  # [S] tokens whose logits are wanted beside those of each sequence's last
    entries: np.ndarray | torch.Tensor  # [E * ENTRY_WORDS] see `rank`; B for those that are picked, S for the others

    @classmethod
    def of(cls, buffer: np.ndarray | torch.Tensor, sizes: Sequence[int]) -> StepArrays:
        """Views of the first words of `buffer`; `sizes` are those of a `Bucket`. Each begins at a multiple of 16
        bytes: kernels are compiled anew for pointers that do not."""
        arrays, at = [], 0
        for size in sizes:
            arrays.append(buffer[at : at + size])
            at += _aligned(size)
        return cls(*arrays)


class Bucket(NamedTuple):
    """The size of a step: `tokens` and `rows` after padding. Decoding steps have as many of one as of the other."""

    tokens: int
    rows: int
    decode_only: bool

    def sizes(self, page_sizes: Sequence[int], programs: int, mask_words: int, flavour: Flavour) -> tuple[int, ...]:
        """Words of each of `StepArrays`. A chunk of c tokens opens at most c / page_size + 1 pages of each group;
        `programs` as for `share_out`; what nobody needs has none."""
        cells = self.rows * len(page_sizes)
        if not self.decode_only:
            cells += sum(self.tokens // page_size for page_size in page_sizes) + SPARE_CELLS
        fresh = 0 if self.decode_only else self.rows
        newly_shaped = min(fresh, MOST_FRESH) if flavour.shaped else 0
        masked = min(self.rows, MOST_MASKED) if flavour.masked else 0
        t, r = self.tokens, self.rows
        return (
            t, t, t, r, r + 1, r, 2, r + programs, r, cells, cells, fresh, fresh * PARAMETER_WORDS,
            r if flavour.shaped else 0, newly_shaped, newly_shaped * SHAPING_WORDS, masked, masked * mask_words,
            flavour.truncated * TRUNCATED_WORDS, flavour.scored, self.entries(flavour) * ENTRY_WORDS,
        )  # fmt: skip

    def entries(self, flavour: Flavour) -> int:
        """Tokens that there is room for to get log-probabilities of the model's own."""
        return self.rows + flavour.scored if flavour.ranked else 0

    def words(self, page_sizes: Sequence[int], programs: int, mask_words: int, flavour: Flavour) -> int:
        """Of a buffer that holds them."""
        return sum(map(_aligned, self.sizes(page_sizes, programs, mask_words, flavour)))


def share_out(work: np.ndarray, sequences: np.ndarray, lengths: np.ndarray, programs: int) -> None:
    """Cut the sequences that decode into parts, so that programs have about as many keys each to look at.

    Args:
        work (`np.ndarray`): int32 `[W]`, written: an item is (sequence + 1, part, number of the sequence's parts - 1)
            as digits to the base `MOST_PARTS`, or 0 where there is nothing to do. `W` is at least `programs` more than
            there are sequences.
        sequences (`np.ndarray`): which of the step's these are.
        lengths (`np.ndarray`): of each, in tokens.
        programs (`int`): how many run side by side. If there are fewer sequences, there are at most so many parts.
    """
    count, total = len(sequences), int(lengths.sum())
    share = -(-total // programs)
    if count < programs:  # rounding up adds a part to a sequence at most: with the last of these there is room
        largest = -(-total // (programs - count))
        for candidate in (share, (share + largest) // 2, largest):
            share = max(1, candidate)
            parts = np.minimum(-(-lengths // share), MOST_PARTS)
            if parts.sum() <= programs:
                break
    else:
        parts = np.minimum(-(-lengths // share), MOST_PARTS)
    last = np.cumsum(parts)
    items = int(last[-1]) if count else 0
    part = np.arange(items) - np.repeat(last - parts, parts)
    work[:items] = (np.repeat(sequences + 1, parts) * MOST_PARTS + part) * MOST_PARTS + np.repeat(parts - 1, parts)
    work[items:] = 0


def _aligned(words: int) -> int:
    return -(-words // 4) * 4


def unpack(
    a: StepArrays,
    page_tables: torch.Tensor,
    parameters: torch.Tensor,
    last_tokens: torch.Tensor,
    tables: Tables | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring the tables of rows up to date, and make the inputs of a model.

    Args:
        a (`StepArrays`): on the device.
        page_tables (`torch.Tensor`): int32 `[groups, rows + 1, columns]`; written.
        parameters (`torch.Tensor`): int32 `[rows + 1, PARAMETER_WORDS]`; written.
        last_tokens (`torch.Tensor`): int32 `[rows + 1]`.
        tables (`Tables`, *optional*): written; where the logits of a row are shaped.

    Returns:
        Token ids and positions, int64 `[T]`, and the last token of each sequence, int64 `[B]`.
    """
    if runs_triton(page_tables):
        from . import triton

        return triton.unpack(a, page_tables, parameters, last_tokens, tables)
    page_tables.view(-1)[a.cells] = a.pages
    parameters[a.fresh] = a.parameters.view(-1, PARAMETER_WORDS)
    carried = last_tokens[(-1 - a.ids).clamp_min(0)]
    ids = torch.where(a.ids < 0, carried, a.ids)
    if tables is not None:
        tables.history[a.token_rows, a.positions] = ids
        tables.shapings[a.newly_shaped] = a.shapings.view(-1, SHAPING_WORDS)
    return ids.long(), a.positions.long(), a.query_starts[1:].long() - 1
