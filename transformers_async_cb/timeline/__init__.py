"""A run as a picture, as a trace for Perfetto, and in numbers."""

from __future__ import annotations

import importlib.util
import statistics
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..recorder import HOST_PHASES, LANES, Recorder, Span, StepSize


# What a file's ending may be.
TRACES, PICTURES = (".json",), (".png", ".svg", ".pdf")


class Timeline(NamedTuple):
    """What the host and the lanes did in one run; times in seconds of `time.perf_counter`."""

    title: str
    device: str  # what its lanes are called: GPU, or CPU where threads stand for streams
    host: list[Span]
    lanes: dict[str, list[Span]]  # by `LANES`; the span of a step has the step's number
    sizes: dict[int, StepSize]  # by the step's number

    @classmethod
    def of(cls, recorder: Recorder, title: str, device: str) -> Timeline:
        """What was recorded, once nothing is in flight.

        Raises:
            ValueError: no step was.
        """
        lanes = {lane: recorder.device_spans(lane) for lane in LANES}
        if not lanes["compute"]:
            raise ValueError("no step was recorded: nothing was generated meanwhile")
        name = "GPU" if device.startswith("cuda") else "device"
        return cls(title, name, recorder.host_spans(), lanes, {size.step: size for size in recorder.sizes()})

    @property
    def gaps(self) -> list[Span]:
        """When the compute lane was idle between two steps."""
        steps = self.lanes["compute"]
        return [Span("idle", b.step, a.end, b.begin) for a, b in pairwise(steps) if b.begin > a.end]

    def summary(self) -> Summary:
        steps, gaps = self.lanes["compute"], self.gaps
        kept = {span.step for span in steps}
        host: dict[str, dict[int, float]] = {phase: dict.fromkeys(kept, 0.0) for phase in (*HOST_PHASES, "wait")}
        for phase, step, begin, end in self.host:
            if phase in host and step in kept:
                host[phase][step] += end - begin
        phases = {phase: statistics.median(seconds.values()) * 1e3 for phase, seconds in host.items()}
        whole = [sum(host[phase][step] for phase in HOST_PHASES) for step in kept]
        seconds = steps[-1].end - steps[0].begin
        return Summary(
            steps=len(steps),
            tokens=sum(size.tokens for size in self.sizes.values()),
            seconds=seconds,
            step_ms=statistics.median(span.end - span.begin for span in steps) * 1e3,
            period_ms=statistics.median(b.begin - a.begin for a, b in pairwise(steps)) * 1e3 if steps[1:] else 0.0,
            active=sum(span.end - span.begin for span in steps) / seconds if seconds else 1.0,
            gap_ms=sum(span.end - span.begin for span in gaps) / max(1, len(steps) - 1) * 1e3,
            host_ms=statistics.median(whole) * 1e3,
            phases_ms=phases,
            copies_ms={
                lane: statistics.median(span.end - span.begin for span in self.lanes[lane]) * 1e3
                for lane in LANES
                if lane != "compute"
            },
        )


class Summary(NamedTuple):
    """A timeline in numbers. Times a step are medians, but the gaps' mean."""

    steps: int
    tokens: int  # computed, of prompts and answers
    seconds: float  # from the first step's begin to the last one's end
    step_ms: float  # on the device
    period_ms: float  # from the begin of a step to that of the next
    active: float  # share of the time that was inside steps
    gap_ms: float  # from one step to the next
    host_ms: float  # the host's work, waiting left out
    phases_ms: dict[str, float]
    copies_ms: dict[str, float]


def check_file(file: str) -> None:
    """Raises `ValueError` for a name whose ending says nothing, or a picture without matplotlib."""
    ending = Path(file).suffix
    if ending not in TRACES + PICTURES:
        allowed = ", ".join(TRACES + PICTURES)
        raise ValueError(f"timeline={str(file)!r} must end with one of {allowed}: a trace for Perfetto, or a picture")
    if ending in PICTURES and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"timeline={str(file)!r} needs matplotlib: pip install 'transformers-async-cb[plot]', or choose .json"
        )


def write(file: str, timelines: list[Timeline]) -> None:
    """Write timelines to one file, whose ending says how: a trace (.json) or a picture (.png, .svg, .pdf)."""
    if Path(file).suffix in TRACES:
        from . import trace

        trace.write(file, timelines)
    else:
        from . import picture

        picture.draw(file, timelines)
