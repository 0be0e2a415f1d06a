"""A bar that says how far a batch is, how fast it goes and how full the cache is."""

from __future__ import annotations

import time

from tqdm import tqdm
from transformers.generation.continuous_batching.requests import GenerationOutput

from .manager import AsyncBatchingManager


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
