"""Log-probabilities of generated tokens and of prompts, for the requests that ask: `generate`'s, and nobody else's."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    FAMILIES,
    VOCABULARY,
    batching,
    greedy,
    new_model,
    random_prompts,
    run_in_interpreter,
    shared_model,
)
from test_grammars import EOS, tokenizer
from test_processors import Avoid
from transformers import GenerationConfig, PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig, prefill, scheduler
from transformers_async_cb.logprobs import RANKED_WORDS, rank, reference
from transformers_async_cb.output import AsyncGenerationOutput
from transformers_async_cb.runner import Runner


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
EOS_IDS = [3, 17, 31, 50, 77, 90]


def close(ours: list[float], theirs: torch.Tensor) -> None:
    """On a GPU two passes in float32 are up to 2e-5 from what is exact, either way."""
    torch.testing.assert_close(torch.tensor(ours), theirs.cpu(), rtol=0, atol=4e-5 if theirs.is_cuda else 2e-5)


def check_likeliest(ours: list[dict[int, float]], logprobs: torch.Tensor, wanted: int) -> None:
    """Those that are as likely, but for rounding, may come in either order."""
    values = [list(of_token.values()) for of_token in ours]
    ids = torch.tensor([list(of_token) for of_token in ours], device=logprobs.device)
    assert values == [sorted(row, reverse=True) for row in values]
    assert all(len(of_token) == wanted for of_token in ours)
    close(values, logprobs.topk(wanted).values)
    close(values, logprobs.gather(1, ids))


def check(model: PreTrainedModel, output: AsyncGenerationOutput, top: int | None, prompt_top: int | None) -> None:
    """Against the logits of one pass over prompt and answer."""
    assert output.error is None
    prompt, tokens = output.prompt_ids, output.generated_tokens
    ids = torch.tensor([prompt + tokens], device=model.device)
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    for of_tokens, likeliest, wanted, part in (
        (output.logprobs, output.top_logprobs, top, slice(len(prompt) - 1, None)),
        (output.prompt_logprobs, output.prompt_top_logprobs, prompt_top, slice(0, len(prompt) - 1)),
    ):
        if wanted is not None:
            close(of_tokens, logprobs[part].gather(1, ids[0, 1:][part, None])[:, 0])
        if wanted:
            check_likeliest(likeliest, logprobs[part], wanted)


class TestOfGeneratedTokens:
    @DEVICES
    @OVERLAP
    def test_are_those_of_generates_logits(self, overlap: bool, device: str) -> None:
        model, prompts, config = shared_model("llama", device), random_prompts(16, 80, seed=2), greedy(10, EOS_IDS)
        outputs = model.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=batching(num_blocks=36, page_size=4, max_batch_tokens=40),
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
            logprobs=5,
        )
        for prompt, output in zip(prompts, outputs.values(), strict=True):
            ids = torch.tensor([prompt], device=device)
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            tokens, logprobs = whole.sequences[0, len(prompt) :], torch.stack(whole.logits)[:, 0].log_softmax(-1)
            assert output.generated_tokens == tokens.tolist()
            close(output.logprobs, logprobs.gather(1, tokens[:, None])[:, 0])
            check_likeliest(output.top_logprobs, logprobs, 5)

    @DEVICES
    def test_are_the_models_own_whatever_is_done_to_the_logits(self, device: str) -> None:
        """Each alone: a step of several would keep the model's logits for the sake of another."""
        model, prompt = shared_model("qwen3", device), [5, 6, 7]
        settings = [
            {"do_sample": True, "temperature": 3.0, "top_k": 5},
            {"do_sample": True, "typical_p": 0.5},
            {"repetition_penalty": 3.0, "suppress_tokens": list(range(40))},
            {"logits_processor": [Avoid()]},
            {"regex": "([a-m][n-z])+[0-9]", "eos_token_id": EOS},
        ]
        with model.continuous_batching_context_manager(
            greedy(12), continuous_batching_config=batching(max_requests_per_batch=1), tokenizer=tokenizer(),
            async_batching=True,
        ) as manager:  # fmt: skip
            ids = [manager.add_request(prompt, logprobs=4, prompt_logprobs=1, **own) for own in settings]
            outputs = [manager.get_result(request_id) for request_id in ids]
        for output in outputs:
            check(model, output, 4, 1)

    @OVERLAP
    def test_are_each_requests_own(self, llama, overlap: bool) -> None:
        prompts = random_prompts(20, 60)
        asked = [(None, 0, 1, 20)[i % 4] for i in range(20)]
        of_prompts = [(None, 2, 0)[i % 3] for i in range(20)]
        with llama.continuous_batching_context_manager(
            greedy(8), continuous_batching_config=batching(max_batch_tokens=64),
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
        ) as manager:  # fmt: skip
            ids = [
                manager.add_request(prompt, logprobs=top, prompt_logprobs=prompt_top)
                for prompt, top, prompt_top in zip(prompts, asked, of_prompts, strict=True)
            ]
            outputs = [manager.get_result(request_id) for request_id in ids]
        for output, top, prompt_top in zip(outputs, asked, of_prompts, strict=True):
            check(llama, output, top, prompt_top)
            assert (output.logprobs == []) == (top is None)
            assert (output.top_logprobs is None) == (not top)
            assert (output.prompt_logprobs is None) == (prompt_top is None)
            assert (output.prompt_top_logprobs is None) == (not prompt_top)

    def test_take_the_place_of_the_managers(self, llama) -> None:
        """Those are of the distribution the token was drawn from, as in transformers' own batching."""
        config = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=6)
        with llama.continuous_batching_context_manager(
            config, continuous_batching_config=batching(return_logprobs=True), async_batching=True
        ) as manager:
            theirs, ours = manager.add_request([1, 2, 3]), manager.add_request([1, 2, 3], logprobs=0)
            assert manager.get_result(theirs).logprobs == [0.0] * 6
            output = manager.get_result(ours)
        check(llama, output, 0, None)
        assert max(output.logprobs) < 0

    def test_come_with_each_token_of_a_stream(self, llama) -> None:
        with llama.continuous_batching_context_manager(greedy(6), async_batching=True) as manager:
            request_id = manager.add_request([1, 2, 3], streaming=True, logprobs=2, prompt_logprobs=2)
            outputs = list(manager.request_id_iter(request_id))
        assert [len(output.generated_tokens) for output in outputs] == [1, 2, 3, 4, 5, 6]
        for output in outputs:
            check(llama, output, 2, 2)

    @OVERLAP
    def test_cost_a_step_in_which_nobody_asks_nothing(self, llama, monkeypatch, overlap: bool) -> None:
        flavours, key_for = [], Runner.key_for
        monkeypatch.setattr(
            Runner, "key_for", lambda self, plan: flavours.append((key := key_for(self, plan)).flavour) or key
        )
        manager = llama.init_continuous_batching(
            greedy(12), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
        )
        manager.add_request([1, 2, 3])
        manager.add_request([4, 5, 6], max_new_tokens=4, logprobs=3, prompt_logprobs=0)
        manager.start()
        manager.stop()
        assert [flavour.ranked for flavour in flavours] == [True] * 4 + [False] * 8
        assert [flavour.scored for flavour in flavours] == [2] + [0] * 11


