"""One copy of the weights, trained and generated with in turn."""

from __future__ import annotations

import re
import runpy
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import (
    VOCABULARY,
    batching,
    generate_alone,
    greedy,
    new_model,
    random_prompts,
    reference,
)
from transformers import PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.attention import ATTRIBUTE
from transformers_async_cb.manager import AsyncBatchingManager


PATIENCE = 30
PROMPT = [7, 3, 9, 11, 2, 5]


@contextmanager
def started(model: PreTrainedModel, limit: int = 8, **settings) -> Iterator[AsyncBatchingManager]:
    config = batching(**{"page_size": 4, "num_blocks": 256} | settings)
    debug = AsyncBatchingConfig(debug=True)
    with model.continuous_batching_context_manager(
        greedy(limit), continuous_batching_config=config, async_batching=debug
    ) as manager:
        yield manager


@pytest.fixture
def old() -> PreTrainedModel:
    return new_model("llama", seed=1)


@pytest.fixture
def new(llama) -> PreTrainedModel:
    """With the weights that a test changes to."""
    return llama


def change(model: PreTrainedModel, to: PreTrainedModel, moved: bool = False) -> None:
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), to.parameters(), strict=True):
            if moved:
                mine.data = theirs.clone()
            else:
                mine.copy_(theirs)


def tokens_of(manager: AsyncBatchingManager, request_id: str) -> list[int]:
    output = list(manager.request_id_iter(request_id))[-1]
    assert output.error is None
    return output.generated_tokens


def under_way(manager: AsyncBatchingManager, prompt: list[int], limit: int) -> str:
    """A request that has some tokens and lacks some."""
    request_id = manager.add_request(prompt, max_new_tokens=limit, streaming=True)
    assert manager.get_result(request_id, PATIENCE) is not None
    return request_id


class TestNewWeights:
    @pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
    @pytest.mark.parametrize("in_flight", ["keep", "recompute", "drain"])
    def test_are_those_of_the_requests_to_come(self, old, new, in_flight: str, moved: bool) -> None:
        with started(old) as manager:
            manager.get_result(manager.add_request(PROMPT), PATIENCE)
            with manager.update_weights(in_flight) as model:
                change(model, new, moved)
            assert tokens_of(manager, manager.add_request(PROMPT)) == reference(new, PROMPT, greedy(8))

    def test_compute_requests_under_way_again_if_asked_to(self, old, new) -> None:
        with started(old) as manager:
            request_id = under_way(manager, PROMPT, 300)
            with manager.update_weights("recompute"):
                change(old, new)
                known = len(manager._door.live[request_id].tokens) - len(PROMPT)
            tokens = tokens_of(manager, request_id)
        before, after = tokens[:known], tokens[known:]
        assert before == generate_alone(new_model("llama", seed=1), PROMPT, greedy(300))[:known]
        assert after == generate_alone(new, PROMPT + before, greedy(300 - known))

    def test_wait_for_requests_under_way_if_asked_to(self, old, new) -> None:
        late: list[str] = []

        def add_late() -> None:
            while not manager._mailbox._drains:
                time.sleep(0.001)
            late.append(manager.add_request(PROMPT))

        with started(old) as manager:
            first = under_way(manager, PROMPT, 200)
            thread = threading.Thread(target=add_late)
            thread.start()
            with manager.update_weights("drain"):
                thread.join()
                assert not manager._engine.scheduler.row_of
                change(old, new)
            assert tokens_of(manager, first) == reference(new_model("llama", seed=1), PROMPT, greedy(200))
            assert tokens_of(manager, late[0]) == reference(new, PROMPT, greedy(8))

    def test_find_no_pages_that_a_request_under_way_filled_with_old_ones(self, old, new) -> None:
        with started(old) as manager:
            request_id = under_way(manager, PROMPT, 100)
            with manager.update_weights():
                change(old, new)
            longer = PROMPT + tokens_of(manager, request_id)
            for prompt in (longer[:30], longer):  # the second finds what the first computes, and no more
                assert tokens_of(manager, manager.add_request(prompt)) == reference(new, prompt, greedy(8))

    def test_find_no_pages_of_a_sequence_that_began_as_a_copy_of_one_under_way(self, old, new) -> None:
        with started(old, max_requests_per_batch=2) as manager:
            blocker = under_way(manager, [1, 2], 500)
            prompt = PROMPT * 2
            first = manager.add_request(
                prompt, max_new_tokens=400, streaming=True, num_return_sequences=2, do_sample=True, temperature=0.01
            )
            assert manager.get_result(first, PATIENCE) is not None
            with manager.update_weights():
                change(old, new)
                assert len(manager._engine.scheduler.row_of) == 2
            manager.cancel_request(blocker)
            second = manager.get_result(f"{first}__child#0", PATIENCE)
            longer = prompt + second.generated_tokens
            while len(longer) < 60:
                longer = prompt + manager.get_result(f"{first}__child#0", PATIENCE).generated_tokens
            for prompt in (longer[:16], longer[:60]):
                expected = reference(new, prompt, greedy(8))
                assert tokens_of(manager, manager.add_request(prompt, priority=1)) == expected
            manager.cancel_request(first)

    def test_that_were_to_wait_for_requests_do_not_where_those_cannot_end(self, llama) -> None:
        with started(llama) as manager:
            with manager.pause(), pytest.raises(RuntimeError, match="holds a pause"), manager.update_weights("drain"):
                pass
            with pytest.raises(ValueError, match="in_flight must be"), manager.update_weights("later"):
                pass


