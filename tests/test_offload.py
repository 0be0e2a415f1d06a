"""Preempted requests whose pages wait on the host: no token changes, nothing is lost, and no edge is left out."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import batching, greedy, new_model, random_prompts, reference, shared_model
from test_lanes import LANES, delay, lane_name
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.engine import Engine
from transformers_async_cb.lanes import HostEvent, HostLane
from transformers_async_cb.manager import AsyncBatchingManager
from transformers_async_cb.offload import HostPages
from transformers_async_cb.request import Request


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
PAGE_LANES = ("pages-out", "pages-in")
EOS_IDS = [3, 17]


@pytest.fixture
def cheap_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the two cost here."""
    monkeypatch.setattr(HostPages, "cheaper", True)


def short_manager(
    model: PreTrainedModel, limit: int, overlap: bool = True, debug: bool = True, **changes: Any
) -> AsyncBatchingManager:
    """Room for about three requests, on the host for all of them."""
    sizes = {"num_blocks": 48, "page_size": 4, "max_batch_tokens": 24, "max_requests_per_batch": 12}
    return model.init_continuous_batching(
        greedy(limit, EOS_IDS),
        batching(**sizes | {"cpu_offload_space": 1e-3} | changes),
        async_batching=AsyncBatchingConfig(overlap=overlap, debug=debug),
    )


def run(
    prompts: list[list[int]], limit: int, device: str = "cpu", **settings: Any
) -> tuple[dict[str, GenerationOutput], Engine]:
    manager = short_manager(shared_model("llama", device), limit, **settings)
    manager.add_requests(prompts)
    manager.start()
    engine = manager._engine
    manager.stop()
    engine.scheduler.check_books()
    return {output.request_id: output for output in manager}, engine


def answers(prompts: list[list[int]], limit: int, device: str = "cpu") -> dict[str, list[int]]:
    model = shared_model("llama", device)
    return {f"req_{i}": reference(model, prompt, greedy(limit, EOS_IDS)) for i, prompt in enumerate(prompts)}


def tokens(outputs: dict[str, GenerationOutput]) -> dict[str, list[int]]:
    return {request_id: output.generated_tokens for request_id, output in outputs.items()}


