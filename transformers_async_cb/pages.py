"""Who holds which page of the cache."""

from __future__ import annotations

import numpy as np


class Pages:
    """A stack of free page numbers.

    Page 0 is never handed out: padding tokens are written there.

    Args:
        count (`int`): pages that can be handed out; their numbers are 1 to `count`.
        page_size (`int`): tokens a page holds.
    """

    PADDING = 0

    def __init__(self, count: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self._stack = np.arange(count, 0, -1, dtype=np.int32)
        self._free = count
        self._held = np.zeros(count + 1, bool)

    @property
    def free(self) -> int:
        return self._free

    def needed(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> np.ndarray:
        """Hand out `count` pages: int32 `[count]`. The caller has made sure that they are free."""
        assert count <= self._free, f"{count} pages asked for, {self._free} free"
        self._free -= count
        taken = self._stack[self._free : self._free + count].copy()
        self._held[taken] = True
        return taken

    def give_back(self, pages: np.ndarray) -> None:
        assert self._held[pages].all(), "a page was given back twice"
        self._held[pages] = False
        self._stack[self._free : self._free + len(pages)] = pages
        self._free += len(pages)
