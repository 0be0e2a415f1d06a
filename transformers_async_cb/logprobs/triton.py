"""Log-probabilities in Triton: logits are read once in their own dtype, of the rows that are asked for.

Nothing is sized by values, so a captured call can be replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..sampling.triton import order_key
from .entries import ENTRY_WORDS, MOST_LIKELIEST, RANKED_WORDS


_CHUNK = 4096  # tokens that a program looks at
_ENTRY, _MOST, _WORDS = tl.constexpr(ENTRY_WORDS), tl.constexpr(MOST_LIKELIEST), tl.constexpr(RANKED_WORDS)
_NONE = tl.constexpr(-(2**63))
_LANES = tl.constexpr(triton.next_power_of_2(MOST_LIKELIEST))


def rank(logits: torch.Tensor, entries: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    count, vocabulary = len(entries) // ENTRY_WORDS, logits.shape[1]
    chunks = triton.cdiv(vocabulary, _CHUNK)
    largest, total = logits.new_empty((2, count, chunks), dtype=torch.float32)
    best = logits.new_empty((count, chunks, MOST_LIKELIEST), dtype=torch.int64)
    ranked = entries.new_empty(count, RANKED_WORDS)
    layout = (logits, *logits.stride(), vocabulary, entries)
    _survey_kernel[(count, chunks)](*layout, largest, total, best, CHUNK=_CHUNK, num_warps=8)
    _rank_kernel[(count,)](
        *layout, picked, largest, total, best, ranked, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=4
    )
    return ranked


@triton.jit
def _survey_kernel(
    logits, row_stride, token_stride, vocabulary, entries, largest, total, best, CHUNK: tl.constexpr
):  # fmt: skip
    """Of each chunk of an entry's row, the largest logit, the sum of the exponentials below it, and the likeliest
    tokens: as integers in the order of their logits, of equals the lowest id above."""
    entry, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, wanted = tl.load(entries + entry * _ENTRY).to(tl.int64), tl.load(entries + entry * _ENTRY + 2)
    if row < 0:
        return
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    there = index < vocabulary
    x = tl.load(logits + row * row_stride + index * token_stride, mask=there, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, 0)
    slot = entry * tl.num_programs(1) + chunk
    tl.store(largest + slot, peak)
    tl.store(total + slot, tl.sum(tl.where(x == peak, 1.0, tl.exp(x - peak)) * there.to(tl.float32), 0))
    left = tl.where(there, (order_key(x, 0).to(tl.int64) << 32) + (0x7FFFFFFF - index).to(tl.int64), _NONE)
    for i in range(wanted):
        most = tl.max(left, 0)
        tl.store(best + slot * _MOST + i, most)
        left = tl.where(left == most, _NONE, left)


@triton.jit
def _rank_kernel(
    logits, row_stride, token_stride, vocabulary, entries, picked, largest, total, best, ranked, chunks,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    row, wanted = tl.load(entries + entry * _ENTRY).to(tl.int64), tl.load(entries + entry * _ENTRY + 2)
    if row < 0:
        return
    logits += row * row_stride
    ranked += entry * _WORDS
    token = tl.load(entries + entry * _ENTRY + 1)
    if token < 0:
        token = tl.load(picked + row)
    chunk = tl.arange(0, CHUNKS)
    peaks = tl.load(largest + entry * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    sums = tl.load(total + entry * chunks + chunk, mask=chunk < chunks, other=0.0)
    peak = tl.max(peaks, 0)
    normaliser = tl.log(tl.sum(tl.where(peaks == peak, sums, sums * tl.exp(peaks - peak)), 0))
    x = tl.load(logits + token * token_stride).to(tl.float32)
    tl.store(ranked, (x - peak - normaliser).to(tl.int32, bitcast=True))
    i = tl.arange(0, CHUNKS * _LANES)
    there = (i // _LANES < chunks) & (i % _LANES < wanted)
    left = tl.load(best + (entry * chunks + i // _LANES) * _MOST + i % _LANES, mask=there, other=_NONE)
    for place in range(wanted):
        most = tl.max(left, 0)
        index = 0x7FFFFFFF - (most & 0x7FFFFFFF)
        x = tl.load(logits + index * token_stride).to(tl.float32)
        tl.store(ranked + 1 + 2 * place, index.to(tl.int32))
        tl.store(ranked + 2 + 2 * place, (x - peak - normaliser).to(tl.int32, bitcast=True))
        left = tl.where(left == most, _NONE, left)
