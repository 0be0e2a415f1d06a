"""A manager that nobody holds any more finishes its requests and gives the model back."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import engine_threads, generate_alone, greedy, in_child, new_model, reference, shared_model
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb import model as loans
from transformers_async_cb.interpreter import collect
from transformers_async_cb.manager import CACHED, AsyncBatchingManager
from transformers_async_cb.runner import Runner


PATIENCE = 30  # seconds, for what comes at once
LONG = 120  # tokens of an answer that takes many times as long as anything that is done beside it
PROMPT = [5, 6, 7, 8]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def answer(tokens: int, device: str = "cpu") -> list[int]:
    return reference(shared_model("llama", device), PROMPT, greedy(tokens))


def new_manager(model: PreTrainedModel, tokens: int = 8, **settings: Any) -> AsyncBatchingManager:
    return model.init_continuous_batching(greedy(tokens), async_batching=True, **settings)


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


def is_free(model: PreTrainedModel) -> bool:
    """Whether nothing is left of any manager, and the model generates by itself."""
    until(lambda: engine_threads() == [])
    return generate_alone(model, PROMPT, greedy(8)) == answer(8, model.device.type)


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture
def model(device: str) -> PreTrainedModel:
    return new_model("llama", device)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Cycles of references go when the test says so."""
    gc.disable()
    yield
    gc.enable()


class TestManager:
    """That is dropped."""

    @DEVICES
    def test_after_a_warmup_gives_the_model_back_at_once(self, model, device: str) -> None:
        manager = new_manager(model)
        manager.warmup()
        del manager
        assert generate_alone(model, PROMPT, greedy(8)) == answer(8, device)
        assert is_free(model)

    def test_while_idle_ends(self, model) -> None:
        manager = new_manager(model)
        manager.start()
        del manager
        assert is_free(model)

    def test_finishes_its_requests_whose_handlers_get_their_results(self, model) -> None:
        async def work() -> list[GenerationOutput]:
            manager, results = new_manager(model, LONG), asyncio.Queue()
            manager.start()
            for _ in range(3):
                manager.register_result_handler(manager.add_request(PROMPT), results.put_nowait)
            del manager
            return [await asyncio.wait_for(results.get(), PATIENCE) for _ in range(3)]

        assert [output.generated_tokens for output in asyncio.run(work())] == [answer(LONG)] * 3
        assert is_free(model)

    def test_before_it_was_started_ends_its_requests(self, model) -> None:
        async def work() -> GenerationOutput:
            manager, result = new_manager(model), asyncio.get_running_loop().create_future()
            manager.register_result_handler(manager.add_request(PROMPT), result.set_result)
            del manager
            return await asyncio.wait_for(result, PATIENCE)

        assert "before it was started" in asyncio.run(work()).error

    def test_by_an_exception_ends(self, model) -> None:
        def work() -> None:
            manager = new_manager(model)
            manager.start()
            manager.add_request([])

        with pytest.raises(ValueError, match="prompt is empty"):
            work()
        assert is_free(model)

    def test_lives_as_long_as_an_iterator_over_its_results(self, model) -> None:
        manager = new_manager(model, LONG)
        manager.start()
        one, every = manager.request_id_iter(manager.add_request(PROMPT)), iter(manager)
        manager.add_request(PROMPT)
        del manager
        assert [output.generated_tokens for output in one] == [answer(LONG)]
        assert next(every).generated_tokens == answer(LONG)
        del one, every
        assert is_free(model)

    def test_lives_as_long_as_a_stream(self, model) -> None:
        async def work() -> list[int]:
            manager = new_manager(model, LONG)
            manager.start()
            stream = manager.stream(manager.add_request(PROMPT, streaming=True))
            del manager
            return [token async for token in stream]

        assert asyncio.run(work()) == answer(LONG)
        assert is_free(model)

    def test_asleep_finishes_its_requests(self, model) -> None:
        async def work() -> GenerationOutput:
            manager, result = new_manager(model, LONG), asyncio.get_running_loop().create_future()
            manager.start()
            manager.register_result_handler(manager.add_request(PROMPT), result.set_result)
            manager.sleep()
            del manager
            return await asyncio.wait_for(result, PATIENCE)

        assert asyncio.run(work()).generated_tokens == answer(LONG)
        assert is_free(model)

    def test_asleep_ends_its_requests_if_the_model_is_not_there_any_more(self, model) -> None:
        async def work() -> GenerationOutput:
            manager, result = new_manager(model, LONG), asyncio.get_running_loop().create_future()
            manager.start()
            manager.register_result_handler(manager.add_request(PROMPT), result.set_result)
            manager.sleep()
            with model.continuous_batching_context_manager(greedy(8), async_batching=True) as other:
                del manager
                output = await asyncio.wait_for(result, PATIENCE)
                assert other.get_result(other.add_request(PROMPT), PATIENCE).generated_tokens == answer(8)
            return output

        assert "stopped before the request finished" in asyncio.run(work()).error
        assert is_free(model)

    def test_asleep_ends_its_requests_if_the_memory_is_not_there_any_more(self, model, monkeypatch) -> None:
        def take_pages(runner: Runner) -> None:
            raise torch.OutOfMemoryError("no room")

        async def work() -> GenerationOutput:
            manager, result = new_manager(model, LONG), asyncio.get_running_loop().create_future()
            manager.start()
            manager.register_result_handler(manager.add_request(PROMPT), result.set_result)
            manager.sleep()
            monkeypatch.setattr(Runner, "take_pages", take_pages)
            del manager
            return await asyncio.wait_for(result, PATIENCE)

        assert "stopped before the request finished" in asyncio.run(work()).error
        assert is_free(model)

    def test_that_was_kept_stays_with_its_model_and_goes_with_it(self) -> None:
        model = new_model("llama")
        with model.continuous_batching_context_manager(
            greedy(8), async_batching=True, persistent_manager=True
        ) as manager:
            manager.add_request(PROMPT)
        kept = weakref.ref(manager)
        del manager
        gc.collect()
        assert getattr(model, CACHED) is kept()
        del model
        gc.collect()
        assert kept() is None
        until(lambda: engine_threads() == [])


