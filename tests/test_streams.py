"""Results while they come: `generate_batch(stream=True)`, and one request's tokens on an asyncio loop."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from conftest import VOCABULARY, engine_threads, greedy, new_model, random_prompts, reference, shared_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from transformers_async_cb.manager import CACHED, AsyncBatchingManager


PATIENCE = 30  # seconds
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def llama() -> PreTrainedModel:
    """A Llama of the test's own, with the weights of the shared one, which stays free to be asked."""
    return new_model("llama")


class TestABatch:
    def test_comes_request_by_request_as_they_finish(self, llama) -> None:
        prompts, limits = random_prompts(6, longest=30), [40, 4, 30, 2, 20, 10]
        results = llama.generate_batch(
            prompts,
            greedy(),
            request_settings=[{"max_new_tokens": n} for n in limits],
            async_batching=True,
            stream=True,
        )
        outputs = list(results)
        assert [output.request_id for output in outputs] == ["req_3", "req_1", "req_5", "req_4", "req_2", "req_0"]
        for output in outputs:
            i = int(output.request_id.removeprefix("req_"))
            assert output.generated_tokens == reference(shared_model("llama"), prompts[i], greedy(limits[i]))
        assert engine_threads() == []

    def test_is_checked_before_anything_is_asked_of_it(self, llama) -> None:
        with pytest.raises(ValueError, match="token id 1000 is outside"):
            llama.generate_batch([PROMPT, [1000]], greedy(4), async_batching=True, stream=True)

    @pytest.mark.parametrize("taken", [0, 1])
    def test_that_is_dropped_ends_and_gives_the_model_back(self, llama, taken: int) -> None:
        results = llama.generate_batch(
            [PROMPT] * 3, greedy(), request_settings=[{"max_new_tokens": n} for n in (2, 400, 400)],
            async_batching=True, stream=True,
        )  # fmt: skip
        for _ in range(taken):
            next(results)
        assert engine_threads() != []
        del results
        gc.collect()
        assert engine_threads() == []
        assert llama.config._attn_implementation == shared_model("llama").config._attn_implementation

    def test_that_is_dropped_leaves_a_persistent_manager_for_the_next(self, llama) -> None:
        call = {"generation_config": greedy(), "async_batching": True, "persistent_manager": True}
        results = llama.generate_batch([PROMPT], max_new_tokens=400, stream=True, **call)
        engine = results.gi_frame.f_locals["manager"]._engine
        results.close()
        output = next(iter(llama.generate_batch([PROMPT], max_new_tokens=6, **call).values()))
        assert output.generated_tokens == reference(shared_model("llama"), PROMPT, greedy(6))
        assert getattr(llama, CACHED)._engine is engine
        llama.destroy_cached_continuous_batching_manager()

    def test_that_is_dropped_ends_no_request_but_its_own(self, llama) -> None:
        call = {"generation_config": greedy(8), "async_batching": True, "persistent_manager": True}
        llama.generate_batch([PROMPT], **call)
        manager = getattr(llama, CACHED)
        early = manager.add_request(PROMPT, request_id="early", max_new_tokens=3)
        results = llama.generate_batch(
            [PROMPT] * 2, stream=True, **call, request_settings=[{}, {"max_new_tokens": 400}]
        )
        late = manager.add_request(PROMPT, request_id="late", max_new_tokens=100)
        own = next(results).request_id
        results.close()
        assert not manager.is_running()
        assert manager.metrics().failed == 1
        outputs = {output.request_id: output for output in manager}
        assert set(outputs) == {early, late}
        for name, limit in ((early, 3), (late, 100)):
            answer = reference(shared_model("llama"), PROMPT, greedy(limit))
            assert (outputs[name].error, outputs[name].generated_tokens) == (None, answer)
        assert own not in outputs
        manager.destroy()

    def test_may_be_dropped_by_what_the_engine_calls(self, llama) -> None:
        """As when Python's collector finds it, on whatever thread that runs."""
        made, dropped = threading.Event(), threading.Event()

        def drop(*_: object) -> bool:
            assert made.wait(PATIENCE)
            results.close()
            dropped.set()
            return False

        results = llama.generate_batch(
            [PROMPT], max_new_tokens=400, async_batching=True, stream=True, stopping_criteria=[drop]
        )
        manager = results.gi_frame.f_locals["manager"]
        made.set()
        assert dropped.wait(PATIENCE)
        manager.stop()
        assert engine_threads() == []

    def test_of_nothing(self, llama) -> None:
        assert list(llama.generate_batch([], async_batching=True, stream=True)) == []


