"""Words of generated tokens, kept for the rows that ask."""

import tracemalloc

import numpy as np

from transformers_async_cb.logprobs import Records


def test_each_row_has_its_own_words_whatever_others_ask_for_and_however_long_it_gets() -> None:
    records, draw = Records(40), np.random.default_rng(0)
    asked = {row: 1 + 2 * (row % 4) for row in range(1, 40, 2)}
    kept = {row: draw.integers(0, 99, (row, words)).astype(np.int32) for row, words in asked.items()}
    read = []
    for row, so_far in kept.items():
        records.take(row, so_far)
    for _ in range(300):
        rows = np.array(sorted(draw.choice(list(kept), 7, replace=False)))
        answers = draw.integers(0, 99, (7, 41)).astype(np.int32)
        records.write(rows, np.array([len(kept[row]) for row in rows]), answers)
        for row, words in zip(rows, answers, strict=True):
            kept[row] = np.vstack([kept[row], words[: asked[row]]])
        row = int(rows[0])
        read.append((records.read(row, len(kept[row])), kept[row]))
        if draw.random() < 0.2:  # a row changes hands
            records.give_back(row)
            records.take(row, kept[row])
    read += [(records.read(row, len(expected)), expected) for row, expected in kept.items()]
    for words, expected in read:  # much later, too
        for first in (0, 1, 31, 32, 40, len(expected)):
            assert np.array_equal(words.since(first), expected[first:])


def test_memory_is_what_rows_have_generated_and_asked_for_and_is_given_back() -> None:
    rows, likeliest = np.arange(100), 41
    records = Records(len(rows))
    for row in rows:
        records.take(row, np.zeros((0, likeliest if row == 0 else 1), np.int32))
    tracemalloc.start()
    try:
        for at in range(1024):  # one row has a long answer, and another of those with many words
            of_step = rows[:2]
            records.write(of_step, np.full(len(of_step), at), np.zeros((len(of_step), likeliest), np.int32))
        held = tracemalloc.get_traced_memory()[0]
        assert held < 1.2 * 1024 * (likeliest + 1) * 4
        for row in rows:
            records.give_back(row)
        assert tracemalloc.get_traced_memory()[0] < held / 20
    finally:
        tracemalloc.stop()
