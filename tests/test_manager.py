"""What a user holds: requests in, results out, pauses, stops and what happens when something fails."""

from __future__ import annotations

import asyncio
import copy
import gc
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    batching,
    engine_threads,
    generate_alone,
    greedy,
    in_child,
    new_model,
    random_prompts,
    reference,
    shared_model,
)
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb import AsyncBatchingConfig, loop_thread
from transformers_async_cb.endings import Endings
from transformers_async_cb.engine import Engine
from transformers_async_cb.entry_points import CACHED
from transformers_async_cb.manager import AsyncBatchingManager
from transformers_async_cb.prefill import Prefill
from transformers_async_cb.request import Rows
from transformers_async_cb.runner import Runner
from transformers_async_cb.scheduler import Scheduler
from transformers_async_cb.settings import Mode


PATIENCE = 30  # seconds, for what comes at once
LONG = 300  # tokens of an answer that takes many times as long as anything that is done beside it
PROMPT = [5, 6, 7, 8]


_managers: list[AsyncBatchingManager] = []


@pytest.fixture
def llama() -> PreTrainedModel:
    """A Llama of the test's own, with the weights of the shared one, which stays free to be asked."""
    return new_model("llama")


@pytest.fixture(autouse=True)
def no_manager_outlives_its_test() -> Iterator[None]:
    """A test that fails halfway disturbs no other."""
    yield
    while _managers:
        _managers.pop().stop(hard_stop=True)


def generates(prompt: Sequence[int], config: GenerationConfig) -> list[int]:
    return reference(shared_model("llama"), prompt, config)


def started(model: PreTrainedModel, config: GenerationConfig | None = None, **kwargs: Any):
    kwargs.setdefault("async_batching", True)
    return model.continuous_batching_context_manager(config or greedy(8), **kwargs)


