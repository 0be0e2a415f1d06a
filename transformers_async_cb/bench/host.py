"""The host's own work for a step, without a device."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from ..lanes import Lanes, Slot
from ..manager import AsyncBatchingManager
from ..recorder import Recorder
from ..settings import Workload
from ..shapes import load


HOST_SIZES = (32, 256, 1024, 4096)
PROMPT = [1] * 32


class NullLanes:
    """Lanes that lead nowhere: what is left is the host's own work. Every token that comes back is 0.

    Args:
        words_in (`int`), words_out (`int`): the largest step, in int32 words.
        wait (`bool`): let go of the interpreter's lock where a device would be waited for.
    """

    here, alive = False, True

    def __init__(self, words_in: int, words_out: int, wait: bool = False) -> None:
        self._slots = [Slot(words_in, words_out, torch.device("cpu")) for _ in range(Lanes.DEPTH)]
        for slot in self._slots:
            slot.array_out.fill(0)
        self._turn = 0
        self._wait = wait

    def stage(self) -> Slot:
        self._turn = (self._turn + 1) % Lanes.DEPTH
        return self._slots[self._turn]

    def launch(self, *_: object, **__: object) -> None: ...

    def now(self) -> tuple[None, float]:
        return None, time.perf_counter()

    def seconds(self, slot: Slot) -> float:
        return 0.0

    def collect(self, slot: Slot) -> np.ndarray:
        if self._wait:
            time.sleep(0)
        return slot.array_out

    def enter(self) -> None: ...

    def close(self) -> None: ...


@contextmanager
def busy_thread() -> Generator[None]:
    """Within, another Python thread computes all the time, as one of the user's may."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute, name="busy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _manager(rows: int, token_budget: int, new_tokens: int) -> AsyncBatchingManager:
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
    batching = ContinuousBatchingConfig(
        max_requests_per_batch=rows, max_batch_tokens=token_budget, max_memory_percent=0.9, allow_block_sharing=False
    )
    return load("tiny", "cpu", torch.float32).init_continuous_batching(config, batching, async_batching=True)


def _lead_nowhere(manager: AsyncBatchingManager, wait: bool = False) -> None:
    manager.warmup()
    engine = manager._engine
    engine.lanes.close()
    engine.lanes = NullLanes(engine.runner.words_in, engine.runner.words_out, wait)


def measure_host(requests: int, steps: int = 200, repeats: int = 3, busy: bool = False) -> float:
    """Milliseconds the host needs for a decoding step of so many requests: plan, stage, launch and retire on null
    lanes. The median of what `steps` more steps take beyond a first run of a few.

    `busy` is beside a Python thread that computes: how long it takes to get the interpreter's lock back, after the
    wait for a step and wherever numpy lets go of it, is part of the time then.
    """

    def seconds(new_tokens: int) -> float:
        manager = _manager(requests, 64 * requests, new_tokens)
        manager.add_requests([PROMPT] * requests)
        manager.size_for_pending()
        _lead_nowhere(manager, wait=busy)
        with busy_thread() if busy else nullcontext():
            begin = time.perf_counter()
            manager.start()
            manager.stop()
            return time.perf_counter() - begin

    few = 8
    seconds(few)
    taken = [seconds(few + steps) - seconds(few) for _ in range(repeats)]
    return statistics.median(taken) / steps * 1e3


def measure_admission(running: int = 32, added: int = 1024, repeats: int = 3) -> float:
    """Milliseconds of the step that the host works longest for, of those in which `added` requests join `running`
    ones: checked and added at once by another thread, and admitted 2,048 tokens a step. The median of some runs."""

    def longest() -> float:
        manager = _manager(running + added, 2048, 2**20)
        manager.workload = Workload(running + added, 1024, 1024 * (running + added))
        manager.add_requests([PROMPT] * running)
        _lead_nowhere(manager)
        engine = manager._engine
        engine.recorder = recorder = Recorder()
        manager.start()
        while engine.steps < 100:
            time.sleep(1e-3)
        first = engine.steps
        for name in manager.add_requests([PROMPT] * added, max_new_tokens=2):
            manager.get_result(name)
        last = engine.steps
        manager.stop(hard_stop=True)
        return max(recorder.host_ms()[first:last])

    return statistics.median(longest() for _ in range(repeats))
