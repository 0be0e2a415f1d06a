"""Words of generated tokens, kept for the rows that ask."""

import numpy as np

from transformers_async_cb.logprobs import Records


def test_each_row_has_its_own_words_whatever_others_ask_for_and_however_long_it_gets() -> None:
    records, draw = Records(40), np.random.default_rng(0)
    asked = {row: 1 + 2 * (row % 4) for row in range(1, 40, 2)}
    kept = {row: draw.integers(0, 99, (row, words)).astype(np.int32) for row, words in asked.items()}
    for row, so_far in kept.items():
        records.take(row, so_far)
    for _ in range(150):
        rows = np.array(sorted(draw.choice(list(kept), 7, replace=False)))
        answers = draw.integers(0, 99, (7, 41)).astype(np.int32)
        records.write(rows, np.array([len(kept[row]) for row in rows]), answers)
        for row, words in zip(rows, answers, strict=True):
            kept[row] = np.vstack([kept[row], words[: asked[row]]])
        if draw.random() < 0.2:  # a row changes hands
            row = int(rows[0])
            records.give_back(row)
            records.take(row, kept[row])
    for row, expected in kept.items():
        assert np.array_equal(records.read(row, len(expected), asked[row]), expected)


def test_no_memory_is_held_when_nobody_asks_any_more() -> None:
    records = Records(3)
    for row in (0, 2):
        records.take(row, np.zeros((500, 41), np.int32))
    for row in range(3):
        records.give_back(row)
    assert records._words.size == 0
    records.take(1, np.ones((2, 3), np.int32))
    assert records.read(1, 2, 3).tolist() == [[1, 1, 1]] * 2
