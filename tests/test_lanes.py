"""Whatever the lanes' timing, no token changes and no request is lost; and without its edges this would not hold."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import batching, engine_threads, greedy, new_model, random_prompts, reference, shared_model
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.engine import Engine
from transformers_async_cb.lanes import HostEvent, HostLane, Lanes, Slot


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
LANES = ("copy-in", "compute", "copy-out")
EOS_IDS = [3, 17, 31, 50, 77, 90]


def lane_name(lane: HostLane) -> str:
    return lane._thread.name.removeprefix("async-batching-")


def delay(monkeypatch: pytest.MonkeyPatch, longest: dict[str, float], seed: int | None = None) -> None:
    """Let lanes dawdle before each piece of work: up to `longest` seconds at random, exactly that without a seed."""
    rng, do = random.Random(seed), HostLane._do

    def dawdle(lane: HostLane, work: Callable[[], None]) -> None:
        time.sleep(longest.get(lane_name(lane), 0) * (1 if seed is None else rng.random()))
        do(lane, work)

    monkeypatch.setattr(HostLane, "_do", dawdle)


def tight(**changes: int) -> ContinuousBatchingConfig:
    """Room for a few requests at a time, prompts in several chunks."""
    sizes = {"num_blocks": 48, "page_size": 4, "max_batch_tokens": 24, "max_requests_per_batch": 12}
    return batching(**sizes | changes)


def run(
    prompts: list[list[int]], limit: int, overlap: bool = True, debug: bool = True
) -> tuple[dict[str, GenerationOutput], Engine]:
    manager = shared_model("llama").init_continuous_batching(
        greedy(limit, EOS_IDS), tight(), async_batching=AsyncBatchingConfig(overlap=overlap, debug=debug)
    )
    manager.add_requests(prompts)
    manager.start()
    engine = manager._engine
    manager.stop()
    return {output.request_id: output for output in manager}, engine


def expected(prompts: list[list[int]], limit: int) -> list[list[int]]:
    return [reference(shared_model("llama"), prompt, greedy(limit, EOS_IDS)) for prompt in prompts]


class TestDelays:
    """Small pools, prompts in chunks, preemption, EOS ids and poisoned pages, with lanes that dawdle."""

    @OVERLAP
    @pytest.mark.parametrize("slow", [LANES, *((name,) for name in LANES)], ids=lambda names: "+".join(names))
    def test_of_lanes_change_no_token_and_lose_no_request(
        self, slow: tuple[str, ...], overlap: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        delay(monkeypatch, dict.fromkeys(slow, 0.003), seed=len(slow))
        prompts = random_prompts(24, longest=70, seed=8)
        outputs, engine = run(prompts, 20, overlap)
        assert {i: (o.status, o.error) for i, o in outputs.items()} == {
            f"req_{i}": (RequestStatus.FINISHED, None) for i in range(len(prompts))
        }
        assert [outputs[f"req_{i}"].generated_tokens for i in range(len(prompts))] == expected(prompts, 20)
        assert engine.scheduler.preemptions > 0, "the pool was too large to tell"
        assert (engine.scheduler.discarded > 0) == overlap
        engine.scheduler.check_books()

    @pytest.mark.parametrize("seed", range(3))
    def test_of_the_cpu_change_no_token_either(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        rng, launch, collect = random.Random(seed), Lanes.launch, Lanes.collect

        def late_launch(lanes: Lanes, *args: object, **kwargs: object) -> None:
            time.sleep(rng.random() * 0.004)
            launch(lanes, *args, **kwargs)

        def late_collect(lanes: Lanes, slot: Slot) -> np.ndarray:
            time.sleep(rng.random() * 0.004)
            return collect(lanes, slot)

        monkeypatch.setattr(Lanes, "launch", late_launch)
        monkeypatch.setattr(Lanes, "collect", late_collect)
        delay(monkeypatch, {"copy-in": 0.002, "copy-out": 0.002}, seed)
        prompts = random_prompts(20, longest=70, seed=seed)
        outputs, _ = run(prompts, 16)
        assert [outputs[f"req_{i}"].generated_tokens for i in range(len(prompts))] == expected(prompts, 16)

    def test_of_lanes_keep_the_order_of_a_stream(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        delay(monkeypatch, dict.fromkeys(LANES, 0.003), seed=1)
        prompt = random_prompts(1, shortest=50, longest=50)[0]
        with llama.continuous_batching_context_manager(
            greedy(12), continuous_batching_config=tight(), async_batching=AsyncBatchingConfig(debug=True)
        ) as manager:
            streamed = manager.add_request(prompt, streaming=True)
            manager.add_requests(random_prompts(8, longest=40))
            seen = [output.generated_tokens for output in manager.request_id_iter(streamed)]
        answer = reference(llama, prompt, greedy(12))
        assert seen == [answer[: n + 1] for n in range(12)]

    def test_of_lanes_do_not_keep_a_hard_stop_from_ending_every_request(
        self, llama, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        delay(monkeypatch, dict.fromkeys(LANES, 0.003), seed=2)
        manager = llama.init_continuous_batching(greedy(200), tight(), async_batching=True)
        ids = manager.add_requests(random_prompts(20, longest=40))
        manager.start()
        time.sleep(0.1)
        manager.stop(hard_stop=True)
        outputs = {output.request_id: output for output in manager}
        assert sorted(outputs) == sorted(ids)
        assert all("stopped" in output.error for output in outputs.values())


class TestEdgesThatAreTakenAway:
    """The proof that the delays above would show a missing edge."""

    @staticmethod
    def without_waiting(monkeypatch: pytest.MonkeyPatch, name: str, spared: int = 0) -> None:
        """Make one lane's waits do nothing, from its `spared`th on."""
        wait, waits = HostLane.wait, {"left": spared}

        def hurry(lane: HostLane, event: HostEvent | None) -> None:
            if lane_name(lane) == name and event is not None:
                waits["left"] -= 1
                if waits["left"] < 0:
                    return
            wait(lane, event)

        monkeypatch.setattr(HostLane, "wait", hurry)

    # A few steps keep the wait of `compute`, or it would read buffers that nobody has ever written.
    @pytest.mark.parametrize("hurried, slow, spared", [("compute", "copy-in", 12), ("copy-out", "compute", 0)])
    def test_show_in_the_results(self, hurried: str, slow: str, spared: int, monkeypatch: pytest.MonkeyPatch) -> None:
        prompts = random_prompts(8, longest=10, shortest=10, seed=6)
        answers = expected(prompts, 20)
        delay(monkeypatch, {slow: 0.02})
        self.without_waiting(monkeypatch, hurried, spared)
        outputs, _ = run(prompts, 20, debug=False)
        assert sorted(outputs) == sorted(f"req_{i}" for i in range(len(prompts)))
        assert [outputs[f"req_{i}"].generated_tokens for i in range(len(prompts))] != answers

    def test_show_when_the_cpu_does_not_wait_for_the_results(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prompts = random_prompts(8, longest=10, shortest=10, seed=6)
        answers = expected(prompts, 20)
        delay(monkeypatch, {"copy-out": 0.02})
        monkeypatch.setattr(HostEvent, "synchronize", lambda event: None)
        outputs, _ = run(prompts, 20, debug=False)
        assert [outputs[f"req_{i}"].generated_tokens for i in range(len(prompts))] != answers


class TestFailures:
    @OVERLAP
    @pytest.mark.parametrize("name", LANES)
    def test_of_a_lane_end_every_request_with_the_cause(
        self, llama, name: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        do, pieces = HostLane._do, {"left": 25}

        def break_down(lane: HostLane, work: Callable[[], None]) -> None:
            if lane_name(lane) == name:
                pieces["left"] -= 1
                if pieces["left"] == 0:

                    def work() -> None:
                        raise OSError("the wire came loose")

            do(lane, work)

        monkeypatch.setattr(HostLane, "_do", break_down)
        prompts = random_prompts(30, longest=40)
        outputs = llama.generate_batch(
            prompts,
            generation_config=greedy(40),
            continuous_batching_config=tight(),
            async_batching=AsyncBatchingConfig(overlap=overlap),
        )
        assert list(outputs) == [f"req_{i}" for i in range(30)]
        failed = [output for output in outputs.values() if output.status == RequestStatus.FAILED]
        assert failed
        assert all("OSError" in o.error and "the wire came loose" in o.error for o in failed)
        for prompt, output in zip(prompts, outputs.values(), strict=True):
            answer = reference(llama, prompt, greedy(40))
            assert output.generated_tokens == answer[: len(output.generated_tokens)], "a token that is out is right"
        assert engine_threads() == []

    @pytest.mark.parametrize("name", LANES)
    def test_of_a_lane_are_gone_with_the_next_call(self, llama, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        do = HostLane._do

        def break_down(lane: HostLane, work: Callable[[], None]) -> None:
            do(lane, (lambda: 1 / 0) if lane_name(lane) == name else work)

        with monkeypatch.context() as broken:
            broken.setattr(HostLane, "_do", break_down)
            outputs = llama.generate_batch([[1, 2, 3]], generation_config=greedy(4), async_batching=True)
        assert "ZeroDivisionError" in outputs["req_0"].error
        outputs = llama.generate_batch([[1, 2, 3]], generation_config=greedy(4), async_batching=True)
        assert outputs["req_0"].generated_tokens == reference(llama, [1, 2, 3], greedy(4))

    def test_of_the_models_forward_name_the_cause(self) -> None:
        model, calls = new_model("llama"), {"left": 6}

        def fail(*_: object) -> None:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise ArithmeticError("a hook of the user's")

        model.model.layers[1].register_forward_pre_hook(fail)
        own = AsyncBatchingConfig(self_check=False)  # which would call it too
        outputs = model.generate_batch([[1, 2], [3]], generation_config=greedy(30), async_batching=own)
        assert all("ArithmeticError: a hook of the user's" in output.error for output in outputs.values())
        again = model.generate_batch([[1, 2]], generation_config=greedy(3), async_batching=own)["req_0"]
        assert again.generated_tokens == reference(model, [1, 2], greedy(3))


class Bench:
    """Lanes that carry one number a step, without a model, and what each lane saw of it."""

    WORDS = 4

    def __init__(self, poison: bool = False) -> None:
        self.lanes = Lanes(torch.device("cpu"), self.WORDS, self.WORDS, poison)
        self.static = torch.zeros(self.WORDS, dtype=torch.int32)
        self.taken: list[int] = []
        self.computed: list[int] = []
        self.returned: list[int] = []

    def launch(self, number: int, slow_step: float = 0) -> Slot:
        slot = self.lanes.stage()
        slot.array_in[:] = number
        self.send(slot, slow_step)
        return slot

    def send(self, slot: Slot, slow_step: float = 0) -> None:
        def take() -> None:
            self.static.copy_(slot.device_in)
            self.taken.append(int(self.static[0]))

        def step() -> None:
            time.sleep(slow_step)
            self.computed.append(int(self.static[0]))
            slot.device_out.copy_(self.static)

        self.lanes.launch(slot, self.WORDS, self.WORDS, take=take, step=step)
        self.lanes.copy_out.run(lambda: self.returned.append(int(slot.host_out[0])))

    def launch_ahead(self, steps: int) -> None:
        """Launch without ever collecting, so that each edge must hold by itself."""
        for number in range(steps):
            self.lanes._uncollected = 0
            self.launch(number)
        for lane in (self.lanes.copy_in, self.lanes.compute, self.lanes.copy_out):
            lane.record().synchronize()


@contextmanager
def held(lane: HostLane) -> Iterator[None]:
    """Within, the lane does nothing of what it is given."""
    released = threading.Event()
    lane.run(released.wait)
    try:
        yield
    finally:
        released.set()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.lanes.close()


class TestLanes:
    def test_bring_back_each_steps_results(self, bench: Bench) -> None:
        flights, seen = [], []
        for number in range(20):
            flights.append(bench.launch(number))
            if len(flights) == Lanes.DEPTH:
                seen.append(int(bench.lanes.collect(flights.pop(0))[0]))
        seen.append(int(bench.lanes.collect(flights.pop())[0]))
        assert seen == list(range(20))

    def test_launch_returns_before_the_step_is_done(self, bench: Bench) -> None:
        with held(bench.lanes.compute):
            slots = [bench.launch(number) for number in range(2)]
            assert bench.computed == []
        assert [int(bench.lanes.collect(slot)[0]) for slot in slots] == [0, 1]

    def test_launch_refuses_a_third_step_that_nobody_collected(self, bench: Bench) -> None:
        slots = [bench.launch(number) for number in range(2)]
        with pytest.raises(AssertionError, match="before its step was collected"):
            bench.launch(2)
        assert [int(bench.lanes.collect(slot)[0]) for slot in slots] == [0, 1]
        assert int(bench.lanes.collect(bench.launch(3))[0]) == 3

    def test_slots_take_turns(self, bench: Bench) -> None:
        first, second = bench.launch(0), bench.launch(1)
        assert first is not second
        bench.lanes.collect(first)
        assert bench.launch(2) is first

    def test_only_the_words_of_the_step_travel(self, bench: Bench) -> None:
        slot = bench.lanes.stage()
        slot.array_in[:] = 7
        slot.device_in.fill_(1)
        slot.device_out.fill_(5)
        slot.array_out[:] = 2
        bench.lanes.launch(slot, 3, 1, take=lambda: None, step=lambda: None)
        assert bench.lanes.collect(slot).tolist() == [5, 2, 2, 2]
        assert slot.device_in.tolist() == [7, 7, 7, 1]

    def test_poison_makes_what_is_not_staged_show(self) -> None:
        bench = Bench(poison=True)
        slot = bench.launch(3)
        bench.lanes.collect(slot)
        bench.lanes.collect(bench.launch(4))
        assert bench.lanes.stage() is slot
        assert slot.array_in.tolist() == [-1] * Bench.WORDS
        bench.lanes.close()

    def test_work_is_done_without_gradients(self, bench: Bench) -> None:
        seen = []
        bench.lanes.compute.run(lambda: seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
        bench.lanes.compute.record().synchronize()
        assert seen == [(False, False)]

    def test_closing_waits_for_what_is_under_way(self) -> None:
        bench = Bench()
        bench.launch(5, slow_step=0.05)
        bench.lanes.close()
        assert bench.returned == [5]

    def test_a_lane_does_nothing_more_after_a_failure(self, bench: Bench) -> None:
        done = []
        bench.lanes.compute.run(lambda: 1 / 0)
        bench.lanes.compute.run(lambda: done.append(1))
        with pytest.raises(ZeroDivisionError):
            bench.lanes.compute.record().synchronize()
        assert done == []

    @pytest.mark.parametrize("name", ["copy_in", "compute", "copy_out"])
    def test_a_failure_in_any_lane_reaches_whoever_collects(self, bench: Bench, name: str) -> None:
        getattr(bench.lanes, name).run(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.lanes.collect(bench.launch(0))


class TestEdges:
    """Each row of the table in `Lanes`, with the lane slowed down that has to be waited for."""

    def test_host_in_is_not_rewritten_before_its_copy_in(self, bench: Bench, monkeypatch) -> None:
        delay(monkeypatch, {"copy-in": 0.05})
        first, second = bench.launch(0), bench.launch(1)
        bench.lanes.stage().array_in[:] = 99
        assert [int(bench.lanes.collect(slot)[0]) for slot in (first, second)] == [0, 1]

    def test_host_in_is_rewritten_too_early_without_that_wait(self, bench: Bench) -> None:
        with held(bench.lanes.copy_in):
            first, second = bench.launch(0), bench.launch(1)
            first.staged = None
            bench.lanes.stage().array_in[:] = 99
        assert [int(bench.lanes.collect(slot)[0]) for slot in (first, second)] == [99, 1]

    SLOWED = [
        # the lane whose wait keeps the edge, the event it waits for, the lane that is late, who sees what went wrong
        pytest.param("copy_in", "consumed", "compute", "taken", id="device_in is taken before it is overwritten"),
        pytest.param("compute", "staged", "copy-in", "taken", id="device_in is written before it is taken"),
        pytest.param(
            "compute", "returned", "copy-out", "returned", id="device_out is copied before it is overwritten"
        ),
        pytest.param("copy_out", "computed", "compute", "returned", id="device_out is written before it is copied"),
    ]

    @pytest.mark.parametrize("waiting, event, late, seen", SLOWED)
    def test_holds(self, bench: Bench, waiting: str, event: str, late: str, seen: str, monkeypatch) -> None:
        delay(monkeypatch, {late: 0.01})
        bench.launch_ahead(6)
        assert bench.taken == bench.computed == bench.returned == list(range(6))

    @pytest.mark.parametrize("waiting, event, late, seen", SLOWED)
    def test_does_not_hold_without_its_wait(
        self, bench: Bench, waiting: str, event: str, late: str, seen: str, monkeypatch
    ) -> None:
        delay(monkeypatch, {late: 0.01})
        lane = getattr(bench.lanes, waiting)
        slots, wait = bench.lanes._slots, lane.wait

        def hurry(awaited: HostEvent | None) -> None:
            if all(getattr(slot, event) is not awaited for slot in slots):
                wait(awaited)

        monkeypatch.setattr(lane, "wait", hurry)
        bench.launch_ahead(6)
        assert getattr(bench, seen) != list(range(6))

    def test_a_step_reads_what_it_took_though_the_next_is_staged(self, bench: Bench, monkeypatch) -> None:
        delay(monkeypatch, {"copy-out": 0.005}, seed=0)
        for number in range(0, 20, 2):
            slots = [bench.launch(number, slow_step=0.003), bench.launch(number + 1)]
            assert [int(bench.lanes.collect(slot)[0]) for slot in slots] == [number, number + 1]
        assert bench.computed == list(range(20))


def test_no_thread_is_left_when_lanes_are_closed() -> None:
    before = threading.active_count()
    bench = Bench()
    bench.lanes.collect(bench.launch(1))
    bench.lanes.close()
    assert threading.active_count() == before
