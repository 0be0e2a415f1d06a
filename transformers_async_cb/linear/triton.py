"""Products of few rows in Triton: the weights stream through once, at the rate the memory gives."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..gpu import early, multiprocessors


MOST_ROWS = 64
_ROWS, _COLUMNS, _DEPTH = 64, 64, 128  # of a tile
_WARPS, _STAGES = 4, 4
_AHEAD = 4  # tiles of each program that are on their way to the L2 cache before the input is there


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
        and weight.stride(0) % 8 == 0
        and weight.data_ptr() % 16 == 0
        and x.is_contiguous()
    )


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counters: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias` of at most `MOST_ROWS` rows; `counters` as for `product`."""
    columns, depth = weight.shape
    rows = x.numel() // depth
    out = x.new_empty(*x.shape[:-1], columns)
    splits = _splits(columns // _COLUMNS, depth // _DEPTH, x.device)
    partial = x.new_empty((splits, rows, columns) if splits > 1 else 0, dtype=torch.float32)
    tile_rows = min(_ROWS, max(16, triton.next_power_of_2(rows)))
    _few_rows_kernel[(columns // _COLUMNS, splits, triton.cdiv(rows, tile_rows))](
        x, weight, bias, out, partial, counters, rows, columns, depth, weight.stride(0),
        ROWS=tile_rows, COLUMNS=_COLUMNS, DEPTH=_DEPTH, SPLITS=splits, AHEAD=min(_AHEAD, depth // _DEPTH // splits),
        num_warps=_WARPS, num_stages=_STAGES, **early(x.device),
    )  # fmt: skip
    return out


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


@triton.jit
def _few_rows_kernel(
    x, weight, bias, out, partial, counters, rows, columns, depth, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of columns, one part of the depth. The last part to arrive adds them all up, in their order, so that
    the sum does not depend on who was last."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    turns = depth // DEPTH // SPLITS
    first = split * turns * DEPTH
    weights = weight + n.to(tl.int64)[:, None] * weight_stride + (first + k)[None, :]
    inputs = x + m[None, :] * depth + (first + k)[:, None]
    there = (m < rows)[None, :]
    if EARLY:  # weights are no kernel's output: fetch some while the input is still computed
        if AHEAD > 0:
            i = tl.arange(0, 128)
            part = AHEAD * DEPTH * COLUMNS // 128
            parts = 128 // COLUMNS
            ahead = weight + (tile * COLUMNS + i // parts).to(tl.int64) * weight_stride + first + (i % parts) * part
            _prefetch(ahead, tl.full([128], part * 2, tl.int32))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    for _ in range(turns):
        acc = tl.dot(tl.load(weights), tl.load(inputs, mask=there, other=0.0), acc)
        weights += DEPTH
        inputs += DEPTH
    at = m[None, :] * columns + n[:, None]
    if SPLITS > 1:
        size = rows * columns
        tl.store(partial + split * size + at, acc, mask=there)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") != SPLITS - 1:
            return
        acc = tl.zeros([COLUMNS, ROWS], tl.float32)
        for part in tl.static_range(SPLITS):
            acc += tl.load(partial + part * size + at, mask=there, other=0.0, volatile=True)
        tl.store(counter, 0)
    if bias is not None:
        acc += tl.load(bias + n)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=there)
