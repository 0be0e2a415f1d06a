"""Pages are handed out once, given back once, and never page 0."""

from __future__ import annotations

import random

import numpy as np
import pytest

from transformers_async_cb.pages import Pages, extend_keys


@pytest.mark.parametrize("page_size, tokens, pages", [
    (1, 0, 0), (1, 1, 1), (1, 9, 9), (4, 1, 1), (4, 4, 1), (4, 5, 2), (16, 160, 10), (16, 161, 11), (256, 257, 2),
])  # fmt: skip
def test_as_many_are_needed_as_hold_the_tokens(page_size: int, tokens: int, pages: int) -> None:
    assert Pages(100, page_size).needed(tokens) == pages


def test_all_can_be_handed_out_but_the_padding_page() -> None:
    pages = Pages(20, 4)
    taken = pages.take(20)
    assert sorted(taken.tolist()) == list(range(1, 21))
    assert Pages.PADDING not in taken
    assert taken.dtype == np.int32
    assert pages.free == 0


def test_more_than_there_are_cannot_be_taken() -> None:
    pages = Pages(3, 4)
    pages.take(2)
    with pytest.raises(AssertionError, match="2 pages asked for, 1 free"):
        pages.take(2)
    assert pages.free == 1


def test_none_can_be_taken_from_a_full_or_an_empty_pool() -> None:
    pages = Pages(2, 4)
    assert len(pages.take(0)) == 0
    taken = pages.take(2)
    assert len(pages.take(0)) == 0
    pages.give_back(np.empty(0, np.int32))
    assert pages.free == 0
    pages.give_back(taken)
    assert pages.free == 2


def test_one_cannot_be_given_back_twice() -> None:
    pages = Pages(5, 4)
    taken = pages.take(3)
    pages.give_back(taken[:1])
    with pytest.raises(AssertionError, match="given back twice"):
        pages.give_back(taken)
    assert pages.free == 3, "nothing of it was taken back"


def test_one_that_was_never_taken_cannot_be_given_back() -> None:
    with pytest.raises(AssertionError, match="given back twice"):
        Pages(5, 4).give_back(np.array([Pages.PADDING], np.int32))


def test_what_was_taken_is_not_changed_by_what_follows() -> None:
    pages = Pages(6, 4)
    first = pages.take(3)
    numbers = first.tolist()
    pages.give_back(pages.take(3))
    pages.take(2)
    assert first.tolist() == numbers


@pytest.mark.parametrize("seed", range(10))
def test_each_has_one_holder_whatever_the_order(seed: int) -> None:
    rng, count = random.Random(seed), 30
    pages, held = Pages(count, 4), []
    for _ in range(500):
        if held and rng.random() < 0.5:
            pages.give_back(held.pop(rng.randrange(len(held))))
        else:
            held.append(pages.take(rng.randint(0, pages.free)))
        numbers = np.concatenate([*held, np.empty(0, np.int32)]).tolist()
        assert len(set(numbers)) == len(numbers)
        assert all(1 <= number <= count for number in numbers)
        assert pages.free == count - len(numbers)
    for taken in held:
        pages.give_back(taken)
    assert sorted(pages.take(count).tolist()) == list(range(1, count + 1))


def keys_of(tokens: list[int], page_size: int = 2) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, np.array(tokens, np.int32), page_size)
    return keys


def test_keys_name_a_page_and_all_before_it() -> None:
    keys = keys_of([1, 2, 3, 4, 5])
    assert len(keys) == 2, "of full pages alone"
    assert keys_of([1, 2, 3, 4, 9, 9])[:2] == keys
    assert keys_of([1, 2, 9, 4])[0] == keys[0]
    assert keys_of([1, 2, 9, 4])[1] != keys[1]
    assert keys_of([9, 2, 3, 4])[1] != keys[1]
    assert keys_of([1, 2, 1, 2])[1] != keys[0]
    begun = keys_of([1, 2])
    extend_keys(begun, np.array([1, 2, 3, 4], np.int32), 2)
    assert begun == keys


def test_pages_with_known_contents_stay_until_others_are_needed() -> None:
    pages, keys = Pages(4, 2), keys_of([1, 2, 3, 4, 5, 6])
    taken = pages.take(3)
    for page, key in zip(taken.tolist(), keys, strict=True):
        pages.fill(page, key)
    pages.give_back(taken)
    assert pages.free == 4
    found = pages.find(keys[:2])
    assert found.tolist() == taken[:2].tolist()
    assert pages.free == 2
    again = pages.find(keys)
    assert again.tolist() == taken.tolist()
    assert pages.free == 1
    pages.give_back(found)
    assert pages.free == 1, "others hold them still"
    pages.give_back(again)
    pages.take(2)  # the empty one, and of the others the last of the sequence
    assert pages.find(keys).tolist() == taken[:2].tolist()
    assert pages.free == 0


def test_what_pages_held_is_forgotten_at_once_but_who_holds_them_is_not() -> None:
    pages, keys = Pages(4, 2), keys_of([1, 2, 3, 4])
    taken = pages.take(2)
    for page, key in zip(taken.tolist(), keys, strict=True):
        pages.fill(page, key)
    pages.give_back(taken[1:])
    pages.forget()
    assert pages.find(keys).tolist() == []
    assert pages.free == 3
    pages.give_back(taken[:1])
    assert sorted(pages.take(4).tolist()) == [1, 2, 3, 4]


def test_pages_are_told_when_they_are_empty_and_not_while_they_hold_something() -> None:
    pages, (key, _) = Pages(3, 2), keys_of([1, 2, 3, 4])
    taken = pages.take(2)
    pages.fill(int(taken[0]), key)
    pages.give_back(taken)
    assert np.concatenate(pages.take_emptied()).tolist() == taken[1:].tolist()
    pages.take(3)
    assert np.concatenate(pages.take_emptied()).tolist() == taken[:1].tolist()
