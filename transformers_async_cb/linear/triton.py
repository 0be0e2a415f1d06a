"""Products of few rows in Triton: the weights stream through once, at the rate the memory gives."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..gpu import early, multiprocessors, starts_early


MOST_ROWS = 64
_ROWS, _COLUMNS, _DEPTH = 64, 64, 128  # of a tile
_WARPS, _STAGES = 4, 4
_AHEAD = 8 * 2**20  # bytes of the weight that is read next


def suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `few_rows` can compute this product and is the better way to."""
    return x.numel() <= MOST_ROWS * weight.shape[1] and _tiles(weight, x.dtype) and x.is_contiguous()


def _tiles(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    columns, depth = weight.shape
    return (
        dtype == weight.dtype
        and dtype in (torch.bfloat16, torch.float16)
        and columns % _COLUMNS == 0
        and depth % _DEPTH == 0
        and weight.stride(1) == 1
    )


def few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    following: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` of at most `MOST_ROWS` rows; `counters` as for `product`. Programs that are done fetch the
    begin of `following`, the weight that is read next, into the L2 cache: while the others end, and what lies between
    two products runs, the memory would have nothing to do."""
    columns, depth = weight.shape
    rows = x.numel() // depth
    out = x.new_empty(*x.shape[:-1], columns)
    splits = _splits(columns // _COLUMNS, depth // _DEPTH, x.device)
    partial = x.new_empty((splits, rows, columns) if splits > 1 else 0, dtype=torch.float32)
    tile_rows = 32 if rows <= 32 else _ROWS
    grid = (columns // _COLUMNS, splits, triton.cdiv(rows, tile_rows))
    ahead = _ahead(following, x)
    each = triton.cdiv(ahead.segments, grid[0] * grid[1])
    _few_rows_kernel[grid](
        x, weight, bias, out, partial, counters, rows, columns, depth, weight.stride(0),
        following if each else None, each, *ahead,
        ROWS=tile_rows, COLUMNS=_COLUMNS, DEPTH=_DEPTH, FETCHED=triton.next_power_of_2(max(each, 1)),
        num_warps=_WARPS, num_stages=_STAGES, **early(x.device),
    )  # fmt: skip
    return out


class _Ahead(NamedTuple):
    """What to fetch of a weight: the begin of each part of each of its first rows."""

    segments: int  # rows times parts
    parts: int
    row_stride: int
    part_stride: int
    bytes: int  # of a segment


def _ahead(weight: torch.Tensor | None, x: torch.Tensor) -> _Ahead:
    """The parts are those that the programs of `few_rows` which run side by side read first."""
    if weight is None or not starts_early(x.device) or not _tiles(weight, x.dtype) or weight.data_ptr() % 16:
        return _Ahead(0, 1, 0, 0, 0)
    columns, depth = weight.shape
    splits = _splits(columns // _COLUMNS, depth // _DEPTH, x.device)
    rows = min(columns, 2 * multiprocessors(x.device) // splits * _COLUMNS)
    turn = _DEPTH * weight.element_size()
    turns = min(depth // _DEPTH // splits, max(1, _AHEAD // (rows * splits * turn)))
    return _Ahead(rows * splits, splits, weight.stride(0), depth // splits, turns * turn)


@functools.lru_cache
def _splits(tiles: int, turns: int, device: torch.device) -> int:
    """Parts to cut the depth into, so that nearly every multiprocessor has a tile: a power of two that divides it."""
    wanted = multiprocessors(device) - 4
    splits = 1
    while tiles * splits < wanted and splits < 8 and turns % (2 * splits) == 0:
        splits *= 2
    return splits


@triton.jit
def _prefetch(pointers, sizes):
    """Fetch so many bytes from each pointer into the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r", [pointers, sizes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


# Sizes vary from step to step, and one kernel serves them all.
@triton.jit(do_not_specialize=["rows", "each", "segments", "parts", "segment_bytes"])
def _few_rows_kernel(
    x, weight, bias, out, partial, counters, rows, columns, depth, weight_stride,
    following, each, segments, parts, following_stride, part_stride, segment_bytes,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FETCHED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of columns, one part of the depth. The last part to arrive adds them all up, in their order, so that
    the sum does not depend on who was last."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    splits = tl.num_programs(1)
    turns = depth // DEPTH // splits
    first = split * turns * DEPTH
    weights = weight + n.to(tl.int64)[:, None] * weight_stride + (first + k)[None, :]
    inputs = x + m[None, :] * depth + (first + k)[:, None]
    there = (m < rows)[None, :]
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    for _ in range(turns):
        acc = tl.dot(tl.load(weights), tl.load(inputs, mask=there, other=0.0), acc)
        weights += DEPTH
        inputs += DEPTH
    if EARLY and following is not None:
        i = tl.arange(0, FETCHED)
        segment = (split * tl.num_programs(0) + tile) * each + i
        segment = tl.minimum(tl.where(i < each, segment, 0), segments - 1)  # the others fetch what is there already
        begin = following + (segment // parts).to(tl.int64) * following_stride + segment % parts * part_stride
        _prefetch(begin, tl.zeros([FETCHED], tl.int32) + segment_bytes)
    at = m[None, :] * columns + n[:, None]
    arrived = splits - 1
    if splits > 1:
        tl.store(partial + split * rows * columns + at, acc, mask=there)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters + tl.program_id(2) * tl.num_programs(0) + tile, 1, sem="acq_rel")
    if arrived != splits - 1:
        return
    if splits > 1:
        tl.store(counters + tl.program_id(2) * tl.num_programs(0) + tile, 0)
        acc = tl.zeros([COLUMNS, ROWS], tl.float32)
        for part in tl.range(0, splits, loop_unroll_factor=2):  # from the L2 cache, where other programs' stores are
            acc += tl.load(partial + part * rows * columns + at, mask=there, other=0.0, cache_modifier=".cg")
    if bias is not None:
        acc += tl.load(bias + n)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=there)
