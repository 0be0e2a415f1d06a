"""What is not valid is refused in a sentence before anything runs, and what is given stays as it was."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    POSITIONS,
    VOCABULARY,
    batching,
    engine_threads,
    generate_alone,
    greedy,
    new_model,
    reference,
    shared_model,
)
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.engine import Engine


PATIENCE = 30
PROMPT = [5, 6, 7, 8]

BAD_PROMPTS = [
    pytest.param([], "at least one", id="empty"),
    pytest.param(torch.empty(0, dtype=torch.long), "at least one", id="an empty tensor"),
    pytest.param([1, -1], "-1 is outside the vocabulary, 0 to 96", id="negative"),
    pytest.param([1, VOCABULARY], "97 is outside the vocabulary, 0 to 96", id="beyond the vocabulary"),
    pytest.param([2**40], "outside the vocabulary", id="beyond 32 bits"),
    pytest.param([2**70], "integer", id="beyond 64 bits"),
    pytest.param([1.0, 2.0], "integer", id="floats"),
    pytest.param([1, 2.5], "integer", id="a float among integers"),
    pytest.param(torch.tensor([1.0, 2.0]), "integer", id="a float tensor"),
    pytest.param(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "integer", id="a bfloat16 tensor"),
    pytest.param(torch.tensor([1.0, 2.0], requires_grad=True), "integer", id="a tensor with gradients"),
    pytest.param(["1", "2"], "integer", id="strings"),
    pytest.param("a text", "text needs the model's tokenizer", id="a text"),
    pytest.param(b"bytes", "flat sequence", id="bytes"),
    pytest.param([True, False], "integer", id="bools"),
    pytest.param([1, None], "integer", id="None among integers"),
    pytest.param(None, "flat sequence", id="None"),
    pytest.param(7, "flat sequence", id="a number"),
    pytest.param([[1, 2], [3, 4]], "flat sequence", id="nested"),
    pytest.param([[1], [2, 3]], "flat sequence", id="ragged"),
    pytest.param([1, [2, 3]], "flat sequence", id="half nested"),
    pytest.param(torch.tensor([[1, 2]]), "flat sequence", id="a batch of one"),
    pytest.param({"input_ids": [1, 2]}, "flat sequence", id="a dictionary"),
    pytest.param([{"role": "user", "content": "a"}], "chat needs the model's tokenizer", id="a chat"),
]
BAD_LIMITS = [0, -1, 2.5, "7", True, [3], float("inf")]

UNSUPPORTED_SETTINGS = [
    {"num_beams": 2}, {"encoder_repetition_penalty": 1.5}, {"guidance_scale": 2.0},
    {"exponential_decay_length_penalty": (5, 1.1)}, {"token_healing": True},
    {"remove_invalid_values": True}, {"output_scores": True, "return_dict_in_generate": True},
    {"output_logits": True, "return_dict_in_generate": True},
    {"output_hidden_states": True, "return_dict_in_generate": True},
    {"output_attentions": True, "return_dict_in_generate": True},
    {"prompt_lookup_num_tokens": 3}, {"watermarking_config": {"greenlist_ratio": 0.3}},
]  # fmt: skip
UNSUPPORTED_BATCHING = [
    {"q_padding_interval_size": 64}, {"kv_padding_interval_size": 64}, {"scheduler_type": "prefill_first"},
    {"cpu_offload_space": -1.0}, {"cpu_offload_space_safety_threshold": 1.5},
    {"num_blocks": 0}, {"max_batch_tokens": 0},
    {"max_requests_per_batch": -1}, {"max_memory_percent": 1.5}, {"safety_margin": -0.1},
    {"cpu_offload_space_safety_threshold": None}, {"cpu_offload_space_safety_threshold": float("nan")},
    {"num_blocks": 2.5}, {"max_batch_tokens": "64"}, {"max_requests_per_batch": True}, {"max_memory_percent": "0.5"},
    {"page_size": None}, {"page_size": 16.0}, {"max_queue_size": None}, {"max_queue_size": -1}, {"seed": "a"},
    {"use_cuda_graph": "no"}, {"use_cuda_graph": (True, None)},
]  # fmt: skip


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Every engine that the test builds."""
    built, init = [], Engine.__init__

    def note(engine: Engine, *args: Any, **kwargs: Any) -> None:
        built.append(engine)
        init(engine, *args, **kwargs)

    monkeypatch.setattr(Engine, "__init__", note)
    return built


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Of this file's own, but like the shared one, which stays free to be asked."""
    return new_model("llama")


