"""Paged attention in Triton. Lengths and page tables are read on the device, so a captured call can be replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from ..gpu import compile_together, early, multiprocessors
from ..inputs import MOST_PARTS


if TYPE_CHECKING:
    from . import Step

_LOG2_E = tl.constexpr(1.4426950408889634)

# What is read a number at a time, of any size and wherever it lies: one kernel serves all.
_ANY = {
    "do_not_specialize": ["table_stride"],
    "do_not_specialize_on_alignment": [
        "page_table", "token_rows", "positions", "rows", "query_starts", "lengths", "counts", "work", "counters",
    ],
}  # fmt: skip


# Kinds of layers whose kernels were compiled.
_compiled: set[tuple] = set()


class _Tile(NamedTuple):
    """How a program walks over the keys."""

    keys: int
    warps: int
    stages: int


# Many small programs: on an H200 one warp reads 4.1 TB/s at 512 sequences of 600 tokens, four with 64 keys 3.6.
# The wide ones are for heads of more than 128, or float32; the widest are what a multiprocessor has room for.
_DECODE, _PREFILL = _Tile(32, 1, 2), _Tile(32, 4, 3)
_WIDE, _WIDEST = _Tile(32, 4, 2), _Tile(16, 4, 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    step: Step,
    scaling: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sequences with one new token go through the decode kernel, the others through the prefill kernel; both run in a
    mixed step, and each leaves the other's sequences alone. A step that only decodes is one kernel: it also writes the
    new keys and values."""
    tokens, heads, key_dim = query.shape
    _, page_size, kv_heads, value_dim = value_pages.shape
    sequences = step.rows.shape[0]
    group = heads // kv_heads
    sinks = None if sinks is None else sinks.contiguous()
    if not step.decode_only:
        _write_pages(key, value, key_pages, value_pages, step)
    out = query.new_empty(tokens, heads, value_dim)
    key_block, value_block = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    decode, prefill, most_queries = _tiles(max(key_block, value_block), query.element_size())
    shared = {
        "PAGE_SIZE": page_size,
        "GROUP": group,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_BLOCK": key_block,
        "VALUE_BLOCK": value_block,
        "WINDOW": window,
        "CHUNK": chunk,
        "SOFTCAP": softcap * _LOG2_E.value,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    layout = (
        step.page_table, step.rows, step.query_starts, step.lengths, sinks,
        scaling / softcap if softcap else scaling * _LOG2_E.value, step.page_table.stride(0),
        *query.stride(), *key_pages.stride()[:3], *value_pages.stride()[:3], *out.stride()[:2],
    )  # fmt: skip

    padded_group = triton.next_power_of_2(group)
    partial = query.new_empty(len(step.work), heads, value_dim, dtype=torch.float32)
    weights = query.new_empty(len(step.work), heads, dtype=torch.float32)
    decode_arguments = (
        query, key, value, key_pages, value_pages, out, partial, weights, step.work, step.counters, *layout,
        *key.stride(), *value.stride(),
    )  # fmt: skip
    decode_options = shared | {
        "ROWS": max(16, padded_group), "KEYS": decode.keys, "PARTS": MOST_PARTS,
        "num_warps": max(decode.warps, min(4, padded_group // 16)), "num_stages": decode.stages,
        **early(query.device),
    }  # fmt: skip
    queries = max(1, most_queries // padded_group)
    prefill_arguments = (query, key_pages, value_pages, out, step.counts, *layout)
    prefill_options = shared | {
        "QUERIES": queries, "PADDED_GROUP": padded_group, "KEYS": prefill.keys,
        "num_warps": prefill.warps, "num_stages": prefill.stages,
    }  # fmt: skip
    kind = (query.device, query.dtype, kv_heads, sinks is None, *prefill_options.items())
    if query.is_cuda and kind not in _compiled:
        _compiled.add(kind)
        compile_together(
            query.device,
            (_decode_kernel, decode_arguments, {**decode_options, "WRITES": True}),
            (_decode_kernel, decode_arguments, {**decode_options, "WRITES": False}),
            (_prefill_kernel, prefill_arguments, prefill_options),
        )
    _decode_kernel[(kv_heads, len(step.work))](*decode_arguments, **decode_options, WRITES=step.decode_only)
    if not step.decode_only:
        programs = min(tokens // queries + sequences, triton.cdiv(4 * multiprocessors(query.device), kv_heads))
        _prefill_kernel[(programs, kv_heads)](*prefill_arguments, **prefill_options)
    return out


def _tiles(widest: int, element_size: int) -> tuple[_Tile, _Tile, int]:
    """For decoding and for prefill, and the rows of queries that a prefill program has, by the dimensions of a head
    (padded) and the bytes of each."""
    if widest * element_size > 1024:
        return _WIDEST, _WIDEST, 16
    if widest > 256:
        return _WIDE, _WIDE, 32
    if widest > 128 or element_size == 4:
        return _WIDE, _WIDE, 64
    return _DECODE, _PREFILL, 128


def _write_pages(
    key: torch.Tensor, value: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, step: Step
) -> None:
    tokens, kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    _write_pages_kernel[(tokens,)](
        key, value, key_pages, value_pages, step.page_table, step.token_rows, step.positions,
        step.page_table.stride(0), *key.stride(), *value.stride(), *key_pages.stride()[:3], *value_pages.stride()[:3],
        PAGE_SIZE=key_pages.shape[1], KV_HEADS=kv_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        KEY_BLOCK=triton.next_power_of_2(kv_heads * key_dim), VALUE_BLOCK=triton.next_power_of_2(kv_heads * value_dim),
    )  # fmt: skip


@triton.jit(**_ANY)
def _write_pages_kernel(
    key, value, key_pages, value_pages, page_table, token_rows, positions,
    table_stride, key_st, key_sh, key_sd, value_st, value_sh, value_sd,
    kp_page, kp_token, kp_head, vp_page, vp_token, vp_head,
    PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_rows + token).to(tl.int64)
    position = tl.load(positions + token)
    page = tl.load(page_table + row * table_stride + position // PAGE_SIZE).to(tl.int64)
    offset = position % PAGE_SIZE
    i = tl.arange(0, KEY_BLOCK)
    head, dim, inside = i // KEY_DIM, i % KEY_DIM, i < KV_HEADS * KEY_DIM
    x = tl.load(key + token * key_st + head * key_sh + dim * key_sd, mask=inside)
    tl.store(key_pages + page * kp_page + offset * kp_token + head * kp_head + dim, x, mask=inside)
    i = tl.arange(0, VALUE_BLOCK)
    head, dim, inside = i // VALUE_DIM, i % VALUE_DIM, i < KV_HEADS * VALUE_DIM
    x = tl.load(value + token * value_st + head * value_sh + dim * value_sd, mask=inside)
    tl.store(value_pages + page * vp_page + offset * vp_token + head * vp_head + dim, x, mask=inside)


@triton.jit
def _tanh(x):
    """Of float32, to its precision: by exponentials, and by its series where they would cancel out."""
    t = tl.exp2(tl.abs(x) * -2.8853900817779268)
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315)))
    return tl.where(square < 0.02, series, tl.where(x < 0, -1.0, 1.0) * (1 - t) / (1 + t))


@triton.jit
def _before_keys(sinks, heads, counts, ROWS: tl.constexpr):
    """The running softmax before the first key: empty, or with a head's sink in each row that `counts` it."""
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        maximum = tl.load(sinks + heads, mask=counts, other=float("-inf")).to(tl.float32) * _LOG2_E
        total = tl.where(counts, 1.0, 0.0)
    return maximum, total


@triton.jit
def _attend_block(
    q, scaling, maximum, total, acc, first, last, query_positions, table, key_pages, value_pages,
    kp_page, kp_token, vp_page, vp_token,
    PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Fold keys `first` to `first + KEYS`, short of `last`, into the running softmax of each query row
    (https://arxiv.org/abs/1805.02867). What lies beyond `last` may be NaN and is not loaded. Not `MASKED`: all of the
    keys are there, and every query sees them."""
    at = first + tl.arange(0, KEYS)
    inside = at < last if MASKED else at >= first
    pages = tl.load(table + at // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    offsets = at % PAGE_SIZE
    key_dims, value_dims = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    k = tl.load(
        key_pages + (pages * kp_page + offsets * kp_token)[None, :] + key_dims[:, None],
        mask=inside[None, :] & (key_dims < KEY_DIM)[:, None], other=0.0,
    )  # fmt: skip
    scores = tl.dot(q, k, input_precision=PRECISION) * scaling
    if SOFTCAP > 0:
        scores = _tanh(scores) * SOFTCAP
    if MASKED:
        seen = inside[None, :] & (at[None, :] <= query_positions[:, None])
        if WINDOW > 0:
            seen = seen & (at[None, :] > query_positions[:, None] - WINDOW)
        if CHUNK > 0:
            seen = seen & (at[None, :] >= (query_positions // CHUNK * CHUNK)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if MASKED else new_maximum
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(maximum - base)
    total = total * shrink + tl.sum(p, 1)
    v = tl.load(
        value_pages + (pages * vp_page + offsets * vp_token)[:, None] + value_dims[None, :],
        mask=inside[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0,
    )  # fmt: skip
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return new_maximum, total, acc


@triton.jit(**_ANY)
def _decode_kernel(
    query, key, value, key_pages, value_pages, out, partial, weights, work, counters,
    page_table, rows, query_starts, lengths, sinks, scaling, table_stride,
    q_token, q_head, q_dim, kp_page, kp_token, kp_head, vp_page, vp_token, vp_head, out_token, out_head,
    key_token, key_head, key_dim, value_token, value_head, value_dim,
    PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, WRITES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token of one sequence, the query heads of one key head, one part of the keys: split-KV, as in Flash-Decoding
    (https://pytorch.org/blog/flash-decoding/), by the list of work that came with the step. The program with the last
    of the keys writes the new one to its page first; the program of a sequence that is done last adds the parts up.

    The heads of one item are neighbours, and start together: what a page holds of a token, it holds side by side. The
    other way around this takes 7 to 25 % longer on an H100."""
    kv_head, number = tl.program_id(0), tl.program_id(1)
    # What the step's inputs say was there long before the query is.
    item = tl.load(work + number)
    sequence = tl.maximum(item // (PARTS * PARTS) - 1, 0)
    token = tl.load(query_starts + sequence)
    length = tl.load(lengths + sequence)
    row = tl.load(rows + sequence)
    if EARLY:  # programs without work too: or the kernel could be done before what it depends on
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if item == 0:
        return
    split, parts = item // PARTS % PARTS, item % PARTS + 1
    begin = tl.maximum(0, length - WINDOW) if WINDOW > 0 else 0
    if CHUNK > 0:
        begin = (length - 1) // CHUNK * CHUNK
    blocks = tl.cdiv(length - begin, KEYS)
    share = tl.cdiv(blocks, parts)
    parts = tl.cdiv(blocks, share)
    if split >= parts:
        return
    first = begin + split * share * KEYS
    last = tl.minimum(first + share * KEYS, length)
    table = page_table + row.to(tl.int64) * table_stride
    key_pages += kv_head * kp_head
    value_pages += kv_head * vp_head
    token = token.to(tl.int64)
    r = tl.arange(0, ROWS)
    heads = kv_head * GROUP + r
    real = r < GROUP
    key_dims, value_dims = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    if WRITES:
        at = length - 1
        if (at >= first) & (at < last):
            page = tl.load(table + at // PAGE_SIZE).to(tl.int64)
            offset = at % PAGE_SIZE
            inside = key_dims < KEY_DIM
            x = tl.load(key + token * key_token + kv_head * key_head + key_dims * key_dim, mask=inside)
            tl.store(key_pages + page * kp_page + offset * kp_token + key_dims, x, mask=inside)
            inside = value_dims < VALUE_DIM
            x = tl.load(value + token * value_token + kv_head * value_head + value_dims * value_dim, mask=inside)
            tl.store(value_pages + page * vp_page + offset * vp_token + value_dims, x, mask=inside)
        tl.debug_barrier()  # and only then is it read
    q = tl.load(
        query + token * q_token + heads[:, None] * q_head + key_dims[None, :] * q_dim,
        mask=real[:, None] & (key_dims < KEY_DIM)[None, :], other=0.0,
    )  # fmt: skip
    positions = tl.zeros([ROWS], tl.int32) + (length - 1)
    maximum, total = _before_keys(sinks, heads, r < tl.where(split == 0, GROUP, 0), ROWS)
    acc = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    whole = first + (last - first) // KEYS * KEYS  # the one query is the newest token, and sees all from `begin` on
    for at in range(first, whole, KEYS):
        maximum, total, acc = _attend_block(
            q, scaling, maximum, total, acc, at, last, positions, table, key_pages, value_pages,
            kp_page, kp_token, vp_page, vp_token,
            PAGE_SIZE, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, KEYS, 0, 0, SOFTCAP, PRECISION, False,
        )  # fmt: skip
    if whole < last:
        maximum, total, acc = _attend_block(
            q, scaling, maximum, total, acc, whole, last, positions, table, key_pages, value_pages,
            kp_page, kp_token, vp_page, vp_token,
            PAGE_SIZE, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, KEYS, 0, 0, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    keep = real[:, None] & (value_dims < VALUE_DIM)[None, :]
    all_heads = tl.num_programs(0) * GROUP
    first_part = (number - split).to(tl.int64) * all_heads + heads  # a sequence's items follow one another
    at = (first_part * VALUE_DIM)[:, None] + value_dims[None, :]
    arrived = parts - 1
    if parts > 1:
        tl.store(partial + split * all_heads * VALUE_DIM + at, acc / total[:, None], mask=keep)
        tl.store(weights + split * all_heads + first_part, maximum + tl.log2(total), mask=real)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters + sequence * tl.num_programs(0) + kv_head, 1, sem="acq_rel")
    if arrived != parts - 1:
        return
    if parts > 1:  # read from the L2 cache, where other programs' stores are
        tl.store(counters + sequence * tl.num_programs(0) + kv_head, 0)
        every = tl.arange(0, PARTS)
        all_weights = tl.load(
            weights + first_part[:, None] + every[None, :] * all_heads,
            mask=real[:, None] & (every < parts)[None, :], other=float("-inf"), cache_modifier=".cg",
        )  # fmt: skip
        maximum = tl.where(real, tl.max(all_weights, 1), 0.0)
        total = tl.sum(tl.exp2(all_weights - maximum[:, None]), 1)
        acc = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
        for part in tl.range(0, parts, loop_unroll_factor=4):
            weight = tl.load(weights + part * all_heads + first_part, mask=real, other=0.0, cache_modifier=".cg")
            x = tl.load(partial + part * all_heads * VALUE_DIM + at, mask=keep, other=0.0, cache_modifier=".cg")
            acc += tl.exp2(weight - maximum)[:, None] * x
    acc = acc / total[:, None]
    where = out + token * out_token + heads[:, None] * out_head + value_dims[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit(**_ANY)
def _prefill_kernel(
    query, key_pages, value_pages, out, counts, page_table, rows, query_starts, lengths, sinks,
    scaling, table_stride, q_token, q_head, q_dim, kp_page, kp_token, kp_head, vp_page, vp_token, vp_head,
    out_token, out_head,
    PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, PADDED_GROUP: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Blocks of `QUERIES` tokens of one sequence each, the query heads of one key head; as many programs as run at
    once, however much or little there is to do.

    The first sequences decode. Of the others, sequence b owns the blocks from (tokens before it) // QUERIES +
    (sequences before it) on: never fewer than it needs, found by bisection.
    """
    kv_head = tl.program_id(1)
    decodes, sequences = tl.load(counts), tl.load(counts + 1)
    blocks = (tl.load(query_starts + sequences) - decodes) // QUERIES + sequences - decodes
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        low, high = decodes, sequences
        while high - low > 1:
            middle = (low + high) // 2
            if (tl.load(query_starts + middle) - decodes) // QUERIES + middle - decodes <= block:
                low = middle
            else:
                high = middle
        start = tl.load(query_starts + low)
        count = tl.load(query_starts + low + 1) - start
        first_query = (block - ((start - decodes) // QUERIES + low - decodes)) * QUERIES
        if (count > 1) & (first_query < count):
            _prefill_block(
                query, key_pages + kv_head * kp_head, value_pages + kv_head * vp_head, out,
                page_table + tl.load(rows + low).to(tl.int64) * table_stride,
                kv_head, start, count, first_query, tl.load(lengths + low), sinks,
                scaling, q_token, q_head, q_dim, kp_page, kp_token, vp_page, vp_token, out_token, out_head,
                PAGE_SIZE, GROUP, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, WINDOW, CHUNK, SOFTCAP, PRECISION,
                QUERIES, PADDED_GROUP, KEYS,
            )  # fmt: skip


@triton.jit
def _prefill_block(
    query, key_pages, value_pages, out, table, kv_head, start, count, first_query, length, sinks,
    scaling, q_token, q_head, q_dim, kp_page, kp_token, vp_page, vp_token, out_token, out_head,
    PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    QUERIES: tl.constexpr, PADDED_GROUP: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    context = length - count
    r = tl.arange(0, QUERIES * PADDED_GROUP)
    queries = first_query + r // PADDED_GROUP
    heads = kv_head * GROUP + r % PADDED_GROUP
    real = (queries < count) & (r % PADDED_GROUP < GROUP)
    tokens = (start + queries).to(tl.int64)
    key_dims = tl.arange(0, KEY_BLOCK)
    q = tl.load(
        query + (tokens * q_token + heads * q_head)[:, None] + key_dims[None, :] * q_dim,
        mask=real[:, None] & (key_dims < KEY_DIM)[None, :], other=0.0,
    )  # fmt: skip
    positions = context + queries
    maximum, total = _before_keys(sinks, heads, real, QUERIES * PADDED_GROUP)
    acc = tl.zeros([QUERIES * PADDED_GROUP, VALUE_BLOCK], tl.float32)
    last = tl.minimum(length, context + first_query + QUERIES)
    if WINDOW > 0:
        first = tl.maximum(0, context + first_query - WINDOW + 1)
    elif CHUNK > 0:
        first = (context + first_query) // CHUNK * CHUNK
    else:  # what even the first of the queries sees needs no mask
        first = (context + first_query + 1) // KEYS * KEYS
        for at in range(0, first, KEYS):
            maximum, total, acc = _attend_block(
                q, scaling, maximum, total, acc, at, last, positions, table, key_pages, value_pages,
                kp_page, kp_token, vp_page, vp_token,
                PAGE_SIZE, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, KEYS, WINDOW, CHUNK, SOFTCAP, PRECISION, False,
            )  # fmt: skip
    for at in range(first, last, KEYS):
        maximum, total, acc = _attend_block(
            q, scaling, maximum, total, acc, at, last, positions, table, key_pages, value_pages,
            kp_page, kp_token, vp_page, vp_token,
            PAGE_SIZE, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, KEYS, WINDOW, CHUNK, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    value_dims = tl.arange(0, VALUE_BLOCK)
    where = out + (tokens * out_token + heads * out_head)[:, None] + value_dims[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=real[:, None] & (value_dims < VALUE_DIM)[None, :])
