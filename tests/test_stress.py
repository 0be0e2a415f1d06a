"""All that a request may ask for, mixed at random: nothing is lost, and each gets what it would get alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, batching, greedy, shared_model
from test_grammars import EOS, GRAMMAR, Thing, tokenizer
from test_processors import Alternate, Avoid
from transformers import PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.door import sequence_id, sequence_seed
from transformers_async_cb.matrix.small import FIRST_ORDINARY, small_model
from transformers_async_cb.output import AsyncGenerationOutput


# What gets several answers: all of them are asked for by name.
SEQUENCES = 3

# Models that keep states: alone, beside pages, and with prompts that are not cut.
WITH_STATES = ("mamba2", "qwen3_next", "recurrent_gemma", "jamba")


def random_requests(rng: random.Random, count: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Prompts, of which many begin alike, and settings."""
    beginning = [rng.randrange(VOCABULARY) for _ in range(120)]
    chances = {
        0.4: lambda: {
            "do_sample": True,
            "temperature": rng.choice([0.5, 1.0, 2.0]),
            "top_k": rng.choice([0, 5, 50]),
            "top_p": rng.choice([1.0, 0.8]),
            "min_p": rng.choice([0.0, 0.1]),
            "seed": rng.randrange(9),
            "num_return_sequences": rng.choice([1, 1, SEQUENCES]),
            **rng.choice([{}, {}, {"typical_p": 0.7}, {"epsilon_cutoff": 0.05, "top_h": 0.9}, {"eta_cutoff": 0.2}]),
        },
        0.3: lambda: {"repetition_penalty": 1.3},
        0.25: lambda: {"eos_token_id": rng.sample(range(VOCABULARY), 6)},
        0.2: lambda: {"no_repeat_ngram_size": 3},
        0.15: lambda: {"min_new_tokens": 4},
        0.14: lambda: {"suppress_tokens": [1, 2, 3]},
        0.13: lambda: {"frequency_penalty": 0.7},
        0.12: lambda: {"logit_bias": {rng.randrange(VOCABULARY): 3.0}},
        0.11: lambda: {"logits_processor": rng.choice([Avoid, Alternate])},
        0.1: lambda: {
            "eos_token_id": EOS,
            **rng.choice([{"json_schema": Thing}, {"regex": "([a-m][n-z])+[0-9]"}, {"grammar": GRAMMAR}]),
        },
        0.09: lambda: {"logprobs": rng.choice([0, 4, 20])},
        0.08: lambda: {"prompt_logprobs": rng.choice([0, 4, 20])},
    }
    for _ in range(count):
        prompt = beginning[: rng.randint(0, 110)] + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))]
        settings: dict[str, Any] = {"max_new_tokens": rng.randint(1, 30)}
        for chance, make in chances.items():
            if rng.random() < chance:
                settings |= make()
        if settings.get("num_return_sequences", 1) > 1 and "logits_processor" in settings:
            settings["logits_processor"] = Avoid  # all sequences have the same processors, so these may have no state
        yield prompt, settings


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """As keyword arguments: processors may have a state, so each request gets new ones."""
    kind = settings.get("logits_processor")
    return settings if kind is None else {**settings, "logits_processor": [kind()]}


def alone(
    model: PreTrainedModel, asked: dict[str, tuple[list[int], dict[str, Any]]]
) -> dict[str, AsyncGenerationOutput]:
    """What each sequence gets when nothing runs beside it, no step waits for another and nothing is reused: an answer,
    or an error where settings leave no token that its grammar allows."""
    answers = {}
    with model.continuous_batching_context_manager(
        greedy(8),
        continuous_batching_config=batching(
            page_size=16, num_blocks=64, max_batch_tokens=512, allow_block_sharing=False
        ),
        tokenizer=tokenizer(),
        async_batching=AsyncBatchingConfig(overlap=False),
    ) as manager:
        for name, (prompt, settings) in asked.items():
            for number in range(settings.get("num_return_sequences", 1)):
                own = settings | {"num_return_sequences": 1}
                if number:
                    own["seed"] = sequence_seed(settings["seed"], number)
                sequence = manager.add_request(prompt, request_id=sequence_id(name, number), **given(own))
                output = manager.get_result(sequence)
                assert (
                    output.error is None or "regex" in settings or "grammar" in settings or "json_schema" in settings
                )
                answers[sequence] = output
    return answers