def answer(prompt: list[int], config: GenerationConfig) -> list[int]:
    return reference(shared_model("llama"), prompt, config)


def batch(
    model: PreTrainedModel, prompts: Any, config: GenerationConfig | None = None, **kwargs: Any
) -> list[list[int]]:
    kwargs.setdefault("async_batching", True)
    outputs = model.generate_batch(prompts, generation_config=config, **kwargs)
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs.values()]


def nothing_ran(model: PreTrainedModel, engines: list[Engine]) -> None:
    """And nothing is left in the way of the next call."""
    assert engines == []
    assert engine_threads() == []
    assert model.config._attn_implementation != "async_batching"
    assert batch(model, [PROMPT], greedy(3)) == [answer(PROMPT, greedy(3))]


class TestPrompts:
    @pytest.mark.parametrize("prompt, reason", BAD_PROMPTS)
    def test_that_are_not_valid_keep_the_whole_call_from_running(
        self, model, engines, prompt: Any, reason: str
    ) -> None:
        with pytest.raises(ValueError, match=reason) as error:
            batch(model, [PROMPT, prompt, PROMPT], greedy(3))
        assert "req_1" in str(error.value)
        nothing_ran(model, engines)

    @pytest.mark.parametrize("prompt, reason", BAD_PROMPTS)
    def test_that_are_not_valid_are_refused_by_a_running_manager_and_the_others_go_on(
        self, model, prompt: Any, reason: str
    ) -> None:
        with model.continuous_batching_context_manager(greedy(3), async_batching=True) as manager:
            before = manager.add_request(PROMPT)
            with pytest.raises(ValueError, match=reason) as error:
                manager.add_request(prompt, request_id="odd")
            assert "odd" in str(error.value)
            after = manager.add_request(PROMPT)
            tokens = [manager.get_result(i, PATIENCE).generated_tokens for i in (before, after)]
            assert manager.get_result("odd", timeout=0) is None
        assert tokens == [answer(PROMPT, greedy(3))] * 2

    def test_without_their_list_are_refused(self, model, engines) -> None:
        with pytest.raises(ValueError, match="flat sequence"):
            batch(model, PROMPT, greedy(3))
        nothing_ran(model, engines)

    def test_may_hold_the_first_and_the_last_id_of_the_vocabulary(self, model) -> None:
        prompt = [0, VOCABULARY - 1]
        assert batch(model, [prompt], greedy(3)) == [answer(prompt, greedy(3))]

    def test_are_read_when_they_are_added(self, model) -> None:
        prompt = np.array(PROMPT)
        manager = model.init_continuous_batching(greedy(3), async_batching=True)
        manager.add_request(prompt)
        prompt[:] = 0
        manager.start()
        manager.stop()
        assert [output.generated_tokens for output in manager] == [answer(PROMPT, greedy(3))]

    def test_beyond_the_learned_positions_are_refused(self, engines) -> None:
        gpt2 = new_model("gpt2")
        prompt = [1] * (POSITIONS + 1)
        with pytest.raises(ValueError, match=f"req_1.*{POSITIONS + 1} tokens.*{POSITIONS} positions"):
            batch(gpt2, [PROMPT, prompt], greedy(3))
        nothing = engines == []
        manager = gpt2.init_continuous_batching(greedy(3), async_batching=True)
        with pytest.raises(ValueError, match=f"{POSITIONS} positions"):
            manager.add_request(prompt)
        manager.destroy()
        assert nothing
        assert batch(gpt2, [prompt[1:]], greedy(1)) == [reference(shared_model("gpt2"), prompt[1:], greedy(1))]

    def test_of_one_list_come_in_all_or_not_at_all(self, model) -> None:
        manager = model.init_continuous_batching(greedy(3), async_batching=True)
        with pytest.raises(ValueError, match="req_2"):
            manager.add_requests([PROMPT, PROMPT, []])
        ids = manager.add_requests([PROMPT])
        assert ids == ["req_0"], "names of requests that never were are free"
        manager.start()
        manager.stop()
        assert [output.request_id for output in manager] == ids


