"""How long the loop waits for the interpreter lock while other threads compute."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager


# Seconds after which a thread that computes gives the lock to one that waits. Python's own 0.005 is as long as a step.
INTERVAL = 0.0005

_lock = threading.Lock()
_inside = 0
_before = 0.0


@contextmanager
def switching_often() -> Generator[None]:
    """Within, threads of the process wait `INTERVAL` for one that computes, if they waited longer before. The interval
    is the process's, and is given back by the last to leave."""
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, INTERVAL))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                sys.setswitchinterval(_before)
