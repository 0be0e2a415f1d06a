"""A user's own logits processors: called as `generate` calls them, for their requests alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, batching, greedy, random_prompts, reference, shared_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.continuous_batching import RequestStatus
from transformers.utils import logging

from transformers_async_cb import AsyncBatchingConfig


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
PROMPT = [5, 6, 7, 8]


class Avoid(LogitsProcessor):
    """Bans tokens that are near the last one, and remembers how it was called."""

    def __init__(self, distance: int = 9) -> None:
        self.distance = distance
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        assert (input_ids.dtype, scores.dtype) == (torch.int64, torch.float32)
        assert (input_ids.shape[0], scores.shape) == (1, (1, VOCABULARY))
        assert input_ids.device == scores.device
        assert not torch.is_grad_enabled()
        self.lengths.append(input_ids.shape[1])
        far = (torch.arange(VOCABULARY, device=scores.device) - input_ids[:, -1:]).abs() > self.distance
        return torch.where(far, scores, -math.inf)


class Alternate(LogitsProcessor):
    """Lets even and odd tokens come in turn: it has a state. Writes to the scores that it is given."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.calls % 2 :: 2] = -math.inf
        self.calls += 1
        return scores


def sums(input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
    """Depends on every token so far."""
    return scores + 9 * torch.cos(input_ids.sum() * torch.arange(VOCABULARY, device=scores.device))


def generates(model: PreTrainedModel, prompt: list[int], limit: int, *processors: Any, **settings: Any) -> list[int]:
    config = greedy(limit)
    config.update(**settings)
    ids = torch.tensor([prompt], device=model.device)
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=LogitsProcessorList(processors),
    )
    return answer[0, len(prompt) :].tolist()


@DEVICE
@OVERLAP
@pytest.mark.parametrize("sizes", [
    {}, {"num_blocks": 60, "page_size": 1, "max_batch_tokens": 17}, {"max_requests_per_batch": 3}
], ids=str)  # fmt: skip
def test_of_requests_do_what_they_do_in_generate_beside_others(sizes: dict, overlap: bool, device: str) -> None:
    """After what the settings say, one after the other; those with a state too, though requests are preempted."""
    model, prompts = shared_model("llama", device), [[3], *random_prompts(14, longest=20, seed=4)]
    kinds = [
        lambda: ([], {}),
        lambda: ([Avoid()], {}),
        lambda: ([sums, Alternate()], {"repetition_penalty": 1.3, "eos_token_id": [1, 9, 44, 60]}),
        lambda: ([Alternate(), sums], {"no_repeat_ngram_size": 1}),
        lambda: ([], {"repetition_penalty": 1.3}),
    ]
    manager = model.init_continuous_batching(
        greedy(16), batching(**sizes), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
    )
    expected = []
    for i, prompt in enumerate(prompts):
        processors, settings = kinds[i % 5]()
        manager.add_request(prompt, logits_processor=processors or None, **settings)
        processors, settings = kinds[i % 5]()
        expected.append(generates(model, prompt, 16, *processors, **settings))
    manager.start()
    engine = manager._engine
    manager.stop()
    outputs = {output.request_id: output for output in manager}
    assert {output.error for output in outputs.values()} == {None}
    assert [outputs[f"req_{i}"].generated_tokens for i in range(len(prompts))] == expected
    assert (engine.scheduler.preemptions > 0) == ("num_blocks" in sizes)
    engine.scheduler.check_books()


def test_of_a_request_go_before_the_calls_and_leave_the_others_alone(llama) -> None:
    with llama.continuous_batching_context_manager(
        greedy(12), logits_processor=[Avoid(3)], async_batching=True
    ) as manager:
        own = ([Avoid(20)], None, [], LogitsProcessorList([sums, sums]))
        ids = [manager.add_request(PROMPT, logits_processor=processors) for processors in own]
        tokens = [manager.get_result(request_id).generated_tokens for request_id in ids]
    assert tokens == [
        generates(llama, PROMPT, 12, Avoid(20)),
        generates(llama, PROMPT, 12, Avoid(3)),
        reference(llama, PROMPT, greedy(12)),
        generates(llama, PROMPT, 12, sums, sums),
    ]


def test_of_one_call_are_not_the_next_ones(llama) -> None:
    for processors, expected in (
        ([sums], generates(llama, PROMPT, 9, sums)),
        (None, reference(llama, PROMPT, greedy(9))),
    ):
        outputs = llama.generate_batch(
            [PROMPT], greedy(9), logits_processor=processors, persistent_manager=True, async_batching=True
        )
        assert [output.generated_tokens for output in outputs.values()] == [expected]
    llama.destroy_cached_continuous_batching_manager()


@OVERLAP
def test_are_called_once_for_each_token_and_at_most_once_more(llama, overlap: bool) -> None:
    prompts, asked = random_prompts(9, longest=12, shortest=8), [Avoid() for _ in range(9)]
    manager = llama.init_continuous_batching(
        greedy(14),
        batching(num_blocks=40, page_size=1, max_batch_tokens=9),
        async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
    )
    ids = [
        manager.add_request(prompt, logits_processor=[processor], eos_token_id=list(range(0, 97, 9)))
        for prompt, processor in zip(prompts, asked, strict=True)
    ]
    manager.start()
    engine = manager._engine
    manager.stop()
    outputs = {output.request_id: output for output in manager}
    assert engine.scheduler.preemptions > 0
    for prompt, processor, request_id in zip(prompts, asked, ids, strict=True):
        tokens = len(outputs[request_id].generated_tokens)
        calls = [len(prompt) + n for n in range(tokens + 1)]
        assert processor.lengths in ((calls, calls[:-1]) if overlap else (calls[:-1],))


