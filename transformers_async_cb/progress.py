"""Bars: how far a batch is, how fast it goes and how full the cache is; how far a warm-up is, and what it does."""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from tqdm import tqdm
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from .engine import Engine


if TYPE_CHECKING:
    from .manager import AsyncBatchingManager


logger = logging.get_logger(f"transformers.{__name__}")

# Seconds from one look at the engine to the next.
_REFRESH = 0.25


class BatchProgress(tqdm):
    """transformers' bar for a batch, with what the engine does beside it. Where nobody looks (stderr is no terminal),
    it says nothing.

    Args:
        count (`int`): of requests.
        shown (`bool`): whether anybody asked for it.
    """

    def __init__(self, count: int, shown: bool) -> None:
        super().__init__(
            total=count, disable=None if shown else True, desc=f"Solving {count} requests", unit="request"
        )
        self._looked = 0.0

    def next_result(self, manager: AsyncBatchingManager) -> GenerationOutput | None:
        """As `manager.get_result()`, and the bar moves on meanwhile."""
        while not self.disable:
            if time.monotonic() - self._looked > _REFRESH:
                self._looked = time.monotonic()
                self.set_postfix_str(manager.metrics().brief)
            output = manager.get_result(timeout=_REFRESH)
            if output is not None:
                return output
            if not manager.is_running():  # whatever there is, is out by now
                break
        return manager.get_result()


def show_warm_up(engine: Engine, warm_up: Future) -> None:
    """Say how far a warm-up is, until it is done: in the log, and in a bar where stderr is a terminal and transformers
    may show any."""
    said, shown = None, 0
    with logging.tqdm(disable=None, desc="Warming up", unit=" tokens", leave=False) as bar:
        while not wait([warm_up], _REFRESH).done:
            (done, total), what = engine.warm_up_progress(), engine.metrics().warming_up
            if not total:  # it has yet to begin, or has just ended
                continue
            bar.total = total
            bar.set_postfix_str(what or "", refresh=False)
            bar.update(done - shown)
            bar.refresh()
            shown = done
            if what not in (None, said):
                logger.info(f"warming up, {done:,} of {total:,} tokens: {what}")
                said = what
