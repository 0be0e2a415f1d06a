"""Which kernels a run spends its time in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Span(NamedTuple):
    """A kernel or copy on the device, from when to when in microseconds."""

    name: str
    begin: float
    end: float


class KernelTime(NamedTuple):
    """All calls of one kernel."""

    name: str
    calls: int
    ms: float
    share: float  # of the time of all kernels


class KernelTimes(NamedTuple):
    """Kernels, those that take longest first."""

    kernels: list[KernelTime]
    ms: float  # from the first kernel's begin to the last one's end
    busy: float  # share of that in which at least one ran


def record(run: Callable[[], object]) -> list[Span]:
    """What a CUDA device does in `run`, by torch's profiler, which slows it down by some percent."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def summarize(spans: Iterable[Span]) -> KernelTimes:
    """Add up the spans by name. Where kernels overlap, the time counts for each, and once as busy."""
    spans = sorted(spans, key=lambda span: span.begin)
    if not spans:
        raise ValueError("no kernel ran")
    calls: dict[str, int] = {}
    times: dict[str, float] = {}
    busy, reached = 0.0, spans[0].begin
    for name, begin, end in spans:
        calls[name] = calls.get(name, 0) + 1
        times[name] = times.get(name, 0.0) + end - begin
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    total, whole = sum(times.values()), reached - spans[0].begin
    names = sorted(times, key=times.__getitem__, reverse=True)
    kernels = [KernelTime(name, calls[name], times[name] / 1e3, times[name] / total) for name in names]
    return KernelTimes(kernels, whole / 1e3, busy / whole)
