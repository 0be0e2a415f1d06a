"""`max_queue_size`: whoever adds more requests than may wait is held up, and none is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from conftest import batching, greedy, new_model, random_prompts, reference, shared_model
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb.manager import AsyncBatchingManager


PATIENCE = 30  # seconds
PROMPT = [5, 6, 7, 8]
LONG = 400  # tokens
ONE_AT_A_TIME = {"max_requests_per_batch": 1, "max_batch_tokens": 32}


@pytest.fixture
def llama() -> PreTrainedModel:
    """A Llama of the test's own, with the weights of the shared one, which stays free to be asked."""
    return new_model("llama")


@pytest.fixture
def manager(llama) -> Iterator[AsyncBatchingManager]:
    """One request runs and two may wait."""
    manager = llama.init_continuous_batching(
        greedy(6), batching(max_queue_size=2, **ONE_AT_A_TIME), async_batching=True
    )
    yield manager
    manager.destroy()


def results(manager: AsyncBatchingManager, count: int) -> list[GenerationOutput]:
    return [manager.get_result(timeout=PATIENCE) for _ in range(count)]


def fill(manager: AsyncBatchingManager) -> list[str]:
    """A long request that runs, and two that wait."""
    manager.start()
    running = manager.add_request(PROMPT, max_new_tokens=LONG, streaming=True)
    manager.get_result(running, PATIENCE)
    return [running, manager.add_request(PROMPT), manager.add_request(PROMPT)]


def adding(manager: AsyncBatchingManager, outcome: list, **settings: object) -> threading.Thread:
    """Add a request on another thread, which is held up."""

    def add() -> None:
        try:
            outcome.append(manager.add_request(PROMPT, **settings))
        except RuntimeError as error:
            outcome.append(error)

    thread = threading.Thread(target=add, daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "the request was let in beyond the bound"
    return thread


class TestAFullQueue:
    def test_holds_up_who_adds_until_one_begins(self, manager) -> None:
        running, *_ = fill(manager)
        outcome: list = []
        thread = adding(manager, outcome)
        manager.cancel_request(running)
        thread.join(PATIENCE)
        output = manager.get_result(outcome[0], PATIENCE)
        assert output.generated_tokens == reference(shared_model("llama"), PROMPT, greedy(6))

    def test_loses_nothing_of_many_threads(self, manager) -> None:
        prompts, ids = random_prompts(24, longest=20), {}
        manager.start()

        def add(some: range) -> None:
            for i in some:
                ids[manager.add_request(prompts[i])] = i

        threads = [threading.Thread(target=add, args=(range(k, 24, 4),), daemon=True) for k in range(4)]
        for thread in threads:
            thread.start()
        outputs = results(manager, 24)
        for thread in threads:
            thread.join(PATIENCE)
        for output in outputs:
            expected = reference(shared_model("llama"), prompts[ids[output.request_id]], greedy(6))
            assert output.generated_tokens == expected

    def test_takes_more_requests_at_once_than_may_wait(self, manager) -> None:
        manager.start()
        ids = manager.add_requests(random_prompts(9, longest=20))
        assert sorted(output.request_id for output in results(manager, 9)) == sorted(ids)

    def test_refuses_who_waits_when_the_manager_stops(self, manager) -> None:
        fill(manager)
        outcome: list = []
        thread = adding(manager, outcome, request_id="late")
        manager.stop(hard_stop=True)
        thread.join(PATIENCE)
        assert isinstance(outcome[0], RuntimeError) or manager.get_result("late", PATIENCE).error is not None
        assert not manager._door.live

    def test_of_a_manager_that_does_not_run_raises(self, manager) -> None:
        manager.add_request(PROMPT)
        manager.add_request(PROMPT)
        with pytest.raises(RuntimeError, match=r"no room for 1 more requests \(max_queue_size=2\)"):
            manager.add_request(PROMPT, request_id="late")
        assert "late" not in manager._door.live
        manager.start()
        assert all(output.error is None for output in results(manager, 2))

    def test_raises_inside_a_pause(self, manager) -> None:
        fill(manager)
        with manager.pause(), pytest.raises(RuntimeError, match="no room"):
            manager.add_request(PROMPT)

    def test_refuses_a_prompt_that_is_not_valid_at_once(self, manager) -> None:
        fill(manager)
        began = time.perf_counter()
        with pytest.raises(ValueError, match="empty"):
            manager.add_request([])
        assert time.perf_counter() - began < PATIENCE

    def test_does_not_concern_a_batch(self, llama) -> None:
        config = batching(max_queue_size=2, **ONE_AT_A_TIME)
        outputs = llama.generate_batch(random_prompts(8, longest=20), greedy(4), config, async_batching=True)
        assert all(output.error is None for output in outputs.values())


class TestSequencesThatComeLate:
    """Those of one request wait for room one by one, so its first may have ended, or been cancelled, before others."""

    @pytest.fixture
    def in_turn(self, llama) -> Iterator[AsyncBatchingManager]:
        """One request may wait."""
        with llama.continuous_batching_context_manager(
            greedy(LONG), continuous_batching_config=batching(max_queue_size=1), async_batching=True
        ) as manager:
            yield manager

    def test_are_generated_after_the_first_has_ended(self, in_turn) -> None:
        name = in_turn.add_request(PROMPT, num_return_sequences=4, do_sample=True, max_new_tokens=1)
        outputs = results(in_turn, 4)
        assert [(output.error, len(output.generated_tokens)) for output in outputs] == [(None, 1)] * 4
        assert {output.request_id.partition("__")[0] for output in outputs} == {name}

    def test_do_not_wait_for_the_end_of_an_answer(self, in_turn) -> None:
        name = in_turn.add_request(PROMPT, num_return_sequences=2, do_sample=True, max_new_tokens=LONG, streaming=True)
        assert in_turn.get_result(f"{name}__child#0", PATIENCE) is not None
        assert name in in_turn._door.live, "the second began when the first had ended"
        in_turn.cancel_request(name)

    def test_and_were_cancelled_on_their_way_leave_nothing_behind(self, manager) -> None:
        manager.start()
        with manager.pause():
            outcome: list = []
            thread = adding(manager, outcome, request_id="late", num_return_sequences=6, do_sample=True)
            manager.cancel_request("late")
        thread.join(PATIENCE)
        outputs = results(manager, 6)
        assert all("cancelled" in output.error for output in outputs)
        after = manager.add_request(PROMPT)
        assert manager.get_result(after, PATIENCE).generated_tokens == reference(
            shared_model("llama"), PROMPT, greedy(6)
        )
