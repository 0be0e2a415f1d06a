"""Several answers to one prompt: each is what a request of its own would get, and the prompt is computed once."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import batching, greedy, random_prompts, shared_model
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.door import sequence_id, sequence_seed
from transformers_async_cb.engine import Engine


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SHAPED = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "presence_penalty": 0.5}


def sampled(max_new_tokens: int, **settings: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, max_new_tokens=max_new_tokens, pad_token_id=0, **settings)


def answers(
    model: PreTrainedModel, asked: list[tuple[list[int], dict[str, Any]]], overlap: bool = True, **sizes: Any
) -> tuple[dict[str, GenerationOutput], Engine]:
    """The results of all sequences of requests `a`, `b`, ..., and the engine, whose books balance."""
    manager = model.init_continuous_batching(
        greedy(8), batching(**sizes), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
    )
    ids = [
        manager.add_request(prompt, request_id=chr(ord("a") + i), **settings)
        for i, (prompt, settings) in enumerate(asked)
    ]
    ids = manager.sequence_ids(ids)
    manager.start()
    engine = manager._engine
    manager.stop()
    outputs = {output.request_id: output for output in manager}
    assert sorted(outputs) == sorted(ids)
    engine.scheduler.check_books()
    return outputs, engine


class TestEachSequence:
    @DEVICE
    @pytest.mark.parametrize(
        "family, settings, sharing, overlap",
        [
            ("llama", {}, True, True),
            ("llama", SHAPED, True, False),
            ("llama", SHAPED, False, True),
            ("mistral", {}, False, False),
            ("gpt2", {}, False, True),
        ],
    )
    def test_gets_what_a_request_with_its_seed_gets_alone(
        self, family: str, settings: dict[str, Any], sharing: bool, overlap: bool, device: str
    ) -> None:
        model = shared_model(family, device)
        draw = random.Random(f"{sharing} {overlap}")
        prompts = random_prompts(8, longest=60, seed=4)
        asked = [
            (prompt, {"do_sample": True, "max_new_tokens": draw.randint(1, 24), "seed": i, **settings})
            for i, prompt in enumerate(prompts)
        ]
        alone, _ = answers(
            model,
            [(p, s | {"seed": sequence_seed(s["seed"], n)}) for p, s in asked for n in range(3)],
            allow_block_sharing=False,
        )
        sizes = {"page_size": 4, "num_blocks": 24, "max_batch_tokens": 24, "max_requests_per_batch": 10}
        together, engine = answers(
            model,
            [(p, s | {"num_return_sequences": 3}) for p, s in asked],
            overlap,
            allow_block_sharing=sharing,
            **sizes,
        )
        assert engine.scheduler.preemptions > 0, "the pool was too large to tell"
        for i in range(len(asked)):
            for n in range(3):
                output = together[sequence_id(chr(ord("a") + i), n)]
                assert output.error is None
                assert output.generated_tokens == alone[chr(ord("a") + 3 * i + n)].generated_tokens

    def test_gets_what_its_id_gives_it_where_no_seed_is_given(self, llama) -> None:
        prompt = random_prompts(1, shortest=20)[0]
        config = batching(seed=5)
        together = llama.generate_batch(
            [prompt, prompt], sampled(12, num_return_sequences=3), config, async_batching=True
        )
        names = [sequence_id(request_id, number) for request_id in ("req_0", "req_1") for number in range(3)]
        assert list(together) == names, "in the order of the inputs, the first of each first"
        assert together["req_1"].prompt_ids == prompt
        assert len({tuple(output.generated_tokens) for output in together.values()}) == 6, "all differ"
        with llama.continuous_batching_context_manager(
            sampled(12), continuous_batching_config=config, async_batching=True
        ) as manager:
            for name in names:
                manager.add_request(prompt, request_id=name)
                assert manager.get_result(name).generated_tokens == together[name].generated_tokens

    def test_is_drawn_from_the_distribution_of_generate(self, llama) -> None:
        """Pairs of tokens against `generate`'s, by the two-sample chi-squared statistic."""
        prompt, count = random_prompts(1, shortest=30, longest=30, seed=2)[0], 1500
        config = sampled(2, num_return_sequences=count, temperature=1.5, top_k=4)
        ids = torch.tensor([prompt])
        torch.manual_seed(0)
        theirs = llama.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected = Counter(map(tuple, theirs[:, -2:].tolist()))
        outputs = llama.generate_batch([prompt], config, batching(seed=1), async_batching=True)
        seen = Counter(tuple(output.generated_tokens) for output in outputs.values())
        assert seen.total() == count
        pairs = expected.keys() | seen.keys()
        assert len(pairs) > 8
        statistic = sum((expected[p] - seen[p]) ** 2 / (expected[p] + seen[p]) for p in pairs)
        assert statistic < len(pairs) + 4 * (2 * len(pairs)) ** 0.5, "four standard deviations above its mean"

    def test_streams_under_its_own_id(self, llama) -> None:
        with llama.continuous_batching_context_manager(sampled(6), async_batching=True) as manager:
            manager.add_request([1, 2, 3], "mine", streaming=True, num_return_sequences=2, seed=0)
            for name in ("mine", "mine__child#0"):
                seen = [output.generated_tokens for output in manager.request_id_iter(name)]
                assert seen == [seen[-1][: n + 1] for n in range(6)]

    def test_ends_by_its_own_eos(self, llama) -> None:
        asked = [([5, 6, 7], {"do_sample": True, "max_new_tokens": 60, "num_return_sequences": 8, "seed": 0})]
        asked[0][1]["eos_token_id"] = [3, 17, 31, 50]
        outputs, _ = answers(llama, asked)
        assert len({len(output.generated_tokens) for output in outputs.values()}) > 2