def assert_same_logprobs(one: AsyncGenerationOutput, other: AsyncGenerationOutput, within: float = 1e-4) -> None:
    """Within rounding; of the likeliest, those that come in another order are as likely."""
    for name in ("logprobs", "prompt_logprobs"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=within)
    for name in ("top_logprobs", "prompt_top_logprobs"):
        values = [getattr(output, name) and [[*d.values()] for d in getattr(output, name)] for output in (one, other)]
        torch.testing.assert_close(*values, rtol=0, atol=within)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_many_requests_gets_what_it_would_get_alone(family: str, overlap: bool, device: str) -> None:
    rng, model = random.Random(f"{family} {overlap}"), shared_model(family, device)
    page_size = rng.choice([2, 4, 16])
    asked = {f"request {i}": request for i, request in enumerate(random_requests(rng, 80))}
    expected = alone(model, asked)
    manager = model.init_continuous_batching(
        greedy(8),
        batching(
            page_size=page_size,
            num_blocks=240 // page_size,
            max_batch_tokens=64,
            max_requests_per_batch=20,
            cpu_offload_space=1e-4 if overlap == (FAMILIES.index(family) % 2 == 0) else 0.0,
        ),
        tokenizer=tokenizer(),
        async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
    )
    manager.start()
    engine, cancelled = manager._engine, set()
    for i, (name, (prompt, settings)) in enumerate(asked.items()):
        late = {"deadline": 0.0} if i % 25 == 24 else {}
        manager.add_request(prompt, request_id=name, priority=rng.choice([0, 0, 1, 2]), **given(settings), **late)
        if rng.random() < 0.1:
            chosen, number = f"request {rng.randint(0, i)}", rng.choice([0, 1])
            cancelled.update(sequence_id(chosen, n) for n in ([number] if number else range(SEQUENCES)))
            manager.cancel_request(sequence_id(chosen, number))
    outputs = {output.request_id: output for output in (manager.get_result(timeout=300) for _ in expected)}
    manager.stop()
    engine.scheduler.check_books()
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        tokens = expected[name].generated_tokens
        if output.error == expected[name].error:
            assert output.generated_tokens == tokens, (name, asked[name.partition("__")[0]])
            assert_same_logprobs(output, expected[name])
        else:
            assert name in cancelled or "deadline" in output.error
            assert output.generated_tokens == tokens[: len(output.generated_tokens)], name
    assert engine.scheduler.admission.reused > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
@pytest.mark.parametrize("family", WITH_STATES)
def test_each_of_many_requests_to_a_model_with_states_gets_what_it_would_get_alone(
    family: str, overlap: bool, device: str
) -> None:
    """They stream, wait for room, are cancelled, and are computed again when weights are said to have changed."""
    rng, model = random.Random(f"{family} {overlap}"), small_model(family).to(device)
    asked = {}
    for i, (prompt, settings) in enumerate(random_requests(rng, 16)):
        settings.pop("logits_processor", None)  # those of the tests know another vocabulary
        asked[f"request {i}"] = [FIRST_ORDINARY + token for token in prompt], settings
    expected = alone(model, asked)
    page_size = rng.choice([2, 4, 16])
    manager = model.init_continuous_batching(
        greedy(8),
        batching(
            page_size=page_size,
            num_blocks=240 // page_size,
            max_batch_tokens=rng.choice([24, 64]),
            max_requests_per_batch=rng.choice([4, 8]),
            max_queue_size=rng.choice([0, 7]),
        ),
        tokenizer=tokenizer(),
        async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
    )
    manager.start()
    engine, cancelled = manager._engine, set()
    for i, (name, (prompt, settings)) in enumerate(asked.items()):
        manager.add_request(
            prompt, request_id=name, priority=rng.randrange(3), streaming=rng.random() < 0.3, **given(settings)
        )
        if rng.random() < 0.1:
            chosen = f"request {rng.randint(0, i)}"
            cancelled.update(sequence_id(chosen, n) for n in range(SEQUENCES))
            manager.cancel_request(chosen)
        if rng.random() < 0.2:
            with manager.update_weights(rng.choice(["keep", "recompute", "drain"])):
                pass
    outputs: dict[str, AsyncGenerationOutput] = {}
    streamed: dict[str, list[AsyncGenerationOutput]] = {}
    while len(outputs) < len(expected):
        output = manager.get_result(timeout=300)
        if output.is_finished():
            outputs[output.request_id] = output
        else:
            streamed.setdefault(output.request_id, []).append(output)
    manager.stop()
    engine.scheduler.check_books()
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        tokens = expected[name].generated_tokens
        if output.error == expected[name].error:
            assert output.generated_tokens == tokens, (name, asked[name.partition("__")[0]])
            assert_same_logprobs(output, expected[name], within=5e-3)
        else:
            assert name in cancelled
            assert output.generated_tokens == tokens[: len(output.generated_tokens)], name
        for count, so_far in enumerate(streamed.get(name, ()), 1):
            assert so_far.generated_tokens == output.generated_tokens[:count]
            assert so_far.logprobs == output.logprobs[:count]
