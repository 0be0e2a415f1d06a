"""What the device makes of a step's packed inputs."""

import numpy as np
import pytest
import torch
from conftest import run_in_interpreter

from transformers_async_cb.inputs import MOST_PARTS, Bucket, StepArrays, share_out, unpack
from transformers_async_cb.logits import SHAPING_WORDS, Tables
from transformers_async_cb.sampling import PARAMETER_WORDS, Flavour


PAGE_SIZE, ROWS, COLUMNS = 4, 6, 5

BUCKETS = [Bucket(3, 3, True), Bucket(40, 4, False), Bucket(300, 6, False), Bucket(6, 6, True)]


def make_case(
    bucket: Bucket, seed: int, device="cpu", shaped: bool = False
) -> tuple[StepArrays, list[torch.Tensor | Tables | None]]:
    """Inputs that write each cell and row at most once, and the tables they write to."""
    draw = np.random.default_rng(seed)
    sizes = bucket.sizes([PAGE_SIZE], 7, 0, Flavour(shaped=shaped))
    packed = np.zeros(bucket.words([PAGE_SIZE], 7, 0, Flavour(shaped=shaped)), np.int32)
    a = StepArrays.of(packed, sizes)
    a.ids[:] = draw.integers(-1 - ROWS, 90, bucket.tokens)
    a.positions[:] = np.arange(bucket.tokens)
    a.token_rows[:] = draw.integers(0, ROWS, bucket.tokens)
    a.query_starts[:] = np.sort(draw.integers(0, bucket.tokens, bucket.rows + 1))
    padding = ROWS * COLUMNS
    a.cells[:] = padding
    used = min(len(a.cells), padding)
    a.cells[:used] = draw.permutation(padding)[:used]
    a.pages[:used] = draw.integers(1, 90, used)
    a.fresh[:] = ROWS
    used = len(a.fresh) // 2
    a.fresh[:used] = draw.permutation(ROWS)[:used]
    a.parameters[: used * PARAMETER_WORDS] = draw.integers(-90, 90, used * PARAMETER_WORDS)
    a.newly_shaped[:] = ROWS
    a.newly_shaped[: used if shaped else 0] = a.fresh[:used] if shaped else 0
    a.shapings[:] = 0
    a.shapings[: used * SHAPING_WORDS] = draw.integers(-90, 90, len(a.shapings[: used * SHAPING_WORDS]))
    buffer = torch.from_numpy(packed).to(device)
    tables = [
        torch.from_numpy(draw.integers(0, 90, (ROWS + 1, columns)).astype(np.int32)).to(device)
        for columns in (COLUMNS, PARAMETER_WORDS)
    ]
    for table in tables:
        table[ROWS] = 0
    last_tokens = torch.from_numpy(draw.integers(0, 90, ROWS + 1).astype(np.int32)).to(device)
    return StepArrays.of(buffer, sizes), [*tables, last_tokens, Tables.of(ROWS, 300, device) if shaped else None]


def test_tokens_are_given_or_carried_and_the_tables_of_rows_are_brought_up_to_date():
    bucket = Bucket(12, 3, False)
    a, (page_table, parameters, last_tokens, _) = make_case(bucket, seed=0)
    pages_before, parameters_before = page_table.clone(), parameters.clone()
    ids, positions, last = unpack(a, page_table, parameters, last_tokens)
    assert ids.dtype == positions.dtype == last.dtype == torch.int64
    given = a.ids.tolist()
    assert min(given) < 0 < max(given)
    assert ids.tolist() == [token if token >= 0 else last_tokens[-1 - token].item() for token in given]
    assert positions.tolist() == a.positions.tolist()
    assert last.tolist() == [start - 1 for start in a.query_starts.tolist()[1:]]
    for cell, page in zip(a.cells.tolist(), a.pages.tolist(), strict=True):
        pages_before.view(-1)[cell] = page
    assert torch.equal(page_table, pages_before)
    for row, values in zip(a.fresh.tolist(), a.parameters.view(-1, PARAMETER_WORDS), strict=True):
        parameters_before[row] = values
    assert torch.equal(parameters, parameters_before)


def test_tokens_and_shapings_are_kept_where_logits_are_shaped():
    a, tables = make_case(Bucket(40, 4, False), seed=0, shaped=True)
    ids, positions, _ = unpack(a, *tables)
    history, shapings = tables[-1]
    written = torch.zeros_like(history)
    for token, row, position in zip(ids.tolist(), a.token_rows.tolist(), positions.tolist(), strict=True):
        written[row, position] = token
    assert torch.equal(history, written)
    assert len(a.newly_shaped) == 4
    for row, values in zip(a.newly_shaped.tolist(), a.shapings.view(-1, SHAPING_WORDS), strict=True):
        assert torch.equal(shapings[row], values)
    assert shapings.any(1).sum() == 2


@pytest.mark.parametrize("programs", [1, 16, 132])
@pytest.mark.parametrize("count", [0, 1, 5, 16, 66, 80, 300])
def test_sequences_are_cut_into_parts_for_all_programs(count, programs):
    lengths = np.random.default_rng(0).integers(1, 2000, count)
    sequences = np.arange(count) * 2 + 3
    work = np.full(count + programs, -1, np.int32)
    share_out(work, sequences, lengths, programs)
    items = work[work > 0].tolist()
    assert all(item == 0 for item in work[len(items) :])
    parts: dict[int, list[int]] = {}
    for item in items:
        sequence, part, others = item // MOST_PARTS**2 - 1, item // MOST_PARTS % MOST_PARTS, item % MOST_PARTS
        parts.setdefault(sequence, []).append(part)
        assert part <= others < MOST_PARTS
    assert {s: sorted(p) for s, p in parts.items()} == {s: list(range(len(p))) for s, p in parts.items()}
    assert sorted(parts) == sequences.tolist()
    if count < programs:
        assert len(items) <= programs
        assert count == 0 or len(items) > programs / 3 or max(map(len, parts.values())) == MOST_PARTS
    largest = max((length / len(parts[s]) for s, length in zip(sequences, lengths, strict=True)), default=0)
    assert largest <= 3 * max(lengths.sum() / programs, 2000 / MOST_PARTS)


def test_the_triton_kernel_makes_the_same_of_them():
    assert run_in_interpreter(__file__).split()[-1] == f"checked:{2 * len(BUCKETS)}"


if __name__ == "__main__":
    from transformers_async_cb.inputs import triton

    for bucket in BUCKETS:
        for shaped in (False, True):
            (a, tables), (_, expected_tables) = (make_case(bucket, seed=1, shaped=shaped) for _ in range(2))
            made = triton.unpack(a, *tables)
            expected = unpack(a, *expected_tables)
            (*tables, kept), (*expected_tables, expected_kept) = tables, expected_tables
            assert all(
                map(
                    torch.equal, [*made, *tables, *(kept or ())], [*expected, *expected_tables, *(expected_kept or ())]
                )
            )
    print(f"checked:{2 * len(BUCKETS)}")
