"""Which pages every row holds, in the page table of each group of layers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .groups import PageLayout, Positions, most_held
from .pages import Pages, extend_keys


class Found(NamedTuple):
    """What a request begins with, held for it: its first `tokens` tokens, as far as those behind them look back."""

    tokens: int
    pages: tuple[np.ndarray, ...]  # int32, of each group: the last of those that are full of these tokens


class PageTables:
    """The page tables of all groups: a line for each row, whose columns are the pages of its sequence in order.

    A row holds pages from column `first` on, short of `end`. In a group that keeps all it has pages for all tokens so
    far when it begins, and one more whenever it has filled the last. In a group with a window or chunks it gets pages
    as steps come to them, prompts too, and gives those back that no token to come looks back on, once the last step
    that did has retired. What the token behind the last full page (of every group) looks back on is kept, so that
    others can begin there.

    Args:
        rows (`int`): rows there are.
        columns (`int`): pages that a sequence can have, of `pool.page_size` tokens.
        layout (`PageLayout`): the groups.
        pool (`Pages`): what all of them take pages from.
    """

    def __init__(self, rows: int, columns: int, layout: PageLayout, pool: Pages) -> None:
        self.pool = pool
        self.layout = layout
        self.groups = layout.groups
        room = layout.longest(pool.count)
        self.most_tokens = columns * pool.page_size if room is None else min(columns * pool.page_size, room)
        self.nothing = Found(0, (np.empty(0, np.int32),) * len(self.groups))
        self.pages = np.zeros((len(self.groups), rows, columns), np.int32)
        self.first = np.zeros((len(self.groups), rows), np.int64)
        self.end = np.zeros((len(self.groups), rows), np.int64)
        self._grain = layout.grain
        self._forgetful = [g for g, group in enumerate(self.groups) if not group.keeps_all]

    @property
    def columns(self) -> int:
        return self.pages.shape[2]

    def held(self, rows: np.ndarray) -> int:
        """Pages that rows (a mask, or their numbers) hold, in all groups."""
        return int((self.end[:, rows] - self.first[:, rows]).sum())

    @property
    def forgets(self) -> bool:
        """Whether pages go back while their row goes on."""
        return bool(self._forgetful)

    def full_columns(self, row: int, computed: int) -> list[range]:
        """Where a row has what the token behind the last full page (of every group) looks back on."""
        tokens = computed // self._grain * self._grain
        return [
            range(int(self._first_kept(g, tokens)), tokens // group.page_size) for g, group in enumerate(self.groups)
        ]

    # ------------------------------------------------------------------------------------------------ a row begins

    def find(self, keys: list[bytes], tokens: int) -> Found:
        """Hold the pages of the longest beginning that every group knows of what has these `keys`, of at most `tokens`
        tokens."""
        if not self._forgetful and len(self.groups) == 1:
            pages = self.pool.find(keys[: tokens // self._grain])
            return Found(len(pages) * self._grain, (pages,))
        for g, group in enumerate(self.groups):
            if group.keeps_all:
                tokens = self.pool.known(self._keys(g, keys, 0, tokens // group.page_size)) * group.page_size
        tokens, before = tokens // self._grain * self._grain, -1
        while tokens != before:
            before = tokens
            for g in self._forgetful:  # without a page there is nothing that looks back on it, or past it
                first, page_size = self._first_kept(g, tokens), self.groups[g].page_size
                known = self.pool.known(self._keys(g, keys, first, tokens // page_size))
                tokens = min(tokens, (first + known) * page_size // self._grain * self._grain)
        return Found(
            int(tokens),
            tuple(
                self.pool.find(self._keys(g, keys, self._first_kept(g, tokens), tokens // group.page_size))
                for g, group in enumerate(self.groups)
            ),
        )

    def can_share(self, row: int, tokens: int) -> bool:
        """Whether a row still has all pages that the token behind its first `tokens` tokens looks back on."""
        return all(self.first[g, row] <= self._first_kept(g, tokens) for g in self._forgetful)

    def share(self, row: int, tokens: int) -> Found:
        """Hold the full pages of a row's first `tokens` tokens."""
        pages = tuple(
            self.pages[g, row, self._first_kept(g, tokens) : tokens // group.page_size]
            for g, group in enumerate(self.groups)
        )
        for held in pages:
            self.pool.hold(held)
        return Found(tokens, pages)

    def give_back(self, found: Found) -> None:
        for pages in found.pages:
            self.pool.give_back(pages)

    def trim(self, found: Found, computed: int) -> Found:
        """Give those pages back that a row with `computed` tokens, some of them on the host, does not hold on to."""
        if not self._forgetful:
            return found
        kept = []
        for g, (group, pages) in enumerate(zip(self.groups, found.pages, strict=True)):
            first = found.tokens // group.page_size - len(pages)
            needless = max(0, self._first_kept(g, computed) - first)
            self.pool.give_back(pages[:needless])
            kept.append(pages[needless:])
        return Found(found.tokens, tuple(kept))

    def missing(self, found: Found, tokens: int, computed: int) -> int:
        """Pages that `begin` will take."""
        return sum(
            self._end_at_begin(g, tokens, computed)
            - max(self._first_kept(g, computed), found.tokens // group.page_size)
            for g, group in enumerate(self.groups)
        )

    def begin(self, row: int, found: Found, tokens: int, computed: int) -> None:
        """Give a row what was found, and pages for the rest of its `tokens` tokens; in groups that forget, for those
        that are to come from the host, up to `computed`, and the next one."""
        for g, (group, pages) in enumerate(zip(self.groups, found.pages, strict=True)):
            first, end = self._first_kept(g, computed), self._end_at_begin(g, tokens, computed)
            first = max(first, found.tokens // group.page_size - len(pages))
            line, has = self.pages[g, row], first + len(pages)
            line[first:has] = pages
            line[has:end] = self.pool.take(end - has)
            self.first[g, row], self.end[g, row] = first, end

    def _first_kept(self, g: int, tokens: Positions) -> Positions:
        """The first column that rows hold on to with so many tokens computed."""
        return self.groups[g].first_seen(tokens // self._grain * self._grain) // self.groups[g].page_size

    def _end_at_begin(self, g: int, tokens: int, computed: int) -> int:
        group = self.groups[g]
        return group.needed(tokens) if group.keeps_all else computed // group.page_size + 1

    # ------------------------------------------------------------------------------------------------ a row goes on

    def wanted(self, starts: np.ndarray) -> np.ndarray:
        """Pages that rows open which decode at these positions: int64, or bool where there is one group."""
        opens = [starts % group.page_size == 0 for group in self.groups]
        return opens[0] if len(opens) == 1 else np.sum(opens, axis=0)

    def open(self, rows: np.ndarray, starts: np.ndarray) -> None:
        """Take the pages that rows open which decode at these positions."""
        for g, group in enumerate(self.groups):
            opening = rows[starts % group.page_size == 0]
            if len(opening):
                end = self.end[g]
                self.pages[g][opening, end[opening]] = self.pool.take(len(opening))
                end[opening] += 1

    def within(self, row: int, start: int, count: int) -> int:
        """How many of the next `count` tokens of a row's prompt there are pages for."""
        if not self._forgetful or self.lacking(row, start + count - 1) <= 0:
            return count
        share = self.pool.free // len(self._forgetful)
        there = min(int(self.end[g, row] + share) * self.groups[g].page_size for g in self._forgetful)
        return max(there - start, int(self.lacking(row, start) <= 0))

    def lacking(self, row: int, position: int) -> int:
        """Pages that are not free of those that a row would take for its prompt up to a position."""
        return (
            sum(max(0, position // self.groups[g].page_size + 1 - int(self.end[g, row])) for g in self._forgetful)
            - self.pool.free
        )

    def extend(self, row: int, tokens: int) -> None:
        """Take the pages for a prompt's first `tokens` tokens that the row does not have yet."""
        for g in self._forgetful:
            end = int(self.end[g, row])
            to = max(end, self.groups[g].needed(tokens))
            self.pages[g, row, end:to] = self.pool.take(to - end)
            self.end[g, row] = to

    def cells(
        self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, decodes: int, fresh: dict[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Entries of the device's flat page tables that the tokens of a step touch first, and their pages; of `fresh`
        rows, those of pages found as well, from their first token on that the device has not been told of. On the
        device a line for padding follows the rows of each group."""
        columns, lines = self.columns, self.pages.shape[1]
        cells, pages = [], []
        for g, group in enumerate(self.groups):
            opens = starts[:decodes] % group.page_size == 0
            own = [rows[:decodes][opens] * columns + starts[:decodes][opens] // group.page_size]
            for row, start, end in zip(rows[decodes:], starts[decodes:], ends[decodes:], strict=True):
                told = fresh.get(int(row))
                first = -(-start // group.page_size) if told is None else told // group.page_size
                first = max(first, int(self.first[g, row]))
                own.append(np.arange(first, -(-end // group.page_size)) + row * columns)
            flat = np.concatenate(own)
            pages.append(self.pages[g].reshape(-1)[flat])
            cells.append(flat + g * (lines + 1) * columns if g else flat)
        return (cells[0], pages[0]) if len(cells) == 1 else (np.concatenate(cells), np.concatenate(pages))

    def to_tell(self, row: int, told: int, computed: int) -> int:
        """Entries that the device must be told of beside those of the tokens that a row begins with."""
        return sum(
            max(0, computed // group.page_size - max(told // group.page_size, int(self.first[g, row])))
            for g, group in enumerate(self.groups)
        )

    # ------------------------------------------------------------------------------------------------ pages go back

    def release_behind(self, rows: np.ndarray, starts: np.ndarray) -> None:
        """Give back what rows whose next tokens are at these positions, in steps that are under way or to come, do
        not look back on any more."""
        for g in self._forgetful:
            counts = np.maximum(self._first_kept(g, starts) - self.first[g, rows], 0)
            if not counts.any():
                continue
            total = int(counts.sum())
            columns = np.arange(total) - np.repeat(np.cumsum(counts) - counts - self.first[g, rows], counts)
            pages, holders = np.unique(self.pages[g, np.repeat(rows, counts), columns], return_counts=True)
            for times in range(int(holders.max())):
                self.pool.give_back(pages[holders > times])
            self.first[g, rows] += counts

    def dying(self, rows: np.ndarray, starts: np.ndarray) -> int:
        """Pages that `release_behind` would give back."""
        return sum(
            int(np.maximum(self._first_kept(g, starts) - self.first[g, rows], 0).sum()) for g in self._forgetful
        )  # fmt: skip

    def keep(self, row: int, g: int, count: int) -> None:
        """Give back a row's pages of one group but those in the first `count` columns."""
        count = max(count, int(self.first[g, row]))
        self.pool.give_back(self.pages[g, row, count : self.end[g, row]].copy())
        self.end[g, row] = count

    def release(self, row: int) -> None:
        """Give back all pages of a row."""
        for g in range(len(self.groups)):
            self.keep(row, g, 0)

    # ------------------------------------------------------------------------------------------------ books

    def to_come(self, rows: np.ndarray, tokens: np.ndarray) -> int:
        """Pages that `rows` will want beside theirs for prompts of so many tokens, in groups that forget."""
        return sum(
            int(np.maximum(self._most_held(g, tokens) - (self.end[g, rows] - self.first[g, rows]), 0).sum())
            for g in self._forgetful
        )

    def to_come_at_begin(self, tokens: int, computed: int) -> int:
        """The same of a row that begins."""
        return sum(
            max(
                0, self._most_held(g, tokens) - self._end_at_begin(g, tokens, computed) + self._first_kept(g, computed)
            )
            for g in self._forgetful
        )

    def _most_held(self, g: int, tokens: Positions) -> Positions:
        return most_held(self.groups[g], tokens, self._grain)

    def growing(self, rows: np.ndarray, limits: np.ndarray) -> int:
        """Pages that `rows` will want next that may outgrow theirs, having that many tokens at most."""
        return sum(
            int((limits - 1 > self.end[g, rows] * group.page_size).sum()) for g, group in enumerate(self.groups)
        )

    def note_full(self, row: int, keys: list[bytes], tokens: np.ndarray, noted: int, full: int) -> None:
        """Let others find a row's pages that are full of `tokens`, from base page `noted` on, short of `full`. Extends
        the row's `keys`."""
        base = self.pool.page_size
        extend_keys(keys, tokens, base)
        for g, group in enumerate(self.groups):
            first, end = noted * base // group.page_size, full * base // group.page_size
            first = max(first, int(self.first[g, row]))
            for column, key in enumerate(self._keys(g, keys, first, end), first):
                self.pool.fill(int(self.pages[g, row, column]), key)

    def _keys(self, g: int, keys: list[bytes], first: int, end: int) -> list[bytes]:
        """Of a group's pages in these columns, by those of base pages."""
        times = self.groups[g].page_size // self.pool.page_size
        own = keys[first * times + times - 1 : end * times : times]
        return own if g == 0 else [key + bytes([g]) for key in own]
