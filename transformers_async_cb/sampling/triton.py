"""Picking tokens in Triton: logits are read once in their own dtype, and what may not be drawn is not looked at again.

The same ids as the reference's, bit for bit: its arithmetic, compiled without fused multiply-adds. Nothing is sized by
values, so a captured call can be replayed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl


if TYPE_CHECKING:
    from . import Flavour, Parameters

_GROUP = 64  # tokens of which only the largest logit is noted: a cache line of bfloat16
_CHUNK = 4096  # tokens that a program of many looks at
_SEARCHED = 2048  # tokens that a row's only program looks at at a time, so that two fit a multiprocessor
_BOUNDS = tl.constexpr(4)  # words a row in `bounds`: see _narrow_kernel

# The lowest bits of a float32 that came from such a dtype are always zero.
_EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


def pick(
    logits: torch.Tensor, parameters: Parameters, positions: torch.Tensor, flavour: Flavour
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `sampling.pick` says. Two kernels; two more before them where a row has top-k, top-p or min-p.

    A chunk is cut the same way whatever the number of rows, and only integers are added up across chunks to decide
    anything: a row gets the same alone and in a batch.
    """
    rows, vocabulary = logits.shape
    chunks, groups = triton.cdiv(vocabulary, _CHUNK), triton.cdiv(vocabulary, _GROUP)
    integers = {"dtype": torch.int32, "device": logits.device}
    temperature, top_p, min_p, top_k, seed_low, seed_high = parameters
    stride = temperature.stride(0)
    assert all(column.stride(0) == stride for column in parameters)
    rules = (temperature, top_p, top_k, min_p, stride)
    layout = (logits, *logits.stride(), vocabulary)
    exact = {"GROUP": _GROUP, "EMPTY_BITS": _EMPTY_BITS[logits.dtype], "enable_fp_fusion": False}
    bounds = listed = None
    if flavour.filtered:
        peaks, listed = torch.empty(rows, groups, **integers), torch.empty(rows, groups, **integers)
        bounds = torch.empty(rows, _BOUNDS.value, **integers)
        _survey_kernel[(rows, chunks)](*layout, *rules, peaks, groups, **exact, CHUNK=_CHUNK, num_warps=4)
        _narrow_kernel[(rows,)](
            *layout, *rules, peaks, listed, bounds, groups,
            **exact, CHUNK=_SEARCHED, LANES=triton.next_power_of_2(groups), num_warps=8,
        )  # fmt: skip
    found, at = torch.empty(rows, chunks, **integers), torch.empty(rows, chunks, **integers)
    largest = total = None
    if flavour.logprobs:
        largest, total = torch.empty_like(found, dtype=torch.float32), torch.empty_like(found, dtype=torch.float32)
    ids = torch.empty(rows, **integers)
    logprobs = logits.new_empty(rows, dtype=torch.float32) if flavour.logprobs else None
    _pick_kernel[(rows, chunks)](
        *layout, *rules, seed_low, seed_high, positions, listed, bounds, found, at, largest, total, groups,
        **exact, CHUNK=_CHUNK, SAMPLED=flavour.sampled, LOGPROBS=flavour.logprobs, num_warps=8,
    )  # fmt: skip
    _combine_kernel[(rows,)](
        *layout, temperature, stride, bounds, found, at, largest, total, ids, logprobs, chunks,
        PER_CHUNK=_CHUNK // _GROUP, CHUNKS=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip
    return ids, logprobs


# ---------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def order_key(x, EMPTY_BITS: tl.constexpr):
    """int32 in the order of float32 `x`: -0 as 0, NaN above all."""
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, key, 0x7FFFFFFF) >> EMPTY_BITS


@triton.jit
def _lowest_key(EMPTY_BITS: tl.constexpr):
    return order_key(tl.full((), float("-inf"), tl.float32), EMPTY_BITS)


@triton.jit
def _value(key, EMPTY_BITS: tl.constexpr):
    """The float32 that has this key."""
    bits = key << EMPTY_BITS
    return tl.where(key < 0, bits ^ (0x7FFFFFFF >> EMPTY_BITS << EMPTY_BITS), bits).to(tl.float32, bitcast=True)


@triton.jit
def _below_largest(x, largest, inverse):
    return tl.where(x == largest, 0.0, (x - largest) * inverse)


@triton.jit
def _inverse(temperature):
    return tl.div_rn(1.0, tl.where(temperature == 0, 1.0, temperature))


