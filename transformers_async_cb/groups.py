"""Layers that keep the same tokens, and how the layers of a model share one pool of pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from .attention import LayerShape, Place


Positions = TypeVar("Positions", int, np.ndarray)


class PageGroup(NamedTuple):
    """Layers that keep the same tokens, and so share a page table."""

    page_size: int  # tokens
    window: int = 0  # a token looks back on so many, itself included; 0: on all before it
    chunk: int = 0  # a token looks back on those from the last multiple of this on; 0: on all before it

    @property
    def keeps_all(self) -> bool:
        return not self.window and not self.chunk

    def first_seen(self, positions: Positions) -> Positions:
        """The earliest position that a token looks back on, by its own."""
        if self.window:
            return np.maximum(positions - self.window + 1, 0)
        return positions - positions % self.chunk if self.chunk else positions * 0

    def seen(self, positions: Positions) -> Positions:
        """Tokens that a token looks back on, itself among them, by its position."""
        return positions - self.first_seen(positions) + 1

    def needed(self, tokens: Positions) -> Positions:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)


class Slot(NamedTuple):
    """Two storages, of keys and of values: bytes of a page in each."""

    key_bytes: int
    value_bytes: int
    dtype: torch.dtype


class Stored(NamedTuple):
    """Where the keys and values of a layer are."""

    group: int
    slot: int
    key_offset: int  # bytes, in a page of the slot
    value_offset: int


class PageLayout(NamedTuple):
    """One pool of pages for layers of different kinds. A page is handed to a group, which keeps `page_size` tokens of
    all its layers in it; as all pages have as many bytes, a group of fewer layers keeps more tokens in one.

        model        F W W W W W F W W W W W      two layers of full attention, ten with a window
        slot 0       page 7: F, 80 tokens      or  W W W W W, 16 tokens each
        slot 1       page 7: F, 80 tokens      or  W W W W W, 16 tokens each

    So no group has room that another lacks, whatever mix of long and short sequences comes. It is the idea of vLLM's
    hybrid cache (https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager/), with one page table for each kind of
    layer, however many layers there are of each. In a model with layers of one kind, each layer is a slot.
    """

    groups: tuple[PageGroup, ...]
    slots: tuple[Slot, ...]
    stored: dict[Place, Stored]

    @property
    def page_bytes(self) -> int:
        return sum(slot.key_bytes + slot.value_bytes for slot in self.slots)

    @property
    def grain(self) -> int:
        """Tokens after which a page of every group is full."""
        return math.lcm(*(group.page_size for group in self.groups))

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens of one sequence, all of them, in every group."""
        return sum(group.needed(tokens) for group in self.groups)

    def pages_at_length(self, tokens: int) -> int:
        """Pages that a sequence of `tokens` tokens holds at once, at most, when it goes on a token at a time."""
        return sum(int(most_held(group, tokens, self.grain)) for group in self.groups)

    def capacity(self, pages: int, length: int) -> int:
        """Tokens of sequences that hold `pages` pages, all of `length` tokens."""
        if len(self.groups) == 1 and self.groups[0].keeps_all:
            return pages * self.groups[0].page_size
        return pages * length // self.pages_at_length(length)

    def longest(self, pages: int) -> int | None:
        """Tokens of the longest sequence that `pages` pages hold, `None` if there is no end."""
        beyond = max(group.window + group.chunk for group in self.groups) + 2 * self.grain
        if all(not group.keeps_all for group in self.groups) and self.pages_at_length(beyond) <= pages:
            return None
        low, high = 0, beyond + pages * max(group.page_size for group in self.groups)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.pages_at_length(middle) <= pages else (low, middle)
        return low

    @classmethod
    def of(cls, shapes: Mapping[Place, LayerShape], page_size: int, longest: int = 0) -> PageLayout:
        """Of layers whose sequences have at most `longest` tokens, 0 if that is not known: windows that none of them
        outgrows are none.

        Args:
            shapes (`Mapping`): what was found of each layer, those that keep nothing of their own included.
            page_size (`int`): tokens that the group with the most bytes a token keeps in a page.
        """
        kinds = _kinds(shapes, longest)
        most = max(map(len, kinds.values()))
        counts = range(1, most + 1) if len(kinds) > 1 else [most]
        options = [_pack(shapes, kinds, page_size, count) for count in counts]
        return max(options, key=lambda layout: (layout._least_used(shapes), len(layout.slots)))

    def _least_used(self, shapes: Mapping[Place, LayerShape]) -> float:
        """The share of a page's bytes that the group uses that uses least."""
        used = [0] * len(self.groups)
        for place, stored in self.stored.items():
            used[stored.group] += shapes[place].bytes_per_token * self.groups[stored.group].page_size
        return round(min(used) / self.page_bytes, 6)


