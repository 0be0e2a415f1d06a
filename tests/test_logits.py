"""What is done to logits: the reference against transformers' own processors, the kernel against the reference, and
requests with settings of their own against `model.generate`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, batching, new_model, random_prompts, reference, run_in_interpreter, shared_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.logits import SHAPING_WORDS, Listed, LogitsSettings, Rule, Shaping, Tables, shape


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EOS_IDS = [3, 17, 31, 50, 77, 90]

SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 5},
    {"min_new_tokens": 7},
    {"min_length": 30},
    {"min_length": 300, "min_new_tokens": 2},
    {"suppress_tokens": [1, 50, 96, 2000]},
    {"begin_suppress_tokens": list(range(0, 97, 2))},
    {"begin_suppress_tokens": list(range(0, 97, 3)), "forced_bos_token_id": 9},
    {"bad_words_ids": [[5], [17], [8, 9], [1, 2, 3, 4], [60, 61], [3]]},
    {"bad_words_ids": [[a, b] for a in range(0, 97, 8) for b in range(0, 97, 8)]},
    {"sequence_bias": {(4,): 7.5, (9,): -3.25, (8, 9): 2.7, (7, 8, 9): -0.3, (60, 61): 4.0}},
    {"sequence_bias": {(a, 2, 20): 9.0 for a in range(97)} | {(20,): 0.7}},
    {"forced_bos_token_id": 12},
    {"forced_eos_token_id": 40},
    {"forced_eos_token_id": [41, 40], "suppress_tokens": [40]},
    {
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "suppress_tokens": [7, 8],
        "begin_suppress_tokens": [9, 10], "bad_words_ids": [[11], [12, 13]],
        "sequence_bias": {(14,): 5.0, (15, 16): -2.0}, "forced_bos_token_id": 5, "forced_eos_token_id": 6,
    },
]  # fmt: skip


def config_of(**settings: Any) -> GenerationConfig:
    return GenerationConfig(**({"max_new_tokens": 14, "eos_token_id": EOS_IDS, "pad_token_id": 0} | settings))


def shaping_of(config: GenerationConfig, prompt_length: int, **own: Any) -> Shaping | None:
    settings = LogitsSettings.of(config, own, VOCABULARY)
    return settings and settings.shaping(prompt_length, prompt_length + config.max_new_tokens, config.eos_token_id)


def tables_of(sequences: list[list[int]], shapings: list[Shaping | None], positions: int = 200) -> Tables:
    """A row for each sequence, in reverse order."""
    tables = Tables.of(len(sequences), positions, torch.device("cpu"))
    tables.history.fill_(2**30)  # what lies beyond a sequence is not looked at
    for i, (sequence, shaping) in enumerate(zip(sequences[::-1], shapings[::-1], strict=True)):
        tables.history[i, : len(sequence)] = torch.tensor(sequence)
        if shaping is not None:
            words = torch.from_numpy(shaping.words())
            tables.shapings[i, : len(words)] = words
    return tables


def step_of(sequences: list[list[int]], shapings: list[Shaping | None]) -> tuple[torch.Tensor, ...]:
    """Which sequences are shaped, their rows and lengths."""
    shaped = [i for i, shaping in enumerate(shapings) if shaping is not None]
    count = len(sequences)
    shaped += [-1] * (count - len(shaped))
    lengths = [len(sequence) for sequence in sequences]
    return tuple(torch.tensor(x, dtype=torch.int32) for x in (shaped, list(range(count))[::-1], lengths))


def processed(config: GenerationConfig, prompt_length: int, sequence: list[int], logits: torch.Tensor) -> torch.Tensor:
    """What `generate` makes of logits."""
    model, prepared = shared_model("llama"), config_of(**config.to_diff_dict())
    model._prepare_special_tokens(prepared, device="cpu")
    prepared.max_length = prompt_length + prepared.max_new_tokens
    prepared.min_length = prepared.min_length or 0
    if prepared.min_new_tokens is not None:
        prepared.min_length = prompt_length + prepared.min_new_tokens
    processors = model._get_logits_processor(prepared, input_ids_seq_length=prompt_length, device="cpu")
    return processors(torch.tensor([sequence]), logits.clone()[None])[0]


class TestTheReference:
    @pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(settings)[:60])
    def test_does_what_generates_processors_do(self, settings: dict[str, Any]) -> None:
        config = config_of(**settings)
        differ = 0
        for seed, (prompt_length, answered) in enumerate([(1, 0), (1, 1), (1, 13), (5, 0), (5, 3), (20, 9), (20, 13)]):
            length = prompt_length + answered
            sequence = ([7, 8, 1, 2, 3] * 9)[seed % 5 :][:length]  # repeats, and ends in different ways
            logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
            expected = processed(config, prompt_length, sequence, logits)
            shapings = [shaping_of(config, prompt_length)]
            got = logits.clone()[None]
            shape(got, tables_of([sequence], shapings), *step_of([sequence], shapings))
            assert torch.equal(got[0], expected), (prompt_length, answered)
            differ += not torch.equal(expected, logits)
        assert differ

    def test_leaves_sequences_alone_that_are_not_shaped(self) -> None:
        logits = torch.randn(3, VOCABULARY)
        before, sequences = logits.clone(), [[1, 2], [3, 4], [5]]
        shapings = [None, Shaping(1, repetition_penalty=2.0), None]
        shape(logits, tables_of(sequences, shapings), *step_of(sequences, shapings))
        assert (logits != before).nonzero().tolist() == [[1, 3], [1, 4]]


class TestWords:
    @pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(settings)[:60])
    def test_say_all_of_a_shaping(self, settings: dict[str, Any]) -> None:
        own = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "logit_bias": {4: 1}}
        settings = {**settings, "repetition_penalty": 1.5}  # exact in float32
        shaping = shaping_of(config_of(**settings), 4, **own)

        def rounded(listed: tuple[Listed, ...]) -> tuple[Listed, ...]:
            return tuple(entry._replace(value=float(np.float32(entry.value))) for entry in listed)

        expected = shaping._replace(tokens=rounded(shaping.tokens), sequences=rounded(shaping.sequences))
        assert Shaping.from_words(shaping.words()) == expected

    def test_hold_no_more_than_32_bits(self) -> None:
        most = 2**31 - 1
        shaping = Shaping(3, shortest=2**40, ngram=2**31, forced_last_at=2**31 + 3)
        assert Shaping.from_words(shaping.words()) == Shaping(3, shortest=most, ngram=most, forced_last_at=most)

    def test_are_as_many_as_there_is_room_for(self) -> None:
        tokens = tuple(Listed(Rule.SUPPRESS, (token,)) for token in range(504))
        assert len(Shaping(1, tokens=tokens).words()) == SHAPING_WORDS
        with pytest.raises(ValueError, match=r"take 1010 words, a request may have 1008: 2 for each token"):
            Shaping(1, tokens=(*tokens, tokens[0])).words()


class OpenAiPenalties(LogitsProcessor):
    def __init__(self, prompt_length: int, presence: float = 0.0, frequency: float = 0.0, bias: dict | None = None):
        self.prompt_length, self.presence, self.frequency, self.bias = prompt_length, presence, frequency, bias or {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        counts = torch.bincount(input_ids[0, self.prompt_length :], minlength=scores.shape[1])
        scores = scores - self.frequency * counts - self.presence * (counts > 0)
        for token, bias in self.bias.items():
            scores[:, token] += bias
        return scores


def generate_with(prompt: list[int], config: GenerationConfig, *processors: LogitsProcessor) -> list[int]:
    ids = torch.tensor([prompt])
    answer = shared_model("llama").generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config,
        logits_processor=LogitsProcessorList(processors),
    )  # fmt: skip
    return answer[0, len(prompt) :].tolist()


class TestRequests:
    PROMPTS = [[5], *random_prompts(len(SETTINGS) - 1, longest=40, seed=1)]

    @OVERLAP
    @pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(settings)[:60])
    def test_of_one_setting_get_what_generate_gives(self, settings: dict[str, Any], overlap: bool) -> None:
        model, config, prompts = shared_model("llama"), config_of(**settings), self.PROMPTS[:3]
        outputs = model.generate_batch(
            prompts, generation_config=config, async_batching=AsyncBatchingConfig(overlap=overlap)
        )
        assert [o.generated_tokens for o in outputs.values()] == [reference(model, p, config) for p in prompts]

    @OVERLAP
    @pytest.mark.parametrize("sizes", [
        {}, {"num_blocks": 40, "page_size": 3, "max_batch_tokens": 7}, {"max_requests_per_batch": 3}
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_of_all_settings_get_it_beside_each_other(self, family: str, sizes: dict, overlap: bool) -> None:
        """And beside some without any. With short pages, prompts are split and requests preempted; with few rows, one
        is taken by requests with settings and without."""
        model, settings = shared_model(family), [*SETTINGS, {}, {}]
        configs = [config_of(**s) for s in settings] * 2
        prompts = [[5], *random_prompts(len(configs) - 1, longest=40, seed=1)]
        outputs = model.generate_batch(
            prompts,
            generation_config=configs,
            continuous_batching_config=batching(**sizes),
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
        )
        expected = [reference(model, p, c) for p, c in zip(prompts, configs, strict=True)]
        assert [output.error for output in outputs.values()] == [None] * len(prompts)
        assert [output.generated_tokens for output in outputs.values()] == expected

    @OVERLAP
    @pytest.mark.parametrize("own", [
        {"presence": 30.0}, {"frequency": 6.0}, {"bias": {4: 40.0, 9: -100.0, 11: 38}},
        {"presence": 3.0, "frequency": -2.5, "bias": {50: 12.5}},
    ], ids=str)  # fmt: skip
    def test_may_have_openais_penalties_and_biases(self, own: dict[str, Any], overlap: bool) -> None:
        keywords = {{"bias": "logit_bias"}.get(name, f"{name}_penalty"): value for name, value in own.items()}
        config = config_of(repetition_penalty=1.1, max_new_tokens=30)
        with shared_model("llama").continuous_batching_context_manager(
            config, async_batching=AsyncBatchingConfig(overlap=overlap)
        ) as manager:
            ids = [manager.add_request(prompt, **keywords) for prompt in self.PROMPTS[:6]]
            plain = manager.add_request(self.PROMPTS[1])
            answers = [manager.get_result(request_id).generated_tokens for request_id in ids]
            beside = manager.get_result(plain).generated_tokens
        expected = [generate_with(p, config, OpenAiPenalties(len(p), **own)) for p in self.PROMPTS[:6]]
        assert answers == expected
        assert beside == generate_with(self.PROMPTS[1], config) != answers[1]

    def test_that_are_sampled_are_shaped_too(self) -> None:
        model, prompts = shared_model("llama"), self.PROMPTS[:8]
        settings = {"do_sample": True, "temperature": 8.0, "no_repeat_ngram_size": 1, "suppress_tokens": [4, 5, 6]}

        def drawn(*others: dict) -> list[list[int]]:
            with model.continuous_batching_context_manager(
                config_of(eos_token_id=None), async_batching=True
            ) as manager:
                ids = [manager.add_request(prompt, seed=2, **settings) for prompt in prompts]
                for other in others:
                    manager.add_request([1, 2, 3], **other)
                return [manager.get_result(request_id).generated_tokens for request_id in ids]

        alone = drawn()
        assert alone == drawn({}, {"repetition_penalty": 1.5}, {"do_sample": True, "min_length": 9})
        for prompt, tokens in zip(prompts, alone, strict=True):
            assert len(set(tokens)) == len(tokens) == 14
            assert not set(tokens) & {4, 5, 6, *prompt}

    def test_have_the_logprobs_of_what_was_picked_from(self) -> None:
        model, prompt = shared_model("llama"), self.PROMPTS[1]
        config = config_of(repetition_penalty=1.5, no_repeat_ngram_size=2)
        output = model.generate_batch(
            [prompt], generation_config=config, continuous_batching_config=batching(return_logprobs=True),
            async_batching=True,
        )["req_0"]  # fmt: skip
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        scores = torch.cat(whole.scores).log_softmax(-1)
        expected = scores.gather(1, torch.tensor(output.generated_tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs), expected, rtol=0, atol=2e-5)

    def test_without_any_leave_nothing_behind_for_them(self) -> None:
        model = shared_model("llama")
        with model.continuous_batching_context_manager(config_of(), async_batching=True) as manager:
            for shaped in (False, True):
                request_id = manager.add_request([1, 2, 3], repetition_penalty=1.5 if shaped else 1.0)
                manager.get_result(request_id)
                assert (manager._engine.runner.tables is not None) == shaped


class TestSettingsThatAreNotValid:
    @pytest.mark.parametrize("settings, reason", [
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"repetition_penalty": 2}, "penalty"),
        ({"no_repeat_ngram_size": -2}, "ngram_size"),
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"bad_words_ids": [[3, 97]]}, "bad_words_ids: token id 97 is outside the vocabulary, 0 to 96"),
        ({"sequence_bias": {3: 1.0}}, "sequence_bias"),
        ({"sequence_bias": {(3, 97): 1.0}}, "sequence_bias: token id 97"),
        ({"forced_bos_token_id": 97}, "forced_bos_token_id: token id 97"),
        ({"forced_eos_token_id": [3, -1]}, "forced_eos_token_id: token id -1"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_length": 1.5}, "min_length"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {97: 1.0}}, "logit_bias: token id 97"),
        ({"logit_bias": {3: "x"}}, "logit_bias"),
        ({"logit_bias": [3]}, "logit_bias"),
        ({"suppress_tokens": [5] * 505}, "1010 words, a request may have 1008"),
    ], ids=str)  # fmt: skip
    def test_are_refused_for_that_request_alone(self, settings: dict[str, Any], reason: str) -> None:
        model = shared_model("llama")
        manager = model.init_continuous_batching(config_of(), async_batching=True)
        with pytest.raises(ValueError, match=f"request odd: .*{reason}"):
            manager.add_request([1, 2], request_id="odd", **settings)
        manager.add_request([1, 2])
        manager.destroy()


def test_the_models_own_settings_hold() -> None:
    model = new_model("llama")
    model.generation_config.repetition_penalty = 1.3
    config, prompt = GenerationConfig(max_new_tokens=10, pad_token_id=0), [1, 2, 3]
    outputs = model.generate_batch([prompt], generation_config=config, async_batching=True)
    assert outputs["req_0"].generated_tokens == reference(model, prompt, config)


def check_kernel(device: str, vocabulary: int, positions: int) -> int:
    """The kernel against the reference on the CPU, all settings in one step; returns the number of sequences.

    Not in bfloat16 in the interpreter, which cuts float32 off where GPUs round."""
    from transformers_async_cb.logits import reference as right
    from transformers_async_cb.logits import triton

    own: list[dict[str, Any]] = [{}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.3, "logit_bias": {8: 2.5}}, {}]
    checked = 0
    for seed, dtype in enumerate((torch.float32, torch.float16) if device == "cpu" else DTYPES):
        sequences, shapings = [], []
        for i, settings in enumerate([*SETTINGS, None, *SETTINGS]):
            prompt_length = 1 if i % 5 == 0 else 5 + i
            length = prompt_length + (0, 13, 2)[i % 3]
            if i % 7 == 1:
                prompt_length, length = positions // 3, positions
            sequences.append(random_prompts(1, shortest=length, longest=length, seed=99 * seed + i)[0])
            shaped = settings is not None
            shapings.append(shaping_of(config_of(**settings), prompt_length, **own[i % 4]) if shaped else None)
        logits = torch.randn(len(sequences), vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
        logits = logits.to(dtype)
        tables, step = tables_of(sequences, shapings, positions), step_of(sequences, shapings)
        before, on_device = logits.clone(), logits.to(device, copy=True)
        triton.shape(on_device, Tables(*(x.to(device) for x in tables)), *(x.to(device) for x in step))
        right.shape(logits, tables, *step)
        wrong = (on_device.cpu() != logits).nonzero()
        assert not len(wrong), (dtype, wrong[:5].tolist())
        changed = (before != logits).any(1)
        assert [i for i, shaping in enumerate(shapings) if shaping is None and changed[i]] == []
        assert changed.sum() > len(SETTINGS)
        checked += len(sequences)
    return checked


def test_the_kernel_does_what_the_reference_does() -> None:
    assert run_in_interpreter(__file__).split()[-1] == f"checked:{2 * (2 * len(SETTINGS) + 1)}"


@pytest.mark.gpu
def test_the_kernel_does_what_the_reference_does_on_the_gpu() -> None:
    assert check_kernel("cuda", 151_936, 9000) == 3 * (2 * len(SETTINGS) + 1)


@pytest.mark.gpu
@OVERLAP
def test_requests_on_the_gpu_get_what_generate_gives(overlap: bool) -> None:
    """By captured steps, with prompts split and requests preempted."""
    model, configs = shared_model("llama", "cuda"), [config_of(**settings) for settings in [*SETTINGS, {}, {}]] * 6
    prompts = [[5], *random_prompts(len(configs) - 1, longest=40, seed=1)]
    manager = model.init_continuous_batching(
        continuous_batching_config=batching(num_blocks=100, page_size=4, max_batch_tokens=48),
        async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
    )
    ids = manager.add_requests(prompts, generation_config=configs)
    manager.start()
    engine = manager._engine
    outputs = {output.request_id: output for output in (manager.get_result() for _ in ids)}
    manager.stop()
    expected = [reference(model, p, c) for p, c in zip(prompts, configs, strict=True)]
    assert [outputs[request_id].error for request_id in ids] == [None] * len(ids)
    assert [outputs[request_id].generated_tokens for request_id in ids] == expected
    assert engine.scheduler.preemptions > 0
    assert any(key.flavour.shaped for key in engine.runner.graphs.captured)


if __name__ == "__main__":
    print(f"checked:{check_kernel('cpu', VOCABULARY, 2100)}")