def new_manager(model: PreTrainedModel, config: GenerationConfig | None = None, **own: Any) -> AsyncBatchingManager:
    flag = AsyncBatchingConfig(**own)
    _managers.append(model.init_continuous_batching(config or greedy(8), async_batching=flag))
    return _managers[-1]


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Begin `work` on another thread; calling what comes back waits for its result, or raises what it raised."""
    outcome: list = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the other thread hangs"
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return join


def ended(output: GenerationOutput | None) -> GenerationOutput:
    assert output is not None, "the result is lost"
    assert output.is_finished() or output.status == RequestStatus.FAILED
    return output


class TestResults:
    def test_come_by_id_in_any_order(self, llama) -> None:
        prompts = random_prompts(6, longest=30)
        with started(llama) as manager:
            ids = [manager.add_request(prompt) for prompt in prompts]
            for i in (3, 0, 5, 1, 4, 2):
                output = manager.get_result(ids[i], timeout=PATIENCE)
                assert output.request_id == ids[i]
                assert output.generated_tokens == generates(prompts[i], greedy(8))

    def test_come_for_names_of_the_users(self, llama) -> None:
        with started(llama) as manager:
            assert manager.add_request(PROMPT, request_id="mine") == "mine"
            assert manager.add_request(PROMPT) == "req_0"
            assert manager.get_result("mine", PATIENCE).request_id == "mine"
            assert manager.get_result("req_0", PATIENCE).request_id == "req_0"

    def test_come_in_the_order_they_ended_when_no_id_is_given(self, llama) -> None:
        with started(llama) as manager:
            for limit in (40, 20, 1):
                manager.add_request(PROMPT, max_new_tokens=limit)
            outputs = [manager.get_result(timeout=PATIENCE) for _ in range(3)]
        assert [output.request_id for output in outputs] == ["req_2", "req_1", "req_0"]

    def test_are_none_after_the_timeout(self, llama) -> None:
        with started(llama) as manager:
            begin = time.perf_counter()
            assert manager.get_result(timeout=0.05) is None
            assert manager.get_result("nobody", timeout=0.05) is None
            assert 0.1 <= time.perf_counter() - begin < PATIENCE
            request_id = manager.add_request(PROMPT)
            assert manager.get_result("nobody", timeout=0.3) is None
            assert ended(manager.get_result(request_id, timeout=0)).request_id == request_id

    def test_are_none_at_once_when_no_more_will_come(self, llama) -> None:
        manager = new_manager(llama)
        manager.start()
        manager.stop()
        assert manager.get_result() is None
        assert manager.get_result("nobody") is None
        assert list(manager) == []

    def test_can_be_iterated_until_the_manager_has_stopped(self, llama) -> None:
        prompts = random_prompts(12, longest=30)
        manager = new_manager(llama)
        manager.add_requests(prompts)
        manager.start()
        manager.stop(block=False)
        outputs = {output.request_id: output.generated_tokens for output in manager}
        manager.stop()
        assert outputs == {f"req_{i}": generates(p, greedy(8)) for i, p in enumerate(prompts)}

    def test_of_one_request_are_not_lost_while_another_thread_waits_for_a_different_one(self, llama) -> None:
        with started(llama) as manager:
            slow = manager.add_request(PROMPT, max_new_tokens=150)
            fast = [manager.add_request(PROMPT, max_new_tokens=n) for n in range(1, 6)]
            waiting_for_slow = in_thread(lambda: manager.get_result(slow, PATIENCE))
            waiting = [in_thread(lambda i=i: manager.get_result(i, PATIENCE)) for i in reversed(fast)]
            assert [join().request_id for join in waiting] == fast[::-1]
            assert len(waiting_for_slow().generated_tokens) == 150

    def test_stay_for_whoever_asks_after_the_stop(self, llama) -> None:
        with started(llama) as manager:
            request_id = manager.add_request(PROMPT)
        assert manager.get_result(request_id).generated_tokens == generates(PROMPT, greedy(8))

    def test_of_an_id_that_is_used_again_are_the_new_ones(self, llama) -> None:
        with started(llama) as manager:
            for limit in (3, 5):
                manager.add_request(PROMPT, request_id="again", max_new_tokens=limit)
                assert len(manager.get_result("again", PATIENCE).generated_tokens) == limit

    def test_wake_a_waiting_thread_when_the_manager_stops(self, llama) -> None:
        with started(llama) as manager:
            waiting = in_thread(lambda: manager.get_result("nobody"))
            time.sleep(0.05)
        assert waiting() is None


class TestManyThreads:
    def test_submit_and_collect_at_once(self, llama) -> None:
        prompts, config = random_prompts(64, longest=30), greedy(8)
        answers = {i: generates(prompt, config) for i, prompt in enumerate(prompts)}
        with started(llama, config) as manager:

            def work(mine: range) -> dict[int, list[int]]:
                ids = {i: manager.add_request(prompts[i]) for i in mine}
                return {i: manager.get_result(request_id, PATIENCE).generated_tokens for i, request_id in ids.items()}

            found: dict[int, list[int]] = {}
            for join in [in_thread(lambda k=k: work(range(k, 64, 8))) for k in range(8)]:
                found.update(join())
        assert found == answers

    def test_get_ids_that_differ(self, llama) -> None:
        manager = new_manager(llama)
        joins = [in_thread(lambda: [manager.add_request(PROMPT) for _ in range(20)]) for _ in range(6)]
        ids = [request_id for join in joins for request_id in join()]
        assert len(set(ids)) == 120
        manager.destroy()

    def test_may_take_any_result_without_one_being_lost_or_doubled(self, llama) -> None:
        with started(llama) as manager:
            ids = manager.add_requests(random_prompts(40, longest=20))
            joins = [
                in_thread(lambda: [manager.get_result(timeout=PATIENCE).request_id for _ in range(10)])
                for _ in range(4)
            ]
            assert sorted(request_id for join in joins for request_id in join()) == sorted(ids)


class TestStreaming:
    @pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
    def test_gives_each_token_once_and_the_finished_result_last(self, llama, overlap: bool) -> None:
        answer = generates(PROMPT, greedy(20))
        with started(llama, greedy(20), async_batching=AsyncBatchingConfig(overlap=overlap)) as manager:
            request_id = manager.add_request(PROMPT, streaming=True)
            manager.add_requests(random_prompts(10, longest=30))
            outputs = list(manager.request_id_iter(request_id))
        assert [output.generated_tokens for output in outputs] == [answer[: n + 1] for n in range(20)]
        assert [output.is_finished() for output in outputs] == [False] * 19 + [True]
        assert {output.status for output in outputs[:-1]} == {RequestStatus.DECODING}
        assert {output.request_id for output in outputs} == {request_id}

    def test_ends_with_the_eos(self, llama) -> None:
        answer = generates(PROMPT, greedy(20))
        stop = next(t for i, t in enumerate(answer) if i >= 3 and t not in answer[:i])
        answer = answer[: answer.index(stop) + 1]
        with started(llama, greedy(20, stop)) as manager:
            outputs = list(manager.request_id_iter(manager.add_request(PROMPT, streaming=True)))
        assert [output.generated_tokens for output in outputs] == [answer[: n + 1] for n in range(len(answer))]
        assert outputs[-1].is_finished()

    def test_goes_on_after_a_preemption(self, llama) -> None:
        small = batching(num_blocks=36, page_size=4)
        prompts = random_prompts(6, longest=20, shortest=20)
        manager = llama.init_continuous_batching(
            greedy(60), continuous_batching_config=small, async_batching=AsyncBatchingConfig(debug=True)
        )
        ids = manager.add_requests(prompts, streaming=True)
        manager.start()
        engine = manager._engine
        manager.stop()
        assert engine.scheduler.preemptions > 0
        for request_id, prompt in zip(ids, prompts, strict=True):
            answer = generates(prompt, greedy(60))
            seen = [output.generated_tokens for output in manager.request_id_iter(request_id)]
            assert seen == [answer[: n + 1] for n in range(60)]

    def test_of_a_request_that_does_not_stream_is_its_result(self, llama) -> None:
        with started(llama) as manager:
            outputs = list(manager.request_id_iter(manager.add_request(PROMPT)))
        assert [output.generated_tokens for output in outputs] == [generates(PROMPT, greedy(8))]

    def test_ends_when_the_manager_is_stopped(self, llama) -> None:
        manager = new_manager(llama, greedy(LONG))
        request_id = manager.add_request(PROMPT, streaming=True)
        manager.start()
        outputs = []
        for output in manager.request_id_iter(request_id):
            outputs.append(output)
            if len(outputs) == 5:
                manager.stop(hard_stop=True)
        assert "stopped" in outputs[-1].error
        assert 5 <= len(outputs) < LONG


class TestHandlers:
    def test_get_each_result_on_their_event_loop(self, llama) -> None:
        answer = generates(PROMPT, greedy(10))

        async def collect() -> list[tuple[int, GenerationOutput]]:
            seen: list[tuple[int, GenerationOutput]] = []
            done = asyncio.Event()

            def handle(output: GenerationOutput) -> None:
                seen.append((threading.get_ident(), output))
                if output.is_finished():
                    done.set()

            manager.register_result_handler("watched", handle)
            manager.add_request(PROMPT, request_id="watched", streaming=True)
            await asyncio.wait_for(done.wait(), PATIENCE)
            return seen

        with started(llama, greedy(10)) as manager:
            seen = asyncio.run(collect())
            assert manager.get_result("watched", timeout=0.01) is None, "the handler came in place of the queue"
        assert {thread for thread, _ in seen} == {threading.get_ident()}
        assert [output.generated_tokens for _, output in seen] == [answer[: n + 1] for n in range(10)]

    def test_registered_late_get_what_has_come_before(self, llama) -> None:
        async def collect() -> GenerationOutput:
            found = asyncio.get_running_loop().create_future()
            manager.register_result_handler("early", found.set_result)
            return await asyncio.wait_for(found, PATIENCE)

        with started(llama) as manager:
            manager.add_request(PROMPT, request_id="early")
            manager.add_request(PROMPT, request_id="later", max_new_tokens=30)
            manager.get_result("later", PATIENCE)
            assert asyncio.run(collect()).generated_tokens == generates(PROMPT, greedy(8))

    def test_registered_in_the_middle_of_a_stream_get_every_token_once_and_in_order(self, llama) -> None:
        answer = generates(PROMPT, greedy(60))

        async def collect() -> list[list[int]]:
            seen: list[list[int]] = []
            done = asyncio.Event()

            def handle(output: GenerationOutput) -> None:
                seen.append(output.generated_tokens)
                if output.is_finished():
                    done.set()

            manager.add_request(PROMPT, request_id="watched", streaming=True)
            await asyncio.sleep(0.02)
            manager.register_result_handler("watched", handle)
            await asyncio.wait_for(done.wait(), PATIENCE)
            return seen

        with started(llama, greedy(60)) as manager:
            for _ in range(5):
                assert asyncio.run(collect()) == [answer[: n + 1] for n in range(60)]

    def test_whose_loop_is_closed_do_not_disturb_the_others(self, llama) -> None:
        async def register() -> None:
            manager.register_result_handler("orphan", lambda output: None)

        with started(llama) as manager:
            asyncio.run(register())
            manager.add_request(PROMPT, request_id="orphan")
            request_id = manager.add_request(PROMPT, max_new_tokens=20)
            output = manager.get_result(request_id, PATIENCE)
            assert output.generated_tokens == generates(PROMPT, greedy(20))
            assert manager.is_running()

    def test_need_a_running_loop(self, llama) -> None:
        manager = new_manager(llama)
        with pytest.raises(RuntimeError, match="event loop"):
            manager.register_result_handler("req_0", print)

    def test_that_raise_do_not_disturb_the_engine(self, llama) -> None:
        async def collect() -> list[str]:
            loop, seen, done = asyncio.get_running_loop(), [], asyncio.Event()
            loop.set_exception_handler(lambda *_: None)

            def bad(output: GenerationOutput) -> None:
                raise KeyError("a mistake of the user's")

            def good(output: GenerationOutput) -> None:
                seen.append(output.request_id)
                done.set()

            manager.register_result_handler("bad", bad)
            manager.register_result_handler("good", good)
            # Both end with the same step, so they are handed over together.
            with manager.pause():
                manager.add_request(PROMPT, request_id="bad")
                manager.add_request(PROMPT, request_id="good")
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(done.wait(), 2)
            return seen

        with started(llama) as manager:
            assert asyncio.run(collect()) == ["good"]


class TestCancelling:
    def test_a_running_request_delivers_its_tokens_so_far_with_an_error(self, llama) -> None:
        answer = generates(PROMPT, greedy(LONG))
        with started(llama, greedy(LONG)) as manager:
            request_id = manager.add_request(PROMPT, streaming=True)
            stream = manager.request_id_iter(request_id)
            for _ in range(10):
                next(stream)
            manager.cancel_request(request_id)
            last = list(stream)[-1]
        assert last.status == RequestStatus.FAILED
        assert request_id in last.error
        assert "cancelled" in last.error
        assert 10 <= len(last.generated_tokens) < LONG
        assert last.generated_tokens == answer[: len(last.generated_tokens)]

    def test_a_waiting_request_never_starts(self, llama) -> None:
        one_at_a_time = ContinuousBatchingConfig(max_requests_per_batch=1)
        with started(llama, greedy(100), continuous_batching_config=one_at_a_time) as manager:
            first, second, third = (manager.add_request(PROMPT) for _ in range(3))
            manager.cancel_request(second)
            output = manager.get_result(second, PATIENCE)
            assert "cancelled" in output.error
            assert output.generated_tokens == []
            for request_id in (first, third):
                assert manager.get_result(request_id, PATIENCE).generated_tokens == generates(PROMPT, greedy(100))

    def test_before_the_start_is_remembered(self, llama) -> None:
        manager = new_manager(llama)
        cancelled, other = manager.add_request(PROMPT), manager.add_request(PROMPT)
        manager.cancel_request(cancelled)
        manager.start()
        manager.stop()
        outputs = {output.request_id: output for output in manager}
        assert "cancelled" in outputs[cancelled].error
        assert outputs[other].generated_tokens == generates(PROMPT, greedy(8))

    def test_an_unknown_or_ended_request_changes_nothing(self, llama) -> None:
        with started(llama) as manager:
            manager.cancel_request("nobody")
            request_id = manager.add_request(PROMPT)
            output = manager.get_result(request_id, PATIENCE)
            manager.cancel_request(request_id)
            assert output.error is None
            again = manager.add_request(PROMPT)
            assert manager.get_result(again, PATIENCE).generated_tokens == output.generated_tokens
            assert manager.get_result(timeout=0.01) is None

    def test_an_ended_request_spares_a_later_one_of_the_same_name(self, llama) -> None:
        with started(llama) as manager:
            for _ in range(10):
                manager.add_request(PROMPT, request_id="name")
                assert manager.get_result("name", PATIENCE).error is None
                with manager.pause():  # both reach the loop together
                    manager.cancel_request("name")
                    manager.add_request(PROMPT, request_id="name")
                assert manager.get_result("name", PATIENCE).error is None

    def test_some_leaves_the_tokens_of_the_others_alone(self, llama) -> None:
        small = ContinuousBatchingConfig(num_blocks=12, max_batch_tokens=24)  # 192 pages of 16 tokens
        prompts = random_prompts(24, longest=60)
        with started(
            llama, greedy(40), continuous_batching_config=small, async_batching=AsyncBatchingConfig(debug=True)
        ) as manager:
            ids = manager.add_requests(prompts)
            for request_id in ids[::3]:
                manager.cancel_request(request_id)
                time.sleep(0.003)
        outputs = {output.request_id: output for output in manager}
        assert sorted(outputs) == sorted(ids)
        for i, (request_id, prompt) in enumerate(zip(ids, prompts, strict=True)):
            answer, output = generates(prompt, greedy(40)), outputs[request_id]
            assert output.generated_tokens == answer[: len(output.generated_tokens)]
            if i % 3:
                assert output.error is None
                assert len(output.generated_tokens) == 40

    def test_does_not_wait_for_a_check_on_another_thread(self, llama) -> None:
        """The collector may drop a stream while the loop reads its mail, for which that check waits in turn."""
        with started(llama, greedy(LONG)) as manager:
            request_id = manager.add_request(PROMPT)
            checking, done = threading.Event(), threading.Event()

            def check() -> None:
                with manager._submission._lock:
                    checking.set()
                    done.wait(PATIENCE)

            join = in_thread(check)
            checking.wait(PATIENCE)
            in_thread(lambda: manager.cancel_request(request_id))()
            done.set()
            join()
            assert "cancelled" in ended(manager.get_result(request_id, PATIENCE)).error

    def test_twice_gives_one_result(self, llama) -> None:
        with started(llama, greedy(LONG)) as manager:
            request_id = manager.add_request(PROMPT)
            for _ in range(3):
                manager.cancel_request(request_id)
            ended(manager.get_result(request_id, PATIENCE))
            assert manager.get_result(request_id, timeout=0.05) is None


class TestStopping:
    def test_finishes_what_is_there(self, llama) -> None:
        manager = new_manager(llama, greedy(30))
        ids = manager.add_requests(random_prompts(10, longest=20))
        manager.start()
        assert manager.is_running()
        manager.stop()
        assert not manager.is_running()
        outputs = list(manager)
        assert sorted(output.request_id for output in outputs) == sorted(ids)
        assert all(output.error is None and len(output.generated_tokens) == 30 for output in outputs)

    def test_without_blocking_returns_at_once(self, llama) -> None:
        manager = new_manager(llama, greedy(LONG))
        request_id = manager.add_request(PROMPT)
        manager.start()
        begin = time.perf_counter()
        manager.stop(block=False)
        assert time.perf_counter() - begin < 0.1
        assert manager.is_running()
        assert len(manager.get_result(request_id, PATIENCE).generated_tokens) == LONG
        manager.stop()
        assert llama.config._attn_implementation != "async_batching"

    def test_gives_up_waiting_after_the_timeout(self, llama) -> None:
        manager = new_manager(llama, greedy(LONG))
        request_id = manager.add_request(PROMPT)
        manager.start()
        begin = time.perf_counter()
        manager.stop(timeout=0.05)
        assert 0.05 <= time.perf_counter() - begin < 0.5
        assert manager.is_running()
        manager.stop()
        assert not manager.is_running()
        assert len(manager.get_result(request_id).generated_tokens) == LONG

    def test_hard_ends_every_request_with_its_tokens_so_far(self, llama) -> None:
        manager = new_manager(llama, greedy(LONG))
        ids = manager.add_requests(random_prompts(5, longest=10))
        streamed = manager.add_request(PROMPT, streaming=True)
        manager.start()
        manager.get_result(streamed, PATIENCE)
        manager.stop(hard_stop=True)
        outputs = {output.request_id: output for output in manager}
        assert sorted(outputs) == sorted([*ids, streamed])
        for output in outputs.values():
            assert output.status == RequestStatus.FAILED
            assert "stopped" in output.error
            assert len(output.generated_tokens) < LONG

    def test_hard_after_a_soft_one_does_not_wait(self, llama) -> None:
        manager = new_manager(llama, greedy(LONG))
        request_id = manager.add_request(PROMPT)
        manager.start()
        manager.stop(block=False)
        manager.stop(hard_stop=True)
        assert "stopped" in manager.get_result(request_id).error

    def test_before_the_start_ends_what_was_added(self, llama) -> None:
        manager = new_manager(llama)
        ids = manager.add_requests([PROMPT, PROMPT])
        manager.stop()
        outputs = list(manager)
        assert [output.request_id for output in outputs] == ids
        assert all("before it was started" in output.error for output in outputs)
        assert not manager.is_running()

    def test_lets_no_request_in_afterwards(self, llama) -> None:
        manager = new_manager(llama)
        manager.start()
        manager.stop()
        for add in (lambda: manager.add_request(PROMPT), lambda: manager.add_requests([PROMPT])):
            with pytest.raises(RuntimeError, match="no more requests"):
                add()
        assert manager.get_result() is None

    def test_lets_no_request_in_while_it_finishes_the_others(self, llama) -> None:
        manager = new_manager(llama, greedy(LONG))
        request_id = manager.add_request(PROMPT)
        manager.start()
        manager.stop(block=False)
        with pytest.raises(RuntimeError, match="no more requests"):
            manager.add_request(PROMPT)
        manager.stop()
        assert [output.request_id for output in manager] == [request_id]

    def test_can_be_followed_by_a_start(self, llama) -> None:
        manager = new_manager(llama)
        for limit in (3, 6, 9):
            manager.start()
            request_id = manager.add_request(PROMPT, max_new_tokens=limit)
            manager.stop()
            output = manager.get_result(request_id)
            assert output.generated_tokens == generates(PROMPT, greedy(limit))

    def test_twice_or_destroying_twice_is_harmless(self, llama) -> None:
        manager = new_manager(llama)
        manager.destroy()
        manager.start()
        manager.stop()
        manager.stop()
        manager.destroy()
        manager.destroy()
        assert not manager.is_running()

    def test_for_good_finishes_what_is_there(self, llama) -> None:
        manager = new_manager(llama)
        manager.start()
        request_id = manager.add_request(PROMPT)
        manager.destroy()
        assert manager.get_result(request_id).generated_tokens == generates(PROMPT, greedy(8))
        assert manager._engine is None

    def test_without_waiting_can_be_waited_for(self, llama, log) -> None:
        log.set_level("INFO", "transformers")
        manager = new_manager(llama, greedy(60))
        manager.start()
        request_id = manager.add_request(PROMPT)
        begin = time.perf_counter()
        manager.stop(block=False)
        manager.join(begin)
        assert not manager.is_running()
        assert len(manager.get_result(request_id).generated_tokens) == 60
        assert re.search(r"the manager stopped after \d+\.\d+ s", log.text)
        manager.join(begin)

    @pytest.mark.parametrize("keep", [False, True])
    def test_without_waiting_keeps_the_engine_for_the_next_session_or_not(self, llama, keep: bool) -> None:
        with started(llama, greedy(8), block=False, persistent_manager=keep) as manager:
            request_id = manager.add_request(PROMPT)
        manager.join(time.perf_counter())
        assert manager.get_result(request_id).error is None
        assert (manager._engine is not None) == keep
        if keep:
            outputs = llama.generate_batch([PROMPT], greedy(8), async_batching=True, persistent_manager=True)
            assert [output.generated_tokens for output in outputs.values()] == [generates(PROMPT, greedy(8))]
            assert llama.init_continuous_batching(async_batching=True) is manager
            manager.destroy()

    def test_from_several_threads_at_once_is_harmless(self, llama) -> None:
        manager = new_manager(llama, greedy(50))
        ids = manager.add_requests([PROMPT] * 4)
        manager.start()
        for join in [in_thread(manager.stop) for _ in range(4)]:
            join()
        assert sorted(output.request_id for output in manager) == sorted(ids)
        assert llama.config._attn_implementation != "async_batching"

    def test_at_the_end_of_the_context_without_blocking(self, llama) -> None:
        with started(llama, greedy(60), block=False) as manager:
            request_id = manager.add_request(PROMPT)
        assert len(manager.get_result(request_id, PATIENCE).generated_tokens) == 60
        manager.stop()


class TestStarting:
    def test_takes_what_was_added_before(self, llama) -> None:
        manager = new_manager(llama)
        assert not manager.is_running()
        request_id = manager.add_request(PROMPT)
        manager.start()
        assert manager.get_result(request_id, PATIENCE).generated_tokens == generates(PROMPT, greedy(8))
        manager.stop()

    def test_twice_changes_nothing(self, llama) -> None:
        with started(llama) as manager:
            engine = manager._engine
            manager.start()
            assert manager._engine is engine
            request_id = manager.add_request(PROMPT)
            assert manager.get_result(request_id, PATIENCE).generated_tokens == generates(PROMPT, greedy(8))

    def test_uses_what_a_warmup_has_built(self, llama) -> None:
        manager = new_manager(llama)
        assert not manager.warmed_up
        manager.warmup()
        assert manager.warmed_up
        assert not manager.is_running()
        engine = manager._engine
        manager.warmup()
        manager.start()
        assert manager._engine is engine
        request_id = manager.add_request(PROMPT)
        assert manager.get_result(request_id, PATIENCE).generated_tokens == generates(PROMPT, greedy(8))
        manager.stop()

    def test_after_a_warmup_can_be_left_out(self, llama) -> None:
        manager = new_manager(llama)
        before = llama.config._attn_implementation
        manager.warmup()
        manager.stop()
        assert llama.config._attn_implementation == before
        assert not manager.warmed_up


class TestPausing:
    def test_lets_new_weights_take_effect_in_place(self) -> None:
        model, other = new_model("llama", seed=1), shared_model("llama")
        first = reference(new_model("llama", seed=1), PROMPT, greedy(8))
        with started(model) as manager:
            before = manager.get_result(manager.add_request(PROMPT), PATIENCE)
            with manager.pause(), torch.no_grad():
                for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                    mine.copy_(theirs)
            after = manager.get_result(manager.add_request(PROMPT), PATIENCE)
        assert before.generated_tokens == first
        assert after.generated_tokens == reference(other, PROMPT, greedy(8)) != first

    def test_holds_the_loop_and_keeps_its_requests(self, llama) -> None:
        with started(llama, greedy(200)) as manager:
            request_id = manager.add_request(PROMPT, streaming=True)
            stream = manager.request_id_iter(request_id)
            next(stream)
            with manager.pause():
                steps = manager._engine.steps
                later = manager.add_request(PROMPT, max_new_tokens=5)
                assert manager.get_result(later, timeout=0.1) is None
                assert manager._engine.steps == steps
            assert list(stream)[-1].generated_tokens == generates(PROMPT, greedy(200))
            assert manager.get_result(later, PATIENCE).generated_tokens == generates(PROMPT, greedy(5))

    def test_by_several_threads_lasts_until_the_last_one_leaves(self, llama) -> None:
        inside, leave = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

        def hold(i: int) -> None:
            with manager.pause():
                inside[i].set()
                assert leave[i].wait(PATIENCE)

        with started(llama, greedy(30)) as manager:
            joins = [in_thread(lambda i=i: hold(i)) for i in range(3)]
            assert all(event.wait(PATIENCE) for event in inside)
            request_id = manager.add_request(PROMPT)
            for event, join in zip(leave[:2], joins[:2], strict=True):
                event.set()
                join()
                assert manager.get_result(request_id, timeout=0.05) is None
            leave[2].set()
            joins[2]()
            assert manager.get_result(request_id, PATIENCE).generated_tokens == generates(PROMPT, greedy(30))

    def test_again_and_again_from_many_threads_loses_nothing(self, llama) -> None:
        prompts = random_prompts(20, longest=30)

        def blink() -> None:
            for _ in range(20):
                with manager.pause():
                    time.sleep(0.0005)

        with started(llama, greedy(40)) as manager:
            ids = manager.add_requests(prompts)
            for join in [in_thread(blink) for _ in range(4)]:
                join()
            for request_id, prompt in zip(ids, prompts, strict=True):
                answer = generates(prompt, greedy(40))
                assert manager.get_result(request_id, PATIENCE).generated_tokens == answer

    def test_can_be_nested(self, llama) -> None:
        with started(llama) as manager:
            with manager.pause(), manager.pause():
                request_id = manager.add_request(PROMPT)
                assert manager.get_result(request_id, timeout=0.05) is None
            assert ended(manager.get_result(request_id, PATIENCE)).error is None

    def test_lets_the_model_be_used(self, llama) -> None:
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            expected = llama(ids).logits
        with started(llama) as manager, manager.pause(), torch.no_grad():
            torch.testing.assert_close(llama(ids).logits, expected)

    def test_of_a_manager_that_does_not_run_is_refused(self, llama) -> None:
        manager = new_manager(llama)
        with pytest.raises(RuntimeError, match="not running"), manager.pause():
            pass
        manager.start()
        manager.stop()
        with pytest.raises(RuntimeError, match="not running"), manager.pause():
            pass

    def test_refuses_a_stop_from_inside(self, llama) -> None:
        with started(llama) as manager:
            with manager.pause():
                with pytest.raises(RuntimeError, match="inside a pause"):
                    manager.stop()
                with pytest.raises(RuntimeError, match="inside a pause"):
                    manager.destroy()
            assert manager.get_result(manager.add_request(PROMPT), PATIENCE).error is None

    def test_holds_back_another_threads_stop(self, llama) -> None:
        manager = new_manager(llama)
        manager.start()
        with manager.pause():
            stopping = in_thread(manager.stop)
            time.sleep(0.05)
            assert manager.is_running()
        stopping()
        assert not manager.is_running()

    def test_ends_with_an_exception_and_the_loop_goes_on(self, llama) -> None:
        with started(llama) as manager:
            with pytest.raises(KeyError), manager.pause():
                raise KeyError("a mistake of the user's")
            assert manager.get_result(manager.add_request(PROMPT), PATIENCE).error is None


class TestPersistentManagers:
    def test_serve_calls_one_after_another(self) -> None:
        model = new_model("llama")
        engines = set()
        for seed in range(3):
            prompts = random_prompts(6, longest=30, seed=seed)
            outputs = model.generate_batch(
                prompts, generation_config=greedy(8), async_batching=True, persistent_manager=True
            )
            assert len(outputs) == 6
            assert [o.generated_tokens for o in outputs.values()] == [generates(p, greedy(8)) for p in prompts]
            engines.add(id(getattr(model, CACHED)))
        assert len(engines) == 1
        model.destroy_cached_continuous_batching_manager()
        assert not hasattr(model, CACHED)
        assert engine_threads() == []

    def test_grow_for_longer_workloads_and_more_requests(self) -> None:
        model = new_model("llama")
        for count, longest, limit in ((2, 10, 3), (2, 300, 20), (30, 60, 6), (1, 5, 450), (2, 700, 10)):
            prompts = random_prompts(count, longest=longest, shortest=longest // 2, seed=longest)
            outputs = model.generate_batch(
                prompts, generation_config=greedy(limit), async_batching=True, persistent_manager=True
            )
            assert [o.error for o in outputs.values()] == [None] * count
            assert [o.generated_tokens for o in outputs.values()] == [generates(p, greedy(limit)) for p in prompts]
        model.destroy_cached_continuous_batching_manager()

    def test_take_each_calls_generation_settings(self) -> None:
        model = new_model("llama")
        for limit in (4, 9):
            output = model.generate_batch(
                [PROMPT], generation_config=greedy(limit), async_batching=True, persistent_manager=True
            )
            assert [o.generated_tokens for o in output.values()] == [generates(PROMPT, greedy(limit))]
        model.destroy_cached_continuous_batching_manager()

    def test_are_given_up_by_a_call_that_does_not_ask_for_them(self) -> None:
        """And calls after that one work like any other."""
        model = new_model("llama")
        answer = generates(PROMPT, greedy(4))
        for persistent in (True, False, False, True, True, False, True):
            outputs = model.generate_batch(
                [PROMPT], generation_config=greedy(4), async_batching=True, persistent_manager=persistent
            )
            assert [output.generated_tokens for output in outputs.values()] == [answer]
        model.destroy_cached_continuous_batching_manager()

    def test_serve_a_context_after_a_call_and_a_call_after_a_context(self) -> None:
        model = new_model("llama")
        answer = generates(PROMPT, greedy(4))
        for _ in range(2):
            outputs = model.generate_batch(
                [PROMPT], generation_config=greedy(4), async_batching=True, persistent_manager=True
            )
            assert [output.generated_tokens for output in outputs.values()] == [answer]
            with started(model, greedy(4), persistent_manager=True) as manager:
                request_id = manager.add_request(PROMPT)
                assert manager.get_result(request_id, PATIENCE).generated_tokens == answer
            assert getattr(model, CACHED) is manager
        model.destroy_cached_continuous_batching_manager()

    def test_survive_a_context_that_ends_with_an_exception(self) -> None:
        model = new_model("llama")
        with started(model, greedy(4), persistent_manager=True):
            pass
        with pytest.raises(KeyError), started(model, greedy(4), persistent_manager=True):
            raise KeyError
        outputs = model.generate_batch([PROMPT], generation_config=greedy(4), async_batching=True)
        assert [o.generated_tokens for o in outputs.values()] == [generates(PROMPT, greedy(4))]
        model.destroy_cached_continuous_batching_manager()

    def test_take_up_weights_that_changed_in_between(self) -> None:
        model, other = new_model("llama", seed=1), shared_model("llama")
        ask = {"generation_config": greedy(8), "async_batching": True, "persistent_manager": True}
        before = model.generate_batch([PROMPT], **ask)
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
        after = model.generate_batch([PROMPT], **ask)
        assert [o.generated_tokens for o in before.values()] != [o.generated_tokens for o in after.values()]
        assert [o.generated_tokens for o in after.values()] == [reference(other, PROMPT, greedy(8))]
        model.destroy_cached_continuous_batching_manager()

    def test_leave_the_model_to_its_user_between_calls(self) -> None:
        model = new_model("llama")
        ids = torch.tensor([PROMPT])
        before = model(ids).logits
        model.generate_batch([PROMPT], generation_config=greedy(4), async_batching=True, persistent_manager=True)
        assert torch.equal(model(ids).logits, before)
        model(ids, labels=ids).loss.backward()
        model.destroy_cached_continuous_batching_manager()

    def test_with_other_settings_are_refused(self) -> None:
        model = new_model("llama")
        model.generate_batch([PROMPT], generation_config=greedy(4), async_batching=True, persistent_manager=True)
        with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
            model.generate_batch([PROMPT], async_batching=AsyncBatchingConfig(overlap=False))
        with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
            model.generate_batch(
                [PROMPT], continuous_batching_config=ContinuousBatchingConfig(num_blocks=7), async_batching=True
            )
        model.destroy_cached_continuous_batching_manager()
        model.destroy_cached_continuous_batching_manager()
        outputs = model.generate_batch(
            [PROMPT], generation_config=greedy(4), async_batching=AsyncBatchingConfig(overlap=False)
        )
        assert [o.generated_tokens for o in outputs.values()] == [generates(PROMPT, greedy(4))]

    def test_work_after_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = new_model("llama")
        ask = {"generation_config": greedy(4), "async_batching": True, "persistent_manager": True}
        model.generate_batch([PROMPT], **ask)
        with monkeypatch.context() as broken:
            broken.setattr(Runner, "step", lambda *_: 1 / 0)
            outputs = model.generate_batch([PROMPT, PROMPT], **ask)
        assert all("ZeroDivisionError" in output.error for output in outputs.values())
        outputs = model.generate_batch([PROMPT], **ask)
        assert [o.generated_tokens for o in outputs.values()] == [generates(PROMPT, greedy(4))]
        model.destroy_cached_continuous_batching_manager()


class TestFailures:
    @staticmethod
    def fail_once(monkeypatch: pytest.MonkeyPatch, where: type, name: str, after: int) -> None:
        original, calls = getattr(where, name), {"left": after}

        def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise MemoryError("no room at the inn")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(where, name, fail)

    @pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
    @pytest.mark.parametrize("name", ["stage", "take", "step", "key_for"])
    @pytest.mark.parametrize("after", [1, 6])
    def test_end_each_request_with_the_cause_and_the_next_call_works(
        self, llama, name: str, after: int, overlap: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, prompts = AsyncBatchingConfig(overlap=overlap, self_check=False), random_prompts(10, longest=20)
        self.fail_once(monkeypatch, Runner, name, after)
        outputs = llama.generate_batch(prompts, generation_config=greedy(30), async_batching=own)
        assert list(outputs) == [f"req_{i}" for i in range(10)]
        for output in outputs.values():
            assert output.status == RequestStatus.FAILED
            assert "MemoryError: no room at the inn" in output.error
        assert engine_threads() == []
        outputs = llama.generate_batch(prompts, generation_config=greedy(30), async_batching=own)
        assert [o.generated_tokens for o in outputs.values()] == [generates(p, greedy(30)) for p in prompts]

    @pytest.mark.parametrize("name", ["stage", "step"])
    def test_keep_nothing_of_the_engine_in_memory(self, llama, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_once(monkeypatch, Runner, name, 3)
        monkeypatch.setattr(loop_thread.logger, "error", lambda *_, **__: None)  # pytest keeps what is logged
        manager = new_manager(llama, greedy(20), self_check=False)
        manager.add_requests(random_prompts(6, longest=20))
        gc.disable()
        try:
            manager.start()
            engine = weakref.ref(manager._engine)
            manager.stop()
            assert engine() is None
        finally:
            gc.enable()
        assert "no room at the inn" in str(manager.fatal_error)

    @pytest.mark.parametrize(
        ("where", "name"),
        [
            (Scheduler, "plan"), (Scheduler, "retire"), (Scheduler, "add"), (Scheduler, "_release"),
            (Prefill, "chunks"), (Endings, "find"),
        ],
    )  # fmt: skip
    def test_of_the_scheduler_lose_no_request_either(
        self, llama, where: type, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fail_once(monkeypatch, where, name, 3)
        manager = new_manager(llama, greedy(20), self_check=False)
        ids = manager.add_requests(random_prompts(6, longest=20))
        manager.start()
        manager.stop()
        assert sorted(output.request_id for output in manager) == sorted(ids)

    def test_of_a_row_lose_no_request_either(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_once(monkeypatch, Rows, "take", 3)
        manager = new_manager(llama, greedy(20))
        ids = manager.add_requests(random_prompts(6, longest=20))
        manager.start()
        manager.stop()
        assert sorted(output.request_id for output in manager) == sorted(ids)

    def test_are_told_to_whoever_waits_or_comes_later(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_once(monkeypatch, Runner, "step", 1)
        manager = new_manager(llama, greedy(30))
        manager.start()
        waiting = in_thread(lambda: manager.get_result("nobody"))
        manager.add_request(PROMPT)
        assert waiting() is None
        with pytest.raises(RuntimeError, match="MemoryError: no room at the inn"):
            manager.add_request(PROMPT)
        assert isinstance(manager.fatal_error, MemoryError)
        assert not manager.is_running()
        manager.stop()
        manager.start()
        assert manager.fatal_error is None
        request_id = manager.add_request(PROMPT)
        assert manager.get_result(request_id, PATIENCE).generated_tokens == generates(PROMPT, greedy(30))
        manager.stop()

    def test_end_a_pause_that_waits(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        def slow_failure(*_: object) -> None:
            time.sleep(0.1)
            raise MemoryError("no room at the inn")

        monkeypatch.setattr(Runner, "step", slow_failure)
        manager = new_manager(llama)
        manager.start()
        manager.add_request(PROMPT)
        time.sleep(0.02)

        def pause() -> None:
            with manager.pause():
                pass

        with pytest.raises(RuntimeError, match="cannot pause"):
            in_thread(pause)()
        manager.stop()

    def test_for_want_of_memory_say_nothing_about_how_a_model_can_be_run(self, llama) -> None:
        def fail(*_: object) -> None:
            handle.remove()
            raise torch.OutOfMemoryError("none left")

        handle = llama.get_input_embeddings().register_forward_hook(fail)
        manager = new_manager(llama, greedy(4))
        with pytest.raises(torch.OutOfMemoryError, match="none left"):
            manager.start()
        manager.start()
        output = manager.get_result(manager.add_request(PROMPT), timeout=PATIENCE)
        manager.stop()
        assert manager.mode is Mode.PAGES
        assert output.generated_tokens == generates(PROMPT, greedy(4))

    def test_while_building_give_the_model_back(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        before = llama.config
        with monkeypatch.context() as broken:
            self.fail_once(broken, Runner, "__init__", 1)
            with pytest.raises(MemoryError):
                llama.generate_batch([PROMPT], async_batching=True)
        assert llama.config is before
        outputs = llama.generate_batch([PROMPT], generation_config=greedy(4), async_batching=True)
        assert outputs["req_0"].generated_tokens == generates(PROMPT, greedy(4))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
    def test_in_the_context_give_the_model_back(self, error: type[BaseException]) -> None:
        model = new_model("llama")
        before = model.config
        ids = torch.tensor([PROMPT])
        logits = model(ids).logits
        with pytest.raises(error), started(model, greedy(LONG)) as manager:
            manager.add_requests(random_prompts(10, longest=20))
            raise error
        assert not manager.is_running()
        assert model.config is before
        assert torch.equal(model(ids).logits, logits)
        assert len(list(manager)) == 10

    def test_interrupting_a_call_give_the_model_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = new_model("llama")
        before = model.config
        with monkeypatch.context() as interrupted:
            self.fail_once(interrupted, AsyncBatchingManager, "get_result", 2)
            with pytest.raises(MemoryError):
                model.generate_batch([PROMPT] * 3, generation_config=greedy(LONG), async_batching=True)
        assert model.config is before
        assert engine_threads() == []
        outputs = model.generate_batch([PROMPT], generation_config=greedy(4), async_batching=True)
        assert outputs["req_0"].generated_tokens == generates(PROMPT, greedy(4))


class TestThreadsOfTheEngine:
    """On which criteria, processors and hooks of the user's are called, and the garbage collector may run."""

    @pytest.mark.parametrize("hold", ["pause", "update_weights", "sleep", "recording"])
    def test_cannot_hold_the_loop_that_waits_for_them(self, llama, hold: str) -> None:
        def criterion(ids: torch.Tensor, scores: None) -> bool:
            with getattr(manager, hold)() or nullcontext():
                return False

        manager = llama.init_continuous_batching(greedy(4), async_batching=True)
        manager.start()
        output = manager.get_result(manager.add_request(PROMPT, stopping_criteria=[criterion]), timeout=PATIENCE)
        manager.stop()
        assert "cannot hold the manager from one of its own threads" in output.error

    def test_add_requests_but_do_not_wait_for_room(self, llama) -> None:
        def criterion(ids: torch.Tensor, scores: None) -> bool:
            added.append(manager.add_request(PROMPT, stopping_criteria=[]))
            return False

        added: list[str] = []
        manager = llama.init_continuous_batching(
            greedy(8), batching(max_queue_size=1, max_requests_per_batch=1), async_batching=True
        )
        manager.start()
        output = manager.get_result(manager.add_request(PROMPT, stopping_criteria=[criterion]), timeout=PATIENCE)
        assert "the queue has no room for 1 more requests (max_queue_size=1)" in output.error
        assert manager.get_result(added[0], timeout=PATIENCE).generated_tokens == generates(PROMPT, greedy(8))
        manager.stop()

    def test_end_a_stream_of_results_that_is_collected_there(self) -> None:
        model, collected = new_model("llama"), threading.Event()

        def collect(*_: object) -> None:
            if dropped.is_set() and not collected.is_set():
                collected.set()
                gc.collect()

        dropped = threading.Event()
        model.lm_head.register_forward_hook(collect)
        results = model.generate_batch(
            [PROMPT] * 4, greedy(LONG), async_batching=True, stream=True,
            request_settings=[{"max_new_tokens": 1}, {}, {}, {}],
        )  # fmt: skip
        next(results)
        gc.disable()
        try:
            cycle: list = [results]
            cycle.append(cycle)
            del results, cycle
            dropped.set()
            assert collected.wait(PATIENCE)
            end = time.monotonic() + PATIENCE
            while engine_threads() and time.monotonic() < end:
                time.sleep(0.01)
        finally:
            gc.enable()
        assert engine_threads() == []
        assert generate_alone(model, PROMPT, greedy(3)) == generates(PROMPT, greedy(3))


