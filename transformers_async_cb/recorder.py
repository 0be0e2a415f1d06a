"""When the host and the lanes of the device did what, step by step."""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

from .lanes import Event, Marks


# Phases of the loop in which the host works; in the others it waits, for a step or for something to do.
HOST_PHASES = ("read", "plan", "stage", "launch", "retire", "deliver")
WAITING_PHASES = ("wait", "idle")
LANES = Marks._fields


class Span(NamedTuple):
    """A piece of work: what, for which step, from when to when in seconds of `time.perf_counter`."""

    phase: str
    step: int
    begin: float
    end: float


class StepSize(NamedTuple):
    """What a step computed."""

    step: int
    sequences: int
    decodes: int  # sequences of one token, which continue
    tokens: int


class StepTimes(NamedTuple):
    """What a recording says of its steps, in milliseconds."""

    steps: int
    median_ms: float  # inside a step on the device
    mean_ms: float
    host_median_ms: float  # the host's work for a step, waiting left out
    host_mean_ms: float
    active: float  # share of the time from the first step's begin to the last one's end that was inside steps


class Recorder:
    """Notes when a loop's phases begin and end, and when its steps do on each lane; `Engine.recorder` holds it.

        host      read · plan · stage · launch │ wait │ retire · deliver │ read · plan · ...
        copy-in                       └─ N+1 ─┐
        compute   ────── step N ───────────┤  ├────────── step N+1 ─────────────┤
        copy-out                           └─ N ─┘

    The loop calls `lap` after each phase, so the host's spans leave no time out. Steps are noted by events on the
    lanes, which are read only when the recording is over. Only the last `most_steps` steps are kept.

    Args:
        most_steps (`int`): how many to keep.
    """

    def __init__(self, most_steps: int = 2**14) -> None:
        phases = len(HOST_PHASES) + len(WAITING_PHASES)
        self._laps: deque[Span] = deque(maxlen=2 * most_steps * phases)  # some turns of the loop launch nothing
        self._launched: deque[tuple[StepSize, Marks | None]] = deque(maxlen=most_steps)
        self._first: tuple[Event, float] | None = None  # points known to both clocks, with nothing in flight
        self._last: tuple[Event, float] | None = None

    def lap(self, phase: str, step: int, begin: float, end: float) -> None:
        """The host's time from `begin`, which is where the last lap ended, was `phase`."""
        self._laps.append(Span(phase, step, begin, end))

    def launched(self, size: StepSize, marks: Marks | None) -> None:
        """A step is on its way; without marks, on lanes that lead nowhere."""
        self._launched.append((size, marks))

    def set_clock(self, event: Event, now: float) -> None:
        """An event of the device that has just passed, and the host's time; before the first step and after the last
        one at least. The device's clock is not the host's, and runs a little faster or slower."""
        self._first = self._first or (event, now)
        self._last = (event, now)

    # What was recorded, once nothing is in flight:

    def sizes(self) -> list[StepSize]:
        return [size for size, _ in self._launched]

    def host_spans(self) -> list[Span]:
        """The loop's phases, in order."""
        return list(self._laps)

    def device_spans(self, lane: str = "compute") -> list[Span]:
        """The steps on one of `LANES`, in order."""
        marked = [(size.step, getattr(marks, lane)) for size, marks in self._launched if marks is not None]
        times = self._times([event for _, pair in marked for event in pair])
        steps = [step for step, _ in marked]
        return [Span(lane, *span) for span in zip(steps, times[::2], times[1::2], strict=True)]

    def _times(self, events: list[Event]) -> list[float]:
        """When events that came one after another passed, by the host's clock."""
        if not events:
            return []
        # From one to the next: the time between two events of CUDA is a float32, too coarse over a long run.
        passed, last = [0.0], events[0]
        for event in events[1:]:
            passed.append(passed[-1] + event.seconds_after(last))
            last = event
        (first_event, first), (last_event, end) = self._first, self._last
        at_end = passed[-1] + last_event.seconds_after(last)
        device = at_end + events[0].seconds_after(first_event)  # between the two points, by the device's clock
        rate = (end - first) / device if device > 0 else 1.0
        return [end + (seconds - at_end) * rate for seconds in passed]

    def host_ms(self) -> list[float]:
        """The host's work for each step, in order: reading, planning, staging, launching, retiring and delivering."""
        seconds = dict.fromkeys((size.step for size, _ in self._launched), 0.0)
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
