"""Shaping and masking of logits in Triton, in place. One program shapes a sequence, and goes through the rules one
after the other.

Nothing is sized by values, so a captured call can be replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .shaping import HEAD_WORDS, SEQUENCE_WORDS, TOKEN_WORDS, Rule, Tables


_BLOCK = 1024
_MOST_COUNTS = 2**24  # words for counting tokens, at most: 64 MiB

_HEAD, _PER_TOKEN, _PER_SEQUENCE = tl.constexpr(HEAD_WORDS), tl.constexpr(TOKEN_WORDS), tl.constexpr(SEQUENCE_WORDS)
_EARLY_BIAS, _BIAS = tl.constexpr(int(Rule.EARLY_BIAS)), tl.constexpr(int(Rule.BIAS))
_BAN, _BAN_WHILE_SHORT = tl.constexpr(int(Rule.BAN)), tl.constexpr(int(Rule.BAN_WHILE_SHORT))
_SUPPRESS, _SUPPRESS_FIRST = tl.constexpr(int(Rule.SUPPRESS)), tl.constexpr(int(Rule.SUPPRESS_FIRST))
_FORCE_LAST = tl.constexpr(int(Rule.FORCE_LAST))


def shape(
    logits: torch.Tensor, tables: Tables, shaped: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor
) -> None:
    sequences, vocabulary = logits.shape
    programs = min(sequences, max(1, _MOST_COUNTS // vocabulary))
    counts = torch.zeros(programs, vocabulary, dtype=torch.int32, device=logits.device)
    _shape_kernel[(programs,)](
        logits, *logits.stride(), vocabulary, shaped, rows, lengths, sequences,
        tables.history, tables.history.stride(0), tables.shapings, tables.shapings.stride(0), counts,
        BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def mask(logits: torch.Tensor, masked: torch.Tensor, masks: torch.Tensor) -> None:
    vocabulary, words = logits.shape[1], masks.shape[1]
    _mask_kernel[(len(masked), triton.cdiv(vocabulary, _BLOCK))](
        logits, *logits.stride(), vocabulary, masked, masks, words, BLOCK=_BLOCK, num_warps=4
    )


@triton.jit
def _mask_kernel(logits, row_stride, token_stride, vocabulary, masked, masks, words, BLOCK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    sequence = tl.load(masked + item).to(tl.int64)
    if sequence >= 0:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(masks + item * words + token // 32, mask=token // 32 < words, other=0)
        banned = (token < vocabulary) & (((word >> (token % 32)) & 1) == 0)
        tl.store(logits + sequence * row_stride + token * token_stride, float("-inf"), mask=banned)


# Sizes vary from step to step, and one kernel serves them all.
@triton.jit(do_not_specialize=["sequences"])
def _shape_kernel(
    logits, row_stride, token_stride, vocabulary, shaped, rows, lengths, sequences,
    history, history_stride, shapings, stride, counts, BLOCK: tl.constexpr,
):  # fmt: skip
    """The order of the reference. What is written under one rule is read under the next by other threads: hence the
    barriers, but between rules that both ban."""
    counts += tl.program_id(0).to(tl.int64) * vocabulary
    for item in range(tl.program_id(0), sequences, tl.num_programs(0)):
        sequence = tl.load(shaped + item).to(tl.int64)
        if sequence >= 0:
            row, length = tl.load(rows + sequence).to(tl.int64), tl.load(lengths + sequence)
            own, past, head = logits + sequence * row_stride, history + row * history_stride, shapings + row * stride
            repetition, presence, frequency = _float(head), _float(head + 1), _float(head + 2)
            prompt_length, shortest, ngram = tl.load(head + 3), tl.load(head + 4), tl.load(head + 5)
            begin, forced_first, forced_last_at = tl.load(head + 6), tl.load(head + 7), tl.load(head + 8)
            count, start, end = tl.load(head + 9), tl.load(head + 10), tl.load(head + 11)

            _add(own, token_stride, vocabulary, head, count, _EARLY_BIAS, BLOCK)
            _add_matching(own, token_stride, vocabulary, head, start, end, past, length, _EARLY_BIAS)
            tl.debug_barrier()
            if repetition != 1:
                _count(past, 0, length, vocabulary, counts, BLOCK)
                _penalise(own, token_stride, vocabulary, past, 0, length, counts, repetition, 0.0, True, BLOCK)
            if ngram > 0:
                _ban_ngrams(own, token_stride, vocabulary, past, length, ngram, BLOCK)
            _set(own, token_stride, vocabulary, head, count, _BAN, float("-inf"), BLOCK)
            tl.debug_barrier()
            _add_matching(own, token_stride, vocabulary, head, start, end, past, length, _BAN)
            tl.debug_barrier()
            if length < shortest:
                _set(own, token_stride, vocabulary, head, count, _BAN_WHILE_SHORT, float("-inf"), BLOCK)
            tl.debug_barrier()
            if (length == 1) & (forced_first >= 0):
                _ban_all(own, token_stride, vocabulary, BLOCK)
                tl.store(own + forced_first * token_stride, 0.0)
                tl.debug_barrier()
            if length == forced_last_at:
                _ban_all(own, token_stride, vocabulary, BLOCK)
                _set(own, token_stride, vocabulary, head, count, _FORCE_LAST, 0.0, BLOCK)
                tl.debug_barrier()
            _set(own, token_stride, vocabulary, head, count, _SUPPRESS, float("-inf"), BLOCK)
            if length == begin:
                _set(own, token_stride, vocabulary, head, count, _SUPPRESS_FIRST, float("-inf"), BLOCK)
            tl.debug_barrier()
            if (presence != 0) | (frequency != 0):
                _count(past, prompt_length, length, vocabulary, counts, BLOCK)
                _penalise(
                    own, token_stride, vocabulary, past, prompt_length, length, counts, frequency, presence,
                    False, BLOCK,
                )  # fmt: skip
            _add(own, token_stride, vocabulary, head, count, _BIAS, BLOCK)


@triton.jit
def _float(pointer):
    return tl.load(pointer).to(tl.float32, bitcast=True)


# -------------------------------------------------------------------------------------------------- the lists


@triton.jit
def _listed(head, count, at, vocabulary, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Where the entries of a row's list from the `at`-th on are, their tokens, and which of them are of this rule."""
    i = at + tl.arange(0, BLOCK)
    entry = head + _HEAD + i * _PER_TOKEN
    word = tl.load(entry, mask=i < count, other=0)
    token = word & 0xFFFFFF
    return entry, token, ((word >> 24) == RULE) & (token < vocabulary)


