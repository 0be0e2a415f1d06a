"""Both attention backends against softmax attention over each sequence's own keys, written out."""

from itertools import takewhile
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import run_in_interpreter

from transformers_async_cb.attention import Step, choose_backend, reference
from transformers_async_cb.inputs import share_out


PAGE_SIZE = 16

# (context, new tokens) of each sequence: decoding ones first, as the scheduler packs them; then chunks of prompts, of
# which one may have a single token.
DECODE = [(0, 1), (5, 1), (15, 1), (16, 1), (100, 1), (333, 1)]
MIXED = [(40, 1), (129, 1), (0, 2), (0, 77), (31, 33), (64, 1), (250, 40)]

# Query heads, key heads, and the dimensions of their keys and values.
SHAPES = [(4, 4, 16, 16), (4, 2, 32, 32), (6, 2, 24, 24), (8, 1, 64, 64), (4, 2, 32, 16)]

# Dimensions for which other tiles are chosen.
UNUSUAL = [(2, 1, 512, 512), (4, 4, 192, 128)]


def make_case(sequences, shape, ask, padding, seed, programs=20, device="cpu", dtype=torch.float32):
    """A step over scattered pages, all that is not a sequence's own filled with NaN, pages too that none of its new
    tokens looks back on; and the inputs of attention."""
    heads, kv_heads, key_dim, value_dim = shape
    g = torch.Generator().manual_seed(seed)
    columns = max(-(-(c + n) // PAGE_SIZE) for c, n in sequences) + 2
    rows = torch.randperm(len(sequences) + 3, generator=g)[: len(sequences)]
    page_table = torch.zeros(len(sequences) + 4, columns, dtype=torch.int32)
    free = 1 + torch.randperm(len(sequences) * columns, generator=g)
    keys = torch.full((len(free) + 1, PAGE_SIZE, kv_heads, key_dim), torch.nan)
    values = torch.full((len(free) + 1, PAGE_SIZE, kv_heads, value_dim), torch.nan)
    keys[0] = values[0] = 0
    own = []
    for b, (context, count) in enumerate(sequences):
        page_table[rows[b]] = free[b * columns : (b + 1) * columns].int()
        k = torch.randn(context + count, kv_heads, key_dim, generator=g)
        v = torch.randn(context + count, kv_heads, value_dim, generator=g)
        at = torch.arange(context)
        pages = page_table[rows[b], at // PAGE_SIZE].long()
        keys[pages, at % PAGE_SIZE], values[pages, at % PAGE_SIZE] = k[:context], v[:context]
        dead = page_table[rows[b], : first_seen(context, ask) // PAGE_SIZE].long()
        keys[dead] = values[dead] = torch.nan
        own.append((k, v))
    tokens = sum(n for _, n in sequences)
    pad_row = len(page_table) - 1
    ints = {"dtype": torch.int32}
    token_rows = torch.cat([torch.full((n,), rows[b].item()) for b, (_, n) in enumerate(sequences)])
    positions = torch.cat([torch.arange(c, c + n) for c, n in sequences])
    starts = torch.tensor([0, *torch.tensor([n for _, n in sequences]).cumsum(0).tolist()])
    decodes = len(list(takewhile(lambda s: s[1] == 1, sequences)))
    single = np.flatnonzero([n == 1 for _, n in sequences])
    work = np.empty(len(sequences) + padding + programs, np.int32)
    share_out(work, single, np.array([c + n for c, n in sequences])[single], programs)
    step = Step(
        page_table=page_table,
        token_rows=torch.cat([token_rows, torch.full((padding,), pad_row)]).int(),
        positions=torch.cat([positions, torch.zeros(padding, dtype=torch.long)]).int(),
        rows=torch.cat([rows, torch.full((padding,), pad_row)]).int(),
        query_starts=torch.cat([starts, torch.full((padding,), tokens)]).int(),
        lengths=torch.tensor([c + n for c, n in sequences] + [0] * padding, **ints),
        counts=torch.tensor([decodes, len(sequences)], **ints),
        work=torch.from_numpy(work),
        counters=torch.zeros((len(sequences) + padding) * kv_heads, **ints),
        decode_only=all(n == 1 for _, n in sequences),
    )
    query = torch.randn(tokens + padding, heads, key_dim, generator=g)
    key = torch.cat(
        [*(k[c:] for (c, _), (k, _) in zip(sequences, own, strict=True)), torch.zeros(padding, *k.shape[1:])]
    )
    value = torch.cat(
        [*(v[c:] for (c, _), (_, v) in zip(sequences, own, strict=True)), torch.zeros(padding, *v.shape[1:])]
    )
    move = lambda x: x.to(device, dtype if x.is_floating_point() else None) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return tuple(map(move, (query, key, value, keys, values))), Step(*map(move, step)), own


class Ask(NamedTuple):
    """What a layer asks for beyond causal attention."""

    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False


CAUSAL = Ask()
ASKS = [Ask(chunk=24), Ask(softcap=2.0), Ask(sinks=True), Ask(window=7, softcap=30.0, sinks=True)]


def first_seen(position, ask):
    if ask.chunk:
        return position // ask.chunk * ask.chunk
    return max(0, position - ask.window + 1) if ask.window else 0


def sinks_of(shape, ask):
    """One above what a head's scores are, one below."""
    return torch.linspace(-4, 4, shape[0]) if ask.sinks else None


def expected(query, own, sequences, scaling, ask, sinks):
    """Softmax attention in float64, one token at a time."""
    out, t = [], 0
    for (context, count), (k, v) in zip(sequences, own, strict=True):
        for i in range(count):
            last = context + i + 1
            first = first_seen(last - 1, ask)
            group = query.shape[1] // k.shape[1]
            ks = k[first:last].double().repeat_interleave(group, 1)
            vs = v[first:last].double().repeat_interleave(group, 1)
            scores = torch.einsum("hd,nhd->hn", query[t].double(), ks).mul(scaling)
            if ask.softcap:
                scores = scores.div(ask.softcap).tanh().mul(ask.softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None]], 1)
            weights = scores.softmax(-1)[:, : len(ks)]
            out.append(torch.einsum("hn,nhd->hd", weights, vs))
            t += 1
    return torch.stack(out)


def check(backend, sequences, shape, ask, padding, device="cpu", dtype=torch.float32, tolerance=2e-6):
    (query, key, value, keys, values), step, own = make_case(
        sequences, shape, ask, padding, seed=1, device=device, dtype=dtype
    )
    scaling = shape[2] ** -0.5
    sinks = sinks_of(shape, ask)
    given = None if sinks is None else sinks.to(device)
    out = backend.attend(query, key, value, keys, values, step, scaling, ask.window, ask.chunk, ask.softcap, given)
    tokens = sum(n for _, n in sequences)
    want = expected(query.cpu(), [(k.to(dtype), v.to(dtype)) for k, v in own], sequences, scaling, ask, sinks)
    error = (out[:tokens].cpu().double() - want).norm() / want.norm()
    assert error < tolerance
    assert not step.counters.any()
    for b, (context, count) in enumerate(sequences):
        at = torch.arange(first_seen(context, ask), context + count, device=device)
        pages = step.page_table[step.rows[b], at // PAGE_SIZE]
        for written, wanted in zip((keys, values), own[b], strict=True):
            assert torch.equal(written[pages, at % PAGE_SIZE].cpu(), wanted[at.cpu()].to(dtype))


@pytest.mark.parametrize("sequences", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ask", [CAUSAL, Ask(window=7), Ask(window=64), *ASKS], ids=str)
def test_the_reference_is_softmax_attention_over_each_sequence(sequences, shape, ask):
    check(reference, sequences, shape, ask, padding=3)


def test_the_triton_backend_is_softmax_attention_over_each_sequence():
    assert run_in_interpreter(__file__).split()[-1] == "checked:30"


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [DECODE, MIXED, DECODE * 60], ids=["decode", "mixed", "many"])
@pytest.mark.parametrize("shape", [*SHAPES[1:3], SHAPES[4], (32, 8, 128, 128), (16, 1, 256, 256), *UNUSUAL], ids=str)
@pytest.mark.parametrize("ask", [CAUSAL, Ask(window=64), *ASKS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_on_the_gpu_is_softmax_attention(sequences, shape, ask, dtype):
    from transformers_async_cb.attention import triton

    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    check(triton, sequences, shape, ask, padding=5, device="cuda", dtype=dtype, tolerance=tolerance)


def test_the_reference_is_what_runs_where_there_is_no_cuda():
    assert choose_backend("auto", torch.device("cpu")) == "reference"
    with pytest.raises(ValueError, match="needs a CUDA device, the model is on cpu"):
        choose_backend("triton", torch.device("cpu"))


if __name__ == "__main__":
    from transformers_async_cb.attention import triton

    cases = [(s, shape, ask) for s in (DECODE, MIXED) for shape in SHAPES for ask in (CAUSAL, Ask(window=64))]
    cases += [(s, SHAPES[2], ask) for s in (DECODE, MIXED) for ask in ASKS]
    cases += [(MIXED, shape, CAUSAL) for shape in UNUSUAL]
    for case_sequences, case_shape, case_ask in cases:
        check(triton, case_sequences, case_shape, case_ask, padding=3)
    print(f"checked:{len(cases)}")
