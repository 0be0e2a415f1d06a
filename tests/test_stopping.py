"""What ends a request beside its limit, an EOS and stop strings: its time and criteria of the user's own."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from conftest import batching, greedy, random_prompts, reference
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb import AsyncBatchingConfig


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
PROMPT = [5, 6, 7, 8]


class TestMaxTime:
    @staticmethod
    def ended_in_time(output: GenerationOutput, seconds: float, expected: list[int]) -> None:
        """By the first token after so many seconds, with the tokens that it would have had without a limit."""
        assert output.status == RequestStatus.FINISHED
        assert output.error is None
        assert output.generated_tokens == expected[: len(output.generated_tokens)]
        deadline = output.lifespan[0] + seconds
        assert output.timestamps[-1] > deadline
        assert all(stamp <= deadline for stamp in output.timestamps[:-1])

    @OVERLAP
    def test_of_a_call_ends_each_request_with_the_first_token_after_it(self, llama, overlap: bool) -> None:
        prompts = random_prompts(3, longest=20)
        outputs = llama.generate_batch(
            prompts,
            greedy(450),
            max_time=0.05,
            record_timestamps=True,
            async_batching=AsyncBatchingConfig(overlap=overlap),
        )
        for prompt, output in zip(prompts, outputs.values(), strict=True):
            self.ended_in_time(output, 0.05, reference(llama, prompt, greedy(450)))

    def test_of_no_seconds_leaves_one_token_as_in_generate(self, llama) -> None:
        config = greedy(9)
        config.max_time = 0.0
        output = llama.generate_batch([PROMPT], config, async_batching=True)["req_0"]
        assert output.generated_tokens == reference(llama, PROMPT, config) == reference(llama, PROMPT, greedy(1))

    def test_of_a_request_goes_before_the_calls_and_leaves_the_others_alone(self, llama) -> None:
        with llama.continuous_batching_context_manager(greedy(30), max_time=0, async_batching=True) as manager:
            ids = [manager.add_request(PROMPT, max_time=seconds) for seconds in (None, math.inf, 0.0, 1000)]
            tokens = [manager.get_result(request_id).generated_tokens for request_id in ids]
        assert tokens == [reference(llama, PROMPT, greedy(n)) for n in (1, 30, 1, 30)]

    def test_begins_when_the_request_begins_to_be_computed(self, llama) -> None:
        manager = llama.init_continuous_batching(
            greedy(450), continuous_batching_config=batching(max_requests_per_batch=1), async_batching=True
        )
        manager.add_request(PROMPT, max_new_tokens=200)
        manager.add_request(PROMPT, max_time=0.05, record_timestamps=True)
        manager.start()
        manager.stop()
        first, second = manager
        assert second.lifespan[0] >= first.lifespan[1] > second.created_time + 0.05
        self.ended_in_time(second, 0.05, reference(llama, PROMPT, greedy(450)))

    @pytest.mark.parametrize("seconds", [-1, math.nan, "3", True, [1.0]])
    def test_that_is_none_is_refused(self, llama, seconds: object) -> None:
        with pytest.raises(ValueError, match=r"max_time must be a number of seconds, 0 or more"):
            llama.generate_batch([PROMPT], greedy(3), max_time=seconds, async_batching=True)
        manager = llama.init_continuous_batching(greedy(3), async_batching=True)
        with pytest.raises(ValueError, match=r"request odd: max_time must be a number of seconds, 0 or more"):
            manager.add_request(PROMPT, request_id="odd", max_time=seconds)
        manager.destroy()


class AtToken(StoppingCriteria):
    """Ends with one of some tokens, once there are so many; remembers what it was asked."""

    def __init__(self, tokens: set[int], least: int = 0) -> None:
        self.tokens, self.least = tokens, least
        self.seen: list[list[int]] = []
        self.threads: set[str] = set()

    def __call__(self, input_ids: torch.LongTensor, scores: None, **kwargs: object) -> torch.BoolTensor:
        assert (input_ids.dtype, input_ids.shape[0], scores) == (torch.int64, 1, None)
        self.seen.append(input_ids[0].tolist())
        self.threads.add(threading.current_thread().name)
        done = input_ids.shape[1] >= self.least and int(input_ids[0, -1]) in self.tokens
        return torch.full((1,), done)


def generates(model: PreTrainedModel, prompt: list[int], limit: int, *criteria: StoppingCriteria) -> list[int]:
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=greedy(limit),
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    return answer[0, len(prompt) :].tolist()


class TestCriteria:
    @OVERLAP
    @pytest.mark.parametrize("sizes", [{}, {"num_blocks": 50, "page_size": 1, "max_batch_tokens": 17}], ids=str)
    def test_end_a_request_where_they_end_generate(self, llama, sizes: dict, overlap: bool) -> None:
        prompts = random_prompts(16, longest=20, seed=2)
        tokens = set(range(0, 97, 9))
        expected = [generates(llama, p, 30, AtToken(tokens), AtToken({5}, 40)) for p in prompts]
        assert sum(len(answer) < 30 for answer in expected) > 8
        manager = llama.init_continuous_batching(
            greedy(30),
            continuous_batching_config=batching(**sizes),
            stopping_criteria=StoppingCriteriaList([AtToken(tokens), AtToken({5}, 40)]),
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
        )
        manager.add_requests(prompts)
        manager.start()
        engine = manager._engine
        manager.stop()
        outputs = {output.request_id: output for output in manager}
        assert [outputs[f"req_{i}"].generated_tokens for i in range(16)] == expected
        assert {output.error for output in outputs.values()} == {None}
        assert (engine.scheduler.preemptions > 0) == bool(sizes)
        engine.scheduler.check_books()

    def test_are_asked_after_each_token_on_the_engines_thread(self, llama) -> None:
        criterion = AtToken(set())
        output = llama.generate_batch([PROMPT], greedy(5), stopping_criteria=[criterion], async_batching=True)["req_0"]
        answer = output.generated_tokens
        assert answer == reference(llama, PROMPT, greedy(5))
        assert criterion.seen == [PROMPT + answer[: n + 1] for n in range(5)]
        assert criterion.threads == {"async-batching"}

    def test_of_a_request_go_before_the_calls_and_leave_the_others_alone(self, llama) -> None:
        whole = reference(llama, PROMPT, greedy(20))
        calls = [AtToken({whole[3]})]
        with llama.continuous_batching_context_manager(
            greedy(20), stopping_criteria=calls, async_batching=True
        ) as manager:
            own = ([AtToken({whole[9]})], None, [], [lambda ids, scores: ids.shape[1] == 7])
            ids = [manager.add_request(PROMPT, stopping_criteria=criteria) for criteria in own]
            tokens = [manager.get_result(request_id).generated_tokens for request_id in ids]
        assert tokens == [
            generates(llama, PROMPT, 20, AtToken({whole[9]})),
            generates(llama, PROMPT, 20, *calls),
            whole,
            whole[:3],
        ]

    @OVERLAP
    def test_that_raise_end_their_request_alone(self, llama, overlap: bool) -> None:
        class Broken(StoppingCriteria):
            def __call__(self, input_ids: torch.LongTensor, scores: None, **kwargs: object) -> torch.BoolTensor:
                if input_ids.shape[1] > 8:
                    raise KeyError("no such thing")
                return torch.tensor([False])

        manager = llama.init_continuous_batching(
            greedy(12), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
        )
        for criteria in (None, [Broken()], [AtToken(set())]):
            manager.add_request(PROMPT, stopping_criteria=criteria)
        manager.start()
        engine = manager._engine
        manager.stop()
        outputs = {output.request_id: output for output in manager}
        whole, broken = reference(llama, PROMPT, greedy(12)), outputs["req_1"]
        assert broken.status == RequestStatus.FAILED
        assert broken.error == "request req_1: its stopping criterion Broken raised KeyError: 'no such thing'"
        assert broken.generated_tokens == whole[:5]
        assert [outputs[i].generated_tokens for i in ("req_0", "req_2")] == [whole] * 2
        assert [outputs[i].error for i in ("req_0", "req_2")] == [None] * 2
        engine.scheduler.check_books()

    def test_of_one_call_are_not_the_next_ones(self, llama) -> None:
        whole = reference(llama, PROMPT, greedy(9))
        for criteria, expected in (([AtToken({whole[2]})], whole[:3]), (None, whole)):
            outputs = llama.generate_batch(
                [PROMPT], greedy(9), stopping_criteria=criteria, persistent_manager=True, async_batching=True
            )
            assert [output.generated_tokens for output in outputs.values()] == [expected]
        llama.destroy_cached_continuous_batching_manager()

    @pytest.mark.parametrize("criteria", [AtToken({1}), [3], "stop", {"a": 1}], ids=["no list", "3", "text", "dict"])
    def test_that_are_none_are_refused(self, llama, criteria: object) -> None:
        with pytest.raises(ValueError, match=r"stopping_criteria must be a list of StoppingCriteria"):
            llama.generate_batch([PROMPT], greedy(3), stopping_criteria=criteria, async_batching=True)
        manager = llama.init_continuous_batching(greedy(3), async_batching=True)
        with pytest.raises(ValueError, match=r"request odd: stopping_criteria must be a list of StoppingCriteria"):
            manager.add_request(PROMPT, request_id="odd", stopping_criteria=criteria)
        manager.destroy()