@triton.jit
def _mass(scores):
    """This and what follows: see the reference, to which each line corresponds."""
    scores = tl.where(scores > -40.0, scores, -40.0)
    halvings = (0.5 - scores * 1.44269502).to(tl.int32)
    x = (scores + halvings.to(tl.float32) * 0.693359375) - halvings.to(tl.float32) * 2.12194442e-4
    y = (1.98756915e-4 * x + 1.39819995e-3) * x + 8.3334519e-3
    y = (((y * x + 4.16657959e-2) * x + 0.166666655) * x + 0.500000012) * (x * x) + x + 1.0
    return ((y * 16777216.0).to(tl.int32).to(tl.int64) << 16) >> halvings.to(tl.int64)


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    x = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    y = (0.010764511 * x - 0.055145193) * x + 0.13467453
    return exponent * 0.693147182 + ((((y * x - 0.22589801) * x + 0.3282422) * x - 0.49947178) * x + 0.99998116) * x


@triton.jit
def _exponential(seed_low, seed_high, position, index):
    low, high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    first = _mix(_mix(position.to(tl.uint32) * 0x9E3779B1 + low) ^ high)
    second = _mix(first + 0x7F4A7C15)
    bits = _mix(_mix(index.to(tl.uint32) ^ first) + second)
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = (1.0 - uniform).to(tl.int32, bitcast=True)
    early = uniform < 0.5
    halvings = tl.where(early, 0, 126 - (rest >> 23))
    mantissa = ((rest & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    x = tl.where(early, uniform + uniform, 2.0 - mantissa)
    y = (0.011164904 * x - 0.014380096) * x + 0.023567557
    y = (((y * x + 0.016909504) * x + 0.061118156) * x + 0.18027079) * x + 0.7213482
    return halvings.to(tl.float32) + y * x


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


# ---------------------------------------------------------------------------------------- what may be drawn


@triton.jit
def _rules_of(row, vocabulary, temperature, top_p, top_k, min_p, stride):
    """A row's temperature, top-p, top-k (0 for off), min-p (0 for off), and whether any of them drops tokens."""
    t = tl.load(temperature + row * stride)
    p = tl.load(top_p + row * stride)
    k = tl.load(top_k + row * stride)
    k = tl.where((k > 0) & (k < vocabulary), k, 0)
    least = tl.load(min_p + row * stride)
    return t, p, k, least, (t != 0) & ((k > 0) | (p < 1) | (least > 0))


@triton.jit
def _survey_kernel(
    logits, row_stride, token_stride, vocabulary, temperature, top_p, top_k, min_p, stride, peaks, groups,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """The largest key of each group of tokens, in the rows where tokens are dropped."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, _, _, _, drops = _rules_of(row, vocabulary, temperature, top_p, top_k, min_p, stride)
    if not drops:
        return
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    index = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + row * row_stride + index * token_stride, mask=index < vocabulary, other=float("-inf"))
    tl.store(peaks + row * groups + group, tl.max(order_key(x.to(tl.float32), EMPTY_BITS), 1), mask=group < groups)


@triton.jit
def _narrow_kernel(
    logits, row_stride, token_stride, vocabulary, temperature, top_p, top_k, min_p, stride, peaks, listed, bounds,
    groups,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, EMPTY_BITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What may be drawn in a row: of the `listed` groups the tokens above a key, and those of that key up to an index.

    The k-th largest peak is at most the k-th largest logit, so the top k are in the groups whose peak is no lower, as
    a rule little more than k of them; likewise with the mass of the peaks for top-p. Only those are looked at again,
    by bisection for the keys.

    `bounds` gets the number of listed groups (-1: all, and none is listed), the key, the index, and the largest key,
    from which min-p counts.
    """
    row = tl.program_id(0).to(tl.int64)
    t, p, k, _, drops = _rules_of(row, vocabulary, temperature, top_p, top_k, min_p, stride)
    logits += row * row_stride
    peaks += row * groups
    listed += row * groups
    lowest = _lowest_key(EMPTY_BITS)
    count, key, last, top = -1, lowest, vocabulary, lowest
    if drops:
        lane = tl.arange(0, LANES)
        peak = tl.load(peaks + lane, mask=lane < groups, other=lowest)
        top = tl.max(peak, 0)
        largest = _value(top, EMPTY_BITS)
        inverse = _inverse(t)
        if (k > 0) | (p < 1):
            wanted = k.to(tl.int64)
            amounts = tl.where(lane < groups, 1, 0).to(tl.int64)
            if k == 0:
                total = _amount(
                    logits, token_stride, vocabulary, listed, groups, lowest, largest, inverse,
                    False, True, GROUP, CHUNK, EMPTY_BITS,
                )  # fmt: skip
                wanted = _share(total, p)
                amounts *= _mass(_below_largest(_value(peak, EMPTY_BITS), largest, inverse))
            low, high = lowest, top
            while low < high:
                middle = (low | high) - ((low ^ high) >> 1)
                enough = tl.sum(tl.where(peak >= middle, amounts, 0), 0) >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            chosen = (peak >= low) & (lane < groups)
            tl.store(listed + tl.cumsum(chosen.to(tl.int32), 0) - 1, lane, mask=chosen)
            tl.debug_barrier()  # the list is read by other threads than wrote it
            count = tl.sum(chosen.to(tl.int32), 0)
            key = low
            if k > 0:
                key = _search(
                    logits, token_stride, vocabulary, listed, count, key, top, wanted, largest, inverse,
                    False, GROUP, CHUNK, EMPTY_BITS,
                )  # fmt: skip
            if p < 1:
                if k > 0:
                    total = _amount(
                        logits, token_stride, vocabulary, listed, count, key, largest, inverse,
                        True, True, GROUP, CHUNK, EMPTY_BITS,
                    )  # fmt: skip
                    wanted = _share(total, p)
                key = _search(
                    logits, token_stride, vocabulary, listed, count, key, top, wanted, largest, inverse,
                    True, GROUP, CHUNK, EMPTY_BITS,
                )  # fmt: skip
                above = _amount(
                    logits, token_stride, vocabulary, listed, count, key + 1, largest, inverse,
                    True, True, GROUP, CHUNK, EMPTY_BITS,
                )  # fmt: skip
                each = tl.maximum(_mass(_below_largest(_value(key, EMPTY_BITS), largest, inverse)), 1)
                ties = tl.maximum((wanted - above + each - 1) // each, 1)
                last = _index_of(logits, token_stride, vocabulary, listed, count, key, ties, GROUP, CHUNK, EMPTY_BITS)
    bounds += row * _BOUNDS
    tl.store(bounds, count)
    tl.store(bounds + 1, key)
    tl.store(bounds + 2, last)
    tl.store(bounds + 3, top)


@triton.jit
def _share(total, p):
    return tl.maximum((total.to(tl.float64) * p.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _tokens(listed, at, count, vocabulary, LISTED: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """The vocabulary indexes of a chunk of groups from the `at`-th on, in rising order, and which of them exist."""
    i = tl.arange(0, CHUNK)
    entry = at + i // GROUP
    group = entry
    if LISTED:
        group = tl.load(listed + entry, mask=entry < count, other=0)
    index = group * GROUP + i % GROUP
    return index, (entry < count) & (index < vocabulary)


@triton.jit
def _amount(
    logits, token_stride, vocabulary, listed, count, key, largest, inverse,
    LISTED: tl.constexpr, MASS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """How many tokens of the listed groups have this key or one above, or the mass they have."""
    total = tl.zeros([CHUNK], tl.int64)
    for at in range(0, count, CHUNK // GROUP):
        index, there = _tokens(listed, at, count, vocabulary, LISTED, GROUP, CHUNK)
        x = tl.load(logits + index * token_stride, mask=there, other=0.0).to(tl.float32)
        there = there & (order_key(x, EMPTY_BITS) >= key)
        if MASS:
            total += tl.where(there, _mass(_below_largest(x, largest, inverse)), 0)
        else:
            total += there.to(tl.int64)
    return tl.sum(total, 0)


@triton.jit
def _search(
    logits, token_stride, vocabulary, listed, count, low, high, wanted, largest, inverse,
    MASS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """The largest key from `low` to `high` at and above which there is the wanted amount; `low` if there is none."""
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        amount = _amount(
            logits, token_stride, vocabulary, listed, count, middle, largest, inverse,
            True, MASS, GROUP, CHUNK, EMPTY_BITS,
        )  # fmt: skip
        low = tl.where(amount >= wanted, middle, low)
        high = tl.where(amount >= wanted, high, middle - 1)
    return low


@triton.jit
def _index_of(
    logits, token_stride, vocabulary, listed, count, key, nth,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """The index of the `nth` token with exactly this key."""
    found = vocabulary
    seen = tl.zeros((), tl.int64)
    for at in range(0, count, CHUNK // GROUP):
        index, there = _tokens(listed, at, count, vocabulary, True, GROUP, CHUNK)
        x = tl.load(logits + index * token_stride, mask=there, other=0.0).to(tl.float32)
        same = (there & (order_key(x, EMPTY_BITS) == key)).to(tl.int32)
        rank = seen + tl.cumsum(same, 0)
        found = tl.minimum(found, tl.min(tl.where((same > 0) & (rank == nth), index, vocabulary), 0))
        seen += tl.sum(same, 0)
    return found


# -------------------------------------------------------------------------------------------------- the draw


@triton.jit
def _pick_kernel(
    logits, row_stride, token_stride, vocabulary, temperature, top_p, top_k, min_p, stride,
    seed_low, seed_high, positions, listed, bounds, found, at, largest, total, groups,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, EMPTY_BITS: tl.constexpr, SAMPLED: tl.constexpr, LOGPROBS: tl.constexpr,
):  # fmt: skip
    """The winner of each chunk of a row, or of what is listed of it; for log-probabilities, the largest logit and the
    sum of the exponentials of what took part."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, _, _, least, _ = _rules_of(row, vocabulary, temperature, top_p, top_k, min_p, stride)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    there = index < vocabulary
    if bounds is not None:
        bounds += row * _BOUNDS
        count = tl.load(bounds)
        first = chunk * (CHUNK // GROUP)
        if (count >= 0) & (first >= count):
            return
        if count >= 0:
            index, there = _tokens(listed + row * groups, first, count, vocabulary, True, GROUP, CHUNK)
    x = tl.load(logits + row * row_stride + index * token_stride, mask=there, other=float("-inf")).to(tl.float32)
    if bounds is not None:
        key, last, top = tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3)
        own = order_key(x, EMPTY_BITS)
        there = there & ((own > key) | ((own == key) & (index <= last)))
        floor = tl.where(least > 0, _log(least), float("-inf"))
        scores = _below_largest(x, _value(top, EMPTY_BITS), _inverse(t))
        there = there & ((scores < floor) == 0)
    raced = x
    if SAMPLED:
        low, high = tl.load(seed_low + row * stride), tl.load(seed_high + row * stride)
        raced = x - t * _log(_exponential(low, high, tl.load(positions + row), index))
    raced = tl.where(there, order_key(raced, 0), -0x80000000)
    best = tl.max(raced, 0)
    slot = row * tl.num_programs(1) + chunk
    tl.store(found + slot, best)
    tl.store(at + slot, tl.min(tl.where(raced == best, index, vocabulary - 1), 0))
    if LOGPROBS:
        peak = tl.max(tl.where(there, x, float("-inf")), 0)
        tl.store(largest + slot, peak)
        tl.store(total + slot, tl.sum(tl.where(there, tl.exp(_below_largest(x, peak, _inverse(t))), 0.0), 0))


@triton.jit
def _combine_kernel(
    logits, row_stride, token_stride, vocabulary, temperature, stride, bounds, found, at, largest, total,
    ids, logprobs, chunks, PER_CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The winner of a row: of equals, the first."""
    row = tl.program_id(0).to(tl.int64)
    if bounds is not None:
        count = tl.load(bounds + row * _BOUNDS)
        used = tl.where(count < 0, chunks, tl.cdiv(count, PER_CHUNK))
    else:
        used = chunks
    i = tl.arange(0, CHUNKS)
    slot = row * chunks + i
    raced = tl.load(found + slot, mask=i < used, other=-0x80000000)
    index = tl.load(at + slot, mask=i < used, other=0)
    winner = tl.min(tl.where((i < used) & (raced == tl.max(raced, 0)), index, vocabulary - 1), 0)
    tl.store(ids + row, winner)
    if logprobs is not None:
        inverse = _inverse(tl.load(temperature + row * stride))
        peak = tl.load(largest + slot, mask=i < used, other=float("-inf"))
        top = tl.max(peak, 0)
        sums = tl.load(total + slot, mask=i < used, other=0.0) * tl.exp(_below_largest(peak, top, inverse))
        x = tl.load(logits + row * row_stride + winner * token_stride).to(tl.float32)
        tl.store(logprobs + row, _below_largest(x, top, inverse) - tl.log(tl.sum(sums, 0)))
