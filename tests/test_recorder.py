"""What a recording says is what the loop did, in the order it did it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from conftest import greedy, random_prompts, shared_model

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.engine import Engine
from transformers_async_cb.recorder import HOST_PHASES, LANES, WAITING_PHASES, Recorder


def recorded(overlap: bool = True, most_steps: int = 2**14) -> tuple[Recorder, Engine]:
    manager = shared_model("llama").init_continuous_batching(
        greedy(12), async_batching=AsyncBatchingConfig(overlap=overlap)
    )
    manager.add_requests(random_prompts(5, 40))
    manager.warmup()
    engine = manager._engine
    engine.recorder = Recorder(most_steps)
    manager.start()
    manager.stop()
    return engine.recorder, engine


@pytest.fixture(scope="module")
def recording() -> tuple[Recorder, Engine]:
    return recorded()


class TestARecording:
    @pytest.mark.parametrize("lane", LANES)
    def test_has_every_step_once_on_each_lane_and_none_overlap(self, recording, lane: str) -> None:
        recorder, engine = recording
        steps = recorder.device_spans(lane)
        assert [span.step for span in steps] == list(range(engine.steps))
        assert all(span.begin < span.end for span in steps)
        assert all(one.end <= next_one.begin for one, next_one in pairwise(steps))

    def test_leaves_no_time_of_the_host_out(self, recording) -> None:
        spans = recording[0].host_spans()
        assert {span.phase for span in spans} == {*HOST_PHASES, *WAITING_PHASES}
        assert all(one.end == next_one.begin for one, next_one in pairwise(spans))

    def test_has_each_phase_of_a_step_in_turn(self, recording) -> None:
        spans = recording[0].host_spans()
        for step in range(recording[1].steps):
            phases = [span.phase for span in spans if span.step == step and span.phase not in ("deliver", "idle")]
            assert [phase for phase in phases if phase != "read"] == ["plan", "stage", "launch", "wait", "retire"]

    def test_sums_up_to_plausible_numbers(self, recording) -> None:
        recorder, engine = recording
        times = recorder.step_times()
        seconds = recorder.host_spans()[-1].end - recorder.host_spans()[0].begin
        assert times.steps == engine.steps
        assert 0 < times.active <= 1
        assert 0 < times.median_ms < seconds * 1e3
        assert times.mean_ms * times.steps <= seconds * 1e3
        assert 0 < times.host_median_ms < seconds * 1e3
        assert times.host_mean_ms * times.steps <= seconds * 1e3
        assert len(recorder.host_ms()) == engine.steps

    def test_has_a_step_travel_in_before_it_is_computed_and_out_after(self, recording) -> None:
        lanes = (recording[0].device_spans(lane) for lane in ("copy_in", "compute", "copy_out"))
        for arriving, computing, leaving in zip(*lanes, strict=True):
            assert arriving.end <= computing.begin
            assert computing.end <= leaving.begin

    def test_says_what_each_step_computed(self, recording) -> None:
        sizes = recording[0].sizes()
        assert sizes[0].decodes == 0
        assert sizes[0].tokens == sum(map(len, random_prompts(5, 40)))
        assert sizes[-1] == (recording[1].steps - 1, 5, 5, 5)

    def test_of_nothing_is_empty(self) -> None:
        recorder = Recorder()
        assert recorder.host_spans() == recorder.device_spans() == []
        with pytest.raises(RuntimeError, match="no step was recorded"):
            recorder.step_times()

    def test_keeps_the_last_steps(self) -> None:
        recorder, engine = recorded(most_steps=4)
        assert [span.step for span in recorder.device_spans()] == list(range(engine.steps - 4, engine.steps))
        assert recorder.step_times().steps == 4


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
def test_a_step_is_launched_before_the_last_one_is_waited_for_only_with_overlap(overlap: bool) -> None:
    recorder, engine = recorded(overlap)
    launched = {span.step: span.end for span in recorder.host_spans() if span.phase == "launch"}
    waited = {span.step: span.begin for span in recorder.host_spans() if span.phase == "wait"}
    before = [launched[step + 1] <= waited[step] for step in range(engine.steps - 1)]
    assert all(before) if overlap else not any(before)


def test_an_engine_records_nothing_unless_told_to() -> None:
    manager = shared_model("llama").init_continuous_batching(async_batching=True)
    manager.warmup()
    assert manager._engine.recorder is None
    manager.stop()
