"""What comes out is what `model.generate` gives for each prompt alone, whatever the engine did meanwhile."""

from __future__ import annotations

import random
import time
from typing import NamedTuple

import pytest
import torch
from conftest import (
    FAMILIES,
    VOCABULARY,
    batching,
    generate_alone,
    greedy,
    new_model,
    random_prompts,
    reference,
    shared_model,
)
from transformers import GenerationConfig
from transformers.generation.continuous_batching import RequestStatus

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.engine import Engine
from transformers_async_cb.manager import CACHED


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
# Many, so that about half of the requests end by one of them before their limit.
EOS_IDS = [3, 17, 31, 50, 77, 90]


class Asked(NamedTuple):
    """A request and its answer."""

    prompt: list[int]
    max_new_tokens: int
    answer: list[int]


def ask_generate(family: str, count: int, longest_answer: int = 24, seed: int = 0) -> list[Asked]:
    rng, model = random.Random(seed), shared_model(family)
    prompts = random_prompts(count, seed=seed)
    limits = [rng.randint(1, longest_answer) for _ in prompts]
    return [Asked(p, n, reference(model, p, greedy(n, EOS_IDS))) for p, n in zip(prompts, limits, strict=True)]


def run(family: str, asked: list[Asked], own: AsyncBatchingConfig, **sizes: int) -> Engine:
    """Run the requests all at once, compare each with its answer, check the books and return the engine."""
    manager = shared_model(family).init_continuous_batching(
        generation_config=greedy(eos_token_id=EOS_IDS),
        continuous_batching_config=batching(**sizes),
        async_batching=own,
    )
    ids = [manager.add_request(request.prompt, max_new_tokens=request.max_new_tokens) for request in asked]
    manager.start()
    engine = manager._engine
    outputs = {output.request_id: output for output in (manager.get_result() for _ in ids)}
    manager.stop()
    wrong = [i for i, r in zip(ids, asked, strict=True) if outputs[i].generated_tokens != r.answer]
    assert not wrong, f"{len(wrong)} of {len(ids)} differ, the first is {outputs[wrong[0]]}"
    assert all(output.error is None for output in outputs.values())
    engine.scheduler.check_books()
    assert engine.scheduler.pages.free == engine.scheduler.pages.count
    return engine


