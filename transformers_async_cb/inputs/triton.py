"""Unpacking of a step's inputs in Triton: one kernel in place of a dozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl


if TYPE_CHECKING:
    from ..logits import Tables
    from . import StepArrays

_BLOCK = 128


def unpack(
    a: StepArrays,
    page_tables: torch.Tensor,
    parameters: torch.Tensor,
    last_tokens: torch.Tensor,
    tables: Tables | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, sequences, cells, words = len(a.ids), len(a.rows), len(a.cells), len(a.parameters)
    history, shapings = (None, None) if tables is None else tables
    positions_held, shaping_words = (1, 1) if tables is None else (history.shape[1], shapings.shape[1])
    ids, positions = last_tokens.new_empty((2, tokens), dtype=torch.int64)
    last = last_tokens.new_empty(sequences, dtype=torch.int64)
    _unpack_kernel[(triton.cdiv(max(tokens, sequences, cells, words, len(a.shapings)), _BLOCK),)](
        a.ids, a.positions, a.query_starts, a.cells, a.pages, a.fresh, a.parameters,
        page_tables, parameters, last_tokens, ids, positions, last, tokens, sequences, cells, words,
        a.token_rows, a.newly_shaped, a.shapings, history, shapings, positions_held, len(a.shapings),
        WORDS=parameters.shape[1], SHAPING_WORDS=shaping_words, BLOCK=_BLOCK,
    )  # fmt: skip
    return ids, positions, last


# Sizes vary from step to step, and one kernel serves them all.
@triton.jit(do_not_specialize=["tokens", "sequences", "cells", "words", "shaping_words"])
def _unpack_kernel(
    given, given_positions, query_starts, at, pages, fresh, values,
    page_tables, parameters, last_tokens, ids, positions, last, tokens, sequences, cells, words,
    token_rows, newly_shaped, new_shapings, history, shapings, positions_held, shaping_words,
    WORDS: tl.constexpr, SHAPING_WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tokens
    token = tl.load(given + i, mask=inside, other=0)
    carried = tl.load(last_tokens + (-1 - token), mask=inside & (token < 0), other=0)
    token = tl.where(token < 0, carried, token)
    position = tl.load(given_positions + i, mask=inside, other=0).to(tl.int64)
    tl.store(ids + i, token.to(tl.int64), mask=inside)
    tl.store(positions + i, position, mask=inside)
    if history is not None:
        row = tl.load(token_rows + i, mask=inside, other=0).to(tl.int64)
        tl.store(history + row * positions_held + position, token, mask=inside)
    inside = i < sequences
    tl.store(last + i, tl.load(query_starts + 1 + i, mask=inside, other=0).to(tl.int64) - 1, mask=inside)
    inside = i < cells
    cell = tl.load(at + i, mask=inside, other=0).to(tl.int64)
    tl.store(page_tables + cell, tl.load(pages + i, mask=inside, other=0), mask=inside)
    inside = i < words
    row = tl.load(fresh + i // WORDS, mask=inside, other=0)
    tl.store(parameters + row * WORDS + i % WORDS, tl.load(values + i, mask=inside, other=0), mask=inside)
    if shapings is not None:
        inside = i < shaping_words
        row = tl.load(newly_shaped + i // SHAPING_WORDS, mask=inside, other=0)
        word = tl.load(new_shapings + i, mask=inside, other=0)
        tl.store(shapings + row * SHAPING_WORDS + i % SHAPING_WORDS, word, mask=inside)