class TestLongPrompts:
    """Beyond what the config states, in a manager that runs: nobody could size the cache for them."""

    @pytest.mark.parametrize("length", [511, 512, 513, 600, 5000])
    def test_end_with_tokens_or_an_error_and_disturb_nobody(self, llama, length: int) -> None:
        with started(llama, greedy(100)) as manager:
            other = manager.add_request(PROMPT)
            long = manager.add_request([1 + i % 96 for i in range(length)], max_new_tokens=3)
            output = ended(manager.get_result(long, PATIENCE))
            assert ended(manager.get_result(other, PATIENCE)).generated_tokens == generates(PROMPT, greedy(100))
        if output.error is None:
            assert len(output.generated_tokens) == 3
        else:
            assert long in output.error


class TestKeptEngines:
    @pytest.fixture
    def kept(self, llama) -> Iterator[Callable[..., list[list[int]]]]:
        def batch(prompts: list[list[int]], limit: int = 6) -> list[list[int]]:
            outputs = llama.generate_batch(
                prompts, generation_config=greedy(limit), async_batching=True, persistent_manager=True
            )
            assert [output.error for output in outputs.values()] == [None] * len(prompts)
            return [output.generated_tokens for output in outputs.values()]

        batch.model = llama
        yield batch
        llama.destroy_cached_continuous_batching_manager()

    def test_are_built_anew_for_more_requests_and_kept_for_fewer(self, kept) -> None:
        prompts = random_prompts(32, longest=20)
        kept(prompts[:1])
        one = getattr(kept.model, CACHED)._engine
        assert kept(prompts) == [generates(p, greedy(6)) for p in prompts]
        many = getattr(kept.model, CACHED)._engine
        assert many is not one
        assert many.steps == 6, "all of them at once"
        kept(prompts[:3])
        assert getattr(kept.model, CACHED)._engine is many

    def test_follow_a_model_that_changes_its_type(self, kept) -> None:
        kept([PROMPT])
        kept.model.double()
        assert kept([PROMPT]) == [generates(PROMPT, greedy(6))]

    def test_forget_results_that_nobody_asked_for(self, kept) -> None:
        with started(kept.model, persistent_manager=True) as manager:
            manager.add_requests(random_prompts(3, longest=9))
        assert kept([PROMPT]) == [generates(PROMPT, greedy(6))]

    def test_serve_one_call_at_a_time_and_refuse_the_others(self, kept) -> None:
        kept([PROMPT])
        calls = [in_thread(lambda: kept(random_prompts(8, longest=30), 20)) for _ in range(4)]
        answers = []
        for call in calls:
            try:
                answers.append(call())
            except RuntimeError as error:
                assert "generating already" in str(error)
        assert answers
        assert answers == [[generates(p, greedy(20)) for p in random_prompts(8, longest=30)]] * len(answers)

    def test_keep_results_apart_from_requests_that_were_added_before(self, kept) -> None:
        kept([PROMPT])
        manager = getattr(kept.model, CACHED)
        mine = manager.add_request([7, 8, 9], max_new_tokens=3)
        assert kept([PROMPT]) == [generates(PROMPT, greedy(6))]
        assert manager.get_result(mine, PATIENCE).generated_tokens == generates([7, 8, 9], greedy(3))

    def test_stay_when_no_new_one_could_do_better(self, llama) -> None:
        engines = set()
        for _ in range(3):
            llama.generate_batch(
                [[1] * 20], generation_config=greedy(9), async_batching=True, persistent_manager=True,
                continuous_batching_config=batching(num_blocks=1, page_size=8),
            )  # fmt: skip
            engines.add(getattr(llama, CACHED)._engine)
        assert len(engines) == 1
        llama.destroy_cached_continuous_batching_manager()

    def test_stay_with_their_model_when_it_is_copied(self, kept) -> None:
        kept([PROMPT])
        twin = copy.deepcopy(kept.model)
        outputs = twin.generate_batch([PROMPT], generation_config=greedy(6), async_batching=True)
        assert [output.generated_tokens for output in outputs.values()] == kept([PROMPT])