def test_come_before_sampling_and_before_the_mask_of_a_grammar(llama) -> None:
    from test_grammars import EOS, tokenizer

    def only(*allowed: int) -> Any:
        def processor(input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            scores[:, [token for token in range(VOCABULARY) if token not in allowed]] = -math.inf
            return scores

        return processor

    sampled = {"do_sample": True, "temperature": 9.0, "top_k": 0, "seed": 1}
    with llama.continuous_batching_context_manager(
        greedy(30, EOS), tokenizer=tokenizer(), async_batching=True
    ) as manager:
        ids = [
            manager.add_request(PROMPT, logits_processor=[only(1, 5, 9)], **sampled),
            manager.add_request(PROMPT, logits_processor=[only(0, 2, EOS)], regex="[b-e]{3}a", **sampled),
        ]
        answers = [manager.get_result(request_id).generated_tokens for request_id in ids]
    assert set(answers[0]) == {1, 5, 9}
    assert answers[1] == [2, 2, 2, 0, EOS]


@OVERLAP
@pytest.mark.parametrize("kind", ["raises", "returns another shape"])
def test_that_fail_end_their_request_alone(llama, kind: str, overlap: bool) -> None:
    calls = []

    def broken(input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        calls.append(input_ids.shape[1])
        if input_ids.shape[1] < 9:
            return scores
        if kind == "raises":
            raise KeyError("no such thing")
        return scores[0]

    manager = llama.init_continuous_batching(
        greedy(12), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
    )
    for processors in (None, [broken], [sums]):
        manager.add_request(PROMPT, logits_processor=processors)
    manager.start()
    engine = manager._engine
    manager.stop()
    outputs = {output.request_id: output for output in manager}
    whole, failed = reference(llama, PROMPT, greedy(12)), outputs["req_1"]
    reason = {
        "raises": "KeyError: 'no such thing'",
        "returns another shape": "ValueError: it returned scores of shape (97,), not (1, 97)",
    }[kind]
    assert failed.status == RequestStatus.FAILED
    assert failed.error == f"request req_1: its logits processor broken raised {reason}"
    assert failed.generated_tokens == whole[:5]
    assert calls == [4, 5, 6, 7, 8, 9]
    assert outputs["req_0"].generated_tokens == whole
    assert outputs["req_2"].generated_tokens == generates(llama, PROMPT, 12, sums)
    engine.scheduler.check_books()


@OVERLAP
def test_that_fail_after_the_last_token_have_not_failed(llama, overlap: bool) -> None:
    whole = reference(llama, PROMPT, greedy(12))
    end = whole[5]

    def broken(input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        assert end not in input_ids[0, 4:]
        return scores

    output = llama.generate_batch(
        [PROMPT], greedy(12, end), logits_processor=[broken], async_batching=AsyncBatchingConfig(overlap=overlap)
    )["req_0"]
    assert (output.error, output.generated_tokens) == (None, whole[: whole.index(end) + 1])


def test_say_once_what_they_cost(llama, log: pytest.LogCaptureFixture) -> None:
    logging.warning_once.cache_clear()
    for processors in (None, [sums], [sums]):
        llama.generate_batch([PROMPT] * 2, greedy(2), logits_processor=processors, async_batching=True)
        said = [record.message for record in log.records if "logits processors of your own" in record.message]
        assert len(said) == (processors is not None)


@pytest.mark.parametrize("given", [Avoid(), [3], "sums", {"a": 1}], ids=["no list", "3", "text", "dict"])
def test_that_are_none_are_refused(llama, given: object) -> None:
    with pytest.raises(ValueError, match=r"logits_processor must be a list of LogitsProcessors"):
        llama.generate_batch([PROMPT], greedy(3), logits_processor=given, async_batching=True)
    manager = llama.init_continuous_batching(greedy(3), async_batching=True)
    with pytest.raises(ValueError, match=r"request odd: logits_processor must be a list of LogitsProcessors"):
        manager.add_request(PROMPT, request_id="odd", logits_processor=given)
    manager.destroy()


def test_of_a_class_that_the_settings_ask_for_too_are_refused(llama) -> None:
    own = RepetitionPenaltyLogitsProcessor(1.5)
    manager = llama.init_continuous_batching(greedy(9), async_batching=True)
    with pytest.raises(ValueError, match=r"request odd: logits_processor has a RepetitionPenaltyLogitsProcessor, and"):
        manager.add_request(PROMPT, request_id="odd", logits_processor=[own], repetition_penalty=1.2)
    manager.add_request(PROMPT, logits_processor=[own, own, MinPLogitsWarper(0.1)], min_new_tokens=2)
    manager.start()
    answer = manager.get_result().generated_tokens
    manager.stop()
    assert answer == generates(llama, PROMPT, 9, own, MinPLogitsWarper(0.1))


def test_of_requests_are_there_whatever_transformers_setting_for_them_says(llama) -> None:
    with llama.continuous_batching_context_manager(
        greedy(9), continuous_batching_config=batching(per_request_processors=True), async_batching=True
    ) as manager:
        request_id = manager.add_request(PROMPT, repetition_penalty=1.4, logits_processor=[sums])
        answer = manager.get_result(request_id).generated_tokens
    assert answer == generates(llama, PROMPT, 9, sums, repetition_penalty=1.4)