class TestModel:
    """On loan to a manager that was dropped."""

    @DEVICES
    @pytest.mark.parametrize("what", ["start", "warmup", "generate_batch"])
    def test_is_waited_for_when_a_cell_is_run_again(self, model, device: str, what: str) -> None:
        manager = None
        for _ in range(3):
            manager = new_manager(model, LONG)  # the one before is dropped now
            if what == "generate_batch":
                outputs = model.generate_batch([PROMPT], greedy(8), async_batching=True)
                assert [output.generated_tokens for output in outputs.values()] == [answer(8, device)]
            elif what == "warmup":
                manager.warmup()
            manager.start()
            manager.add_request(PROMPT)
        assert manager.get_result(timeout=PATIENCE).generated_tokens == answer(LONG, device)
        del manager
        assert is_free(model)

    def test_is_waited_for_where_a_stop_was_asked_for_before(self, model) -> None:
        for _ in range(2):
            manager = new_manager(model, LONG)
            manager.start()
            manager.add_request(PROMPT)
            manager.stop(block=False)
            del manager
        assert is_free(model)

    def test_is_not_waited_for_while_somebody_holds_the_manager(self, model) -> None:
        manager = new_manager(model, LONG)
        manager.start()
        manager.add_request(PROMPT)
        with pytest.raises(RuntimeError, match="generating already: stop the manager that has it first"):
            new_manager(model).start()
        assert manager.is_running()
        assert manager.get_result(timeout=PATIENCE).generated_tokens == answer(LONG)
        del manager
        assert is_free(model)

    def test_is_not_waited_for_without_end(self, model, monkeypatch) -> None:
        monkeypatch.setattr(loans, "PATIENCE", 0.02)
        manager = new_manager(model, LONG)
        manager.start()
        manager.add_request(PROMPT)
        del manager
        with pytest.raises(RuntimeError, match=r"was dropped and has not finished its requests within 0.02 s"):
            new_manager(model).start()
        assert is_free(model)

    def test_goes_to_one_of_those_that_wait(self, model) -> None:
        manager = new_manager(model, LONG)
        manager.start()
        manager.add_request(PROMPT)
        others, errors = [new_manager(model) for _ in range(3)], []

        def start(other: AsyncBatchingManager) -> None:
            try:
                other.start()
            except RuntimeError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=start, args=(other,)) for other in others]
        del manager
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sum(other.is_running() for other in others) == 1
        assert len(errors) == 2
        assert all("generating already" in error for error in errors)
        threads.clear()
        del others, thread
        assert is_free(model)

    @DEVICES
    def test_comes_when_the_engine_is_gone_and_the_weights_are_apart(self, model, monkeypatch) -> None:
        borrow, found = loans.ModelLoan.borrow, []

        def note(loan: loans.ModelLoan) -> None:
            borrow(loan)
            found.append(engine())
            found.extend(p for p in model.parameters() if p.untyped_storage().nbytes() > p.nbytes)

        manager = new_manager(model, LONG)
        manager.start()
        manager.add_request(PROMPT)
        engine = weakref.ref(manager._engine)
        del manager
        monkeypatch.setattr(loans.ModelLoan, "borrow", note)
        model.generate_batch([PROMPT], greedy(8), async_batching=True)
        assert found == [None]
        assert is_free(model)