@pytest.mark.usefixtures("cheap_copies")
class TestOffloading:
    @DEVICES
    @OVERLAP
    @pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
    def test_changes_no_token(self, overlap: bool, reuse: bool, device: str) -> None:
        prompts = random_prompts(24, longest=70, seed=8)
        outputs, engine = run(prompts, 40, device, overlap=overlap, allow_block_sharing=reuse)
        assert tokens(outputs) == answers(prompts, 40, device)
        scheduler = engine.scheduler
        assert 0 < scheduler.restored <= scheduler.offloaded <= scheduler.preemptions
        assert engine.metrics().restored == scheduler.restored

    @OVERLAP
    @pytest.mark.parametrize("slow", [(*LANES, *PAGE_LANES), *((name,) for name in PAGE_LANES)], ids="+".join)
    def test_changes_no_token_when_lanes_dawdle(self, slow, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        prompts = random_prompts(16, longest=70, seed=9)
        monkeypatch.setattr("transformers_async_cb.offload.MOVE_TOKENS", 12)
        delay(monkeypatch, dict.fromkeys(slow, 0.002), seed=len(slow))
        outputs, engine = run(prompts, 30, overlap=overlap)
        assert tokens(outputs) == answers(prompts, 30)
        assert engine.scheduler.restored > 0

    def test_serves_sequences_of_one_prompt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        delay(monkeypatch, dict.fromkeys((*LANES, *PAGE_LANES), 0.002), seed=1)
        prompts, ended = random_prompts(6, longest=40, shortest=20, seed=2), []
        for space in (1e-3, 0.0):
            manager = short_manager(shared_model("llama"), 24, cpu_offload_space=space)
            for i, prompt in enumerate(prompts):
                manager.add_request(prompt, num_return_sequences=4, do_sample=True, seed=i)
            manager.start()
            engine = manager._engine
            manager.stop()
            ended.append(tokens({output.request_id: output for output in manager}))
            assert (engine.scheduler.restored > 0) == (space > 0)
        assert len(ended[0]) == 24
        assert ended[0] == ended[1]

    def test_uses_what_room_there_is_on_the_host(self) -> None:
        prompts = random_prompts(24, longest=70, seed=8)
        page_bytes = 4 * 2 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, dimensions, bytes
        outputs, engine = run(prompts, 40, cpu_offload_space=6 * page_bytes / 2**30)
        assert tokens(outputs) == answers(prompts, 40)
        assert engine.scheduler.host.count == 6
        assert engine.scheduler.restored > 0

    def test_in_several_blocks_of_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers_async_cb.offload.BLOCK_BYTES", 3 * 2048)
        prompts = random_prompts(24, longest=70, seed=8)
        outputs, engine = run(prompts, 40)
        assert len(engine.copies._blocks) == -(-engine.scheduler.host.count // 3)
        assert tokens(outputs) == answers(prompts, 40)

    def test_with_a_pool_that_fits_one_request_finishes_them_all_and_does_not_spin(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = random_prompts(6, longest=20, shortest=20, seed=4)
        delay(monkeypatch, dict.fromkeys(PAGE_LANES, 0.03))
        turns, read = [], Engine._read
        monkeypatch.setattr(Engine, "_read", lambda *args, **kwargs: (turns.append(1), read(*args, **kwargs)))
        outputs, engine = run(prompts, 40, num_blocks=15)
        assert tokens(outputs) == answers(prompts, 40)
        assert engine.scheduler.restored > 0
        s = engine.scheduler
        assert len(turns) <= engine.steps + 3 * (s.offloaded + s.restored) + 2 * len(prompts) + 5

    def test_leaves_nothing_behind_of_what_is_cancelled_meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        delay(monkeypatch, dict.fromkeys(PAGE_LANES, 0.02), seed=3)
        rng, prompts = random.Random(0), random_prompts(20, longest=60, seed=5)
        manager = short_manager(shared_model("llama"), 40)
        ids = manager.add_requests(prompts) or [f"req_{i}" for i in range(20)]
        manager.start()
        engine, expected = manager._engine, answers(prompts, 40)
        while engine.scheduler.offloaded < 2 and manager.is_running() and manager._door.live:
            time.sleep(0.001)
        for request_id in rng.sample(ids, 12):
            manager.cancel_request(request_id)
            time.sleep(rng.random() * 0.01)
        manager.stop()
        engine.scheduler.check_books()
        outputs = {output.request_id: output for output in manager}
        assert outputs.keys() == expected.keys()
        for request_id, output in outputs.items():
            assert output.error is None or "cancelled" in output.error
            answer, so_far = expected[request_id], output.generated_tokens
            assert so_far == (answer if output.error is None else answer[: len(so_far)])

    def test_forgets_what_other_weights_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        delay(monkeypatch, dict.fromkeys(PAGE_LANES, 0.005), seed=3)
        model = new_model("llama")
        manager = short_manager(model, 60)
        manager.add_requests(random_prompts(12, longest=40, shortest=30, seed=5))
        manager.start()
        host, forgotten = manager._engine.scheduler.host, []
        forget = host.forget
        host.forget = lambda: (forgotten.append(host.count - host.free), forget())
        while host.free == host.count:
            time.sleep(0.001)
        with manager.pause():
            assert not host.under_way
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
        manager.stop()
        assert len(forgotten) == 1
        assert forgotten[0] > 0
        assert all(output.error is None for output in manager)

    def test_goes_on_after_a_sleep(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        delay(monkeypatch, dict.fromkeys(PAGE_LANES, 0.005), seed=3)
        prompts = random_prompts(12, longest=40, shortest=30, seed=5)
        manager = short_manager(llama, 40)
        manager.add_requests(prompts)
        manager.start()
        scheduler = manager._engine.scheduler
        while not scheduler.offloaded:
            time.sleep(0.001)
        manager.sleep()
        assert scheduler.host.free == scheduler.host.count
        manager.wake()
        manager.stop()
        assert scheduler.restored > 0
        assert tokens({output.request_id: output for output in manager}) == answers(prompts, 40)


@pytest.mark.usefixtures("cheap_copies")
class TestEdges:
    """With the lane slowed down that has to be waited for; and without the wait."""

    PROMPTS = random_prompts(12, longest=40, shortest=30, seed=6)

    @pytest.mark.parametrize("slow", PAGE_LANES)
    def test_hold_when_a_lane_is_late(self, slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
        delay(monkeypatch, {slow: 0.02})
        outputs, engine = run(self.PROMPTS, 30)
        assert tokens(outputs) == answers(self.PROMPTS, 30)
        assert engine.scheduler.restored > 0

    @pytest.mark.parametrize("slow", PAGE_LANES)
    def test_do_not_hold_when_moves_seem_to_have_landed(self, slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
        delay(monkeypatch, {slow: 0.02})
        monkeypatch.setattr(HostEvent, "query", lambda event: True)
        monkeypatch.setattr(HostEvent, "seconds_after", lambda event, earlier: 1.0)
        outputs, _ = run(self.PROMPTS, 30)
        assert tokens(outputs) != answers(self.PROMPTS, 30)

    def test_do_not_hold_when_pages_come_in_before_their_last_readers_are_done(self, monkeypatch) -> None:
        """What compute still has to do to them is that they are poisoned."""
        delay(monkeypatch, {"compute": 0.004})
        wait = HostLane.wait
        monkeypatch.setattr(
            HostLane, "wait", lambda lane, event: None if lane_name(lane) == "pages-in" else wait(lane, event)
        )
        outputs, _ = run(self.PROMPTS, 30)
        assert tokens(outputs) != answers(self.PROMPTS, 30)

    @pytest.mark.parametrize("name", PAGE_LANES)
    def test_a_failure_of_a_lane_ends_every_request_with_the_cause(self, name: str, monkeypatch) -> None:
        do = HostLane._do

        def break_down(lane: HostLane, work: Callable[[], None]) -> None:
            do(lane, (lambda: 1 / 0) if lane_name(lane) == name else work)

        manager = short_manager(shared_model("llama"), 30)
        manager.add_requests(self.PROMPTS)
        manager.warmup()
        monkeypatch.setattr(HostLane, "_do", break_down)
        manager.start()
        manager.stop()
        outputs = list(manager)
        assert len(outputs) == len(self.PROMPTS)
        failed = [output.error for output in outputs if output.error is not None]
        assert failed
        assert all("ZeroDivisionError" in error for error in failed)


class TestSettings:
    @staticmethod
    def host_pages(**settings: Any) -> int:
        manager = short_manager(shared_model("llama"), 4, **settings)
        manager.start()
        engine = manager._engine
        manager.stop()
        assert (engine.copies is not None) == (engine.settings.host_pages > 0)
        return engine.settings.host_pages

    @pytest.fixture
    def available(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A host with a mebibyte."""
        memory = type("Memory", (), {"available": 2**20})
        monkeypatch.setattr("transformers_async_cb.settings.psutil.virtual_memory", lambda: memory)

    def test_are_off_by_default(self) -> None:
        assert self.host_pages(cpu_offload_space=0.0) == 0

    def test_give_the_safe_share_of_what_there_is_where_none_is_stated(self, available: None) -> None:
        share = {"cpu_offload_space_safety_threshold": 0.5}
        assert self.host_pages(cpu_offload_space=None, **share) == 2**19 // 2048

    def test_are_cut_to_the_safe_share(self, available: None, log: pytest.LogCaptureFixture) -> None:
        logging.enable_propagation()
        try:
            assert self.host_pages(cpu_offload_space=1.0) == int(0.8 * 2**20) // 2048
            assert "cpu_offload_space=1.0 GiB is more than 80%" in log.text
            assert self.host_pages(cpu_offload_space=1e-9) == 0
            assert "no room for a page of 2,048 bytes" in log.text
        finally:
            logging.disable_propagation()

    @pytest.mark.parametrize("space", [-1.0, float("inf"), float("nan"), "8", True])
    def test_are_refused_where_they_are_no_amount(self, space: Any) -> None:
        with pytest.raises(ValueError, match=r"cpu_offload_space=.* must be a number of GiB"):
            short_manager(shared_model("llama"), 4, cpu_offload_space=space)


class TestHostPages:
    @staticmethod
    def request() -> Request:
        return Request("r", np.arange(9, dtype=np.int32), 9, 1)

    def test_are_cheaper_where_two_copies_take_less_than_the_fastest_step(self) -> None:
        host = HostPages(8, 4)
        assert not host.cheaper
        host.note_copied(100, 1.0)
        assert host.cheaper, "no step was seen yet"
        host.note_computed(100, 2.5)
        assert host.cheaper
        host.note_computed(100, 1.9)
        host.note_computed(100, 30.0)
        assert not host.cheaper
        host.note_copied(100, 0.9)
        assert host.cheaper

    def test_go_out_from_the_last_to_the_first_and_come_in_from_where_they_are_missing(self) -> None:
        host, request = HostPages(8, 256), self.request()  # two pages a move
        host.note_copied(1, 0.1)
        assert host.move_out(3, request, [range(5)]) == 3
        assert [(move.row, move.out, move.first, len(move.host_pages)) for move in host.take_moves()] == [
            (3, True, 4, 1), (3, True, 2, 2), (3, True, 0, 2)
        ]  # fmt: skip
        assert (host.free, host.under_way) == (3, 3)
        assert host.move_in(1, request, [2]) == 2
        moves = host.take_moves()
        assert [(move.row, move.out, move.first) for move in moves] == [(1, False, 2), (1, False, 4)]
        assert np.concatenate([move.host_pages for move in moves]).tolist() == host.of(request)[2:].tolist()
        host.drop(request)
        assert host.free == 8
        assert host.of(request).tolist() == []

    def test_take_as_many_as_there_are(self) -> None:
        host, first, second, third = HostPages(8, 512), self.request(), self.request(), self.request()
        host.note_copied(1, 0.1)
        assert [host.move_out(0, request, [range(5)]) for request in (first, second, third)] == [5, 3, 0]
        assert len(host.of(third)) == 0
