"""What threads may do to one manager, at once and in any order: nothing hangs, and every request has one result."""

from __future__ import annotations

import faulthandler
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count

import pytest
import torch
from conftest import batching, greedy, new_model, reference, shared_model
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.manager import AsyncBatchingManager


SECONDS = 4
PATIENCE = 60  # seconds, for a thread to end
PROMPTS = [[5, 6, 7], [9] * 20, [3, 4] * 9, [8]]
TOKENS = 12


class Hammer:
    """Threads that do things to a manager at random, and what they did.

    Args:
        manager (`AsyncBatchingManager`): that of a Llama.
        seed (`int`): of the order in which each thread does things.
    """

    def __init__(self, manager: AsyncBatchingManager, seed: int) -> None:
        self.manager = manager
        self.added: dict[str, int] = {}  # prompt by id, of requests with one answer
        self.several: set[str] = set()  # ids of the others
        self.results: list[GenerationOutput] = []
        self.errors: list[BaseException] = []
        self._seed = seed
        self._numbers = count()

    def run(self) -> None:
        """Each thread does its own things, so that some meet: stops of one another's runs, pauses and stops, ..."""
        roles: list[list[Callable[[random.Random], None]]] = [
            [self.add], [self.add, self.cancel], [self.start, self.start, self.stop],
            [self.start, self.stop, self.hold], [self.hold, self.update], [self.update, self.sleep],
            [self.take], [self.take],
        ]  # fmt: skip
        end = time.monotonic() + SECONDS
        threads = [
            threading.Thread(target=self._act, args=(i, role, end), daemon=True) for i, role in enumerate(roles)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                faulthandler.dump_traceback()
                raise AssertionError("a thread hangs, and stands where the trace says")

    def _act(self, number: int, role: list[Callable[[random.Random], None]], end: float) -> None:
        rng = random.Random(f"{self._seed} {number}")
        while time.monotonic() < end:
            try:
                with suppress(RuntimeError):  # it does not run just then
                    rng.choice(role)(rng)
            except BaseException as error:
                self.errors.append(error)
            time.sleep(rng.choice([0, 0, 0.001, 0.01]))

    def add(self, rng: random.Random) -> None:
        prompt, name = rng.randrange(len(PROMPTS)), f"request {next(self._numbers)}"
        settings = {"streaming": rng.random() < 0.3, "priority": rng.randrange(3)}
        if rng.random() < 0.3:
            self.manager.add_request(PROMPTS[prompt], name, num_return_sequences=3, do_sample=True, **settings)
            self.several.add(name)
        else:
            self.manager.add_request(PROMPTS[prompt], name, **settings)
            self.added[name] = prompt

    def cancel(self, rng: random.Random) -> None:
        if names := [*self.added, *self.several][-8:]:
            self.manager.cancel_request(rng.choice(names))

    def start(self, rng: random.Random) -> None:
        self.manager.start()

    def stop(self, rng: random.Random) -> None:
        self.manager.stop(
            block=rng.random() < 0.6,
            timeout=rng.choice([None, None, 0.01]),
            keep_for_next_session=rng.random() < 0.7,
            hard_stop=rng.random() < 0.4,
        )

    def hold(self, rng: random.Random) -> None:
        with self.manager.pause():
            self.manager.model(torch.tensor([[1, 2, 3]]))

    def update(self, rng: random.Random) -> None:
        with self.manager.update_weights(rng.choice(["keep", "recompute", "drain"])):
            time.sleep(rng.choice([0, 0.003]))

    def sleep(self, rng: random.Random) -> None:
        self.manager.sleep()
        time.sleep(rng.choice([0, 0.003]))
        self.manager.wake()

    def take(self, rng: random.Random) -> None:
        if (output := self.manager.get_result(timeout=0.01)) is not None and output.is_finished():
            self.results.append(output)


@pytest.mark.parametrize("bound", [0, 3], ids=["", "queue of 3"])
def test_threads_that_start_stop_hold_and_use_a_manager_get_along(bound: int) -> None:
    model = new_model("llama")
    manager = model.init_continuous_batching(
        greedy(TOKENS),
        batching(page_size=4, num_blocks=60, max_requests_per_batch=6, max_queue_size=bound),
        async_batching=AsyncBatchingConfig(debug=True),
    )
    hammer = Hammer(manager, bound)
    hammer.run()
    manager.stop()
    hammer.results += [output for output in manager if output.is_finished()]
    assert hammer.errors == []
    assert manager.fatal_error is None
    answers = [reference(shared_model("llama"), prompt, greedy(TOKENS)) for prompt in PROMPTS]
    results = {output.request_id: output for output in hammer.results}
    assert len(results) == len(hammer.results), "a request has two results"
    names = {f"{name}{child}" for name in hammer.several for child in ("", "__child#0", "__child#1")}
    assert results.keys() >= names | hammer.added.keys()
    for name, prompt in hammer.added.items():
        output = results[name]
        assert output.error is None or "cancelled" in output.error or "stopped" in output.error
        assert output.generated_tokens == answers[prompt][: len(output.generated_tokens) if output.error else None]
    model(torch.tensor([[1, 2, 3]]))  # which was given back
    manager.start()
    names = manager.add_requests(PROMPTS)
    assert [manager.get_result(name, PATIENCE).generated_tokens for name in names] == answers
    manager.stop()
