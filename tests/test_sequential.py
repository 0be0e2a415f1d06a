"""Models that cannot be run on pages answer what `generate` does, one sequence at a time."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import VOCABULARY, batching, generate_alone, generated_in_short_room, greedy, random_prompts
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.matrix.small import small_model


# Positions counted by the model; attention that is not replaceable; a recurrence that decodes one sequence alone.
FAMILIES = ("bloom", "gpt_neo", "rwkv")
PROMPTS = random_prompts(9, shortest=1, longest=40, seed=1)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return small_model(request.param)


@pytest.fixture(scope="module")
def bloom() -> PreTrainedModel:
    return small_model("bloom")


def generated(model: PreTrainedModel, config: GenerationConfig | None = None, **kwargs) -> list[list[int]]:
    kwargs.setdefault("async_batching", True)
    outputs = model.generate_batch(PROMPTS, generation_config=config or greedy(12), **kwargs)
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs.values()]


def test_they_answer_what_generate_does_with_overlap_on_and_off(model) -> None:
    expected = [generate_alone(model, prompt, greedy(12)) for prompt in PROMPTS]
    few = batching(max_requests_per_batch=4, max_batch_tokens=16)
    assert generated(model, continuous_batching_config=few) == expected
    assert (
        generated(model, continuous_batching_config=few, async_batching=AsyncBatchingConfig(overlap=False)) == expected
    )


def test_requests_that_find_no_room_are_computed_again(bloom) -> None:
    expected = [generate_alone(bloom, prompt, greedy(40)) for prompt in PROMPTS]
    assert generated_in_short_room(bloom, PROMPTS, greedy(40)) == expected


def test_nothing_is_kept_of_requests_that_have_ended(bloom) -> None:
    manager = bloom.init_continuous_batching(greedy(8), async_batching=True)
    manager.start()
    manager.add_requests(PROMPTS)
    for _ in PROMPTS:
        assert manager.get_result(timeout=60).error is None
    manager.stop(keep_for_next_session=True)
    assert manager._engine.runner._sequences == {}
    manager.destroy()


def test_penalties_and_samples_are_those_of_paged_models(bloom) -> None:
    config = GenerationConfig(do_sample=False, max_new_tokens=12, repetition_penalty=1.5, pad_token_id=0)
    assert generated(bloom, config) == [generate_alone(bloom, prompt, config) for prompt in PROMPTS]
    sampled = GenerationConfig(do_sample=True, top_k=20, max_new_tokens=12, pad_token_id=0)
    runs = [
        generated(bloom, sampled, continuous_batching_config=batching(seed=3), async_batching=flag)
        for flag in (True, AsyncBatchingConfig(overlap=False))
    ]
    assert runs[0] == runs[1] != generated(bloom, sampled, continuous_batching_config=batching(seed=4))


def test_the_log_says_once_why(bloom, log) -> None:
    with log.at_level(logging.WARNING):
        generated(bloom)
    said = [record.getMessage() for record in log.records if "one sequence at a time" in record.getMessage()]
    assert len(said) == 1
    assert "BloomForCausalLM counts positions itself" in said[0]


def test_they_are_refused_where_the_user_says_so(bloom) -> None:
    with pytest.raises(ValueError, match="BloomForCausalLM counts positions itself"):
        generated(bloom, async_batching=AsyncBatchingConfig(sequential_fallback=False))


def test_a_model_that_keeps_a_sequence_elsewhere_than_in_its_cache_is_refused() -> None:
    model = small_model("bloom")

    class Remembering(nn.Module):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__()
            self.embedding = embedding
            self.past = 0.0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found = self.embedding(ids)
            self.past = found.mean(1, keepdim=True) + (self.past if ids.shape[1] == 1 else 0.0)
            return found + self.past

    embedding = model.transformer.word_embeddings
    model.transformer.word_embeddings = Remembering(embedding)
    model.get_input_embeddings = lambda: embedding
    with pytest.raises(ValueError, match="keeps something of a sequence outside of its cache"):
        generated(model)


def test_prompts_are_checked_as_ever(bloom) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        bloom.generate_batch([[VOCABULARY + 1000]], generation_config=greedy(2), async_batching=True)
