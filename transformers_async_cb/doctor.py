"""What the engine finds on this machine and does with a model, in lines fit for a bug report."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import psutil
import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel

from . import __version__, bench
from .choices import Choice
from .config import AsyncBatchingConfig
from .gpu import starts_early, triton_error
from .groups import PageGroup
from .keeper import EngineKeeper
from .settings import Mode, Workload


# New tokens of each request that is measured.
_NEW_TOKENS = 64

# Why there is no limit, on a CPU and on CUDA.
_UNKNOWN = ("known on CUDA only", "not known for this model")


class Finding(NamedTuple):
    """A line: what it is about, and what was found."""

    topic: str
    text: str


class Capacity(NamedTuple):
    """What the cache of an engine for this model would hold, with all the memory that it may take."""

    tokens: int  # of requests of a length
    rows: int  # requests at once, at most
    choices: list[Choice]


class Measurement(NamedTuple):
    """A short run with overlap on and off."""

    requests: int
    context: int  # tokens of a request that a step looks back on, about
    on: bench.Observation
    off: bench.Observation
    limit_ms: float | None  # least time of a decoding step

    @property
    def step_ms(self) -> tuple[float, float]:
        """From one step to the next with overlap on and off, median."""
        return self.on.timeline.summary().period_ms, self.off.timeline.summary().period_ms

    @property
    def gain(self) -> float:
        """How much longer it takes without overlap, as a share."""
        on, off = self.step_ms
        return off / on - 1


def versions() -> list[Finding]:
    """Of what the engine builds on."""
    triton = "not there" if triton_error() is not None else _version("triton")
    packages = f"transformers {_version('transformers')}, torch {torch.__version__}, triton {triton}"
    return [
        Finding("versions", f"transformers-async-cb {__version__}, {packages}, Python {platform.python_version()}")
    ]


def device(name: str) -> list[Finding]:
    """What is known of a device, and of the processor beside it."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = f"{platform.machine()}, {cores} cores, {memory.available / 2**30:.1f} GiB of memory free"
    if not name.startswith("cuda"):
        return [Finding("device", f"CPU: {processor}")]
    free, total = torch.cuda.mem_get_info(name)
    major, minor = torch.cuda.get_device_capability(name)
    early = ", kernels may start early" if starts_early(torch.device(name)) else ""
    gpu = (
        f"{torch.cuda.get_device_name(name)}, capability {major}.{minor}{early}, {free / 2**30:.1f} of "
        f"{total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}"
    )
    return [Finding("device", gpu), Finding("beside it", f"CPU: {processor}")]


def backends(name: str) -> list[Finding]:
    """Ways to compute attention, and whether they can be used on the device."""
    if (error := triton_error()) is not None:
        triton = f"no ({error})"
    elif not name.startswith("cuda"):
        triton = "no, it needs a CUDA device"
    else:
        triton = "yes"
    return [Finding("attention", f"triton: {triton}; reference: yes, plain torch")]


def about(model: PreTrainedModel, name: str) -> list[Finding]:
    """The model in a line."""
    weights = sum(p.numel() for p in model.parameters())
    size = sum(p.nbytes for p in model.parameters()) / 2**30
    dtype = str(model.dtype).removeprefix("torch.")
    return [
        Finding("model", f"{name}: {type(model).__name__}, {weights / 1e6:,.1f} M weights, {dtype}, {size:.2f} GiB")
    ]


def capacity(model: PreTrainedModel, length: int) -> Capacity:
    """For requests of `length` tokens. Raises `ValueError` for a model that the engine does not run, or that leaves no
    room for a cache."""
    keeper = EngineKeeper(model, ContinuousBatchingConfig(), AsyncBatchingConfig())
    try:
        keeper.prepare(Workload())
        settings = keeper.engine.settings
    finally:
        keeper.drop()
        keeper.loan.give_back()
    on_pages = settings.mode in (Mode.PAGES, Mode.HYBRID)  # or there is room for a sequence in each row
    tokens = settings.layout.capacity(settings.pages, length) if on_pages else settings.rows * length
    return Capacity(tokens, settings.rows, keeper.choices)


