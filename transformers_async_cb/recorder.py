"""When the host and the device did what, step by step."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch


# Phases of the loop in which the host works; in the others it waits, for a step or for something to do.
HOST_PHASES = ("read", "plan", "stage", "launch", "retire", "deliver")
WAITING_PHASES = ("wait", "idle")


class Span(NamedTuple):
    """A piece of work: what, for which step, from when to when in seconds of `time.perf_counter`."""

    phase: str
    step: int
    begin: float
    end: float


class StepTimes(NamedTuple):
    """What a recording says of its steps, in milliseconds."""

    steps: int
    median_ms: float  # inside a step on the device
    mean_ms: float
    host_median_ms: float  # the host's work for a step, waiting left out
    host_mean_ms: float
    active: float  # share of the time from the first step's begin to the last one's end that was inside steps


class Recorder:
    """Notes when a loop's phases begin and end, and when its steps do on the device; `Engine.recorder` holds it.

        host      read · plan · stage · launch │ wait │ retire · deliver │ read · plan · ...
        device    ────── step N ───────────┤   ├────────── step N+1 ─────────────┤

    The loop calls `lap` after each phase, so the host's spans leave no time out. A step's begin and end are noted by
    the lane that computes, just before it takes the inputs and just after it has computed: as CUDA events, which are
    read only when the loop has ended, or as times where lanes are threads. Only the last `most_steps` steps are kept,
    and their events are used again.

    Args:
        device (`torch.device`): where the steps compute.
        most_steps (`int`): how many to keep.
    """

    def __init__(self, device: torch.device, most_steps: int = 2**14) -> None:
        self._cuda = device.type == "cuda"
        self._most = most_steps
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self._cuda:  # a point known to both clocks
            with torch.cuda.device(device):
                self._anchor = torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                self._anchor.record()
                self._anchor.synchronize()
            self._anchor_time = time.perf_counter()
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded; what follows is another recording. Not while the loop runs."""
        phases = len(HOST_PHASES) + len(WAITING_PHASES)
        self._laps: deque[Span] = deque(maxlen=2 * self._most * phases)  # some turns of the loop launch nothing
        self._last = time.perf_counter()
        self._launched: deque[int] = deque(maxlen=self._most)  # the steps whose begin and end are kept
        self._count = 0
        self._times: deque[float] = deque(maxlen=2 * self._most)  # of host lanes: begin, end, begin, end, ...

    def lap(self, phase: str, step: int) -> None:
        """All the host's time since the last lap was `phase`."""
        now = time.perf_counter()
        self._laps.append(Span(phase, step, self._last, now))
        self._last = now

    def around(
        self, step: int, take: Callable[[], None], compute: Callable[[], None]
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        """The two pieces of a step's work on the compute lane, noting when the first begins and the second ends."""
        if self._cuda:
            place = self._count % self._most
            if place == len(self._events):
                self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            begin, end = (event.record for event in self._events[place])
        else:
            begin = end = self._note_time
        self._launched.append(step)
        self._count += 1

        def take_noted() -> None:
            begin()
            take()

        def compute_noted() -> None:
            compute()
            end()

        return take_noted, compute_noted

    def _note_time(self) -> None:
        self._times.append(time.perf_counter())

    # What was recorded, once the loop has ended:

    def host_spans(self) -> list[Span]:
        """The loop's phases, in order."""
        return list(self._laps)

    def device_spans(self) -> list[Span]:
        """The steps on the device, in order."""
        times = self._device_times()
        return [Span("step", *span) for span in zip(self._launched, times[::2], times[1::2], strict=False)]

    def _device_times(self) -> list[float]:
        if not self._cuda:
            return list(self._times)
        places = [place % self._most for place in range(self._count - len(self._launched), self._count)]
        # From one to the next: the time between two events is a float32, too coarse over a long run.
        times, last, now = [], self._anchor, self._anchor_time
        for event in (event for place in places for event in self._events[place]):
            now += last.elapsed_time(event) / 1e3
            times.append(now)
            last = event
        return times

    def host_ms(self) -> list[float]:
        """The host's work for each step, in order: reading, planning, staging, launching, retiring and delivering."""
        seconds = dict.fromkeys(self._launched, 0.0)
        for span in self._laps:
            if span.phase in HOST_PHASES and span.step in seconds:
                seconds[span.step] += span.end - span.begin
        return [s * 1e3 for s in seconds.values()]

    def step_times(self) -> StepTimes:
        """Raises `RuntimeError` if no step was recorded."""
        steps, host = self.device_spans(), self.host_ms()
        if not steps:
            raise RuntimeError("no step was recorded")
        inside = [(span.end - span.begin) * 1e3 for span in steps]
        return StepTimes(
            steps=len(steps),
            median_ms=statistics.median(inside),
            mean_ms=statistics.mean(inside),
            host_median_ms=statistics.median(host),
            host_mean_ms=statistics.mean(host),
            active=sum(inside) / 1e3 / (steps[-1].end - steps[0].begin),
        )
