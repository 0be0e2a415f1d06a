"""Models that their users have changed: seen by a kept manager, and compared with `generate` again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, generate_alone, greedy, new_model, random_model
from transformers import CompileConfig, LlamaForCausalLM, PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig


PROMPTS = [[3, 9, 11, 7, 8, 2, 13] * 6, [5], [3, 9, 11, 7, 8, 2, 13] * 6 + [1]]
LIMIT = 10
ON_PAGES = AsyncBatchingConfig(sequential_fallback=False)


def says(
    model: PreTrainedModel,
    own: AsyncBatchingConfig | bool = True,
    prompts: list[list[int]] = PROMPTS,
    **settings: Any,
) -> list[list[int]]:
    outputs = model.generate_batch(prompts, generation_config=greedy(LIMIT), async_batching=own, **settings)
    return [output.error or output.generated_tokens for output in outputs.values()]


def should_say(model: PreTrainedModel, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [generate_alone(model, prompt, greedy(LIMIT)) for prompt in prompts]


def mixtral() -> PreTrainedModel:
    return random_model(
        "MixtralForCausalLM", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip


def narrow_window(model: PreTrainedModel) -> None:
    model.config.sliding_window = 5


def large_eps(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 5.0


def one_expert(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1


def hook_that_waits_for_the_first_token(model: PreTrainedModel) -> None:
    """As those that steer answers and spare prompts."""
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5 if out.shape[1] == 1 else out)


@pytest.mark.parametrize(
    ("new", "change"),
    [
        (partial(new_model, "mistral"), narrow_window),
        (partial(new_model, "llama"), large_eps),
        (mixtral, one_expert),
        (partial(new_model, "llama"), hook_that_waits_for_the_first_token),
    ],
    ids=["config", "numbers", "experts", "hook"],
)
def test_between_calls_of_a_kept_manager_are_seen(new: Callable, change: Callable) -> None:
    model = new()
    try:
        before = says(model, persistent_manager=True)
        change(model)
        assert says(model, persistent_manager=True) == should_say(model) != before
    finally:
        model.destroy_cached_continuous_batching_manager()


def test_in_nothing_that_counts_keep_the_engine() -> None:
    model, engines = new_model("llama"), set()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        model.config.use_cache = attention == "sdpa"  # trainers turn it off
        with model.continuous_batching_context_manager(
            greedy(LIMIT), async_batching=True, persistent_manager=True
        ) as manager:
            engines.add(manager._engine)
    assert len(engines) == 1
    manager.destroy()


def test_by_their_config_in_a_pause_end_the_manager_with_the_reason() -> None:
    model = new_model("mistral")
    manager = model.init_continuous_batching(greedy(LIMIT), async_batching=True)
    manager.start()
    said = manager.get_result(manager.add_request(PROMPTS[0])).generated_tokens
    with pytest.raises(RuntimeError, match="the model's config was changed in a pause"), manager.pause():
        asked = manager.add_request(PROMPTS[0])
        narrow_window(model)
    assert manager.get_result(asked).error is not None
    manager.stop()
    assert says(model) == should_say(model)
    assert says(model)[0] != said


def shifted(ids: torch.Tensor) -> torch.Tensor:
    return (ids + 1) % VOCABULARY


def test_whose_methods_were_replaced_are_compared_though_their_like_has_passed() -> None:
    model = new_model("llama")
    before = says(model, ON_PAGES)

    def prepare(self: PreTrainedModel, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> dict[str, Any]:
        inputs = type(self).prepare_inputs_for_generation(self, input_ids, attention_mask=attention_mask, **kwargs)
        return inputs | {"input_ids": shifted(inputs["input_ids"])}

    model.prepare_inputs_for_generation = MethodType(prepare, model)
    assert says(model) == should_say(model) != before


def test_whose_class_was_written_anew_are_compared_though_its_like_has_passed() -> None:
    def written(change: Callable) -> PreTrainedModel:
        class Mine(LlamaForCausalLM):
            def prepare_inputs_for_generation(
                self, input_ids: Any, attention_mask: Any = None, **kwargs: Any
            ) -> dict[str, Any]:
                inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
                return inputs | {"input_ids": change(inputs["input_ids"])}

        torch.manual_seed(0)
        return Mine(new_model("llama").config).eval()

    first, second = written(lambda ids: ids), written(shifted)
    assert says(first, ON_PAGES) == should_say(first)
    assert says(second) == should_say(second) != should_say(first)


def compile_forward(model: PreTrainedModel) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def test_whose_modules_were_replaced_are_compared_though_their_like_has_passed() -> None:
    class Steered(torch.nn.Module):
        """Steers answers and spares prompts."""

        def __init__(self, mlp: torch.nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.mlp(states) * (2 if states.shape[1] == 1 else 1)

    model = new_model("llama")
    before = says(model, ON_PAGES)
    model.model.layers[0].mlp = Steered(model.model.layers[0].mlp)
    assert says(model) == should_say(model) != before


@pytest.mark.parametrize(
    "compile_it",
    [
        lambda model: model.compile(backend="eager"),
        lambda model: model.model.compile(backend="eager"),
        compile_forward,
    ],
    ids=["model", "decoder", "forward"],
)
def test_that_are_compiled_as_a_whole_run_on_pages_and_stay_compiled(compile_it: Callable) -> None:
    model = new_model("llama")
    compile_it(model)
    compiled = model._compiled_call_impl, model.model._compiled_call_impl, vars(model).get("forward")
    assert says(model, ON_PAGES) == should_say(new_model("llama"))
    assert compiled == (model._compiled_call_impl, model.model._compiled_call_impl, vars(model).get("forward"))


def test_whose_settings_have_generate_compile_them_run_on_pages() -> None:
    model = new_model("llama")
    expected = should_say(model)
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = CompileConfig()
    assert says(model, ON_PAGES) == expected


@pytest.mark.parametrize("overlap", [True, False])
def test_whose_forward_keeps_the_logits_of_all_tokens_run_on_pages(overlap: bool) -> None:
    model = new_model("llama")
    as_written = model.forward

    def forward(
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> Any:
        return as_written(input_ids, attention_mask, position_ids, past_key_values, **kwargs)

    model.forward = forward
    own = AsyncBatchingConfig(overlap=overlap, sequential_fallback=False)
    assert says(model, own) == should_say(model)


def test_with_hardly_any_tokens_answer_what_generate_does() -> None:
    for class_name, sizes in (
        ("LlamaForCausalLM", {"intermediate_size": 64, "num_attention_heads": 4}),
        ("BloomForCausalLM", {"n_head": 4}),
    ):
        for vocabulary in (2, 3):
            model = random_model(
                class_name, vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, eos_token_id=None,
                bos_token_id=None, **sizes,
            )  # fmt: skip
            prompts = [[1], [0, 1, 1, 0]]
            assert says(model, prompts=prompts) == should_say(model, prompts)


def test_whose_config_holds_what_json_does_not_are_compared_all_the_same() -> None:
    model = new_model("llama")
    model.config.scale = torch.ones(3)
    assert says(model, ON_PAGES) == should_say(model)
