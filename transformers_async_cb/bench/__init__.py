"""Engines side by side: the same requests, one model, one run."""

from __future__ import annotations

import gc
import math
import platform
import statistics
import time
from typing import NamedTuple

import torch
import transformers
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from ..engine import Engine
from ..manager import CACHED
from ..recorder import Recorder, StepTimes
from .engines import ENGINES, missing
from .host import HOST_SIZES, measure_admission, measure_host
from .kernels import KernelTimes, record, summarize
from .limit import ModelCost, Rates, least_seconds, limit_seconds, measure_rates
from .overlap import Observation, observe
from .workload import WORKLOADS, Workload


__all__ = [
    "ENGINES", "HOST_SIZES", "WORKLOADS", "KernelTimes", "ModelCost", "Observation", "Rates", "Result", "Workload",
    "environment",
    "least_seconds", "limit_seconds", "measure", "measure_admission", "measure_host", "measure_rates", "missing",
    "observe",
]  # fmt: skip


class Result(NamedTuple):
    """What one engine did with one workload. What is not known of an engine, or after a single run, is `None`."""

    engine: str
    tokens: int
    seconds: list[float]  # of each measured run
    warmup_seconds: float  # what starting and the first run took beyond the median of the others
    peak_gib: float | None  # of device memory
    recompiled: int  # graphs of torch.compile made in measured runs
    # Medians of the measured runs:
    steps: int | None = None
    step_ms: float | None = None  # on the device, median
    step_mean_ms: float | None = None
    host_ms: float | None = None  # the host's work for a step, median
    host_mean_ms: float | None = None
    gpu_active: float | None = None  # share of the time from the first step to the last that was inside steps
    kernels: KernelTimes | None = None  # of one more run, if asked for

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def measure(
    model: PreTrainedModel,
    engine: str,
    workload: Workload,
    repeats: int,
    patience: float = math.inf,
    batch_size: int = 64,
    kernels: bool = False,
) -> Result:
    """Run a workload `1 + repeats` times on one engine; the first run, which also warms up, is not measured, unless it
    stays the only one: because no more are asked for, or because it takes longer than `patience` seconds. With
    `kernels`, one more run on a CUDA device is profiled.

    Raises:
        RuntimeError: a request failed, or got another number of tokens than it asked for.
    """
    prompts, limits = workload.prompts(model.get_input_embeddings().num_embeddings), workload.limits()
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    recordings: list[StepTimes] = []
    begin = time.perf_counter()
    with ENGINES[engine](model, workload, batch_size) as generate:
        starting = time.perf_counter() - begin
        recorder = None
        compiled = 0
        for _ in range(1 + repeats):
            if (loop := _loop_of(model)) is not None:  # one of ours, which the first run has made
                loop.recorder = recorder = Recorder()
            begin = time.perf_counter()
            answers = generate(prompts, limits)
            seconds.append(time.perf_counter() - begin)
            if [len(answer) for answer in answers] != limits:
                raise RuntimeError(f"{sum(map(len, answers))} tokens came, {sum(limits)} were asked for")
            if recorder is not None:
                recordings.append(recorder.step_times())
            if len(seconds) == 1:
                compiled = _compilations()
            if seconds[0] > patience:
                break
        recompiled = _compilations() - compiled
        kernel_times = summarize(record(lambda: generate(prompts, limits))) if kernels else None
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda and engine != "vllm" else None  # that has its own process
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    measured = seconds[1:] or seconds
    warmup = max(0.0, starting + seconds[0] - statistics.median(measured))
    result = Result(engine, sum(limits), measured, warmup, peak, recompiled, kernels=kernel_times)
    if not recordings:
        return result
    steps, *times = (statistics.median(values) for values in zip(*recordings, strict=True))
    return result._replace(steps=round(steps), **dict(zip(Result._fields[7:-1], times, strict=True)))


def _loop_of(model: PreTrainedModel) -> Engine | None:
    manager = getattr(model, CACHED, None)
    return None if manager is None else manager._engine


def _compilations() -> int:
    return counters["stats"]["unique_graphs"]


def environment(device: str) -> str:
    """GPU or processor, and versions, for the line under a table."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"
