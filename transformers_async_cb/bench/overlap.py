"""One run with every step noted on every lane, to see what overlap is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from .. import settings
from ..choices import Choice
from ..config import AsyncBatchingConfig
from ..metrics import Metrics
from ..timeline import Timeline
from .workload import Workload


# The second run of a workload captures what the first has compiled.
_WARM_UPS = 2


class Observation(NamedTuple):
    """What an engine did, and was built with."""

    timeline: Timeline
    metrics: Metrics
    choices: list[Choice]
    compiled: bool  # its layers are: they were to be, and it worked
    captured: bool  # so for its steps, as CUDA graphs


def observe(
    model: PreTrainedModel, workload: Workload, overlap: bool, say: Callable[[str], None] = lambda text: None
) -> Observation:
    """Run a workload a few times, and note what the last run does.

    Args:
        say (`Callable`): is told what happens now.

    Raises:
        RuntimeError: a request failed.
        ValueError: the model is not supported.
    """
    prompts, limits = workload.prompts(model.get_input_embeddings().num_embeddings), workload.limits()
    name = f"overlap {'on' if overlap else 'off'}"
    longest = workload.prompt_tokens[1] + workload.new_tokens[1]
    manager = model.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(allow_block_sharing=False),  # or a run would find the prompts of the one before
        settings.Workload(len(prompts), longest, sum(map(len, prompts)) + sum(limits)),
        async_batching=AsyncBatchingConfig(overlap=overlap),
    )

    def generate() -> None:
        """Like `generate_batch`: all requests are there before the first step."""
        for prompt, limit in zip(prompts, limits, strict=True):
            manager.add_request(prompt, max_new_tokens=limit)
        manager.start()
        manager.stop(keep_for_next_session=True)
        if failed := [output.error for output in manager if output.error is not None]:
            raise RuntimeError(f"{len(failed)} of {len(prompts)} requests failed, the first with: {failed[0]}")

    try:
        for run in range(1, _WARM_UPS + 1):
            say(f"{name}: warming up, {run} of {_WARM_UPS}")
            generate()
        say(f"{name}: measuring")
        with manager.recording() as recorder:
            generate()
        runner = manager._engine.runner
        timeline = Timeline.of(recorder, name, model.device.type)
        return Observation(timeline, manager.metrics(), manager.choices, runner.compiled, runner.graphs.on)
    finally:
        manager.stop(hard_stop=True)
