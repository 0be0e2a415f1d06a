"""Engines side by side: the same requests, one model, one run."""

from __future__ import annotations

import copy
import gc
import logging
import math
import platform
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.utils import WorkloadHints

from .config import AsyncBatchingConfig
from .lanes import Lanes, Slot
from .shapes import load


class Workload(NamedTuple):
    """Requests of a benchmark: lengths are drawn uniformly from the ranges, with seed 0."""

    requests: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]

    def prompts(self, vocabulary: int) -> list[list[int]]:
        random = np.random.default_rng(0)
        lengths = random.integers(self.prompt_tokens[0], self.prompt_tokens[1] + 1, self.requests)
        return [random.integers(0, vocabulary, n).tolist() for n in lengths]

    def limits(self) -> list[int]:
        random = np.random.default_rng(1)
        return random.integers(self.new_tokens[0], self.new_tokens[1] + 1, self.requests).tolist()


WORKLOADS = {
    "small": Workload(16, (8, 64), (32, 32)),
    "blog": Workload(32, (32, 32), (1024, 1024)),
    "post": Workload(32, (32, 32), (8192, 8192)),
    "mixed": Workload(512, (64, 1024), (32, 512)),
    "wide": Workload(256, (128, 128), (256, 256)),
    "small-mixed": Workload(1024, (64, 512), (16, 256)),
}


class Result(NamedTuple):
    """What one engine did with one workload."""

    engine: str
    tokens: int
    seconds: list[float]  # of each measured run
    warmup_seconds: float  # what the first run took beyond the median of the others
    peak_gib: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def _batch(model: PreTrainedModel, prompts: list[list[int]], limits: list[int], **kwargs: Any) -> int:
    """Generate for all prompts and return the number of tokens; a request that fails raises."""
    config = GenerationConfig(max_new_tokens=max(limits), do_sample=False, eos_token_id=-1)
    kwargs |= {"generation_config": config, "persistent_manager": True}
    if min(limits) == max(limits):
        outputs = list(model.generate_batch(prompts, **kwargs).values())
    else:  # limits of its own for each request are the manager's to take
        hints = WorkloadHints(
            max_prompt_length=max(map(len, prompts)), max_generated_length=max(limits), num_requests=len(prompts)
        )
        with model.continuous_batching_context_manager(workload_hints=hints, **kwargs) as manager:
            for prompt, limit in zip(prompts, limits, strict=True):
                manager.add_request(prompt, max_new_tokens=limit)
            outputs = [manager.get_result() for _ in prompts]
    if failed := [output.error for output in outputs if output is None or output.error is not None]:
        raise RuntimeError(f"{len(failed)} of {len(prompts)} requests failed, the first with: {failed[0]}")
    tokens = sum(len(output.generated_tokens) for output in outputs)
    if tokens != sum(limits):
        raise RuntimeError(f"{tokens} tokens came, {sum(limits)} were asked for")
    return tokens


def _ours(overlap: bool) -> dict[str, Any]:
    return {"async_batching": AsyncBatchingConfig(overlap=overlap)}


def _theirs(use_async: bool) -> dict[str, Any]:
    return {"continuous_batching_config": ContinuousBatchingConfig(use_async_batching=use_async)}


# What each engine is given beside the workload.
ENGINES: dict[str, dict[str, Any]] = {
    "ours": _ours(True),
    "ours-no-overlap": _ours(False),
    "transformers-async": _theirs(True),
    "transformers": _theirs(False),
}


def measure(
    model: PreTrainedModel, engine: str, workload: Workload, repeats: int, patience: float = math.inf
) -> Result:
    """Run a workload `1 + repeats` times on one engine; the first run, which also warms up, is not measured, unless it
    stays the only one: because no more are asked for, or because it takes longer than `patience` seconds."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # transformers' own
    prompts, limits = workload.prompts(model.get_input_embeddings().num_embeddings), workload.limits()
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        for _ in range(1 + repeats):
            begin = time.perf_counter()
            tokens = _batch(model, prompts, limits, **copy.deepcopy(ENGINES[engine]))
            seconds.append(time.perf_counter() - begin)
            if seconds[0] > patience:
                break
    finally:
        model.destroy_cached_continuous_batching_manager()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    measured = seconds[1:] or seconds
    return Result(engine, tokens, measured, max(0.0, seconds[0] - statistics.median(measured)), peak)


HOST_SIZES = (32, 256, 1024, 4096)


class NullLanes:
    """Lanes that lead nowhere: what is left is the host's own work. Every token that comes back is 0."""

    def __init__(self, words_in: int, words_out: int) -> None:
        self._slots = [Slot(words_in, words_out, torch.device("cpu")) for _ in range(Lanes.DEPTH)]
        for slot in self._slots:
            slot.array_out.fill(0)
        self._turn = 0

    def stage(self) -> Slot:
        self._turn = (self._turn + 1) % Lanes.DEPTH
        return self._slots[self._turn]

    def launch(self, *_: object, **__: object) -> None: ...

    def collect(self, slot: Slot) -> np.ndarray:
        return slot.array_out

    def enter(self) -> None: ...

    def close(self) -> None: ...


def measure_host(requests: int, steps: int = 200, repeats: int = 3) -> float:
    """Milliseconds the host needs for a decoding step of so many requests: plan, stage, launch and retire on null
    lanes. The median of what `steps` more steps take beyond a first run of a few."""
    model = load("tiny", "cpu", torch.float32)
    prompts = [[1] * 32] * requests

    def seconds(new_tokens: int) -> float:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
        batching = ContinuousBatchingConfig(
            max_requests_per_batch=requests, max_batch_tokens=64 * requests, max_memory_percent=0.9
        )
        manager = model.init_continuous_batching(config, batching, async_batching=True)
        manager.add_requests(prompts)
        manager.size_for_pending()
        manager.warmup()
        engine = manager._engine
        engine.lanes.close()
        engine.lanes = NullLanes(engine.runner.words_in, engine.runner.words_out)
        begin = time.perf_counter()
        manager.start()
        manager.stop()
        return time.perf_counter() - begin

    few = 8
    seconds(few)
    taken = [seconds(few + steps) - seconds(few) for _ in range(repeats)]
    return statistics.median(taken) / steps * 1e3


def environment(device: str) -> str:
    """GPU or processor, and versions, for the line under a table."""
    name = torch.cuda.get_device_name(device) if device == "cuda" else f"{platform.machine()} CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"