class TestLimits:
    @pytest.mark.parametrize("limit", BAD_LIMITS, ids=repr)
    def test_that_are_not_valid_are_refused_for_a_call(self, model, engines, limit: Any) -> None:
        with pytest.raises((ValueError, TypeError)):  # transformers' own check comes first, and compares with 0
            batch(model, [PROMPT], max_new_tokens=limit)
        nothing_ran(model, engines)

    @pytest.mark.parametrize("limit", BAD_LIMITS, ids=repr)
    def test_that_are_not_valid_are_refused_for_a_request(self, model, limit: Any) -> None:
        with model.continuous_batching_context_manager(greedy(3), async_batching=True) as manager:
            with pytest.raises(ValueError, match=r"request odd: max_new_tokens must be an integer of 1 or more"):
                manager.add_request(PROMPT, request_id="odd", max_new_tokens=limit)
            output = manager.get_result(manager.add_request(PROMPT), PATIENCE)
        assert output.generated_tokens == answer(PROMPT, greedy(3))

    @pytest.mark.parametrize("longest", [0, 3, 4])
    def test_of_the_length_must_lie_above_the_prompt(self, model, engines, longest: int) -> None:
        with pytest.raises(ValueError, match=f"req_[01]: the prompt has 4 tokens, max_length is {longest}"):
            batch(model, [[1], PROMPT] if longest > 1 else [PROMPT, PROMPT], GenerationConfig(max_length=longest))
        nothing_ran(model, engines)


class TestRequestIds:
    def test_in_use_are_refused(self, model) -> None:
        with model.continuous_batching_context_manager(greedy(200), async_batching=True) as manager:
            manager.add_request(PROMPT, request_id="mine")
            with pytest.raises(ValueError, match=r"mine.*in use"):
                manager.add_request(PROMPT, request_id="mine")
            assert len(manager.get_result("mine", PATIENCE).generated_tokens) == 200
            assert manager.get_result("mine", timeout=0.01) is None

    def test_given_by_the_user_are_left_out_by_those_that_are_made(self, model) -> None:
        manager = model.init_continuous_batching(greedy(2), async_batching=True)
        for request_id in ("req_0", "req_2"):
            manager.add_request(PROMPT, request_id=request_id)
        made = [manager.add_request(PROMPT), *manager.add_requests([PROMPT, PROMPT])]
        assert made == ["req_1", "req_3", "req_4"]
        manager.destroy()