def on_a_loop(model: PreTrainedModel, work: Callable[[AsyncBatchingManager], Any], **kwargs: Any) -> Any:
    """What an asynchronous function of a running manager returns."""

    async def run() -> Any:
        with model.continuous_batching_context_manager(greedy(8), async_batching=True, **kwargs) as manager:
            return await asyncio.wait_for(work(manager), PATIENCE)

    return asyncio.run(run())


async def collected(stream: AsyncIterator) -> list:
    return [item async for item in stream]


def cents() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of as many tokens as the models have, a third of which are parts of characters."""
    symbols = [*"abcdefghijklmnopqrstuvwxyzĠ", "Ã", "©", "â", "Ĥ", "¬", "Ã©", "ĤÂ"]
    symbols += [f"{a}{b}" for a in "abcd" for b in ("Ã", "©", "â", "Ĥ", "¬x", "Ġ", *"efghijklmnop")]
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols[:VOCABULARY])}, []))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


class TestARequest:
    def test_comes_token_by_token(self, llama) -> None:
        async def work(manager: AsyncBatchingManager) -> list[int]:
            return await collected(manager.stream(manager.add_request(PROMPT, streaming=True)))

        assert on_a_loop(llama, work) == reference(shared_model("llama"), PROMPT, greedy(8))

    def test_comes_beside_others(self, llama) -> None:
        prompts = random_prompts(8, longest=30)

        async def work(manager: AsyncBatchingManager) -> list[list[int]]:
            streams = [manager.stream(manager.add_request(prompt, streaming=True)) for prompt in prompts]
            return await asyncio.gather(*map(collected, streams))

        expected = [reference(shared_model("llama"), prompt, greedy(8)) for prompt in prompts]
        assert on_a_loop(llama, work) == expected

    def test_that_has_ended_already_comes_whole(self, llama) -> None:
        async def work(manager: AsyncBatchingManager) -> list[int]:
            request_id = manager.add_request(PROMPT)
            while not manager._outbox.holds(request_id):
                await asyncio.sleep(0.01)
            return await collected(manager.stream(request_id))

        assert on_a_loop(llama, work) == reference(shared_model("llama"), PROMPT, greedy(8))

    def test_comes_as_text_that_is_never_half_a_character(self, llama) -> None:
        tokenizer, prompts = cents(), random_prompts(12, longest=10)

        async def work(manager: AsyncBatchingManager) -> list[list[str]]:
            ids = [manager.add_request(prompt, streaming=True, max_new_tokens=40) for prompt in prompts]
            return await asyncio.gather(*(collected(manager.stream(i, tokenizer)) for i in ids))

        for prompt, pieces in zip(prompts, on_a_loop(llama, work), strict=True):
            tokens = reference(shared_model("llama"), prompt, greedy(40))
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            assert "".join(pieces) == text.rstrip("\N{REPLACEMENT CHARACTER}")
            assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces)
            assert len(pieces) > 1

    @pytest.mark.parametrize("how", ["close", "drop"])
    def test_that_nobody_follows_any_more_is_cancelled(self, llama, how: str) -> None:
        async def work(manager: AsyncBatchingManager) -> None:
            request_id = manager.add_request(PROMPT, streaming=True, max_new_tokens=100_000)
            stream = manager.stream(request_id)
            await anext(stream)
            if how == "close":
                await stream.aclose()
                assert await collected(stream) == []
            del stream
            while request_id in manager._door.live:
                await asyncio.sleep(0.01)

        on_a_loop(llama, work)

    def test_that_fails_raises_after_its_tokens(self, llama) -> None:
        tokens = []

        async def work(manager: AsyncBatchingManager) -> None:
            request_id = manager.add_request(PROMPT, streaming=True, max_new_tokens=100_000)
            async for token in manager.stream(request_id):
                tokens.append(token)
                if len(tokens) == 3:
                    manager.cancel_request(request_id)

        with pytest.raises(RuntimeError, match="was cancelled"):
            on_a_loop(llama, work)
        assert len(tokens) >= 3

    def test_that_is_not_there_is_refused(self, llama) -> None:
        async def work(manager: AsyncBatchingManager) -> None:
            with pytest.raises(ValueError, match="no request 'mine'"):
                manager.stream("mine")

        on_a_loop(llama, work)

    def test_needs_a_loop(self, llama) -> None:
        with llama.continuous_batching_context_manager(greedy(4), async_batching=True) as manager:
            request_id = manager.add_request(PROMPT)
            with pytest.raises(RuntimeError, match="no running event loop"):
                manager.stream(request_id)