class TestSurroundings:
    def test_inference_mode(self, llama) -> None:
        with torch.inference_mode():
            outputs = llama.generate_batch([PROMPT], generation_config=greedy(6), async_batching=True)
        assert outputs["req_0"].generated_tokens == generates(PROMPT, greedy(6))

    def test_the_global_seed_is_left_alone_by_greedy_decoding(self, llama) -> None:
        before = torch.get_rng_state()
        llama.generate_batch([PROMPT], generation_config=greedy(6), async_batching=True)
        assert torch.equal(torch.get_rng_state(), before)

    def test_another_default_device(self, llama) -> None:
        torch.set_default_device("meta")
        try:
            manager = new_manager(llama, greedy(6))
            manager.add_request(PROMPT)
            manager.start()
        finally:
            torch.set_default_device(None)
        assert ended(manager.get_result(timeout=PATIENCE)).generated_tokens == generates(PROMPT, greedy(6))

    @pytest.mark.parametrize("settings", [{"top_k": 2**40, "do_sample": True}, {"eos_token_id": 2**31}], ids=str)
    def test_settings_beyond_32_bits(self, llama, settings: dict[str, Any]) -> None:
        config = GenerationConfig(max_new_tokens=6, **settings)
        output = llama.generate_batch([PROMPT], generation_config=config, async_batching=True)["req_0"]
        assert output.error is None
        assert len(output.generated_tokens) == 6

    def test_starting_again_after_a_failure(self, llama, monkeypatch) -> None:
        manager = new_manager(llama, greedy(6))
        with monkeypatch.context() as broken:
            broken.setattr(Runner, "stage", lambda *_: 1 / 0)
            manager.add_request(PROMPT)
            manager.start()
            assert "ZeroDivisionError" in manager.get_result(timeout=PATIENCE).error
        while manager.is_running():
            time.sleep(0.01)
        manager.start()
        manager.add_request(PROMPT)
        assert ended(manager.get_result(timeout=PATIENCE)).generated_tokens == generates(PROMPT, greedy(6))

    def test_an_interrupt_while_a_pause_begins(self, llama, monkeypatch) -> None:
        with started(llama) as manager:
            with monkeypatch.context() as interrupting:
                interrupting.setattr(
                    manager._mailbox.lock, "wait_for", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
                )
                with pytest.raises(KeyboardInterrupt), manager.pause():
                    pass
            request_id = manager.add_request(PROMPT)
            assert ended(manager.get_result(request_id, PATIENCE)).generated_tokens == generates(PROMPT, greedy(8))