class TestTokensEqualGenerates:
    @OVERLAP
    @pytest.mark.parametrize("family", FAMILIES)
    def test_with_room_for_all(self, family: str, overlap: bool) -> None:
        engine = run(family, ask_generate(family, 200), AsyncBatchingConfig(overlap=overlap))
        assert engine.scheduler.preemptions == 0
        assert (engine.scheduler.discarded > 0) == overlap, "an EOS costs a token exactly when a step is ahead"

    @OVERLAP
    @pytest.mark.parametrize("family", FAMILIES)
    def test_when_pages_are_short_and_prompts_are_split(self, family: str, overlap: bool) -> None:
        asked = ask_generate(family, 200)
        pages, page_size, token_budget = 100, 4, 48
        assert max(len(request.prompt) for request in asked) > 4 * token_budget, "prompts take several chunks"
        engine = run(
            family,
            asked,
            AsyncBatchingConfig(overlap=overlap, debug=True),
            num_blocks=pages,
            page_size=page_size,
            max_batch_tokens=token_budget,
        )
        assert (engine.scheduler.preemptions > 0) == (family != "mistral"), "windows of a few pages do not run short"
        assert (engine.scheduler.discarded > 0) == overlap

    @OVERLAP
    @pytest.mark.parametrize("sizes", [
        {"num_blocks": 2},  # of 256 tokens
        {"num_blocks": 24, "page_size": 16, "max_batch_tokens": 7},
        {"num_blocks": 330, "page_size": 1, "max_batch_tokens": 64},
        {"num_blocks": 40, "page_size": 16, "max_requests_per_batch": 3},
        {"max_requests_per_batch": 1},
        {"page_size": 13, "max_batch_tokens": 100, "safety_margin": 0.5, "num_blocks": 60},
    ], ids=str)  # fmt: skip
    def test_for_any_sizes(self, sizes: dict, overlap: bool) -> None:
        run("mistral", ask_generate("mistral", 60), AsyncBatchingConfig(overlap=overlap, debug=True), **sizes)

    @OVERLAP
    def test_when_the_pool_holds_just_the_longest_request(self, overlap: bool) -> None:
        asked = ask_generate("llama", 40, longest_answer=40)
        longest = max(len(request.prompt) + request.max_new_tokens for request in asked)
        run("llama", asked, AsyncBatchingConfig(overlap=overlap, debug=True), num_blocks=longest - 1, page_size=1)

    @OVERLAP
    def test_when_requests_grow_to_many_times_their_prompt(self, overlap: bool) -> None:
        """Each is preempted again and again, and computed again with all it had generated."""
        model = shared_model("qwen3")
        prompts, config = random_prompts(8, longest=5), greedy(100)
        asked = [Asked(p, 100, reference(model, p, config)) for p in prompts]
        manager = model.init_continuous_batching(
            config,
            continuous_batching_config=batching(num_blocks=40, page_size=3, max_batch_tokens=16),
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
        )
        manager.add_requests(prompts)
        manager.start()
        engine = manager._engine
        manager.stop()
        assert {i: o.generated_tokens for i, o in ((o.request_id, o) for o in manager)} == {
            f"req_{i}": request.answer for i, request in enumerate(asked)
        }
        assert engine.scheduler.preemptions >= len(prompts)

    def test_when_requests_come_while_others_run(self) -> None:
        asked = ask_generate("llama", 60)
        model = shared_model("llama")
        sizes = batching(num_blocks=120, page_size=4, max_batch_tokens=40)
        with model.continuous_batching_context_manager(
            greedy(eos_token_id=EOS_IDS), continuous_batching_config=sizes, async_batching=True
        ) as manager:
            answers: dict[str, list[int]] = {}
            for request in asked:
                manager.add_request(request.prompt, max_new_tokens=request.max_new_tokens)
                if (output := manager.get_result(timeout=0.001)) is not None:
                    answers[output.request_id] = output.generated_tokens
            while len(answers) < len(asked):
                output = manager.get_result()
                answers[output.request_id] = output.generated_tokens
        assert answers == {f"req_{i}": request.answer for i, request in enumerate(asked)}

    def test_for_the_same_prompt_many_times(self) -> None:
        model, prompt = shared_model("llama"), random_prompts(1, seed=5)[0]
        outputs = model.generate_batch([prompt] * 20, generation_config=greedy(10), async_batching=True)
        assert [o.generated_tokens for o in outputs.values()] == [reference(model, prompt, greedy(10))] * 20

    def test_beside_other_requests_eos_ids(self) -> None:
        """An EOS of one request is a token like any other for the rest."""
        model, prompt = shared_model("llama"), random_prompts(1, seed=5)[0]
        answer = reference(model, prompt, greedy(12))
        stops = [None, answer[3], [answer[7], answer[5]], -1]
        with model.continuous_batching_context_manager(greedy(12), async_batching=True) as manager:
            ids = [manager.add_request(prompt, eos_token_id=stop) for stop in stops]
            outputs = [manager.get_result(request_id).generated_tokens for request_id in ids]
        assert outputs == [reference(model, prompt, greedy(12, stop)) for stop in stops]
        assert len(outputs[1]) < len(outputs[0])


