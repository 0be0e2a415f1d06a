"""What of the interpreter holds the loop up: the lock while other threads compute, and the garbage collector."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager


# Seconds after which a thread that computes gives the lock to one that waits. Python's own 0.005 is as long as a step.
INTERVAL = 0.0005

# More objects than this are frozen because somebody wanted it: Python freezes some hundreds itself when it starts.
_FROZEN_BY_PYTHON = 10_000

_lock = threading.Lock()
_inside = 0
_before = 0.0
_frozen = False


@contextmanager
def undisturbed() -> Generator[None]:
    """Within, threads of the process wait `INTERVAL` for one that computes, if they waited longer before; and the
    garbage collector leaves alone what was there already. To look at all of that, a process that has imported
    transformers takes half a second, in which every thread stands still.

    Both are the process's, and are given back by the last to leave. What the user has frozen stays so.
    """
    global _inside, _before, _frozen
    with _lock:
        if _inside == 0:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, INTERVAL))
            _frozen = gc.get_freeze_count() < _FROZEN_BY_PYTHON
            if _frozen:
                gc.freeze()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                sys.setswitchinterval(_before)
                if _frozen:
                    gc.unfreeze()


def collect() -> None:
    """Collect garbage, also of what the collector was kept from. Not with the lock held: what is collected may wait
    for a loop that leaves."""
    if _inside and _frozen:
        gc.unfreeze()
    gc.collect()
    with _lock:
        if _inside and _frozen:
            gc.freeze()