def most_held(group: PageGroup, tokens: Positions, grain: int) -> Positions:
    """Pages of one group that a sequence of `tokens` tokens holds at once, at most. It keeps what a token at the last
    multiple of `grain` looks back on, so that others can begin there."""
    if group.keeps_all:
        return group.needed(tokens)
    span = (group.window or group.chunk) + grain - 1
    return np.minimum(group.needed(tokens), (span - 2) // group.page_size + 2)


def _kinds(shapes: Mapping[Place, LayerShape], longest: int) -> dict[tuple[int, int], list[Place]]:
    """The layers that keep something, by their window and chunk, those that keep all first. One that serves others
    keeps what any of them looks back on."""
    looks: dict[Place, set[tuple[int, int]]] = {}
    for place, shape in shapes.items():
        span = shape.window or shape.chunk
        kind = (0, 0) if longest and span >= longest else (shape.window, shape.chunk)
        looks.setdefault(place if shape.source is None else shape.source, set()).add(kind)
    kinds: dict[tuple[int, int], list[Place]] = {}
    for place, wanted in looks.items():
        windows = all(window for window, _ in wanted)
        kind = wanted.pop() if len(wanted) == 1 else (max(wanted)[0], 0) if windows else (0, 0)
        kinds.setdefault(kind, []).append(place)
    return dict(sorted(kinds.items(), key=lambda item: item[0] != (0, 0)))


def _pack(
    shapes: Mapping[Place, LayerShape], kinds: dict[tuple[int, int], list[Place]], page_size: int, count: int
) -> PageLayout:
    """With `count` slots."""
    parts = []  # of each group, the layers in each slot
    for places in kinds.values():
        share = -(-len(places) // count)
        parts.append([places[i : i + share] for i in range(0, len(places), share)])
    loads = [[_bytes_of(shapes[place] for place in part) for part in of_group] for of_group in parts]
    largest = np.array([np.max(of_group, axis=0) for of_group in loads])  # [groups, 2]
    times = np.where(largest > 0, largest.max(0) // np.maximum(largest, 1), largest.max()).min(1)
    groups = tuple(PageGroup(page_size * int(n), *kind) for n, kind in zip(times, kinds, strict=True))
    slots = []
    for i in range(max(map(len, parts))):
        here = [number for number, of_group in enumerate(parts) if i < len(of_group)]
        sizes = np.max([groups[number].page_size * np.array(loads[number][i]) for number in here], axis=0)
        if len(kinds) > 1:
            sizes = -(-sizes // 16) * 16
        dtype = shapes[parts[here[0]][i][0]].dtype
        slots.append(Slot(int(sizes[0]), int(sizes[1]), dtype))
    stored = {}
    for number, (group, of_group) in enumerate(zip(groups, parts, strict=True)):
        for slot, part in enumerate(of_group):
            offsets = np.zeros(2, np.int64)
            for place in part:
                stored[place] = Stored(number, slot, int(offsets[0]), int(offsets[1]))
                offsets += group.page_size * np.array(_bytes_of([shapes[place]]))
    return PageLayout(groups, tuple(slots), stored)


def _bytes_of(shapes: Iterable[LayerShape]) -> tuple[int, int]:
    """Of the keys and of the values of a token, in several layers."""
    sizes = [(s.kv_heads * s.key_dim * s.dtype.itemsize, s.kv_heads * s.value_dim * s.dtype.itemsize) for s in shapes]
    return sum(key for key, _ in sizes), sum(value for _, value in sizes)
