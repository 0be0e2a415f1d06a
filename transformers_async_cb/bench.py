"""Engines side by side: the same requests, one model, one run."""

from __future__ import annotations

import gc
import logging
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from .config import AsyncBatchingConfig


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
    "wide": Workload(256, (128, 128), (256, 256)),
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


def _batch(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig, **kwargs) -> int:
    outputs = model.generate_batch(prompts, generation_config=config, persistent_manager=True, **kwargs)
    errors = [output.error for output in outputs.values() if output.error is not None]
    if errors or len(outputs) != len(prompts):
        raise RuntimeError(f"{len(outputs)} of {len(prompts)} results, errors: {errors[:1]}")
    return sum(len(output.generated_tokens) for output in outputs.values())


def _ours(overlap: bool) -> Callable[..., int]:
    return lambda *args: _batch(*args, async_batching=AsyncBatchingConfig(overlap=overlap))


def _theirs(use_async: bool) -> Callable[..., int]:
    return lambda *args: _batch(
        *args, continuous_batching_config=ContinuousBatchingConfig(use_async_batching=use_async)
    )


ENGINES: dict[str, Callable[[PreTrainedModel, list[list[int]], GenerationConfig], int]] = {
    "ours": _ours(True),
    "ours-no-overlap": _ours(False),
    "transformers-async": _theirs(True),
    "transformers": _theirs(False),
}


def measure(model: PreTrainedModel, engine: str, workload: Workload, repeats: int) -> Result:
    """Run a workload `1 + repeats` times on one engine; the first run, which also warms up, is not measured."""
    if workload.new_tokens[0] != workload.new_tokens[1]:
        raise ValueError("a workload needs one number of new tokens for all requests")
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # transformers' own
    prompts = workload.prompts(model.get_input_embeddings().num_embeddings)
    config = GenerationConfig(max_new_tokens=workload.new_tokens[0], do_sample=False, eos_token_id=-1)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        tokens = ENGINES[engine](model, prompts, config)
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    model.destroy_cached_continuous_batching_manager()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return Result(engine, tokens, seconds[1:], max(0.0, seconds[0] - statistics.median(seconds[1:])), peak)


def environment(device: str) -> str:
    """GPU or processor, and versions, for the line under a table."""
    name = torch.cuda.get_device_name(device) if device == "cuda" else f"{platform.machine()} CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"