def measure(
    model: PreTrainedModel, requests: int, length: int, say: Callable[[str], None] = lambda text: None
) -> Measurement:
    """Generate 64 tokens for requests whose prompts leave that much of `length`, a few times.

    Args:
        say (`Callable`): is told what happens now.

    Raises:
        RuntimeError: a request failed.
        ValueError: the model is not supported.
    """
    new_tokens = min(_NEW_TOKENS, length - 1)
    prompt = length - new_tokens
    workload = bench.Workload(requests, (prompt, prompt), (new_tokens, new_tokens))
    on, off = (bench.observe(model, workload, overlap, say) for overlap in (True, False))
    context = prompt + new_tokens // 2
    limit = None
    if model.device.type == "cuda":
        say("measuring what the device can do")
        rates = bench.measure_rates(model.device, model.dtype)

        def looks(kept: PageGroup) -> int:
            return requests * int(kept.seen(context - 1))

        with suppress(ValueError):  # what a step of a model with states costs is not known
            limit = bench.ModelCost.of(model).seconds(rates, requests, requests, looks, new=False) * 1e3
    return Measurement(requests, context, on, off, limit)


def times(measured: Measurement) -> list[Finding]:
    """What a step takes, on the device and on the host, and what overlap is worth."""
    on, off, limit = measured.on.timeline.summary(), measured.off.timeline.summary(), measured.limit_ms
    phases = ", ".join(f"{phase} {on.phases_ms[phase]:.2f}" for phase in ("plan", "stage", "launch", "retire"))
    known = limit is not None
    cuda = measured.on.timeline.device == "GPU"
    return [
        Finding("limit", f"{limit:.2f} ms for the bytes and products" if known else _UNKNOWN[cuda]),
        Finding(
            "device", f"{on.step_ms:.2f} ms" + (f", {limit / on.step_ms:.0%} of the limit's speed" if known else "")
        ),
        Finding("host", f"{on.host_ms:.2f} ms: {phases}"),
        Finding("device active", f"{on.active:.1%} with overlap, {off.active:.1%} without"),
        Finding("overlap", _verdict(measured)),
        Finding("compiled", _outcome(cuda, measured.on.compiled, "the layers")),
        Finding("captured", _outcome(cuda, measured.on.captured, f"{measured.on.metrics.graphs} sizes of steps")),
    ]


def _verdict(measured: Measurement) -> str:
    """Whether overlap pays."""
    on, off = measured.step_ms
    text = f"{on:.2f} ms from step to step with overlap, {off:.2f} without"
    if measured.gain > 0.02:
        return f"pays: {text}, {measured.gain:.0%} more tokens/s"
    if measured.gain < -0.02:
        return f"does not pay: {text}, {-measured.gain:.0%} fewer tokens/s"
    return f"changes little: {text}"


def _outcome(cuda: bool, works: bool, what: str) -> str:
    if not cuda:
        return "nothing, on a CPU"
    return f"yes, {what}" if works else "no"


def advice(model: PreTrainedModel, room: Capacity, length: int, measured: Measurement) -> list[str]:
    """What to change, the most important first; nothing where all is well."""
    on = measured.on.timeline.summary()
    cuda = model.device.type == "cuda"
    lines = []
    if not cuda:
        lines.append("run it on a CUDA device: a CPU shows that it works, not how fast")
    elif triton_error() is not None:
        lines.append("install triton: without it attention is plain torch, and nothing is captured")
    if cuda and model.dtype == torch.float32:
        lines.append("load the model in bfloat16: half the bytes, and about half the time")
    if cuda and not measured.on.compiled:
        lines.append("the layers do not compile: the log says why (transformers.logging.set_verbosity_warning())")
    if cuda and triton_error() is None and not measured.on.captured:
        lines.append(
            "steps cannot be captured as CUDA graphs: the log says why; a hook of yours may wait for the device"
        )
    if room.tokens < 8 * length:
        lines.append(
            f"free memory: the cache holds fewer than 8 requests of {length:,} tokens, so that requests wait in line"
        )
    if on.host_ms > on.step_ms:
        lines.append(
            "the device waits for the host, which takes longer: give more requests at a time, or keep other threads "
            "of Python from computing meanwhile"
        )
    if cuda and measured.gain < -0.02:
        lines.append("AsyncBatchingConfig(overlap=False) is faster here")
    return lines


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not there"