class Holder:
    """Holds its manager, and is held by it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.manager = new_manager(model, stopping_criteria=[self.criterion])
        self.manager.start()

    def criterion(self, ids: torch.Tensor, scores: None) -> bool:
        return False


@pytest.mark.usefixtures("no_collector")
class TestCycle:
    """Of references, which alone holds a manager."""

    def test_is_collected_when_the_model_is_asked_for(self, model) -> None:
        holder = Holder(model)
        output = holder.manager.get_result(holder.manager.add_request(PROMPT), PATIENCE)
        assert output.generated_tokens == answer(8)
        del holder
        outputs = model.generate_batch([PROMPT], greedy(8), async_batching=True)
        assert [output.generated_tokens for output in outputs.values()] == [answer(8)]
        assert is_free(model)

    @pytest.mark.parametrize("thread", ["loop", "lane"])
    def test_is_collected_on_a_thread_of_the_manager(self, model, thread: str) -> None:
        dropped, collected = threading.Event(), threading.Event()

        def look(*_: object) -> bool:
            if dropped.is_set() and not collected.is_set():
                collect()
                collected.set()
            return False

        def hook(*_: object) -> None:
            if thread == "lane":
                look()

        handle = model.lm_head.register_forward_hook(hook)
        holder = Holder(model)
        criteria = [look] if thread == "loop" else []
        holder.manager.add_request(PROMPT, max_new_tokens=LONG, stopping_criteria=criteria)
        del holder
        dropped.set()
        assert collected.wait(PATIENCE)
        until(lambda: engine_threads() == [])
        handle.remove()
        assert is_free(model)

    @pytest.mark.parametrize("lock", ["_keeper", "_mailbox", "_outbox"])
    def test_is_collected_where_a_lock_of_the_manager_is_held(self, model, lock: str) -> None:
        holder = Holder(model)
        held = getattr(holder.manager, lock).lock
        del holder
        begin = time.monotonic()
        with held:
            collect()
        assert time.monotonic() - begin < 3
        assert is_free(model)


def test_in_a_child_of_fork_nothing_is_waited_for(model) -> None:
    managers = [new_manager(model)]
    managers[0].start()
    with managers[0]._mailbox.lock:  # nobody lets go of it there
        assert in_child(lambda: managers.clear() is None, patience=4)
    assert managers[0].get_result(managers[0].add_request(PROMPT), PATIENCE).generated_tokens == answer(8)
    managers.clear()
    assert is_free(model)