class TestPriorities:
    def test_go_before_arrival_among_those_that_wait(self, llama) -> None:
        manager = llama.init_continuous_batching(
            greedy(8), batching(max_requests_per_batch=1, max_batch_tokens=32), async_batching=True
        )
        for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 5)):
            manager.add_request([1, 2, 3], request_id=name, priority=priority)
        manager.start()
        assert [manager.get_result().request_id for _ in range(4)] == ["b", "d", "a", "c"]
        manager.stop()

    def test_that_are_no_integers_are_refused(self, llama) -> None:
        manager = llama.init_continuous_batching(greedy(8), async_batching=True)
        for priority in ("high", 1.5, None, True, 2**31, -(2**70)):
            with pytest.raises(ValueError, match="request mine: priority must be an integer"):
                manager.add_request([1, 2, 3], request_id="mine", priority=priority)
        manager.stop()


class TestDeadlines:
    def test_end_a_request_with_what_it_has_and_leave_others_alone(self, llama) -> None:
        expected = reference(llama, [1, 2, 3], greedy(4))
        with llama.continuous_batching_context_manager(greedy(4), async_batching=True) as manager:
            late = manager.add_request([1, 2, 3], max_new_tokens=100_000, deadline=0.3)
            in_time = manager.add_request([1, 2, 3], deadline=3600)
            output = manager.get_result(late)
            assert output.error == f"request {late} was not finished by its deadline, 0.3 s"
            assert 0 < len(output.generated_tokens) < 100_000
            assert manager.get_result(in_time).generated_tokens == expected

    def test_end_a_request_that_waits(self, llama) -> None:
        manager = llama.init_continuous_batching(
            greedy(4), batching(max_requests_per_batch=1, max_batch_tokens=32), async_batching=True
        )
        manager.add_request([1, 2, 3], request_id="long", max_new_tokens=100_000)
        manager.add_request([1, 2, 3], request_id="late", deadline=0.2)
        manager.start()
        assert "was not finished by its deadline" in manager.get_result("late").error
        manager.stop(hard_stop=True)

    def test_that_are_no_seconds_are_refused(self, llama) -> None:
        manager = llama.init_continuous_batching(greedy(8), async_batching=True)
        for deadline in ("soon", -1, float("nan"), True):
            with pytest.raises(ValueError, match="request mine: deadline must be a number of seconds"):
                manager.add_request([1, 2, 3], request_id="mine", deadline=deadline)
        manager.stop()