class TestThePrompt:
    @OVERLAP
    @pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no sharing"])
    def test_is_computed_once(self, llama, sharing: bool, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        computed, launch = [], Engine._launch

        def counting(engine: Engine, plan: Any) -> Any:
            computed.append(plan.tokens)
            return launch(engine, plan)

        monkeypatch.setattr(Engine, "_launch", counting)
        settings = {"do_sample": True, "max_new_tokens": 5, "num_return_sequences": 6}
        sizes = {"page_size": 16, "max_batch_tokens": 64, "allow_block_sharing": sharing}
        answers(llama, [(random_prompts(1, shortest=200)[0][:200], settings)], overlap, **sizes)
        assert sum(computed) == 200 + 5 + 6 * 4, "and its last token for each of the others"


class TestCancelling:
    @pytest.mark.parametrize("begun", [False, True], ids=["waiting", "running"])
    def test_the_request_ends_all_its_sequences_and_a_child_that_one_alone(self, llama, begun: bool) -> None:
        with llama.continuous_batching_context_manager(sampled(400), async_batching=True) as manager:
            with manager.pause():
                for name in ("mine", "yours"):
                    manager.add_request([1, 2, 3], name, num_return_sequences=3, streaming=begun, seed=1)
                if not begun:
                    manager.cancel_request("mine")
                    manager.cancel_request("yours__child#0")
            if begun:
                manager.get_result("mine__child#1")
                manager.get_result("yours__child#1")
                manager.cancel_request("mine")
                manager.cancel_request("yours__child#0")
            names = [sequence_id(name, number) for name in ("mine", "yours") for number in range(3)]
            errors = {name: list(manager.request_id_iter(name))[-1].error for name in names}
        assert [error is not None for error in errors.values()] == [True, True, True, False, True, False]
        assert errors["mine__child#1"] == "request mine__child#1 was cancelled"

    def test_the_request_ends_those_that_go_on_after_the_first_has_ended(self, llama) -> None:
        with llama.continuous_batching_context_manager(sampled(400), async_batching=True) as manager:
            manager.add_request([1, 2, 3], "mine", num_return_sequences=3, streaming=True, seed=1)
            manager.get_result("mine__child#1")
            manager._mailbox.cancel(manager._door.live["mine"])
            assert list(manager.request_id_iter("mine"))[-1].error is not None
            assert manager.sequence_ids(["mine"]) == ["mine__child#0", "mine__child#1"]
            manager.cancel_request("mine")
            assert list(manager.request_id_iter("mine__child#0"))[-1].error is not None


class TestTheDoor:
    @pytest.mark.parametrize("settings, message", [
        ({"num_return_sequences": 2}, "Greedy methods .* do not support `num_return_sequences`"),
        ({"num_return_sequences": 0, "do_sample": True}, "must be an integer of 1 or more, got 0"),
        ({"num_return_sequences": 1.5, "do_sample": True}, "must be an integer of 1 or more, got 1.5"),
        ({"num_beams": 4}, "num_beams=4: async_batching does not search with beams"),
        ({"num_beams": 4, "num_return_sequences": 2}, "num_beams=4: async_batching does not search with beams"),
    ])  # fmt: skip
    def test_names_the_request_and_what_is_allowed(self, llama, settings: dict[str, Any], message: str) -> None:
        manager = llama.init_continuous_batching(greedy(4), async_batching=True)
        with pytest.raises(ValueError, match=f"request mine: .*{message}"):
            manager.add_request([1, 2], "mine", **settings)

    def test_refuses_ids_that_are_in_use(self, llama) -> None:
        manager = llama.init_continuous_batching(sampled(4), async_batching=True)
        manager.add_request([1, 2], "mine__child#1")
        with pytest.raises(ValueError, match="request mine: the id mine__child#1 is in use"):
            manager.add_request([1, 2], "mine", num_return_sequences=3)
        assert manager.sequence_ids(["mine"]) == []

    def test_takes_a_number_for_each_prompt(self, llama) -> None:
        configs = [sampled(3, num_return_sequences=2), greedy(3), sampled(3, num_return_sequences=1)]
        outputs = llama.generate_batch([[1, 2], [3], [4, 5]], configs, async_batching=True)
        assert list(outputs) == ["req_0", "req_0__child#0", "req_1", "req_2"]
