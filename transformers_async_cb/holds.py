"""The loop held still: pauses, in which the model is its owner's, and sleeps, in which the memory is free too."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch

from .keeper import EngineKeeper
from .mailbox import Mailbox


class Holds:
    """Counts who holds the loop. The first gives the model back; when the last lets go, the engine takes it up as it
    is then. A sleep is a hold that nobody's block ends, and the cache is gone meanwhile.

    Args:
        keeper (`EngineKeeper`): has the model and the engine.
        mailbox (`Mailbox`): the loop parks there.
    """

    def __init__(self, keeper: EngineKeeper, mailbox: Mailbox) -> None:
        self._keeper = keeper
        self._mailbox = mailbox
        self._count = 0
        self.asleep = False
        self._here = threading.local()

    @property
    def here(self) -> bool:
        """Whether this thread is inside a pause."""
        return getattr(self._here, "depth", 0) > 0

    @contextmanager
    def pause(self, drain: bool = False) -> Generator[None]:
        """Within, the running loop has nothing in flight and the model is as it was; with `drain`, it has also
        finished the requests that it had."""
        self._take(drain)
        self._here.depth = getattr(self._here, "depth", 0) + 1
        try:
            yield
        finally:
            self._here.depth -= 1
            self._let_go(drain)

    def sleep(self, running: bool) -> None:
        """Begin a sleep, of a loop that is `running` or of a kept engine, which sleeps until it is started again."""
        if running:
            self._take()
        with self._keeper.lock:
            if self.asleep and running:  # another thread was faster
                self._count -= 1
                self._mailbox.resume()
                return
            self._keeper.loan.give_back()
            if self._keeper.engine is not None:
                self._keeper.engine.release_cache()
            self.asleep = running

    def wake(self, cache: bool = True) -> None:
        """End a sleep, if there is one. Without `cache` nothing will be computed, and no memory is taken.

        Raises:
            torch.OutOfMemoryError: there is none; the sleep goes on.
        """
        if not self.asleep:
            return
        with self._keeper.lock:
            if not self.asleep:
                return
            if cache:
                with torch.inference_mode(False), torch.no_grad():
                    self._keeper.engine.runner.take_pages()
            self.asleep = False
            if not cache:
                self._count -= 1
        if cache:
            self._let_go()
        else:
            self._mailbox.resume()

    def _take(self, drain: bool = False) -> None:
        self._mailbox.pause(drain)
        with self._keeper.lock:
            self._count += 1
            if self._count == 1:
                self._keeper.loan.give_back()

    def _let_go(self, drained: bool = False) -> None:
        """The engine takes up the model as it is now, after all that this thread's stream does to it."""
        try:
            with self._keeper.lock:
                self._count -= 1
                if self._count == 0:
                    with torch.inference_mode(False), torch.no_grad():  # weights may be joined anew
                        self._keeper.loan.borrow()
                        self._keeper.engine.attach()
                self._keeper.engine.lanes.enter()
        except BaseException:
            self._mailbox.ask_to_stop(hard=True)
            raise
        finally:
            self._mailbox.resume(drained)
