"""How layers of different kinds share pages of one size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from transformers_async_cb.attention import LayerShape, Place
from transformers_async_cb.groups import PageGroup, PageLayout


FULL, WINDOW, CHUNKS = {}, {"window": 512}, {"chunk": 8192}


def layers(*kinds: tuple[int, dict], kv_heads: int = 1) -> dict[Place, LayerShape]:
    spans = [span for count, span in kinds for _ in range(count)]
    return {Place(nn.Identity(), 0): LayerShape(kv_heads, 256, 256, torch.bfloat16, **span) for span in spans}


@pytest.mark.parametrize("kinds, page_sizes, slots", [
    ([(5, FULL)], [16], 5),
    ([(5, WINDOW)], [16], 5),
    ([(12, FULL), (12, WINDOW)], [16, 16], 12),  # gpt-oss 20B
    ([(4, FULL), (22, WINDOW)], [96, 16], 4),  # Gemma 3 1B
    ([(36, CHUNKS), (12, FULL)], [48, 16], 12),  # Llama 4
], ids=str)  # fmt: skip
def test_a_page_holds_more_tokens_of_a_group_with_fewer_layers(kinds, page_sizes, slots) -> None:
    shapes = layers(*kinds)
    layout = PageLayout.of(shapes, 16)
    assert [group.page_size for group in layout.groups] == page_sizes
    assert len(layout.slots) == slots
    for number, group in enumerate(layout.groups):
        used = sum(
            shapes[place].bytes_per_token * group.page_size
            for place, stored in layout.stored.items()
            if stored.group == number
        )
        assert 0.9 * layout.page_bytes <= used <= layout.page_bytes


def test_layers_of_one_kind_waste_nothing_though_their_heads_differ() -> None:
    shapes = layers((2, FULL)) | layers((3, FULL), kv_heads=3)
    layout = PageLayout.of(shapes, 16)
    assert layout.page_bytes == 16 * sum(shape.bytes_per_token for shape in shapes.values())


def test_parts_of_a_page_do_not_overlap() -> None:
    shapes = layers((3, FULL)) | layers((7, WINDOW), kv_heads=2) | layers((4, CHUNKS), kv_heads=3)
    layout = PageLayout.of(shapes, 16)
    taken: dict[tuple, int] = {}
    for place, stored in layout.stored.items():
        size = layout.groups[stored.group].page_size * shapes[place].bytes_per_token // 2
        for part, offset in ((0, stored.key_offset), (1, stored.value_offset)):
            at = (stored.group, stored.slot, part)
            assert offset == taken.get(at, 0)
            taken[at] = offset + size
            assert taken[at] <= layout.slots[stored.slot][part]


def test_a_layer_that_serves_another_keeps_what_either_looks_back_on() -> None:
    source = Place(nn.Identity(), 0)
    like = LayerShape(1, 256, 256, torch.bfloat16, window=512)
    for other, kept in (({"window": 512}, 512), ({"window": 700}, 700), ({"window": 0}, 0), ({"chunk": 9}, 0)):
        shapes = {source: like, Place(nn.Identity(), 0): like._replace(**{"window": 0} | other, source=source)}
        (group,) = PageLayout.of(shapes, 16).groups
        assert group.window == kept


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    assert [g.window for g in PageLayout.of(layers((1, FULL), (3, WINDOW)), 16, longest=512).groups] == [0]
    assert [g.window for g in PageLayout.of(layers((1, FULL), (3, WINDOW)), 16, longest=513).groups] == [0, 512]


@pytest.mark.parametrize("pages", [40, 100, 1000])
@pytest.mark.parametrize("kinds", [[(5, FULL)], [(4, FULL), (22, WINDOW)], [(12, FULL), (36, CHUNKS)]], ids=str)
def test_the_longest_sequence_is_what_just_fits(kinds, pages: int) -> None:
    layout = PageLayout.of(layers(*kinds), 16)
    longest = layout.longest(pages)
    assert layout.pages_at_length(longest) <= pages < layout.pages_at_length(longest + 1)


def test_windows_alone_have_no_longest_sequence_once_they_fit() -> None:
    layout = PageLayout.of(layers((3, WINDOW)), 16)
    assert layout.longest(40) is None
    assert layout.longest(20) == 320


@pytest.mark.parametrize("group, seen", [
    (PageGroup(4), [1, 2, 3, 4, 5, 6, 7]),
    (PageGroup(4, window=3), [1, 2, 3, 3, 3, 3, 3]),
    (PageGroup(4, chunk=3), [1, 2, 3, 1, 2, 3, 1]),
])  # fmt: skip
def test_a_token_looks_back_on_its_window_or_chunk(group: PageGroup, seen: list[int]) -> None:
    assert group.seen(np.arange(7)).tolist() == seen
