"""Products of few rows in Triton: the weights stream through once, at the rate the memory gives."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..gpu import early, multiprocessors, starts_early


MOST_ROWS = 64
_ROWS, _COLUMNS, _DEPTH = 64, 64, 128  # of a tile
_WARPS, _STAGES = 4, 6
_AHEAD = 8 * 2**20  # bytes of a weight that are on their way to the L2 cache before the input is there


def suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `few_rows` can compute this product and is the better way to."""
    columns, depth = weight.shape
    return (
        x.numel() <= MOST_ROWS * depth
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and columns % _COLUMNS == 0
        and depth % _DEPTH == 0
        and weight.stride(1) == 1
        and x.is_contiguous()
    )


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counters: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias` of at most `MOST_ROWS` rows; `counters` as for `product`."""
    columns, depth = weight.shape
    rows = x.numel() // depth
    out = x.new_empty(*x.shape[:-1], columns)
    splits = _splits(columns // _COLUMNS, depth // _DEPTH, x.device)
    partial = x.new_empty((splits, rows, columns) if splits > 1 else 0, dtype=torch.float32)
    tile_rows = 32 if rows <= 32 else _ROWS
    grid = (columns // _COLUMNS, splits, triton.cdiv(rows, tile_rows))
    _few_rows_kernel[grid](
        x, weight, bias, out, partial, counters, rows, columns, depth, weight.stride(0),
        _ahead(weight, grid[0] * grid[1], depth // splits),
        ROWS=tile_rows, COLUMNS=_COLUMNS, DEPTH=_DEPTH, num_warps=_WARPS, num_stages=_STAGES, **early(x.device),
    )  # fmt: skip
    return out


@functools.lru_cache
def _splits(tiles: int, turns: int, device: torch.device) -> int:
    """Parts to cut the depth into, so that half of the multiprocessors have a tile, which is enough to keep the memory
    busy, and adding parts up takes longer than it saves beyond: a power of two that divides the depth."""
    wanted = multiprocessors(device) // 2 - 4
    splits = 1
    while tiles * splits < wanted and splits < 8 and turns % (2 * splits) == 0:
        splits *= 2
    return splits


def _ahead(weight: torch.Tensor, programs: int, depth: int) -> int:
    """How much of its part of each weight row a program fetches ahead, in bytes: a multiple of 32, for two threads."""
    if not starts_early(weight.device) or weight.data_ptr() % 16 or weight.stride(0) % 8:
        return 0
    side_by_side = min(programs, multiprocessors(weight.device))
    return min(depth * weight.element_size(), _AHEAD // side_by_side // _COLUMNS // 32 * 32)


@triton.jit
def _prefetch(pointers, sizes):
    """Fetch so many bytes from each pointer into the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r", [pointers, sizes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


# Sizes vary from step to step, and one kernel serves them all.
@triton.jit(do_not_specialize=["rows", "ahead"])
def _few_rows_kernel(
    x, weight, bias, out, partial, counters, rows, columns, depth, weight_stride, ahead,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
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
        if ahead > 0:  # weights are no kernel's output: fetch some while the input is still computed
            i = tl.arange(0, 2 * COLUMNS)
            half = ahead // 2
            begin = (weight + (tile * COLUMNS + i // 2).to(tl.int64) * weight_stride + first).to(
                tl.int64, bitcast=True
            )
            _prefetch(begin + i % 2 * half, tl.zeros([2 * COLUMNS], tl.int32) + half)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    for _ in range(turns):
        acc = tl.dot(tl.load(weights), tl.load(inputs, mask=there, other=0.0), acc)
        weights += DEPTH
        inputs += DEPTH
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