class TestResults:
    def test_come_in_the_order_of_the_inputs(self) -> None:
        prompts = random_prompts(30, longest=60)
        # Later prompts end earlier, for a third of them by an EOS.
        outputs = shared_model("llama").generate_batch(
            prompts, generation_config=GenerationConfig(max_length=61, eos_token_id=EOS_IDS), async_batching=True
        )
        assert list(outputs) == [f"req_{i}" for i in range(30)]
        assert [output.request_id for output in outputs.values()] == list(outputs)
        assert [output.prompt_ids for output in outputs.values()] == prompts

    def test_say_how_the_request_went(self, llama) -> None:
        before = time.perf_counter()
        output = llama.generate_batch([[1, 2, 3]], generation_config=greedy(5), async_batching=True)["req_0"]
        after = time.perf_counter()
        assert output.status == RequestStatus.FINISHED
        assert output.is_finished()
        assert output.error is None
        assert output.logprobs == []
        assert output.timestamps is None
        started, finished = output.lifespan
        assert before <= output.created_time <= started <= finished <= after

    @OVERLAP
    def test_have_a_timestamp_for_each_token_when_asked(self, overlap: bool) -> None:
        outputs = shared_model("llama").generate_batch(
            random_prompts(20, longest=40),
            generation_config=greedy(9, EOS_IDS),
            continuous_batching_config=batching(num_blocks=20, page_size=4),
            record_timestamps=True,
            async_batching=AsyncBatchingConfig(overlap=overlap),
        )
        for output in outputs.values():
            assert len(output.timestamps) == len(output.generated_tokens)
            assert output.timestamps == sorted(set(output.timestamps)), "each token came after the one before it"
            assert output.lifespan[0] < output.timestamps[0] <= output.timestamps[-1] <= output.lifespan[1]

    @OVERLAP
    def test_have_generates_logprobs_when_asked(self, any_model, overlap: bool) -> None:
        prompts, limit = random_prompts(12, longest=80, seed=2), 10
        outputs = any_model.generate_batch(
            prompts,
            generation_config=greedy(limit),
            continuous_batching_config=batching(return_logprobs=True, num_blocks=36, page_size=4, max_batch_tokens=40),
            async_batching=AsyncBatchingConfig(overlap=overlap),
        )
        for prompt, output in zip(prompts, outputs.values(), strict=True):
            ids = torch.tensor([prompt])
            whole = any_model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=greedy(limit),
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            tokens = whole.sequences[0, len(prompt) :]
            expected = torch.stack(whole.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            assert output.generated_tokens == tokens.tolist()
            torch.testing.assert_close(torch.tensor(output.logprobs), expected, rtol=0, atol=2e-5)

    def test_of_no_inputs_are_none(self, llama) -> None:
        assert llama.generate_batch([], generation_config=greedy(5), async_batching=True) == {}

    def test_take_tensors_and_arrays_as_prompts(self, llama) -> None:
        prompt = [5, 6, 7, 8]
        forms = [prompt, tuple(prompt), torch.tensor(prompt), torch.tensor(prompt, dtype=torch.int32).numpy()]
        outputs = llama.generate_batch(forms, generation_config=greedy(6), async_batching=True)
        assert [o.generated_tokens for o in outputs.values()] == [reference(llama, prompt, greedy(6))] * 4
        assert [o.prompt_ids for o in outputs.values()] == [prompt] * 4


class TestSteps:
    @OVERLAP
    @pytest.mark.parametrize("tokens", [1, 2, 17])
    def test_a_request_that_ends_by_its_length_takes_one_for_each_token(self, tokens: int, overlap: bool) -> None:
        prompt = [1, 2, 3]
        asked = [Asked(prompt, tokens, reference(shared_model("gpt2"), prompt, greedy(tokens)))]
        assert not set(asked[0].answer) & set(EOS_IDS)
        engine = run("gpt2", asked, AsyncBatchingConfig(overlap=overlap))
        assert engine.steps == tokens

    def test_a_prompt_takes_one_for_each_chunk(self) -> None:
        prompt = random_prompts(1, shortest=100, longest=100)[0]
        asked = [Asked(prompt, 1, reference(shared_model("llama"), prompt, greedy(1)))]
        assert run("llama", asked, AsyncBatchingConfig(), max_batch_tokens=30).steps == 4

    def test_all_requests_that_fit_share_them(self) -> None:
        model = shared_model("llama")
        prompts = random_prompts(20, longest=20, seed=4)
        asked = [Asked(p, 5, reference(model, p, greedy(5, EOS_IDS))) for p in prompts]
        assert run("llama", asked, AsyncBatchingConfig()).steps == 5


class TestRequestsThatCannotFit:
    def test_a_prompt_larger_than_the_pool_fails_alone(self, llama) -> None:
        prompts = [[1] * 20, [2] * 100, [3] * 20]
        outputs = llama.generate_batch(
            prompts,
            generation_config=greedy(8),
            continuous_batching_config=batching(num_blocks=10, page_size=4),
            async_batching=True,
        )
        assert [o.status for o in outputs.values()] == [
            RequestStatus.FINISHED, RequestStatus.FAILED, RequestStatus.FINISHED
        ]  # fmt: skip
        error = outputs["req_1"].error
        assert "req_1" in error
        assert "needs 25 pages" in error
        assert "has 10" in error
        for request_id, prompt in (("req_0", prompts[0]), ("req_2", prompts[2])):
            assert outputs[request_id].generated_tokens == reference(llama, prompt, greedy(8))

    @OVERLAP
    def test_an_answer_that_outgrows_the_pool_keeps_what_it_has_and_says_why_it_ended(self, overlap: bool) -> None:
        model, prompts = shared_model("llama"), [[1] * 20, [2] * 20, [3] * 20]
        manager = model.init_continuous_batching(
            greedy(8),
            continuous_batching_config=batching(num_blocks=10, page_size=4),
            async_batching=AsyncBatchingConfig(overlap=overlap),
        )
        for prompt, limit in zip(prompts, (8, 60, 8), strict=True):
            manager.add_request(prompt, max_new_tokens=limit)
        manager.start()
        manager.stop()
        outputs = {output.request_id: output for output in manager}
        long = outputs["req_1"]
        assert long.status == RequestStatus.FAILED
        assert "req_1" in long.error
        # 40 positions hold the prompt and 20 tokens; the 21st needs none.
        assert long.generated_tokens == reference(model, prompts[1], greedy(21))
        for request_id, prompt in (("req_0", prompts[0]), ("req_2", prompts[2])):
            assert outputs[request_id].error is None
            assert outputs[request_id].generated_tokens == reference(model, prompt, greedy(8))

    def test_an_answer_beyond_the_learned_positions_ends_there_and_says_so(self) -> None:
        model, prompt = shared_model("gpt2"), random_prompts(1, shortest=500, longest=500)[0]
        output = model.generate_batch([prompt], generation_config=greedy(40), async_batching=True)["req_0"]
        assert output.status == RequestStatus.FAILED
        assert "512 positions" in output.error
        assert output.generated_tokens == reference(model, prompt, greedy(13))


def test_a_config_in_the_place_of_block_is_refused() -> None:
    """Of `init_continuous_batching` the second argument is a config, of the context manager it is not."""
    with (
        pytest.raises(ValueError, match="block must be True or False, got ContinuousBatchingConfig"),
        shared_model("llama").continuous_batching_context_manager(greedy(4), batching(), async_batching=True),
    ):
        pass


class TestSettingsOfASingleRequest:
    @OVERLAP
    def test_hold_for_it_alone(self, overlap: bool) -> None:
        """Greedy and sampled requests in the same steps, each with its limit; a top-k of 1 is greedy."""
        model, prompts = shared_model("llama"), random_prompts(12, longest=40, seed=8)
        settings = [
            {}, {"do_sample": True, "top_k": 1, "temperature": 3.0}, {"do_sample": True, "temperature": 5.0},
            {"max_length": 50, "max_new_tokens": None}, {"generation_config": greedy(5)},
            {"do_sample": True, "min_p": 1.0},
        ]  # fmt: skip
        with model.continuous_batching_context_manager(
            greedy(9), async_batching=AsyncBatchingConfig(overlap=overlap)
        ) as manager:
            ids = [
                manager.add_request(prompt, **(settings[i % 6] | ({"max_new_tokens": 7} if i % 6 == 2 else {})))
                for i, prompt in enumerate(prompts)
            ]
            answers = [manager.get_result(request_id).generated_tokens for request_id in ids]
        for i, (prompt, tokens) in enumerate(zip(prompts, answers, strict=True)):
            limit = (9, 9, 7, 9, 5, 9)[i % 6]
            assert (tokens == reference(model, prompt, greedy(limit))) == (i % 6 != 2)
            assert len(tokens) == limit

    @OVERLAP
    def test_may_come_as_a_list_of_configs(self, overlap: bool) -> None:
        model, prompts = shared_model("qwen3"), random_prompts(6, longest=40, seed=9)
        configs = [
            greedy(4), GenerationConfig(max_length=50, pad_token_id=0), greedy(12, EOS_IDS), greedy(1), greedy(12),
            GenerationConfig(pad_token_id=0),
        ]  # fmt: skip
        outputs = model.generate_batch(
            prompts, generation_config=configs, async_batching=AsyncBatchingConfig(overlap=overlap)
        )
        expected = [reference(model, prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
        assert [output.generated_tokens for output in outputs.values()] == expected

    def test_of_a_config_are_in_place_of_all_the_managers(self) -> None:
        model, prompt = shared_model("llama"), [4, 5, 6]
        manager = model.init_continuous_batching(greedy(7), async_batching=True, do_sample=True, temperature=9.0)
        ids = [manager.add_request(prompt, **own) for own in ({"generation_config": greedy(5)}, {"do_sample": False})]
        manager.start()
        answers = [manager.get_result(request_id).generated_tokens for request_id in ids]
        manager.stop()
        assert answers == [reference(model, prompt, greedy(5)), reference(model, prompt, greedy(7))]

    def test_of_many_configs_come_after_the_keywords_of_the_call(self) -> None:
        model, prompt = shared_model("llama"), [4, 5, 6]
        configs = [greedy(4), greedy(6)]
        outputs = model.generate_batch([prompt] * 2, generation_config=configs, max_new_tokens=2, async_batching=True)
        assert [output.generated_tokens for output in outputs.values()] == [reference(model, prompt, greedy(2))] * 2
        assert [config.max_new_tokens for config in configs] == [4, 6]

    def test_are_merged_with_the_models_own(self) -> None:
        model = new_model("llama")
        whole = reference(shared_model("llama"), [4, 5, 6], greedy(9))
        model.generation_config.eos_token_id = whole[4]
        with model.continuous_batching_context_manager(greedy(9, whole[2]), async_batching=True) as manager:
            request_id = manager.add_request([4, 5, 6], generation_config=GenerationConfig(max_new_tokens=8))
            assert manager.get_result(request_id).generated_tokens == whole[: whole.index(whole[4]) + 1]

    def test_include_a_seed_that_decides_alone_what_is_sampled(self) -> None:
        model, prompt = shared_model("llama"), [1, 2, 3]
        config = GenerationConfig(do_sample=True, temperature=2.0, max_new_tokens=10)

        def drawn(seeds: list[int | None], **ids: str) -> list[list[int]]:
            with model.continuous_batching_context_manager(config, async_batching=True) as manager:
                ids = [manager.add_request(prompt, seed=seed, **ids) for seed in seeds]
                return [manager.get_result(request_id).generated_tokens for request_id in ids]

        alone = drawn([5], request_id="any")
        beside = drawn([3, 5, None, 5, -1, 2**80])
        assert beside[1] == beside[3] == alone[0]
        assert len({tuple(tokens) for tokens in beside}) == 5


class TestSampling:
    @staticmethod
    def tokens(
        prompts: list[list[int]], seed: int | None = 7, overlap: bool = True, ids: list[str] | None = None, **sizes
    ) -> dict[str, list[int]]:
        manager = shared_model("llama").init_continuous_batching(
            GenerationConfig(do_sample=True, temperature=2.0, top_k=40, top_p=0.95, max_new_tokens=12),
            continuous_batching_config=batching(seed=seed, **({"num_blocks": 64} | sizes)),
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
        )
        for i, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=ids[i] if ids else None)
        manager.start()
        manager.stop()
        return {output.request_id: output.generated_tokens for output in manager}

    def test_gives_a_request_the_same_tokens_whatever_runs_beside_it(self) -> None:
        prompts = random_prompts(24, longest=60, seed=3)
        together = self.tokens(prompts)
        assert len(together) == 24
        assert together == self.tokens(prompts, overlap=False)
        assert together == self.tokens(prompts, num_blocks=24, page_size=4, max_batch_tokens=11)
        assert together == self.tokens(prompts[::-1], ids=[f"req_{i}" for i in range(24)][::-1])
        for i in (0, 11, 23):
            assert self.tokens([prompts[i]], ids=[f"req_{i}"]) == {f"req_{i}": together[f"req_{i}"]}

    def test_differs_between_seeds(self) -> None:
        prompts = random_prompts(8, longest=20)
        first, second = self.tokens(prompts, seed=1), self.tokens(prompts, seed=2)
        assert all(first[request_id] != second[request_id] for request_id in first)

    def test_differs_between_requests_with_the_same_prompt(self) -> None:
        tokens = self.tokens([[1, 2, 3]] * 16)
        assert len({tuple(answer) for answer in tokens.values()}) == 16

    def test_follows_the_global_seed_without_one_of_its_own(self) -> None:
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(self.tokens([[1, 2, 3]], seed=None))
        assert drawn[0] == drawn[1] != drawn[2]

    def test_draws_anew_in_each_call_without_a_seed(self) -> None:
        assert self.tokens([[1, 2, 3]], seed=None) != self.tokens([[1, 2, 3]], seed=None)

    @pytest.mark.parametrize(
        "settings",
        [
            {"top_k": 0},
            {"top_k": 0, "temperature": 0.7},
            {"top_k": 5, "temperature": 3.0},
            {"top_k": 0, "top_p": 0.8, "temperature": 2.0},
            {"top_k": 12, "top_p": 0.7, "temperature": 4.0},
            {"top_k": 0, "min_p": 0.05, "temperature": 3.0},
            {},  # generate's own top_k of 50
            {"top_k": 0, "typical_p": 0.6, "temperature": 2.0},
            {"top_k": 0, "epsilon_cutoff": 0.02, "temperature": 2.0},
            {"top_k": 0, "eta_cutoff": 0.1, "temperature": 4.0},
            {"top_h": 0.6, "temperature": 3.0},
            {"top_k": 30, "top_p": 0.95, "typical_p": 0.8, "eta_cutoff": 0.02, "temperature": 4.0},
        ],
        ids=str,
    )
    def test_draws_from_the_distribution_that_generate_draws_from(self, llama, settings: dict) -> None:
        """Chi-square over the tokens of one-token requests; its 0.1 % quantile, by Wilson and Hilferty."""
        prompt, draws = [11, 12, 13], 4000
        config = GenerationConfig(do_sample=True, max_new_tokens=1, **settings)
        outputs = llama.generate_batch(
            [prompt] * draws,
            generation_config=config,
            continuous_batching_config=batching(seed=0),
            async_batching=True,
        )
        drawn = torch.tensor([output.generated_tokens[0] for output in outputs.values()])
        counts = torch.bincount(drawn, minlength=97).double()

        ids = torch.tensor([prompt])
        scores = llama.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, pad_token_id=0, output_scores=True,
            return_dict_in_generate=True,
        ).scores[0][0]  # fmt: skip
        expected = scores.double().softmax(-1) * draws
        assert counts[expected == 0].sum() == 0, "a token was drawn that top-k or top-p excludes"
        often = expected >= 5
        observed = torch.cat([counts[often], counts[~often].sum()[None]])
        expected = torch.cat([expected[often], expected[~often].sum()[None].clamp_min(1e-9)])
        freedom = int(often.sum())
        assert freedom >= 3, "the distribution is too narrow to tell"
        statistic = float(((observed - expected) ** 2 / expected).sum())
        limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
        assert statistic < limit

    def test_logprobs_are_those_of_the_distribution_it_draws_from(self, llama) -> None:
        """Temperature, top-k and top-p included: as `generate`'s scores, not its logits."""
        config = GenerationConfig(do_sample=True, max_new_tokens=1, temperature=2.0, top_k=5, top_p=0.9)
        outputs = llama.generate_batch(
            [[11, 12, 13]] * 50,
            generation_config=config,
            continuous_batching_config=batching(seed=0, return_logprobs=True),
            async_batching=True,
        )
        ids = torch.tensor([[11, 12, 13]])
        scores = llama.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, pad_token_id=0, output_scores=True,
            return_dict_in_generate=True,
        ).scores[0][0]  # fmt: skip
        expected = scores.log_softmax(-1)
        for output in outputs.values():
            torch.testing.assert_close(
                torch.tensor(output.logprobs), expected[output.generated_tokens], rtol=0, atol=2e-5
            )

    def test_a_top_k_of_one_is_greedy(self, llama) -> None:
        prompts = random_prompts(10, longest=40)
        outputs = llama.generate_batch(
            prompts, generation_config=greedy(8), do_sample=True, top_k=1, temperature=5.0, async_batching=True
        )
        assert [o.generated_tokens for o in outputs.values()] == [reference(llama, p, greedy(8)) for p in prompts]


