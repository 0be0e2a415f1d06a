"""A timeline in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..recorder import LANES, Span
from . import Timeline


def write(file: str, timelines: list[Timeline]) -> None:
    """Each timeline is a process of the trace, and begins at its time 0; its lanes are threads. An arrow leads from
    the launch of each step to where it computes."""
    events = [event for number, timeline in enumerate(timelines) for event in _events(timeline, number)]
    with open(file, "w") as out:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, out, separators=(",", ":"))


def _events(timeline: Timeline, pid: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": timeline.title}}
    threads = ["CPU", *(f"{timeline.device} {lane.replace('_', '-')}" for lane in LANES)]
    for tid, name in enumerate(threads):
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
    origin = min(timeline.host[0].begin, timeline.lanes["copy_in"][0].begin)

    def at(seconds: float) -> float:
        return round((seconds - origin) * 1e6, 3)

    def piece(span: Span, tid: int, name: str, **more: int) -> dict[str, Any]:
        begin = at(span.begin)
        duration = round((span.end - span.begin) * 1e6, 3)
        args = {"step": span.step, **more}
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": begin, "dur": duration, "args": args}

    for span in timeline.host:
        yield piece(span, 0, span.phase)
        if span.phase == "launch":
            yield {"ph": "s", "name": "launch", "cat": "step", "id": span.step, "pid": pid, "tid": 0,
                   "ts": at(span.begin)}  # fmt: skip
    compute = 1 + LANES.index("compute")
    for tid, lane in enumerate(LANES, 1):
        for span in timeline.lanes[lane]:
            size = timeline.sizes[span.step]
            name = f"step {span.step}" if tid == compute else lane.replace("_", "-")
            yield piece(span, tid, name, sequences=size.sequences, decodes=size.decodes, tokens=size.tokens)
            if tid == compute:
                yield {"ph": "f", "bp": "e", "name": "launch", "cat": "step", "id": span.step, "pid": pid,
                       "tid": tid, "ts": at(span.begin)}  # fmt: skip
