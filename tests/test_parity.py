"""The manager beside transformers' own: the same methods, parameters, outputs and places for settings."""

from __future__ import annotations

import inspect
import time

from conftest import batching, greedy, new_model
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb.manager import AsyncBatchingManager


def test_it_has_all_their_methods_with_their_parameters() -> None:
    theirs = {
        name: member
        for name, member in vars(ContinuousBatchingManager).items()
        if inspect.isfunction(member) and not name.startswith("_") and name != "switch_to_cb_friendly_attn"
    }
    assert len(theirs) > 10
    for name, method in theirs.items():
        mine = list(inspect.signature(getattr(AsyncBatchingManager, name)).parameters.values())
        named = [p for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_KEYWORD]
        assert [(p.name, p.kind, p.default) for p in mine[: len(named)]] == [
            (p.name, p.kind, p.default) for p in named
        ], name


def test_it_gives_their_outputs_with_times_in_order() -> None:
    with new_model("llama").continuous_batching_context_manager(greedy(8), async_batching=True) as manager:
        output = manager.get_result(manager.add_request([5, 6, 7], record_timestamps=True), timeout=30)
    assert isinstance(output, GenerationOutput)
    assert output.status == RequestStatus.FINISHED
    begin, end = output.lifespan
    assert output.created_time <= begin <= output.timestamps[0] <= output.timestamps[-1] <= end
    assert end <= time.perf_counter()


def test_it_takes_the_batching_config_that_the_models_generation_config_has() -> None:
    model = new_model("llama")
    model.generation_config.continuous_batching_config = batching(page_size=32, num_blocks=7)
    manager = model.init_continuous_batching(async_batching=True)
    assert manager.continuous_batching_config.num_blocks == 7
    manager = model.init_continuous_batching(greedy(3), async_batching=True)
    assert manager.continuous_batching_config.num_blocks is None
