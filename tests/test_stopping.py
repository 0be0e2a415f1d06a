"""What ends a request beside its limit, an EOS and stop strings: its time and criteria of the user's own."""

from __future__ import annotations

import math

import pytest
from conftest import batching, greedy, random_prompts, reference
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
