"""Pages of preempted requests in pinned host memory: who holds which, and the two lanes that copy them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .lanes import Event, Lane, Lanes
from .request import Request


if TYPE_CHECKING:
    from .runner import Runner
    from .tables import PageTables

# Tokens of one copy: many enough for the full rate, few enough that a request's pages return to the pool bit by bit.
MOVE_TOKENS = 512

# Copies under way on a lane at once. Each takes the host dozens of launches, so a long request is not sent in one go.
MOST_UNDER_WAY = 4

# Pinned memory is allocated in powers of two; in pieces of this size little of it is wasted.
BLOCK_BYTES = 2**30


class Move(NamedTuple):
    """Full pages of one row on their way to the host, or back."""

    row: int
    out: bool
    first: int  # column of the row's page table
    host_pages: np.ndarray  # int64 [pages]
    group: int = 0  # which of the row's page tables


class _Kept(NamedTuple):
    """Pages of one of a request's page tables."""

    first: int  # column
    host_pages: np.ndarray  # int64 [pages]


class HostPages:
    """Which host pages hold the full pages of which preempted request, and which are on their way.

    Whether copying them out and in again is cheaper than computing them again is measured: a token costs what it cost
    in the fastest copy and in the fastest step so far.

    Args:
        count (`int`): host pages there are; 0 turns all this off.
        page_size (`int`): tokens a page holds.
    """

    def __init__(self, count: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self.pages_a_move = max(1, MOVE_TOKENS // page_size)
        self.under_way = 0  # moves that have not landed
        self._free = np.ones(count, bool)
        self._of: dict[Request, list[_Kept]] = {}
        self._moves: list[Move] = []
        self._copying = self._computing = math.inf  # seconds a token

    @property
    def free(self) -> int:
        return int(self._free.sum())

    @property
    def cheaper(self) -> bool:
        """Whether to copy a token out and in costs less than to compute it."""
        return 2 * self._copying < self._computing

    def of(self, request: Request) -> np.ndarray:
        """Host pages with what a request begins with: int64 `[pages]`, of one page table after the other."""
        return np.concatenate([kept.host_pages for kept in self._of.get(request, [])] or [np.empty(0, np.int64)])

    def columns(self, request: Request) -> list[range]:
        """Where those belong, in each of its page tables."""
        return [range(kept.first, kept.first + len(kept.host_pages)) for kept in self._of.get(request, [])]

    def move_out(self, row: int, request: Request, columns: Sequence[range]) -> int:
        """Let these pages of a row move out, of each of its page tables; of a single one that has all, as many of the
        first as there is room for. The last go first, so that what is left in the cache are always the first. Returns
        how many moves that takes."""
        wanted = sum(map(len, columns))
        taken = np.flatnonzero(self._free)[:wanted]
        if not self.cheaper or not len(taken):
            return 0
        if len(taken) < wanted and (len(columns) > 1 or columns[0].start > 0):  # which are of use only together
            return 0
        self._free[taken] = False
        parts = np.split(taken, np.cumsum([len(of_group) for of_group in columns])[:-1])
        kept = [_Kept(of_group.start, part) for of_group, part in zip(columns, parts, strict=True)]
        self._of[request] = kept
        return self._announce(
            move
            for group, (first, host_pages) in enumerate(kept)
            for move in reversed([*self._split(row, True, first, host_pages, group)])
        )

    def move_in(self, row: int, request: Request, firsts: Sequence[int]) -> int:
        """Let host pages of a request move in, to a row's pages from these columns of its page tables on. Returns how
        many moves."""
        return self._announce(
            move
            for group, (first, kept) in enumerate(zip(firsts, self._of[request], strict=True))
            for move in self._split(
                row, False, max(first, kept.first), kept.host_pages[max(0, first - kept.first) :], group
            )
        )

    def take_moves(self) -> list[Move]:
        """Moves announced since the last call, for whoever makes them."""
        moves, self._moves = self._moves, []
        return moves

    def drop(self, request: Request) -> None:
        """A request needs its host pages no more, and none of them is on its way."""
        for kept in self._of.pop(request, []):
            self._free[kept.host_pages] = True

    def forget(self) -> None:
        """What host pages hold is worth nothing any more, as the model has changed. None of them may be on its way."""
        self._of.clear()
        self._free[:] = True

    def note_copied(self, tokens: int, seconds: float) -> None:
        self._copying = min(self._copying, seconds / tokens)

    def note_computed(self, tokens: int, seconds: float) -> None:
        self._computing = min(self._computing, seconds / tokens)

    def _split(self, row: int, out: bool, first: int, host_pages: np.ndarray, group: int) -> Iterator[Move]:
        for i in range(0, len(host_pages), self.pages_a_move):
            yield Move(row, out, first + i, host_pages[i : i + self.pages_a_move], group)

    def _announce(self, moves: Iterable[Move]) -> int:
        before = len(self._moves)
        self._moves.extend(moves)
        self.under_way += len(self._moves) - before
        return len(self._moves) - before


class _Way:
    """A lane for pages in one direction, with a buffer on the device in which each page is in one piece."""

    def __init__(self, lane: Lane, staging: torch.Tensor, storages: list[torch.Tensor]) -> None:
        self.lane = lane
        self.staging = staging  # uint8 [pages, bytes]
        self.parts: list[torch.Tensor] = []  # of it, for each storage: [pages, values]
        at = 0
        for storage in storages:
            part = staging[:, at : at + storage[0].nbytes].view(storage.dtype)
            self.parts.append(part.view(len(staging), *storage.shape[1:]))
            at += _aligned(storage[0].nbytes)
        self.waiting: deque[tuple[Move, Event | None]] = deque()  # and what the lane has to wait for
        self.under_way: deque[tuple[Move, Event, Event]] = deque()  # with its begin and end


class PageCopies:
    """Makes the moves of `HostPages`, on two lanes of their own: a large copy on one of a step's lanes would hold up
    the ids that the loop waits for.

        CPU        retire N (its last) │ plan N+1 · send │ ...           │ landed: its pages are free
        pages-out                               └─ gather · copy ─► event ─┘
        CPU        plan M: takes pages, send │ launch M │ ...                   │ landed │ plan: the row runs
        compute    ── step M-1 ──────────────┤├────────── step M ────────── ... │        │
        pages-in                             └─ line · copy · scatter ─► event ─┘

    A move gathers its pages from all layers on the device, so that a host page is one page of all layers and one copy
    carries many. On the device, page numbers come from the row's line of the page table.

    Every edge, for the pages, the row and the host pages of a move:

    | what                 | may be                                           | kept by                              |
    |----------------------|--------------------------------------------------|--------------------------------------|
    | out: pages, line     | read when the steps that wrote them are done     | sent after the row's last retire     |
    | the same             | rewritten when the gather that read them is done | given back when landed               |
    | in: pages, line      | written when the steps that read them last (a    | pages-in waits for compute as it was |
    |                      | fork may, of an owner that has left) are done    | when the pages were taken            |
    | the same             | read when the scatter is done                    | no plan or fork before it has landed |
    | in: `tables.pages`   | rewritten when the copy that read it is done     | only planned rows get more pages     |
    | staging              | rewritten when the move that used it is done     | one a lane, in the lane's own order  |
    | host pages           | read when the move out is done                   | in line only when all have landed    |
    | the same             | rewritten when the moves in are done             | dropped only when all have landed    |

    All else that reads and writes these is compute's, and the host passes them on: what precedes an event that it has
    seen is done before whatever it sends afterwards.

    Args:
        lanes (`Lanes`): those of the steps; the two for pages join them.
        runner (`Runner`): has the cache and the page tables.
        tables (`PageTables`): the rows' lines of these, which move to pinned memory.
        books (`HostPages`): says what to move, and is told how long it took.
    """

    def __init__(self, lanes: Lanes, runner: Runner, tables: PageTables, books: HostPages) -> None:
        self._lanes = lanes
        self._runner = runner
        self._page_tables = runner.page_tables
        self._books = books
        storages = runner.storages
        page_bytes = sum(_aligned(storage[0].nbytes) for storage in storages)
        pinned = lanes.device.type == "cuda"
        self._lines = torch.zeros(tables.pages.shape, dtype=torch.int32, device="cpu", pin_memory=pinned)
        tables.pages = self._lines.numpy()
        self._block_pages = max(1, BLOCK_BYTES // page_bytes)
        self._blocks = [
            torch.empty(
                min(self._block_pages, books.count - first), page_bytes,
                dtype=torch.uint8, device="cpu", pin_memory=pinned,
            )
            for first in range(0, books.count, self._block_pages)
        ]  # fmt: skip
        self._out, self._in = (
            _Way(
                lanes.add(name),
                torch.empty(books.pages_a_move, page_bytes, dtype=torch.uint8, device=lanes.device),
                storages,
            )
            for name in ("pages-out", "pages-in")
        )
        self._measure()

    def send(self, moves: list[Move]) -> None:
        """Make moves, and those that wait, as soon as few enough are under way. Returns at once."""
        taken = self._lanes.compute.record() if any(not move.out for move in moves) else None
        for move in moves:
            if move.out:
                self._out.waiting.append((move, None))
            else:
                self._in.waiting.append((move, taken))
        for way, copy in ((self._out, self._copy_out), (self._in, self._copy_in)):
            while way.waiting and len(way.under_way) < MOST_UNDER_WAY:
                move, event = way.waiting.popleft()
                way.lane.wait(event)
                begin = way.lane.record(timed=True)
                way.lane.run(lambda copy=copy, move=move: copy(move))
                way.under_way.append((move, begin, way.lane.record(timed=True)))

    def landed(self) -> list[Move]:
        """Moves that are done, each once. Waits for nothing."""
        landed = []
        for way in (self._out, self._in):
            while way.under_way and way.under_way[0][2].query():
                move, begin, end = way.under_way.popleft()
                self._books.note_copied(len(move.host_pages) * self._books.page_size, end.seconds_after(begin))
                landed.append(move)
        return landed

    def wait(self) -> None:
        """Block until a move that was sent is done."""
        way = next(way for way in (self._out, self._in) if way.under_way)
        way.under_way[0][2].synchronize()

    def _measure(self, rounds: int = 3) -> None:
        """Copy the padding page, which is all that the page table has yet, out and back onto itself. The first copies
        load kernels; being slow, they do not count."""
        host_pages = np.arange(min(self._books.pages_a_move, self._books.count, self._page_tables.shape[2]))
        for out in (True, False) * rounds:
            self.send([Move(0, out, 0, host_pages)])
            self.wait()
            self.landed()

    def _copy_out(self, move: Move) -> None:
        pages = self._pages(move)
        for storage, part in zip(self._runner.storages, self._out.parts, strict=True):
            torch.index_select(storage, 0, pages, out=part[: len(pages)])
        for on_host, staged in self._pieces(move, self._out):
            on_host.copy_(staged, non_blocking=True)

    def _copy_in(self, move: Move) -> None:
        for on_device, lines in zip(self._page_tables, self._lines, strict=True):
            on_device[move.row].copy_(lines[move.row], non_blocking=True)
        for on_host, staged in self._pieces(move, self._in):
            staged.copy_(on_host, non_blocking=True)
        pages = self._pages(move)
        for storage, part in zip(self._runner.storages, self._in.parts, strict=True):
            storage.index_copy_(0, pages, part[: len(pages)])

    def _pages(self, move: Move) -> torch.Tensor:
        """Numbers of a move's pages in the cache: int64 `[pages]`, on the device."""
        return self._page_tables[move.group, move.row, move.first : move.first + len(move.host_pages)].long()

    def _pieces(self, move: Move, way: _Way) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Host pages that lie together, and where they are staged."""
        numbers = move.host_pages
        cuts = np.flatnonzero((np.diff(numbers) != 1) | (numbers[1:] % self._block_pages == 0)) + 1
        for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(numbers)], strict=True):
            block, at = divmod(int(numbers[begin]), self._block_pages)
            yield self._blocks[block][at : at + end - begin], way.staging[begin:end]


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
