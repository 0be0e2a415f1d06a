"""Requests that wait for a row, in which order, and which of them wait for one of their own kind."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from .request import Family, Request


class Line:
    """The highest priority first, and within one, first come, first served.

    Of a request's sequences only one stands in line at first, the leader, and the others are held back until it has
    computed the prompt; if it ends before, the next takes its place.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[tuple[int, int], Request]] = []  # heap by place in line
        self.held_back = 0  # requests, in all families
        self.next_deadline = math.inf  # no request is late before

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def __len__(self) -> int:
        """Requests that stand in line or are held back; a cancelled one counts until its turn comes."""
        return len(self.waiting) + self.held_back

    def __iter__(self) -> Iterator[Request]:
        """Those that stand in line, in no order."""
        return (request for _, request in self.waiting)

    def join(self, request: Request) -> None:
        """A request has come: the first of its family, or alone, stands in line."""
        self.next_deadline = min(self.next_deadline, request.deadline)
        family = request.family
        if family is not None and family.leader is not None:
            self._hold_back(request)
            return
        if family is not None:
            family.leader = request
        self.stand(request)

    def stand(self, request: Request) -> None:
        """A request stands in line, again or at last."""
        heapq.heappush(self.waiting, ((-request.priority, request.arrival), request))

    def first(self) -> Request | None:
        """The first in line that has not been cancelled."""
        while self.waiting and self.waiting[0][1].finished_time >= 0:
            self.pop()
        return self.waiting[0][1] if self.waiting else None

    def pop(self) -> Request:
        return heapq.heappop(self.waiting)[1]

    def hold_first_back(self, leader: Request) -> None:
        """Another of its family computes its prompt."""
        request = self.pop()
        request.family.leader = leader
        self._hold_back(request)

    def _hold_back(self, request: Request) -> None:
        request.family.held_back.append(request)
        self.held_back += 1

    def let_go(self, family: Family) -> None:
        """The prompt is computed, also for those that have yet to come."""
        family.leader = None
        for request in family.held_back:
            self.stand(request)
        self.held_back -= len(family.held_back)
        family.held_back.clear()

    def pass_on(self, request: Request) -> None:
        """A request has ended: if others are held back for it, the first of them leads."""
        family = request.family
        if family is None or family.leader is not request:
            return
        family.leader = None
        while family.leader is None and family.held_back:
            heir = family.held_back.pop(0)
            self.held_back -= 1
            if heir.finished_time < 0:
                family.leader = heir
                self.stand(heir)
