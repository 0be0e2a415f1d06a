"""Steps captured as CUDA graphs, and which of them computes a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from transformers.utils import logging

from .inputs import Bucket
from .sampling import Flavour


logger = logging.get_logger(f"transformers.{__name__}")

# What a graph of its own saves a step is padding: it is worth so many tokens of it, or fewer if they are so many
# operations. To compute a step uncaptured once and then capture it takes the host 55 to 85 ms, of which the step
# before hides a part; an H100 computes as many operations in 40.
_WORTH_TOKENS, _WORTH_FLOPS = 8192, 3e13


def worth_a_graph(parameters: int) -> int:
    """Padding tokens that a step of a model with so many parameters takes to be worth a graph of its own."""
    return max(1, int(min(_WORTH_TOKENS, _WORTH_FLOPS / (2 * parameters))))


class StepKey(NamedTuple):
    """What a captured step is made for."""

    bucket: Bucket
    flavour: Flavour

    def holds(self, other: StepKey) -> bool:
        """Whether this step can compute what `other` can."""
        return (
            self.flavour == other.flavour
            and self.bucket.decode_only == other.bucket.decode_only
            and self.bucket.tokens >= other.bucket.tokens
            and self.bucket.rows >= other.bucket.rows
        )


class Graphs:
    """The graphs of one engine, in one memory pool.

    A step is computed as it comes the first time, when its kernels are compiled, and captured the second time. Either
    takes as long as many replays, so a step that is rarely wanted is computed by a larger one that was captured
    already, until the padding of that would have paid for a graph of its own.

    Args:
        worth (`int`): padding tokens that a step takes to be worth a graph.
        on (`bool`): whether to capture anything. Turned off when something cannot be; what was captured before is
            still replayed.
    """

    def __init__(self, on: bool, worth: int) -> None:
        self.on = on
        self._worth = worth
        self._graphs: dict[StepKey, torch.cuda.CUDAGraph | None] = {}  # None: was computed once
        self._padding: Counter[StepKey] = Counter()
        self.count = 0  # captured, and not forgotten; any thread may read it
        self._pool = torch.cuda.graph_pool_handle() if on else None

    @property
    def captured(self) -> list[StepKey]:
        return [key for key, graph in self._graphs.items() if graph is not None]

    def clear(self) -> None:
        """Forget what was captured: it no longer computes what the model does."""
        self._graphs.clear()
        self.count = 0
        if self._pool is not None:  # a pool whose graphs are gone takes no others
            self._pool = torch.cuda.graph_pool_handle()

    def choose(self, wanted: StepKey) -> StepKey:
        """The step to compute for a plan that fits `wanted`: that one, or a larger one."""
        if self._graphs.get(wanted) is not None:
            return wanted
        larger = min((key for key in self.captured if key.holds(wanted)), default=None)
        if larger is None:
            return wanted
        if self.on:
            self._padding[wanted] += larger.bucket.tokens - wanted.bucket.tokens
            if self._padding[wanted] > self._worth:
                return wanted
        return larger

    def run(self, key: StepKey, compute: Callable[[], None], record: Callable[[], None]) -> None:
        """Replay a step, or `compute` it; when it comes the second time, `record` it first."""
        graph = self._graphs.get(key)
        if graph is None and self.on:
            if key in self._graphs:
                graph = self._capture(key, record)
            self._graphs[key] = graph
            self.count += graph is not None
        if graph is not None:
            graph.replay()
        else:
            compute()

    def _capture(self, key: StepKey, record: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """`None`, and no more tries, if the model does what cannot be recorded, or memory has no room for it."""
        logger.debug(f"capturing {key}")
        try:
            try:
                return self._record(record)
            except torch.OutOfMemoryError:  # while it captures, the allocator cannot free what it has cached
                if not self.count:
                    self._pool = torch.cuda.graph_pool_handle()
                torch.cuda.empty_cache()
                return self._record(record)
        except Exception as error:
            self.on = False
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning(f"steps cannot be captured as CUDA graphs, they run as they come: {first_line}")
            return None

    def _record(self, record: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Unlike `torch.cuda.graph`, this waits for nothing and leaves the allocator's cache alone: a step is
        running."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            record()
        except BaseException:
            with suppress(RuntimeError):  # which says no more than that there was an error
                graph.capture_end()
            raise
        graph.capture_end()
        return graph
