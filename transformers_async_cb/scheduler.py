"""Who runs in the next step, how many tokens each, on which pages; and what a finished step means."""

from __future__ import annotations

import heapq
import time
from collections import deque
from typing import NamedTuple

import numpy as np
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from .pages import Pages
from .request import MOST_FRESH, Phase, Request, Rows


class Plan(NamedTuple):
    """One step: `S` sequences, decoding ones first. A sequence is one row's next tokens."""

    rows: np.ndarray  # int64 [S]
    starts: np.ndarray  # int64 [S] position of the first token
    counts: np.ndarray  # int64 [S] tokens
    samples: np.ndarray  # bool [S] whether the last token's logits become a token
    decodes: int  # the first so many rows decode: their one token is on the device
    fresh: list[int]  # rows that begin with this step, all among `rows`
    cells: np.ndarray  # int64 [P] entries of the flat page table that change
    pages: np.ndarray  # int32 [P] what they become
    sampled: bool  # a row samples rather than takes the largest logit
    filtered: bool  # a row samples with top-k, top-p or min-p
    shaped: bool  # something is done to the logits of a row

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())


class Scheduler:
    """First come, first served: decode first, then prompts in chunks, then new requests, under a token budget.

    A request is admitted when all its tokens so far have pages. When a decoding row finds no page, the youngest is
    preempted: it gives its pages back after its last step and is computed again later. The oldest is never preempted,
    so a pool that fits one request finishes them all.

    Args:
        rows (`Rows`), pages (`Pages`): the books.
        token_budget (`int`): tokens one step may hold, at least the number of rows.
        max_tokens (`int`): positions one request may use.
        reserve (`float`): share of the pages that admission leaves free while anything runs.
    """

    def __init__(self, rows: Rows, pages: Pages, token_budget: int, max_tokens: int, reserve: float = 0.0) -> None:
        self.rows = rows
        self.pages = pages
        self.token_budget = token_budget
        self.max_tokens = max_tokens
        self.reserve = int(reserve * pages.count)
        self.waiting: list[tuple[int, Request]] = []  # heap by arrival
        self.prefilling: deque[int] = deque()  # rows, by arrival
        self.row_of: dict[str, int] = {}
        self.preemptions = 0
        self.discarded = 0  # tokens sampled for requests that had ended
        self._outputs: list[GenerationOutput] = []
        self._released: list[np.ndarray] = []

    # ------------------------------------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        heapq.heappush(self.waiting, (request.arrival, request))

    def cancel(self, request: Request, reason: str) -> None:
        """End a request now, wherever it is. One that has ended already stays as it is."""
        if request.finished_time >= 0:
            return
        row = self.row_of.get(request.id)
        if row is not None:
            self._end(row, reason)
        else:  # it stays in the heap until its turn comes, which is when `_admit` leaves it out
            self._refuse(request, reason)

    def fail_all(self, reason: str) -> None:
        """End every request with `reason`; the rows stay held until their steps retire."""
        for row in list(self.row_of.values()):
            self._end(row, reason)
        while self.waiting:
            request = heapq.heappop(self.waiting)[1]
            if request.finished_time < 0:
                self._refuse(request, reason)

    def save_all(self) -> None:
        """Copy the running requests' tokens so far into them, for whoever ends them without this scheduler."""
        for row in self.row_of.values():
            self.rows.save(row)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.row_of

    def take_outputs(self) -> list[GenerationOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_released(self) -> list[np.ndarray]:
        """Pages given back since the last call, for whoever poisons them."""
        released, self._released = self._released, []
        return released

    def check_books(self) -> None:
        """When nothing runs, nothing may be held. Raises `RuntimeError` with what is."""
        held = {
            "pages": self.pages.count - self.pages.free,
            "rows": self.rows.count - self.rows.free,
            "steps in flight": int(self.rows.in_flight.sum()),
            "prefilling rows": len(self.prefilling),
        }
        if any(held.values()):
            raise RuntimeError(f"the books do not balance, still held while idle: {held}")

    # ------------------------------------------------------------------------------------------------ plan

    def plan(self) -> Plan | None:
        """The next step, or `None` when nothing can run before a step retires or a request comes."""
        decoding = self._decoding_rows()
        chunks, fresh = self._chunks(self.token_budget - len(decoding))
        if not len(decoding) and not chunks:
            return None
        r = self.rows
        rows = np.concatenate([decoding, np.array([row for row, _ in chunks], np.int64)])
        counts = np.ones(len(rows), np.int64)
        counts[len(decoding) :] = [count for _, count in chunks]
        starts = r.computed[rows]
        ends = starts + counts
        samples = ends >= r.prefill[rows]
        cells, pages = self._new_cells(rows, starts, ends, len(decoding))
        r.computed[rows] = ends
        r.total[rows] += samples
        r.in_flight[rows] += 1
        return Plan(
            rows, starts, counts, samples, len(decoding), fresh, cells, pages,
            bool(r.sampled[rows].any()), bool(r.filtered[rows].any()), bool(r.shaped[rows].any()),
        )  # fmt: skip

    def _decoding_rows(self) -> np.ndarray:
        """Rows that decode in this step, each with a page for its token: int64 `[D]`."""
        r, page_size = self.rows, self.pages.page_size
        while True:
            ready = np.flatnonzero((r.phase == Phase.RUNNING) & (r.computed >= r.prefill) & (r.total < r.limit))
            needy = ready[r.computed[ready] % page_size == 0]
            short = len(needy) - self.pages.free
            if short <= 0:
                break
            if not self._make_room(short):
                needy = needy[np.argsort(r.arrival[needy])]
                ready = np.setdiff1d(ready, needy[self.pages.free :])  # the younger ones skip this step
                needy = needy[: self.pages.free]
                break
        r.pages[needy, r.page_count[needy]] = self.pages.take(len(needy))
        r.page_count[needy] += 1
        return ready

    def _make_room(self, short: int) -> bool:
        """Preempt the youngest row for a shortage of `short` pages. `False`: enough pages are on their way back."""
        r = self.rows
        done = (r.phase >= Phase.PREEMPTED) | ((r.phase == Phase.RUNNING) & (r.total >= r.limit))
        coming = int(r.page_count[done].sum())
        if coming >= short:
            return False
        candidates = np.flatnonzero((r.phase == Phase.RUNNING) & (r.total < r.limit))
        if len(candidates) == 1:
            if coming:
                return False
            row = int(candidates[0])
            needs = self.pages.needed(int(r.total[row]))
            self._end(
                row,
                f"request {r.request[row].id} needs {needs} pages of {self.pages.page_size} tokens at length "
                f"{r.total[row]}, the cache has {self.pages.count}",
            )
            return True
        row = int(candidates[np.argmax(r.arrival[candidates])])
        self.preemptions += 1
        r.phase[row] = Phase.PREEMPTED
        self._forget_prefill(row)
        if not r.in_flight[row]:
            self._release(row)
        return True

    def _chunks(self, budget: int) -> tuple[list[tuple[int, int]], list[int]]:
        """`(row, tokens)` of the prompts that go on or begin in this step, and the rows that begin."""
        r = self.rows
        chunks: list[tuple[int, int]] = []
        fresh: list[int] = []
        while budget > 0:
            if len(chunks) == len(self.prefilling):
                row = self._admit() if len(fresh) < MOST_FRESH else None
                if row is None:
                    break
                fresh.append(row)
            row = self.prefilling[len(chunks)]
            count = min(int(r.prefill[row] - r.computed[row]), budget)
            chunks.append((row, count))
            budget -= count
        for row, count in chunks:
            if r.computed[row] + count == r.prefill[row]:
                self.prefilling.popleft()
        return chunks, fresh

    def _admit(self) -> int | None:
        """Give the oldest waiting request a row and pages for all its tokens so far, if there is room."""
        r = self.rows
        while self.waiting and r.free:
            request = self.waiting[0][1]
            if request.finished_time >= 0:  # cancelled
                heapq.heappop(self.waiting)
                continue
            tokens = len(request.tokens)
            needed = self.pages.needed(tokens)
            room = min(self.pages.count, r.pages.shape[1])
            if needed > room:
                heapq.heappop(self.waiting)
                self._refuse(
                    request,
                    f"request {request.id} needs {needed} pages of {self.pages.page_size} tokens for its {tokens} "
                    f"tokens, the cache has {room} for one request",
                )
                continue
            if not self._leaves_room(self.pages.free - needed):
                return None
            row = r.take(request, min(request.total_limit, self.max_tokens + 1))  # the last token needs no position
            r.pages[row, :needed] = self.pages.take(needed)
            r.page_count[row] = needed
            heapq.heappop(self.waiting)
            self.row_of[request.id] = row
            self.prefilling.append(row)
            return row
        return None

    def _leaves_room(self, free: int) -> bool:
        """Whether `free` pages are enough beside the running rows: each that may outgrow its pages will want another
        (its last token needs no place)."""
        r = self.rows
        if free >= max(r.count - r.free, self.reserve):  # even if all of them do
            return True
        growing = int(((r.phase == Phase.RUNNING) & (r.limit - 1 > r.page_count * self.pages.page_size)).sum())
        return free >= max(growing, self.reserve if growing else 0)

    def _new_cells(
        self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, decodes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Entries of the device's flat page table that the tokens of this step touch first, and their pages."""
        r, page_size = self.rows, self.pages.page_size
        columns = r.pages.shape[1]
        opens = starts[:decodes] % page_size == 0
        cells = [rows[:decodes][opens] * columns + starts[:decodes][opens] // page_size]
        for row, start, end in zip(rows[decodes:], starts[decodes:], ends[decodes:], strict=True):
            cells.append(np.arange(-(-start // page_size), -(-end // page_size)) + row * columns)
        flat = np.concatenate(cells)
        return flat, r.pages.reshape(-1)[flat]

    # ------------------------------------------------------------------------------------------------ retire

    def retire(self, plan: Plan, ids: np.ndarray, logprobs: np.ndarray | None) -> None:
        """Take the tokens of a finished step: `ids` int32 `[S]`, `logprobs` float32 `[S]`, both in plan order."""
        r = self.rows
        r.in_flight[plan.rows] -= 1
        live = plan.samples & (r.phase[plan.rows] <= Phase.PREEMPTED)
        self.discarded += int(plan.samples.sum() - live.sum())
        rows, tokens = plan.rows[live], ids[live]
        r.append(rows, tokens, None if logprobs is None else logprobs[live], time.perf_counter())
        ended = (r.known[rows] >= r.limit[rows]) | (r.eos[rows] == tokens[:, None]).any(1)
        for row in rows[r.streaming[rows] & ~ended]:
            request = r.save(row)
            request.status = RequestStatus.DECODING
            self._outputs.append(request.output())
        for row in rows[ended]:
            self._end(int(row), self._cut_short(int(row)))
        drained = plan.rows[(r.in_flight[plan.rows] == 0) & (r.phase[plan.rows] >= Phase.PREEMPTED)]
        for row in drained:
            self._release(int(row))

    def _cut_short(self, row: int) -> str | None:
        """Why a row that reached its limit got fewer tokens than it asked for, if it did."""
        r, request = self.rows, self.rows.request[row]
        known = int(r.known[row])
        if known >= request.total_limit or r.tokens[row, known - 1] in request.eos_ids:
            return None
        return (
            f"request {request.id} reached the longest sequence there is room for, {self.max_tokens} positions, after "
            f"{known - request.prompt_length} of {request.max_new_tokens} new tokens"
        )

    def _end(self, row: int, error: str | None) -> None:
        """The request's result is out; the row follows when its last step has retired."""
        r = self.rows
        request = r.save(row)
        request.finish(error)
        self._outputs.append(request.output())
        r.phase[row] = Phase.ENDED
        self._forget_prefill(row)
        del self.row_of[request.id]
        if not r.in_flight[row]:
            self._release(row)

    def _release(self, row: int) -> None:
        """Nothing in flight reads the row any more: its pages and the row itself are free."""
        r = self.rows
        if r.phase[row] == Phase.PREEMPTED:
            request = r.save(row)
            del self.row_of[request.id]
            self.add(request)
        pages = r.pages[row, : r.page_count[row]].copy()
        self.pages.give_back(pages)
        self._released.append(pages)
        r.page_count[row] = 0
        r.give_back(row)

    def _forget_prefill(self, row: int) -> None:
        if row in self.prefilling:
            self.prefilling.remove(row)

    def _refuse(self, request: Request, reason: str) -> None:
        request.finish(reason)
        self._outputs.append(request.output())
