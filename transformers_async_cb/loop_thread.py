"""The engine's loop on a thread of its own, from its start to the last result."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress

from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from .holds import Holds
from .keeper import EngineKeeper
from .mailbox import Mailbox, Outbox
from .recorder import Recorder
from .request import Request
from .settings import Workload
from .timeline import Timeline, write


logger = logging.get_logger(f"transformers.{__name__}")

# Seconds for what takes none, unless the thread that waits has a lock that it takes.
_AT_ONCE = 5

_started: weakref.WeakSet[LoopThread] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """End what still runs while threads and the device are there."""
    for loop in list(_started):
        if loop.is_running():
            loop.stop(loop.keeper.drop, timeout=10, hard=True)


class LoopThread:
    """Starts and stops the loop, and hands its results out. Whatever happens to it, every request gets one.

    The thread holds this, and must not hold the manager: it could not be dropped. So nothing here knows the settings
    of requests to come, of which a criterion may.

    Args:
        keeper (`EngineKeeper`): has the engine.
        holds (`Holds`): a sleep ends when a stop is asked for.
        live (`dict`): requests that have no final result yet, by id.
        mailbox (`Mailbox`): where requests come from; they are let in with its lock held.
        outbox (`Outbox`): where results go.
    """

    def __init__(
        self,
        keeper: EngineKeeper,
        holds: Holds,
        live: dict[str, Request],
        mailbox: Mailbox,
        outbox: Outbox,
    ) -> None:
        self.keeper = keeper
        self.fatal_error: BaseException | None = None
        self.recorder: Recorder | None = None
        self._holds = holds
        self._live = live
        self._mailbox = mailbox
        self._outbox = outbox
        self._thread: threading.Thread | None = None
        self._ended = True  # the loop has, and settled what it was asked to; guarded by the keeper's lock
        self._settle: Callable[[], None] | None = None  # when it has ended, since nobody waits for that
        self._process = os.getpid()

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def here(self) -> bool:
        """Whether the calling thread is the loop's, or one that the loop waits for: then it cannot wait for the loop.
        Criteria, processors and hooks of the user's are called there, and what the collector ends may be, too."""
        engine = self.keeper.engine
        return threading.current_thread() is self._thread or (engine is not None and engine.lanes.here)

    def start(self, workload: Workload, given: Collection[str]) -> None:
        """Begin the loop, on an engine that fits the model, the workload and what requests give the model. Called with
        the keeper's lock held."""
        if self.fatal_error is not None:
            self.keeper.drop()
            self.fatal_error = None
        self.keeper.prepare(workload, given)
        if self.keeper.own.timeline is not None:
            self.recorder = Recorder()
        if self.recorder is not None:
            self.keeper.engine.recorder = self.recorder
        self.keeper.engine.lanes.enter()
        self._mailbox.reopen(running=True)
        self._outbox.set_open(True)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="async-batching", daemon=True)
        _started.add(self)
        self._thread.start()

    def stop(
        self, settle: Callable[[], None], block: bool = True, timeout: float | None = None, hard: bool = False
    ) -> None:
        """Have the loop finish the requests that are there, or end them with an error if `hard`, and take no more.

        Args:
            settle (`Callable`): called with the keeper's lock held, when the loop has ended: on this thread, or on the
                loop's if nobody waits for that.
            block (`bool`), timeout (`float`, *optional*): whether to wait, and how many seconds at most. A loop that
                has not ended by then does so later, and settles then.
        """
        with self.keeper.lock:
            thread = self._thread
            if thread is None:
                self._close("the manager was stopped before it was started")
                self._settle_and_give_back(settle)
                return
            self._mailbox.ask_to_stop(hard)
        self._holds.wake(cache=not hard and bool(self._live))
        waits = block and not self.here
        if not (waits and self._wait_for(thread, timeout)) and self._settle_later(thread, settle):
            return
        with self.keeper.lock:
            if self._thread not in (thread, None):  # somebody has started it again
                return
            self._thread = None
            self._settle_and_give_back(settle)

    def _settle_and_give_back(self, settle: Callable[[], None]) -> None:
        """In this order: whoever waits for the model finds memory and weights as they were."""
        try:
            settle()
        finally:
            self.keeper.loan.give_back()

    def abandon(self) -> None:
        """Stop, since nobody holds the manager any more, and give the model back last of all. One that waits for
        nothing has done so when this returns.

        The collector calls this on any thread, with whatever locks and modes of torch that has: another does the work.
        In a child of `os.fork` there is nobody to let go of locks that were held, and nothing is done.
        """
        nothing_left = self._ended and not (self.keeper.loan.out or self.keeper.engine or self._live)
        if nothing_left or sys.is_finalizing() or os.getpid() != self._process:
            return
        self.keeper.loan.dropped = True
        thread = threading.Thread(target=self._stop_abandoned, name="async-batching-end", daemon=True)
        thread.start()
        if not (self.is_running() or self.here):
            thread.join(_AT_ONCE)

    def _stop_abandoned(self) -> None:
        try:
            self.stop(self.keeper.drop)
        except Exception as error:  # it slept, and its memory or its model is somebody else's now
            logger.error(f"a manager that was dropped could not finish its requests: {error}")
            self.stop(self.keeper.drop, hard=True)

    def _settle_later(self, thread: threading.Thread, settle: Callable[[], None]) -> bool:
        """Leave that to the loop's `thread`, unless that has ended."""
        with self.keeper.lock:
            if self._ended or self._thread is not thread:
                return False
            self._settle = settle
            return True

    def join(self, timeout: float | None) -> bool:
        """Wait for the loop to end, at most so many seconds; whether it has."""
        return self._wait_for(self._thread, timeout)

    def _wait_for(self, thread: threading.Thread | None, timeout: float | None) -> bool:
        if thread is not None:
            thread.join(timeout)
            if thread.is_alive():
                logger.warning(f"the manager did not stop within {timeout} s")
                return False
        return True

    def set_recorder(self, recorder: Recorder | None) -> None:
        """Have what the loop does noted from now on, or no more. It stands still for that, with nothing in flight."""
        self.recorder = recorder  # for `start`
        if self.is_running():
            with suppress(RuntimeError):  # it has ended meanwhile
                self._mailbox.pause()
                self.keeper.engine.recorder = recorder
                self._mailbox.resume()
        elif self.keeper.engine is not None:
            self.keeper.engine.recorder = recorder

    def timeline_of(self, recorder: Recorder) -> Timeline:
        """What was recorded, under the name of what ran. Raises `ValueError` when no step was."""
        model, overlap = self.keeper.loan.model, "on" if self.keeper.own.overlap else "off"
        return Timeline.of(recorder, f"{type(model).__name__}, overlap {overlap}", self.keeper.loan.device.type)

    def _run(self) -> None:
        reason = "it has stopped"
        engine = self.keeper.engine
        try:
            engine.run(self._mailbox, self._deliver)
        except BaseException as error:
            logger.error(f"async batching failed: {error}", exc_info=True)
            self.fatal_error = error
            reason = f"the engine failed with {type(error).__name__}: {error}"
            self._deliver(engine.scheduler.take_outputs())
            engine.scheduler.save_all()
            _forget_frames(error)  # on which the engine and its memory hang; the log has shown them
        finally:
            try:
                with self.keeper.lock:  # all steps have retired: the device is not behind what the host has seen
                    if not self.keeper.loan.dropped:  # or `abandon` does, when the engine is gone too
                        self.keeper.loan.give_back()
            finally:
                self._close(reason)
            self._outbox.set_open(False)
            if self.keeper.own.timeline is not None:
                self._write_timeline()
            with self.keeper.lock:
                settle, self._settle, self._ended = self._settle, None, True
                if settle is not None:
                    settle()

    def _close(self, reason: str) -> None:
        """Take no more requests, and end those that are left."""
        with self._mailbox.lock:
            self._mailbox.close(reason)
            left = list(self._live.values())
            for request in left:
                request.finish(reason)
        self._deliver([request.output() for request in left])

    def _deliver(self, outputs: list[GenerationOutput]) -> None:
        if not outputs:
            return
        with self._outbox.lock:  # a request is live, or its result is there
            for output in outputs:
                if output.is_finished():
                    self._live.pop(output.request_id, None)
            self._outbox.put(outputs)

    def _write_timeline(self) -> None:
        recorder, self.recorder, self.keeper.engine.recorder = self.recorder, None, None
        try:
            if self.fatal_error is None:
                write(self.keeper.own.timeline, [self.timeline_of(recorder)])
        except (OSError, ValueError) as error:
            logger.error(f"the timeline could not be written to {self.keeper.own.timeline}: {error}")


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