@triton.jit
def _set(own, stride, vocabulary, head, count, RULE: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    for at in range(0, count, BLOCK):
        _, token, there = _listed(head, count, at, vocabulary, RULE, BLOCK)
        tl.store(own + token * stride, VALUE, mask=there)


@triton.jit
def _add(own, stride, vocabulary, head, count, RULE: tl.constexpr, BLOCK: tl.constexpr):
    for at in range(0, count, BLOCK):
        entry, token, there = _listed(head, count, at, vocabulary, RULE, BLOCK)
        value = tl.load(entry + 1, mask=there, other=0).to(tl.float32, bitcast=True)
        x = tl.load(own + token * stride, mask=there, other=0.0).to(tl.float32)
        tl.store(own + token * stride, x + value, mask=there)


@triton.jit
def _add_matching(own, stride, vocabulary, head, start, end, past, length, RULE: tl.constexpr):
    """Add up what is to be added to a token, which is listed together, then add it."""
    at = start
    total = 0.0
    while at < end:
        rule, tokens = tl.load(head + at), tl.load(head + at + 2)
        matches = ((rule >> 1) == RULE) & (tokens <= length + 1)
        for i in range(tokens - 1):
            there = length + 1 - tokens + i
            own_token = tl.load(past + there, mask=there >= 0, other=-1)
            matches = matches & (own_token == tl.load(head + at + 3 + i))
        total += tl.where(matches, _float(head + at + 1), 0.0)
        token = tl.load(head + at + 2 + tokens)
        there = (rule == 2 * RULE + 1) & (token < vocabulary)
        x = tl.load(own + token * stride, mask=there, other=0.0).to(tl.float32)
        tl.store(own + token * stride, x + total, mask=there)
        total = tl.where((rule & 1) == 1, 0.0, total)
        at += _PER_SEQUENCE + tokens


# ------------------------------------------------------------------------------------------------- the history


@triton.jit
def _count(past, start, length, vocabulary, counts, BLOCK: tl.constexpr):
    """Count tokens from `start` on; all counts are 0 before."""
    for at in range(start, length, BLOCK):
        i = at + tl.arange(0, BLOCK)
        token = tl.load(past + i, mask=i < length, other=vocabulary)
        tl.atomic_add(counts + token, 1, mask=token < vocabulary, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def _penalise(
    own, stride, vocabulary, past, start, length, counts, penalty, presence,
    REPETITION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Penalise each token once: whoever takes its count, which leaves 0, does it."""
    for at in range(start, length, BLOCK):
        i = at + tl.arange(0, BLOCK)
        token = tl.load(past + i, mask=i < length, other=vocabulary)
        count = tl.atomic_xchg(counts + token, 0, mask=token < vocabulary, sem="relaxed")
        taken = (token < vocabulary) & (count > 0)
        x = tl.load(own + token * stride, mask=taken, other=0.0).to(tl.float32)
        if REPETITION:
            x = tl.where(x < 0, x * penalty, tl.div_rn(x, penalty))
        else:
            x = (x - penalty * count.to(tl.float32)) - presence
        tl.store(own + token * stride, x, mask=taken)
    tl.debug_barrier()


@triton.jit
def _ban_ngrams(own, stride, vocabulary, past, length, ngram, BLOCK: tl.constexpr):
    """Ban what followed wherever the last tokens, one fewer than `ngram`, came before."""
    for at in range(0, length + 1 - ngram, BLOCK):
        i = at + tl.arange(0, BLOCK)
        same = i <= length - ngram
        for j in range(ngram - 1):
            wanted = tl.load(past + length + 1 - ngram + j)
            same = same & (tl.load(past + i + j, mask=same, other=-1) == wanted)
        token = tl.load(past + i + ngram - 1, mask=same, other=vocabulary)
        tl.store(own + token * stride, float("-inf"), mask=token < vocabulary)


@triton.jit
def _ban_all(own, stride, vocabulary, BLOCK: tl.constexpr):
    for at in range(0, vocabulary, BLOCK):
        i = at + tl.arange(0, BLOCK)
        tl.store(own + i * stride, float("-inf"), mask=i < vocabulary)
    tl.debug_barrier()