class TestSettingsThatAreNotSupported:
    @pytest.mark.parametrize("settings", UNSUPPORTED_SETTINGS, ids=lambda settings: list(settings)[-1])
    @pytest.mark.parametrize("door", ["config", "keyword"])
    def test_are_refused_by_name(self, model, engines, settings: dict[str, Any], door: str) -> None:
        name = next(name for name in settings if name not in ("do_sample", "return_dict_in_generate"))
        with pytest.raises(ValueError, match=name):
            if door == "config":
                batch(model, [PROMPT], GenerationConfig(max_new_tokens=3, **settings))
            else:
                batch(model, [PROMPT], greedy(3), **settings)
        assert engines == []

    @pytest.mark.parametrize("settings", UNSUPPORTED_BATCHING, ids=lambda settings: next(iter(settings)))
    def test_of_batching_are_refused_by_name(self, model, engines, settings: dict[str, Any]) -> None:
        name = next(iter(settings))
        with pytest.raises(ValueError, match=name):
            batch(model, [PROMPT], greedy(3), continuous_batching_config=batching(**settings))
        nothing_ran(model, engines)

    def test_are_refused_when_only_the_models_own_config_has_them(self, engines) -> None:
        model = new_model("llama")
        model.generation_config.num_beams = 2
        with pytest.raises(ValueError, match=r"num_beams=2"):
            batch(model, [PROMPT], greedy(3))
        assert engines == []

    @pytest.mark.parametrize("settings", [
        {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0},
        {"use_cache": True, "pad_token_id": 3, "bos_token_id": 2},
        {"min_p": 0.2},  # has no effect without sampling
        {"output_scores": False, "stop_strings": None, "guidance_scale": 1.0},
        {"temperature": 0.3, "top_k": 4, "top_p": 0.2},
    ], ids=str)  # fmt: skip
    def test_do_not_include_those_that_ask_for_nothing(self, model, settings: dict[str, Any]) -> None:
        config = GenerationConfig(max_new_tokens=3, **settings)
        assert batch(model, [PROMPT], config) == [answer(PROMPT, greedy(3))]

    @pytest.mark.parametrize("call", [
        lambda model: model.generate_batch([PROMPT], max_new_token=3, async_batching=True),
        lambda model: model.generate_batch([PROMPT], prefix_allowed_tokens_fn=len, async_batching=True),
        lambda model: model.init_continuous_batching(temprature=3, async_batching=True),
    ])  # fmt: skip
    def test_include_keywords_that_nobody_knows(self, model, engines, call: Callable) -> None:
        with pytest.raises((ValueError, TypeError), match=r"max_new_token|prefix_allowed_tokens_fn|temprature"):
            call(model)
        nothing_ran(model, engines)

    @pytest.mark.parametrize("settings", [
        {"nonsense": 1}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.0}, {"max_length": 4},
        {"max_length": "9"}, {"seed": 1.5}, {"seed": True}, {"generation_config": {"top_k": 1}},
        {"generation_config": GenerationConfig(num_beams=2), "num_beams": 3},
        {"eos_token_id": 2.5}, {"eos_token_id": ["3"]}, {"priority": 2**63},
        {"do_sample": True, "top_k": float("inf")}, {"do_sample": True, "temperature": float("nan")},
    ], ids=str)  # fmt: skip
    def test_of_a_single_request_are_refused_by_a_running_manager_and_the_others_go_on(
        self, model, settings: dict[str, Any]
    ) -> None:
        with model.continuous_batching_context_manager(async_batching=True) as manager:
            with pytest.raises(ValueError, match=f"request odd.*{list(settings)[-1]}"):
                manager.add_request(PROMPT, request_id="odd", **settings)
            output = manager.get_result(manager.add_request(PROMPT), PATIENCE)
        assert output.generated_tokens == answer(PROMPT, greedy(20))

    def test_of_one_of_many_configs_keep_the_whole_call_from_running(self, model, engines) -> None:
        with pytest.raises(ValueError, match=r"request req_1: num_beams=2"):
            batch(model, [PROMPT] * 3, [greedy(3), GenerationConfig(num_beams=2), greedy(3)])
        nothing_ran(model, engines)

    @pytest.mark.parametrize("configs", [0, 2, 4])
    def test_include_configs_of_another_number_than_prompts(self, model, engines, configs: int) -> None:
        with pytest.raises(ValueError, match=f"{configs} generation configs for 3 prompts"):
            batch(model, [PROMPT] * 3, [greedy(3)] * configs)
        nothing_ran(model, engines)

    @pytest.mark.parametrize("settings, reason", [
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "top_k": -3}, "top_k"),
        ({"do_sample": True, "min_p": 1.5}, "min_p"),
        ({"do_sample": True, "min_p": -0.1}, "min_p"),
        ({"do_sample": True, "typical_p": 0.0}, "typical_p"),
        ({"do_sample": True, "typical_p": 1.1}, "typical_p"),
        ({"do_sample": True, "epsilon_cutoff": 1.0}, "epsilon_cutoff"),
        ({"do_sample": True, "eta_cutoff": -0.1}, "eta_cutoff"),
        ({"do_sample": True, "top_h": 1.5}, "top_h"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature"),
    ], ids=str)  # fmt: skip
    def test_include_values_out_of_range(self, model, engines, settings: dict[str, Any], reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            batch(model, [PROMPT], **settings)
        nothing_ran(model, engines)

    def test_end_no_persistent_manager(self, engines) -> None:
        model = new_model("llama")
        assert batch(model, [PROMPT], greedy(3), persistent_manager=True) == [answer(PROMPT, greedy(3))]
        for prompts, settings in (([PROMPT, []], {}), ([PROMPT], {"num_beams": 2}), ([PROMPT], {"nonsense": 1})):
            with pytest.raises(ValueError):
                batch(model, prompts, greedy(3), persistent_manager=True, **settings)
        assert len(engines) == 1
        assert batch(model, [PROMPT], greedy(3), persistent_manager=True) == [answer(PROMPT, greedy(3))]
        model.destroy_cached_continuous_batching_manager()


class TestWhatIsGivenStaysAsItWas:
    @pytest.mark.parametrize("config", [
        GenerationConfig(max_new_tokens=3),
        GenerationConfig(max_length=12, eos_token_id=[3, 4]),
        GenerationConfig(do_sample=True, top_k=5, temperature=0.5, max_new_tokens=3),
        GenerationConfig(),
    ], ids=["limit", "eos", "sampling", "defaults"])  # fmt: skip
    def test_generation_configs(self, config: GenerationConfig) -> None:
        model = new_model("llama")
        model.generation_config.eos_token_id = 9
        own, its_fields = model.generation_config, copy.deepcopy(vars(model.generation_config))
        fields = copy.deepcopy(vars(config))
        batch(model, [PROMPT], config, max_new_tokens=4)
        with pytest.raises(ValueError):
            batch(model, [[]], config, max_new_tokens=4)
        assert vars(config) == fields
        assert model.generation_config is own
        assert vars(own) == its_fields

    def test_batching_configs(self, model) -> None:
        config = ContinuousBatchingConfig(num_blocks=9, max_batch_tokens=40, seed=4)
        fields = copy.deepcopy(vars(config))
        batch(model, [PROMPT], greedy(3), continuous_batching_config=config)
        assert vars(config) == fields

    def test_batching_configs_inside_generation_configs_which_are_honoured(self, model, engines) -> None:
        config = greedy(3)
        config.continuous_batching_config = ContinuousBatchingConfig(max_batch_tokens=3)
        fields = copy.deepcopy(vars(config.continuous_batching_config))
        assert batch(model, [PROMPT], config) == [answer(PROMPT, greedy(3))]
        assert vars(config.continuous_batching_config) == fields
        assert engines[0].settings.token_budget == 3

    def test_inputs(self, model) -> None:
        prompts = [list(PROMPT), torch.tensor(PROMPT)]
        batch(model, prompts, greedy(3))
        assert prompts[0] == PROMPT
        assert prompts[1].tolist() == PROMPT

    def test_the_random_state_of_the_user_when_a_seed_is_given(self, model) -> None:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        batch(model, [PROMPT], do_sample=True, continuous_batching_config=ContinuousBatchingConfig(seed=4))
        assert torch.equal(torch.get_rng_state(), before)


class TestSettingsResolveAsInGenerate:
    def test_an_eos_known_only_to_the_model_stops(self) -> None:
        model = new_model("llama")
        stop = answer(PROMPT, greedy(12))[5]
        model.generation_config.eos_token_id = stop
        config = GenerationConfig(max_new_tokens=12, pad_token_id=0)
        expected = generate_alone(model, PROMPT, config)
        assert len(expected) < 12
        assert batch(model, [PROMPT], config) == [expected]
        assert batch(model, [PROMPT], max_new_tokens=12) == [expected]

    def test_an_eos_of_the_config_goes_before_the_models(self) -> None:
        model = new_model("llama")
        whole = answer(PROMPT, greedy(12))
        model.generation_config.eos_token_id = whole[3]
        config = GenerationConfig(max_new_tokens=12, eos_token_id=whole[6], pad_token_id=0)
        assert batch(model, [PROMPT], config) == [generate_alone(model, PROMPT, config)]

    @pytest.mark.parametrize("longest", [5, 9, 30])
    def test_max_length_counts_the_prompt(self, model, longest: int) -> None:
        config = GenerationConfig(max_length=longest, do_sample=False, pad_token_id=0)
        tokens = batch(model, [PROMPT], config)
        assert tokens == [answer(PROMPT, config)]
        assert len(tokens[0]) == longest - len(PROMPT)

    def test_max_new_tokens_goes_before_max_length(self, model) -> None:
        config = GenerationConfig(max_length=30, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert batch(model, [PROMPT], config) == [answer(PROMPT, greedy(5))]

    def test_a_max_length_known_only_to_the_model_is_honoured(self) -> None:
        model = new_model("llama")
        model.generation_config.max_length = 11
        config = GenerationConfig(do_sample=False, pad_token_id=0)
        assert batch(model, [PROMPT], config) == [generate_alone(model, PROMPT, config)]

    def test_keywords_go_before_the_config(self, model) -> None:
        stop = answer(PROMPT, greedy(12))[4]
        assert batch(model, [PROMPT], greedy(12), max_new_tokens=2) == [answer(PROMPT, greedy(2))]
        assert batch(model, [PROMPT], greedy(12), eos_token_id=stop) == [answer(PROMPT, greedy(12, stop))]
        sampled = GenerationConfig(do_sample=True, max_new_tokens=6)
        assert batch(model, [PROMPT], sampled, do_sample=False) == [answer(PROMPT, greedy(6))]

    def test_a_requests_own_limit_and_eos_go_before_everything(self, model) -> None:
        whole = answer(PROMPT, greedy(12))
        with model.continuous_batching_context_manager(greedy(12, whole[8]), async_batching=True) as manager:
            shorter = manager.add_request(PROMPT, max_new_tokens=2)
            earlier = manager.add_request(PROMPT, eos_token_id=whole[4])
            several = manager.add_request(PROMPT, eos_token_id=[whole[6], whole[2]])
            tokens = [manager.get_result(i, PATIENCE).generated_tokens for i in (shorter, earlier, several)]
        assert tokens == [
            answer(PROMPT, greedy(n, stop)) for n, stop in ((2, whole[8]), (12, whole[4]), (12, [whole[6], whole[2]]))
        ]

    def test_twenty_tokens_are_the_default(self, model) -> None:
        assert batch(model, [PROMPT]) == [answer(PROMPT, greedy(20))]
        assert batch(model, [PROMPT], GenerationConfig()) == [answer(PROMPT, greedy(20))]
        with model.continuous_batching_context_manager(async_batching=True) as manager:
            output = manager.get_result(manager.add_request(PROMPT), PATIENCE)
        assert output.generated_tokens == answer(PROMPT, greedy(20))

    @pytest.mark.parametrize("length", [500, POSITIONS - 1])
    def test_the_default_stays_within_the_models_positions(self, model, length: int) -> None:
        prompt = [1 + i % 90 for i in range(length)]
        config = GenerationConfig(do_sample=False, pad_token_id=0)
        assert batch(model, [prompt], config) == [answer(prompt, config)]

    def test_sampling_known_only_to_the_model_is_honoured(self) -> None:
        model = new_model("llama")
        model.generation_config.do_sample = True
        model.generation_config.temperature = 5.0
        outputs = batch(model, [PROMPT] * 8, max_new_tokens=6)
        assert len({tuple(tokens) for tokens in outputs}) == 8


def test_arguments_are_those_of_transformers(model) -> None:
    """By place and by name, as the documentation of transformers has them."""
    parameters = list(inspect.signature(type(model).generate_batch).parameters)
    assert parameters[:4] == ["self", "inputs", "generation_config", "continuous_batching_config"]
    outputs = model.generate_batch([PROMPT], greedy(3), None, async_batching=AsyncBatchingConfig())
    assert [output.generated_tokens for output in outputs.values()] == [answer(PROMPT, greedy(3))]
