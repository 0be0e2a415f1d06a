"""What a user gets with each token of a stream."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tracemalloc

import numpy as np
import pytest
from conftest import batching, greedy, random_prompts
from transformers import PreTrainedModel

from transformers_async_cb.output import AsyncGenerationOutput
from transformers_async_cb.request import Request


PROMPT = [5, 6, 7, 8]
NEW_TOKENS = 70  # log-probabilities are kept in pieces of 32


def stream(model: PreTrainedModel, with_logprobs: bool = False, **settings) -> list[AsyncGenerationOutput]:
    """All outputs of a request, which nobody has looked at before the last has come."""
    own = batching(return_logprobs=with_logprobs)
    with model.continuous_batching_context_manager(
        greedy(NEW_TOKENS), continuous_batching_config=own, async_batching=True
    ) as manager:
        manager.add_requests(random_prompts(3))
        request_id = manager.add_request(PROMPT, streaming=True, **settings)
        return list(manager.request_id_iter(request_id))


@pytest.mark.parametrize(
    ("with_logprobs", "settings"),
    [
        (False, {}),
        (False, {"record_timestamps": True, "logprobs": 3, "prompt_logprobs": 1}),
        (True, {"record_timestamps": True}),
    ],
    ids=["tokens", "the model's log-probabilities", "those drawn from"],
)
def test_each_output_has_what_was_known_with_its_token_however_late_it_is_read(llama, with_logprobs, settings) -> None:
    outputs = stream(llama, with_logprobs, **settings)
    last = outputs[-1]
    assert last.is_finished()
    assert len(outputs) == len(last.generated_tokens) == NEW_TOKENS
    for count, output in reversed(list(enumerate(outputs[:-1], 1))):
        assert output.prompt_ids == PROMPT
        assert output.generated_tokens == last.generated_tokens[:count]
        assert output.logprobs == last.logprobs[:count]
        assert output.timestamps == (last.timestamps and last.timestamps[:count])
        assert output.top_logprobs == (last.top_logprobs and last.top_logprobs[:count])
        assert output.prompt_top_logprobs == last.prompt_top_logprobs
        assert output.generated_since(count - 1) == last.generated_tokens[count - 1 : count]
        assert output.lifespan[1] == -1
        if "logprobs" in settings:
            for since in (0, 31, 32, 33, count - 1, count):
                assert np.array_equal(output.ranked_since(since), last.ranked[since:count])


def test_what_a_user_does_to_one_output_happens_to_no_other(llama) -> None:
    outputs = stream(llama)
    outputs[3].generated_tokens.clear()
    outputs[3].prompt_ids.append(0)
    assert outputs[4].generated_tokens == outputs[-1].generated_tokens[:5]
    assert outputs[4].prompt_ids == PROMPT


def test_outputs_can_be_copied_pickled_and_compared(llama) -> None:
    outputs = stream(llama, record_timestamps=True, logprobs=2)
    for output in (outputs[40], outputs[-1]):
        expected = dataclasses.asdict(output)
        for other in (pickle.loads(pickle.dumps(output)), copy.copy(output), copy.deepcopy(output)):
            found = dataclasses.asdict(other)
            assert np.array_equal(found.pop("ranked"), output.ranked)
            assert found == {name: value for name, value in expected.items() if name != "ranked"}
    assert outputs[40] == outputs[40]
    assert outputs[40] != outputs[41]


def test_an_output_that_nobody_reads_holds_no_copy_of_what_came_before() -> None:
    request = Request("long", np.zeros(10**6, np.int32), 10**6, 100)
    tracemalloc.start()
    try:
        outputs = [request.stream(token, None, 0.0, None) for token in range(100)]
        assert tracemalloc.get_traced_memory()[0] < 10**6
    finally:
        tracemalloc.stop()
    assert outputs[-1].generated_tokens == list(range(100))
    assert len(outputs[0].prompt_ids) == 10**6