class TestASleepingManager:
    def test_has_given_its_memory_back_and_goes_on_where_it_was(self, llama) -> None:
        prompts = random_prompts(6, longest=40)
        with started(llama) as manager:
            ids = [under_way(manager, prompt, 60) for prompt in prompts]
            pages = [weakref.ref(layer.key_pages) for layer in manager._engine.runner.layers.values()]
            manager.sleep()
            manager.sleep()
            assert not any(page() is not None for page in pages)
            assert not any(hasattr(module, ATTRIBUTE) for module in llama.modules())
            expected = [reference(llama, prompt, greedy(60)) for prompt in prompts]
            late = manager.add_request(prompts[0])
            assert manager.get_result(late, timeout=0.05) is None
            with manager.pause():
                pass
            manager.wake()
            manager.wake()
            assert [tokens_of(manager, request_id) for request_id in ids] == expected
            assert tokens_of(manager, late) == expected[0][:8]

    def test_wakes_to_other_weights(self, old, new) -> None:
        with started(old) as manager:
            tokens_of(manager, manager.add_request(PROMPT))
            manager.sleep()
            change(old, new)
            manager.wake()
            assert tokens_of(manager, manager.add_request(PROMPT)) == reference(new, PROMPT, greedy(8))

    def test_that_finds_no_memory_sleeps_on(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        def take_none() -> None:
            raise torch.OutOfMemoryError("on purpose")

        with started(llama) as manager:
            request_id = under_way(manager, PROMPT, 50)
            manager.sleep()
            monkeypatch.setattr(manager._engine.runner, "take_pages", take_none)
            with pytest.raises(torch.OutOfMemoryError):
                manager.wake()
            monkeypatch.undo()
            expected = reference(llama, PROMPT, greedy(50))
            manager.wake()
            assert tokens_of(manager, request_id) == expected

    @pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
    def test_that_is_stopped_ends_its_requests(self, llama, hard: bool) -> None:
        with started(llama) as manager:
            request_id = under_way(manager, PROMPT, 60)
            manager.sleep()
            manager.stop(hard_stop=hard)
            output = list(manager.request_id_iter(request_id))[-1]
        assert (output.error is None) == (not hard)
        expected = reference(llama, PROMPT, greedy(60))
        assert output.generated_tokens == expected[: len(output.generated_tokens)]

    def test_that_is_stopped_with_nothing_to_do_takes_no_memory(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        with started(llama) as manager:
            manager.sleep()
            monkeypatch.setattr(manager._engine.runner, "take_pages", lambda: pytest.fail("it took memory"))
            manager.stop()

    def test_that_was_kept_takes_its_memory_at_the_next_start(self, llama) -> None:
        settings = {"generation_config": greedy(8), "persistent_manager": True, "async_batching": True}
        llama.generate_batch([PROMPT], **settings)
        manager = llama.init_continuous_batching(async_batching=True)
        engine = manager._engine
        manager.sleep()
        assert not engine.runner.layers
        (output,) = llama.generate_batch([PROMPT], **settings).values()
        assert output.generated_tokens == reference(llama, PROMPT, greedy(8))
        assert manager._engine is engine
        llama.destroy_cached_continuous_batching_manager()


def test_the_example_learns(capsys) -> None:
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "rl.py"))
    rewards = [int(percent) for percent in re.findall(r"(\d+)% of the tokens", capsys.readouterr().out)]
    assert rewards[0] < 70 and rewards[-1] > 85


class TestTrainingInTurn:
    def train(self, model: PreTrainedModel, generate: bool, own: AsyncBatchingConfig) -> tuple[list[float], list[int]]:
        """Losses of some steps, and what is generated between them if anything is."""
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses, tokens = [], []
        model.train()
        for _ in range(3):
            batch = torch.randint(VOCABULARY, (2, 24))
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if generate:
                outputs = model.generate_batch([PROMPT] * 2, greedy(6), persistent_manager=True, async_batching=own)
                tokens = next(iter(outputs.values())).generated_tokens
        if generate:
            model.destroy_cached_continuous_batching_manager()
        return losses, tokens

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
    def test_is_bitwise_what_it_is_without_generating(self, family: str, fused: bool) -> None:
        dropout = {"attn_pdrop": 0.1, "resid_pdrop": 0.1} if family == "gpt2" else {"attention_dropout": 0.1}
        alone, mixed = new_model(family, **dropout), new_model(family, **dropout)
        own = AsyncBatchingConfig(fuse_projections=fused)
        losses, _ = self.train(alone, False, own)
        mixed_losses, tokens = self.train(mixed, True, own)
        assert mixed_losses == losses
        for one, other in zip(mixed.parameters(), alone.parameters(), strict=True):
            assert torch.equal(one, other)
        assert tokens == generate_alone(alone.eval(), PROMPT, greedy(6))