class TestOfPrompts:
    @DEVICES
    @OVERLAP
    @pytest.mark.parametrize("family", FAMILIES)
    def test_are_the_models_own_in_chunks_and_after_preemptions(self, family: str, overlap: bool, device: str) -> None:
        model, prompts = shared_model(family, device), random_prompts(10, 70, 30, seed=3)
        manager = model.init_continuous_batching(
            greedy(12),
            batching(num_blocks=30, page_size=4, max_batch_tokens=24),
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
        )
        ids = manager.add_requests(prompts, logprobs=1, prompt_logprobs=3)
        manager.start()
        engine = manager._engine
        outputs = [manager.get_result(request_id) for request_id in ids]
        manager.stop()
        assert (engine.scheduler.preemptions > 0) == (family != "mistral"), "windows of a few pages do not run short"
        for output in outputs:
            check(model, output, 1, 3)

    def test_are_all_there_though_its_beginning_is_in_the_cache(self, llama) -> None:
        beginning = random_prompts(1, 100, 100)[0]
        with llama.continuous_batching_context_manager(greedy(4), async_batching=True) as manager:
            outputs, reused = [], []
            for end, wanted in ((1, None), (2, 1), (3, None)):
                request_id = manager.add_request([*beginning, end], prompt_logprobs=wanted)
                outputs.append(manager.get_result(request_id))
                reused.append(manager._engine.scheduler.admission.reused)
        assert reused == [0, 0, 96], "the second computed each position, the others did not have to"
        check(llama, outputs[1], None, 1)

    @OVERLAP
    def test_are_computed_once_for_several_answers(self, llama, monkeypatch, overlap: bool) -> None:
        scored, plan = [], scheduler.Scheduler.plan
        monkeypatch.setattr(
            scheduler.Scheduler, "plan", lambda self: ((p := plan(self)) and scored.append(p.scores)) or p
        )
        prompt = random_prompts(1, 60, 60)[0]
        outputs = llama.generate_batch(
            [prompt],
            GenerationConfig(do_sample=True, max_new_tokens=6, num_return_sequences=4),
            logprobs=2,
            prompt_logprobs=2,
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
        )
        assert len(outputs) == 4
        for output in outputs.values():
            check(llama, output, 2, 2)
        assert sum(scored) == 59

    def test_of_one_token_are_none(self, llama) -> None:
        outputs = llama.generate_batch([[7]], greedy(3), prompt_logprobs=2, async_batching=True)
        assert outputs["req_0"].prompt_logprobs == []
        assert outputs["req_0"].prompt_top_logprobs == []
        assert outputs["req_0"].logprobs == []

    @OVERLAP
    def test_are_not_more_in_a_step_than_there_is_memory_for(self, llama, monkeypatch, overlap: bool) -> None:
        monkeypatch.setattr(prefill, "MOST_SCORED", 8)
        scores, plan = [], scheduler.Scheduler.plan
        monkeypatch.setattr(
            scheduler.Scheduler, "plan", lambda self: ((p := plan(self)) and scores.append(p.scores)) or p
        )
        prompts = random_prompts(20, 50)
        outputs = llama.generate_batch(
            prompts, greedy(5), prompt_logprobs=1, async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
        )
        for output in outputs.values():
            check(llama, output, None, 1)
        assert max(scores) == 8
        assert sum(scores) == sum(len(prompt) - 1 for prompt in prompts), "each once"

    def test_of_a_long_prompt_hold_nobody_up(self, llama) -> None:
        with llama.continuous_batching_context_manager(
            greedy(2), continuous_batching_config=batching(max_batch_tokens=16), async_batching=True
        ) as manager:
            long, short = (random_prompts(1, length, length)[0] for length in (400, 3))
            ids = [manager.add_request(prompt, prompt_logprobs=1) for prompt in (long, short)]
            outputs = [manager.get_result() for _ in ids]
        assert [output.request_id for output in outputs] == ids[::-1]
        for output in outputs:
            check(llama, output, None, 1)