class TestSettingsOfEachRequestOfABatch:
    def test_are_whatever_add_request_takes(self, llama) -> None:
        own = [
            {"max_new_tokens": 3}, {}, {"eos_token_id": generates(PROMPT, greedy(8))[2]}, {"request_id": "mine"},
            {"repetition_penalty": 1.8}, {"do_sample": True, "seed": 4}, {"do_sample": True, "seed": 4},
            {"generation_config": greedy(5)}, {"max_time": 0.0},
        ]  # fmt: skip
        outputs = llama.generate_batch([PROMPT] * 9, greedy(8), request_settings=own, async_batching=True)
        whole = generates(PROMPT, greedy(8))
        tokens = [output.generated_tokens for output in outputs.values()]
        assert tokens[0] == whole[:3]
        assert tokens[1] == tokens[3] == whole
        assert tokens[2] == whole[:3]
        assert list(outputs)[3] == "mine"
        assert tokens[4] != whole
        assert tokens[5] == tokens[6]
        assert tokens[7] == whole[:5]
        assert tokens[8] == whole[:1]

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            ([{}], "1 request_settings for 2 prompts"),
            ([{}, 5], r"request_settings\[1\] must be a dictionary"),
            ([{}, {"tempreature": 1}], "request req_1: unknown keyword arguments"),
            ([{"request_id": "a"}, {"request_id": "a"}], "request a: this id is given twice"),
            ([{"streaming": True}, {}], r"request_settings\[0\]: streaming"),
        ],
        ids=str,
    )
    def test_are_checked_before_anything_runs(self, llama, own: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            llama.generate_batch([PROMPT] * 2, greedy(8), request_settings=own, async_batching=True)

    def test_go_with_priorities(self, llama) -> None:
        order = [
            output.request_id
            for output in llama.generate_batch(
                [PROMPT] * 4, greedy(4), batching(max_requests_per_batch=1, max_batch_tokens=32), async_batching=True,
                request_settings=[{"priority": priority} for priority in (0, 5, -1, 5)], stream=True,
            )
        ]  # fmt: skip
        assert order == ["req_1", "req_3", "req_0", "req_2"]


class TestWarmingUp:
    def test_runs_the_largest_steps_and_leaves_no_trace(self, llama, monkeypatch) -> None:
        manager = llama.init_continuous_batching(
            greedy(8), batching(max_requests_per_batch=4, max_batch_tokens=64, num_blocks=40, page_size=16),
            async_batching=True,
        )  # fmt: skip
        manager._keeper.prepare(manager.workload)
        engine, plans = manager._engine, []
        engine.warm = False  # as where something is compiled or captured
        plan = engine.scheduler.plan
        monkeypatch.setattr(engine.scheduler, "plan", lambda: plans.append(plan()) or plans[-1])
        manager.warmup()
        assert manager.warmed_up
        assert max(plan.tokens for plan in plans if plan is not None) == 64
        assert sum(plan.decodes == len(plan.rows) == 4 for plan in plans if plan is not None) >= 4
        assert engine.scheduler.pages.free == engine.scheduler.pages.count
        count = len(plans)
        manager.warmup()
        assert len(plans) == count
        manager.add_request(PROMPT)
        manager.start()
        assert ended(manager.get_result(timeout=PATIENCE)).generated_tokens == generates(PROMPT, greedy(8))
        assert manager._engine is engine
        manager.stop()

    def test_that_fails_gives_the_model_back(self, llama, monkeypatch) -> None:
        manager = new_manager(llama)
        monkeypatch.setattr(Engine, "warm_up", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            manager.warmup()
        llama(torch.tensor([PROMPT]))
        assert engine_threads() == []

    def test_happens_before_a_context_begins_unless_told_not_to(self, llama, monkeypatch) -> None:
        warmed = []
        monkeypatch.setattr(Engine, "warm_up", lambda *_: warmed.append(True))
        monkeypatch.setattr(AsyncBatchingManager, "warmed_up", False)
        with started(llama, warmup=False):
            assert not warmed
        with started(llama):
            assert warmed


class TestTheEndOfTheInterpreter:
    def test_is_quiet_while_a_manager_runs(self) -> None:
        script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import greedy, new_model
manager = new_model("llama").init_continuous_batching(greedy(100_000), async_batching=True)
manager.start()
manager.add_request([1, 2, 3], streaming=True)
manager.get_result()
"""
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert process.returncode == 0
        assert "Traceback" not in process.stderr, process.stderr
        assert "async" not in process.stderr, process.stderr


@pytest.mark.parametrize("how", ["kept", "warmed up"])
def test_a_child_of_fork_generates_with_a_manager_of_the_parent(llama, how: str) -> None:
    manager = new_manager(llama)
    if how == "kept":
        manager.start()
        manager.stop(keep_for_next_session=True)
    else:
        manager.warmup()

    def work() -> bool:
        manager.start()
        return manager.get_result(manager.add_request(PROMPT), PATIENCE).generated_tokens == generates(
            PROMPT, greedy(8)
        )

    assert in_child(work)
    assert work()
    manager.destroy()