BEGINNING = [(7 * i) % VOCABULARY for i in range(50)]
ALIKE = [[*BEGINNING, i, i + 1] for i in range(12)] + [BEGINNING[:32], BEGINNING[:33], [5, 6]]


class TestPromptsThatBeginAlike:
    """The pages of a beginning are computed once, as long as the model is what it was."""

    def generated(self, model, **changes) -> tuple[list[list[int]], int]:
        """The answers, and how many tokens of prompts were found; the manager is kept."""
        outputs = model.generate_batch(
            ALIKE,
            generation_config=greedy(10),
            continuous_batching_config=batching(page_size=8, max_batch_tokens=64, **changes),
            persistent_manager=True,
            async_batching=AsyncBatchingConfig(debug=True),
        )
        return [output.generated_tokens for output in outputs.values()], getattr(
            model, CACHED
        )._engine.scheduler.admission.reused

    def expected(self, model) -> list[list[int]]:
        return [reference(model, prompt, greedy(10)) for prompt in ALIKE]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_give_the_tokens_of_generate(self, family):
        model = new_model(family)
        expected = self.expected(model)
        tokens, reused = self.generated(model)
        assert tokens == expected
        assert reused == 48 * 11 + 24 + 32, "all but the first prompt, and the one that is none of its kind"
        tokens, reused_again = self.generated(model)
        assert tokens == expected
        assert reused_again - reused == 48 * 12 + 24 + 32, "now the first as well"
        model.destroy_cached_continuous_batching_manager()

    def test_are_computed_one_by_one_when_sharing_is_off(self):
        model = new_model("llama")
        assert self.generated(model, allow_block_sharing=False) == (self.expected(model), 0)
        model.destroy_cached_continuous_batching_manager()

    @pytest.mark.parametrize("change", ["in place", "through data", "one bit", "in another order", "moved", "hooked"])
    def test_follow_a_model_that_changes_between_calls(self, change):
        model = new_model("llama")
        self.generated(model)
        weight = model.model.layers[0].self_attn.v_proj.weight
        with torch.no_grad():
            if change == "in place":
                weight.mul_(1.5)
            elif change == "through data":
                weight.data.copy_(weight.data * 1.5)
            elif change == "one bit":
                weight.data.view(torch.int32)[3, 4] ^= 1 << 30
            elif change == "in another order":
                weight.data.copy_(weight.data.flip(0))
            elif change == "moved":
                weight.data = weight.data * 1.5
            else:
                model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: out * 1.5)
        engine = getattr(model, CACHED)._engine
        reused = engine.scheduler.admission.reused
        expected = self.expected(model)
        tokens, reused_again = self.generated(model)
        before = reused if getattr(model, CACHED)._engine is engine else 0
        assert tokens == expected
        assert reused_again - before == reused, "as in the first call: the first prompt had to be computed again"
        model.destroy_cached_continuous_batching_manager()

    def test_follow_weights_that_change_in_a_pause(self):
        model = new_model("llama")
        prompt = ALIKE[0]
        with model.continuous_batching_context_manager(
            greedy(10), continuous_batching_config=batching(page_size=8), async_batching=True
        ) as manager:
            manager.add_request(prompt, request_id="before")
            before = manager.get_result("before").generated_tokens
            with manager.pause():
                expected = [generate_alone(model, prompt, greedy(10))]
                model.model.layers[0].self_attn.v_proj.weight.data.mul_(-1)
                expected.append(generate_alone(model, prompt, greedy(10)))
            manager.add_request(prompt, request_id="after")
            assert [before, manager.get_result("after").generated_tokens] == expected
        assert expected[0] != expected[1], "or the change would not show"
