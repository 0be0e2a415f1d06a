"""What the loop counts as it goes, for any thread to read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers.generation.continuous_batching.requests import GenerationOutput

from .recorder import HOST_PHASES, WAITING_PHASES
from .request import Request, Rows
from .scheduler import Plan, Scheduler


# Rates are those of the last so many seconds, noted once a second.
WINDOW = 10

# Seconds from one line in the log to the next, while there is something to do.
LOG_INTERVAL = 5

# Latencies are those of the last so many requests.
_KEPT = 1024


class Percentiles(NamedTuple):
    """Of the last 1,024 values; zeros while there is none."""

    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0


_NO_VALUES = Percentiles()


@dataclass(frozen=True, slots=True)
class Metrics:
    """What an engine is doing, and has done since it was built.

    The numbers are read while the loop runs and without holding it up: each is right, but one may be a step older
    than another. Rates and times a step are those of the last ten seconds; rates are 0 when nothing ran in these.

    Attributes:
        running (`int`): requests that hold a row.
        waiting (`int`): requests that wait for one; preempted ones wait here again.
        preempted (`int`): how often a request gave its pages back, to be computed again later.
        offloaded (`int`), restored (`int`): how often its pages were copied to the host instead, and back.
        finished (`int`): requests that ended with all their tokens.
        failed (`int`): requests that ended with an error.
        pages_used (`int`), pages (`int`), page_size (`int`): pages of the cache that requests hold, all there are, and
            the tokens of one (where layers differ in what they keep, of one of those with the most bytes a token).
        looked_up (`int`): tokens of the requests that were let in.
        found (`int`): of those, tokens whose keys and values were in the cache already.
        tokens_in (`int`): tokens of prompts that were computed.
        tokens_out (`int`): tokens generated.
        tokens_in_per_second (`float`), tokens_out_per_second (`float`): of late.
        steps (`int`): launched.
        host_ms (`float`): the host's own work for a step, mean.
        device_ms (`float`): a step on the device, mean.
        queue_seconds (`Percentiles`): from when a request was added to when its computation began.
        first_token_seconds (`Percentiles`): from when a request was added to its first token.
        graphs (`int`): steps captured as CUDA graphs.
        warming_up (`str`, *optional*): what is being compiled or captured just now, which takes seconds.
    """

    running: int = 0
    waiting: int = 0
    preempted: int = 0
    offloaded: int = 0
    restored: int = 0
    finished: int = 0
    failed: int = 0
    pages_used: int = 0
    pages: int = 0
    page_size: int = 0
    looked_up: int = 0
    found: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_in_per_second: float = 0.0
    tokens_out_per_second: float = 0.0
    steps: int = 0
    host_ms: float = 0.0
    device_ms: float = 0.0
    queue_seconds: Percentiles = _NO_VALUES
    first_token_seconds: Percentiles = _NO_VALUES
    graphs: int = 0
    warming_up: str | None = None

    @property
    def pages_share(self) -> float:
        """Of the cache, what requests hold."""
        return self.pages_used / self.pages if self.pages else 0.0

    @property
    def brief(self) -> str:
        """For a bar that shows progress."""
        if self.warming_up is not None:
            return self.warming_up
        return f"{self.tokens_out_per_second:,.0f} tokens/s, {self.pages_share:.0%} of the cache in use"

    def __str__(self) -> str:
        text = (
            f"{self.running:,} running, {self.waiting:,} waiting; tokens/s: {self.tokens_out_per_second:,.0f} out, "
            f"{self.tokens_in_per_second:,.0f} in; {self.pages_share:.0%} of the cache in use; a step: "
            f"{self.device_ms:.2f} ms on the device, {self.host_ms:.2f} ms on the host"
        )
        if self.preempted:
            text += f"; {self.preempted:,} preemptions"
        if self.offloaded:
            text += f", {self.offloaded:,} of them to the host"
        return text if self.warming_up is None else f"{text}; {self.warming_up}"


class Latencies:
    """The last values, in a ring that any thread may read."""

    def __init__(self) -> None:
        self._values = np.zeros(_KEPT)
        self._count = 0

    def add(self, values: list[float]) -> None:
        for value in values:
            self._values[self._count % _KEPT] = value
            self._count += 1

    def percentiles(self) -> Percentiles:
        values = self._values[: min(self._count, _KEPT)]
        return Percentiles(*np.percentile(values, (50, 90, 99)).tolist()) if len(values) else _NO_VALUES


class Counts(NamedTuple):
    """Counters at one time."""

    time: float
    steps: int
    tokens_in: int
    tokens_out: int
    host_seconds: float
    device_seconds: float


class Meter:
    """The loop's counters. The loop alone writes them, others read: a number of Python's is replaced as a whole, so
    nobody waits for anybody."""

    def __init__(self) -> None:
        self.steps = 0  # retired
        self.tokens_in = 0
        self.tokens_out = 0
        self.device_seconds = 0.0
        self.finished = 0
        self.failed = 0
        self.queue, self.first_token = Latencies(), Latencies()
        self._seconds = dict.fromkeys((*HOST_PHASES, *WAITING_PHASES), 0.0)
        self._last = self._logged = time.perf_counter()
        self._noted: tuple[Counts, ...] = (self._counts(),)

    def lap(self, phase: str) -> tuple[float, float]:
        """A phase of the loop has ended: from when to when it was, in seconds of `time.perf_counter`."""
        begin, self._last = self._last, time.perf_counter()
        self._seconds[phase] += self._last - begin
        if phase == "idle" and self._last - begin > 1:  # which says nothing about the rate from now on
            self._noted = (self._counts(),)
        return begin, self._last

    def launch(self, plan: Plan, rows: Rows) -> None:
        """A step is on its way."""
        if plan.fresh:
            self.queue.add([r.started_time - r.created_time for r in _without_tokens(rows, plan.fresh)])

    def retire(self, plan: Plan, rows: Rows, device_seconds: float) -> None:
        """A step's tokens are there, and will be handed out next."""
        self.steps += 1
        self.device_seconds += device_seconds
        self.tokens_out += int(plan.samples.sum())
        if len(plan.rows) > plan.decodes:
            self.tokens_in += int(plan.counts[plan.decodes :].sum())
            prompts = plan.rows[plan.decodes :][plan.samples[plan.decodes :]].tolist()
            self.first_token.add([self._last - r.created_time for r in _without_tokens(rows, prompts)])

    def tick(self) -> bool:
        """Note the counters once a second; returns whether it is time for a line in the log."""
        if self._last - self._noted[-1].time >= 1:
            self._noted = (*self._noted[-WINDOW:], self._counts())
        if self._last - self._logged < LOG_INTERVAL:
            return False
        self._logged = self._last
        return True

    def deliver(self, outputs: list[GenerationOutput]) -> None:
        ended = [output for output in outputs if output.is_finished()]
        failed = sum(output.error is not None for output in ended)
        self.failed += failed
        self.finished += len(ended) - failed

    # For any thread:

    def metrics(self, scheduler: Scheduler, graphs: int, warming_up: str | None) -> Metrics:
        """These counters, and the scheduler's."""
        s, recent = scheduler, self._recent()
        steps = max(1, recent.steps)
        return Metrics(
            running=s.rows.count - s.rows.free,
            waiting=len(s.line),
            preempted=s.preemptions,
            offloaded=s.offloaded,
            restored=s.restored,
            finished=self.finished,
            failed=self.failed,
            pages_used=s.pages.count - s.pages.free,
            pages=s.pages.count,
            page_size=s.pages.page_size,
            looked_up=s.admission.looked_up,
            found=s.admission.reused,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out - s.discarded,
            tokens_in_per_second=recent.tokens_in / recent.time,
            tokens_out_per_second=recent.tokens_out / recent.time,
            steps=self.steps,
            host_ms=recent.host_seconds / steps * 1e3,
            device_ms=recent.device_seconds / steps * 1e3,
            queue_seconds=self.queue.percentiles(),
            first_token_seconds=self.first_token.percentiles(),
            graphs=graphs,
            warming_up=warming_up,
        )

    def _counts(self) -> Counts:
        host = sum(self._seconds[phase] for phase in HOST_PHASES)
        return Counts(self._last, self.steps, self.tokens_in, self.tokens_out, host, self.device_seconds)

    def _recent(self) -> Counts:
        """What came in the last `WINDOW` seconds; its time is how many they were. Zeros if nothing ran in them."""
        now, before = self._counts(), self._noted[0]
        if now.time <= before.time or time.perf_counter() - now.time > WINDOW:
            return Counts(1.0, 0, 0, 0, 0.0, 0.0)
        return Counts(*(new - old for new, old in zip(now, before, strict=True)))


def _without_tokens(rows: Rows, which: list[int]) -> list[Request]:
    """Requests of those rows that have got no token yet: none that was preempted and comes again."""
    requests = [rows.request[row] for row in which]
    return [r for row, r in zip(which, requests, strict=True) if rows.known[row] == r.prompt_length]
