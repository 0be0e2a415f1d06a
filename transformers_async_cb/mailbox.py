"""Between the users' threads and the loop's: requests in, results out."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from .request import Request


logger = logging.get_logger(f"transformers.{__name__}")


class Mail(NamedTuple):
    """What users asked for since the last look."""

    requests: list[Request]
    cancelled: list[Request]


class QueueFull(RuntimeError):
    """There is no room for more requests that wait to begin."""


class Mailbox:
    """What reaches the loop from other threads, and the condition it waits on when there is nothing to do.

    Args:
        bound (`int`): requests that may wait to begin before `post_in_turn` holds up whoever posts more; 0 for any
            number.
    """

    def __init__(self, bound: int = 0) -> None:
        self.bound = bound
        self.lock = threading.Condition()  # reentrant; while it is held, the loop reads nothing
        self._mail = Mail([], [])
        self._pauses = 0
        self._drains = 0  # pauses that begin once no request is under way
        self._parked = False
        self._idle = False  # no request was under way when the loop parked
        self.reopen()

    def reopen(self, running: bool = False) -> None:
        """Take mail for another run of the loop, which is `running` or to come; what has been posted before stays."""
        with self.lock:
            self._running = running
            self._closed: str | None = None
            self._waiting = 0  # requests that the loop has read and not begun
            self.stopping = False
            self.hard = False

    def post(self, *requests: Request) -> None:
        """Raises `RuntimeError` when the loop takes no more requests."""
        with self.lock:
            self.check_open()
            self._mail.requests.extend(requests)
            self.lock.notify_all()

    def post_in_turn(self, request: Request) -> None:
        """Wait until fewer than `bound` requests wait to begin, and post another. Raises as `post` does."""
        with self.lock:
            self.lock.wait_for(lambda: self.has_room() or self._closed is not None or self.stopping)
            self.check_open()
            self._mail.requests.append(request)
            self.lock.notify_all()

    def check_open(self) -> None:
        """Raises `RuntimeError` when the loop takes no more requests."""
        with self.lock:
            if self._closed is not None:
                raise RuntimeError(f"the manager takes no more requests: {self._closed}")
            if self.stopping:
                raise RuntimeError("the manager is stopping and takes no more requests")

    def has_room(self, count: int = 1) -> bool:
        """Whether `count` more requests may wait to begin."""
        with self.lock:
            return not self.bound or len(self._mail.requests) + self._waiting + count <= self.bound

    def cancel(self, request: Request) -> None:
        with self.lock:
            self._mail.cancelled.append(request)
            self.lock.notify_all()

    def ask_to_stop(self, hard: bool) -> None:
        with self.lock:
            self.stopping = True
            self.hard |= hard
            self.lock.notify_all()

    def pause(self, drain: bool = False) -> None:
        """Block until the loop has nothing in flight and stands still; with `drain`, until it has also finished the
        requests that it has, while those that come wait. Raises `RuntimeError` if the loop has ended."""
        with self.lock:
            self._count_pause(drain, 1)
            try:
                self.lock.wait_for(lambda: (self._parked and (self._idle or not drain)) or not self._running)
                if not self._running:
                    raise RuntimeError(f"the manager cannot pause: {self._closed or 'it has stopped'}")
            except BaseException:  # an interrupt too
                self._count_pause(drain, -1)
                raise

    def resume(self, drained: bool = False) -> None:
        """End a pause, one with `drain` if it was `drained`."""
        with self.lock:
            self._count_pause(drained, -1)

    def _count_pause(self, drain: bool, change: int) -> None:
        if drain:
            self._drains += change
        else:
            self._pauses += change
        self.lock.notify_all()

    def pending(self) -> list[Request]:
        """Requests posted that the loop has not read."""
        with self.lock:
            return list(self._mail.requests)

    @property
    def count(self) -> int:
        """How many those are, just about."""
        return len(self._mail.requests)

    # For the loop:

    def read(self, wait: bool) -> Mail:
        """All mail; with `wait`, once there is some, or a stop or a pause is asked for. Requests stay where they are
        while others are to be finished before a pause."""
        with self.lock:
            if wait:
                self.lock.wait_for(lambda: any(self._mail) or self.stopping or self._pauses or self._drains)
            mail, self._mail = self._mail, Mail([], [])
            if self._drains:
                self._mail.requests.extend(mail.requests)
                mail.requests.clear()
            self._waiting += len(mail.requests)
            return mail

    def note_waiting(self, count: int) -> None:
        """Say how many requests that were read have not begun."""
        if self.bound and count != self._waiting:
            with self.lock:
                self._waiting = count
                self.lock.notify_all()

    def pausing(self, idle: bool) -> bool:
        """Whether to park now, when no request is under way or when some are."""
        return self._pauses > 0 or (idle and self._drains > 0)

    @property
    def done(self) -> bool:
        """A stop was asked for, and nothing was posted before it that the loop has not read."""
        with self.lock:
            return self.stopping and not self._mail.requests

    def park(self, idle: bool) -> None:
        """Stand still until every pause is over that could begin; one with `drain` could if `idle`."""
        with self.lock:
            self._parked, self._idle = True, idle
            self.lock.notify_all()
            self.lock.wait_for(lambda: not self.pausing(idle))
            self._parked = False

    def close(self, reason: str) -> None:
        """Take no more mail, and forget what nobody has read."""
        with self.lock:
            self._running = False
            self._closed = reason
            self._mail = Mail([], [])
            self.lock.notify_all()


class Outbox:
    """Results on their way to whoever asks for them, by request or in the order they came."""

    def __init__(self) -> None:
        self.lock = threading.Condition()  # reentrant
        self._results: dict[str, deque[GenerationOutput]] = {}
        self._handlers: dict[str, tuple[Callable[[GenerationOutput], None], asyncio.AbstractEventLoop]] = {}
        self.open = False  # whether more may come

    def clear(self) -> None:
        """Forget the results that nobody has asked for."""
        with self.lock:
            self._results.clear()
            self._handlers.clear()

    def set_open(self, is_open: bool) -> None:
        with self.lock:
            self.open = is_open
            self.lock.notify_all()

    def put(self, outputs: list[GenerationOutput]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        with self.lock:
            for output in outputs:
                entry = self._handlers.get(output.request_id)
                if entry is None:
                    self._results.setdefault(output.request_id, deque()).append(output)
                else:
                    by_loop.setdefault(entry[1], []).append((entry[0], output))
                    if output.is_finished():
                        del self._handlers[output.request_id]
            for loop, calls in by_loop.items():
                try:
                    loop.call_soon_threadsafe(_call_all, loop, calls)
                except RuntimeError:  # the loop of whoever asked is gone; the engine's other requests go on
                    logger.warning(f"dropping {len(calls)} results, the event loop of their handlers is closed")
            self.lock.notify_all()

    def handle(self, request_id: str, callback: Callable, loop: asyncio.AbstractEventLoop) -> None:
        with self.lock:
            early = self._results.pop(request_id, None)
            if early is None or not early[-1].is_finished():
                self._handlers[request_id] = (callback, loop)
            if early:  # within the lock, or a later result could overtake these
                loop.call_soon_threadsafe(_call_all, loop, [(callback, output) for output in early])

    def holds(self, request_id: str) -> bool:
        """Whether a result of that request waits for somebody."""
        with self.lock:
            return request_id in self._results

    def get(self, request_id: str | None, timeout: float | None) -> GenerationOutput | None:
        def ready() -> bool:
            return bool(self._results) if request_id is None else request_id in self._results

        with self.lock:
            self.lock.wait_for(lambda: ready() or not self.open, timeout)
            if not ready():
                return None
            key = next(iter(self._results)) if request_id is None else request_id
            queued = self._results[key]
            output = queued.popleft()
            if not queued:
                del self._results[key]
            return output


def _call_all(loop: asyncio.AbstractEventLoop, calls: list[tuple[Callable, GenerationOutput]]) -> None:
    for callback, output in calls:
        try:
            callback(output)
        except Exception as error:  # one handler's; the others get their results
            message = f"the result handler of request {output.request_id} failed"
            loop.call_exception_handler({"message": message, "exception": error})
