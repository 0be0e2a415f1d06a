"""Who holds which page of the cache, and which pages hold what a new request begins with."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np


class Pages:
    """Pages that are free, held, or idle: held by nobody, but with contents that a request may want again.

    A full page is known by a key: a digest of its tokens and of all before them. Requests that begin alike share such
    pages; a page is never written after it is full. Idle ones count as free, and the least recently used are emptied
    when there are no others.

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
        self._empty = count
        self._holders = np.zeros(count + 1, np.int32)
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._emptied: list[np.ndarray] = []

    @property
    def free(self) -> int:
        return self._empty + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> np.ndarray:
        """Hand out `count` pages: int32 `[count]`. The caller has made sure that they are free."""
        assert count <= self.free, f"{count} pages asked for, {self.free} free"
        if count > self._empty:
            self._drop([self._idle.popitem(last=False)[0] for _ in range(count - self._empty)])
        self._empty -= count
        taken = self._stack[self._empty : self._empty + count].copy()
        self._holders[taken] = 1
        return taken

    def give_back(self, pages: np.ndarray) -> None:
        assert (self._holders[pages] > 0).all(), "a page was given back twice"
        self._holders[pages] -= 1
        left = pages[self._holders[pages] == 0]
        known = [page in self._key_of for page in left.tolist()]
        for page in reversed(left[known].tolist()):  # the first of a sequence goes last: others begin with it
            self._idle[page] = None
        self._push(left[np.logical_not(known)])

    def known(self, keys: list[bytes]) -> int:
        """How many of the first keys are known."""
        return next((i for i, key in enumerate(keys) if key not in self._page_of), len(keys))

    def find(self, keys: list[bytes]) -> np.ndarray:
        """Hold the pages of the first keys that are known: int32 `[pages]`, for whoever gives them back."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
            self._idle.pop(page, None)
        pages = np.array(found, np.int32)
        self._holders[pages] += 1
        return pages

    def hold(self, pages: np.ndarray) -> None:
        """Hold pages that somebody holds already, once more."""
        assert (self._holders[pages] > 0).all(), "a page that nobody holds cannot be shared"
        self._holders[pages] += 1

    def fill(self, page: int, key: bytes) -> None:
        """Note what a held page holds. Of two that hold the same, the first is known by it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self) -> None:
        """What pages hold is worth nothing any more: the weights have changed."""
        idle = list(self._idle)
        self._idle.clear()
        self._drop(idle)
        self._key_of.clear()
        self._page_of.clear()

    def take_emptied(self) -> list[np.ndarray]:
        """Pages emptied since the last call, for whoever poisons them."""
        emptied, self._emptied = self._emptied, []
        return emptied

    def _drop(self, pages: list[int]) -> None:
        for page in pages:
            del self._page_of[self._key_of.pop(page)]
        self._push(np.array(pages, np.int32))

    def _push(self, pages: np.ndarray) -> None:
        self._stack[self._empty : self._empty + len(pages)] = pages
        self._empty += len(pages)
        self._emptied.append(pages)


def extend_keys(keys: list[bytes], tokens: np.ndarray, page_size: int) -> None:
    """Add the keys of the full pages of `tokens` (int32) that `keys` does not have yet."""
    for first in range(len(keys) * page_size, len(tokens) // page_size * page_size, page_size):
        digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        digest.update(tokens[first : first + page_size].tobytes())
        keys.append(digest.digest())