@pytest.mark.parametrize("setting", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 21, True, 2.0, "all"])
def test_a_number_of_likeliest_that_is_not_valid_is_refused(llama, setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"request req_0: {setting} must be an integer from 0 .* to 20"):
        llama.generate_batch([[1, 2]], greedy(2), async_batching=True, **{setting: value})


def test_a_vocabulary_smaller_than_the_largest_number_bounds_it() -> None:
    model = new_model("llama", vocab_size=6)
    with pytest.raises(ValueError, match="to 6 "):
        model.generate_batch([[1, 2]], greedy(2), async_batching=True, logprobs=7)
    outputs = model.generate_batch([[1, 2]], greedy(2), async_batching=True, logprobs=6)
    check(model, outputs["req_0"], 6, None)


# --------------------------------------------------------------------------------------------------- the kernels


def entries_of(rows: int, picked: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Of the rows some, in any order; the first of which have a token that was picked."""
    draw = torch.Generator().manual_seed(seed)
    entries = torch.stack(
        [
            torch.randperm(rows, generator=draw),
            torch.randint(vocabulary, (rows,), generator=draw),
            torch.randint(min(20, vocabulary) + 1, (rows,), generator=draw),
        ],
        1,
    )
    entries[entries[:, 0] < picked, 1] = -1
    entries[4::5] = -1
    return entries.int().view(-1)


def check_kernels(device: str, sizes: list[tuple[int, int]]) -> int:
    """Against the reference; returns the number of cases."""
    from transformers_async_cb.logprobs import triton

    cases = 0
    for rows, vocabulary in sizes:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(cases)) * 4
            logits = (logits.round() if cases % 2 else logits).to(device, dtype)  # with many ties
            logits[:, vocabulary // 3] = -torch.inf
            picked = torch.arange(rows // 2 + 1, dtype=torch.int32, device=device) % vocabulary
            entries = entries_of(rows, len(picked), vocabulary, cases).to(device)
            ranked, expected = triton.rank(logits, entries, picked), reference.rank(logits, entries, picked)
            for (row, _, count), ours, theirs in zip(entries.view(-1, 3).tolist(), ranked, expected, strict=True):
                if row >= 0:
                    end = 1 + 2 * count
                    assert torch.equal(ours[1:end:2], theirs[1:end:2]), (rows, vocabulary, dtype)
                    for part in (slice(0, 1), slice(2, end, 2)):
                        values = [x[part].contiguous().view(torch.float32) for x in (ours, theirs)]
                        torch.testing.assert_close(*values, rtol=0, atol=1e-5)
            cases += 1
    return cases


def test_the_kernels_answer_as_the_reference_does() -> None:
    assert run_in_interpreter(__file__).split()[-1] == "checked:9"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_the_kernels_answer_as_the_reference_does_on_the_gpu(rows: int) -> None:
    assert check_kernels("cuda", [(rows, 1000), (rows, 151_936)]) == 6


def test_of_equally_likely_tokens_the_lowest_ids_come_first() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, -0.0, 0.0]])
    ranked = rank(logits, torch.tensor([0, -1, 7], dtype=torch.int32), torch.tensor([2], dtype=torch.int32))
    assert ranked.shape == (1, RANKED_WORDS)
    assert ranked[0, 1:15:2].tolist() == [1, 3, 2, 4, 0, 5, 6]
    values = ranked[0, :15].view(torch.float32)
    torch.testing.assert_close(values[[0, 6]], logits.log_softmax(-1)[0, [2, 2]])


if __name__ == "__main__":
    print(f"checked:{check_kernels('cpu', [(1, 2), (6, VOCABULARY), (3, 9001)])}")
