"""Models in half precision, of mixed dtypes, and under `torch.autocast` answer what their own forward says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import greedy, new_model, random_prompts
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

import transformers_async_cb
from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.matrix.small import small_model


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
PROMPTS = random_prompts(6, longest=60)
# How far below the likeliest token one may be, as a share of the logits' size: rounding depends on what is computed
# together, of which `generate` itself is no exception.
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def assert_likeliest(model: PreTrainedModel, outputs: Sequence[GenerationOutput], rounding: float) -> None:
    """Each token is, but for rounding, the likeliest after all before it."""
    for output in outputs:
        assert output.error is None
        ids = torch.tensor([output.prompt_ids + output.generated_tokens], device=model.device)
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, len(output.prompt_ids) - 1 :].float()
        chosen = logits.gather(1, ids[0, len(output.prompt_ids) :, None])[:, 0]
        assert (logits.max(1).values - chosen <= rounding * logits.abs().max(1).values).all()


def generated(model: PreTrainedModel, **settings) -> list[GenerationOutput]:
    settings = {"compile_layers": False, **settings}
    own = AsyncBatchingConfig(sequential_fallback=False, **settings)
    return list(model.generate_batch(PROMPTS, generation_config=greedy(12), async_batching=own).values())


def tokens(outputs: Sequence[GenerationOutput]) -> list[list[int]]:
    return [output.generated_tokens for output in outputs]


@DEVICES
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_every_dtype_answers_what_the_model_says(dtype, fused, device) -> None:
    model = new_model("llama", device).to(dtype)
    outputs = generated(model, fuse_projections=fused)
    assert_likeliest(model, outputs, ROUNDING[dtype])
    assert tokens(generated(model, fuse_projections=fused, overlap=False)) == tokens(outputs)


def test_norms_may_be_in_float32(monkeypatch) -> None:
    model = small_model("gemma2").bfloat16()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.float()
    assert_likeliest(model, generated(model), ROUNDING[torch.bfloat16])


def test_a_head_in_float32_is_no_reason_to_compare_as_in_float32() -> None:
    class Widened(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float())

    model = new_model("llama").bfloat16()
    head = Widened(64, model.vocab_size, bias=False)
    head.weight = nn.Parameter(model.lm_head.weight.float())
    model.lm_head = head
    assert_likeliest(model, generated(model), ROUNDING[torch.bfloat16])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return new_model("qwen3")


class TestAutocast:
    @DEVICES
    def test_it_reaches_the_engine(self, device) -> None:
        model, seen = new_model("qwen3", device), []
        handle = model.model.layers[0].self_attn.v_proj.register_forward_hook(
            lambda module, given, found: seen.append(found.dtype)
        )
        with torch.autocast(device, torch.bfloat16):
            outputs = generated(model, fuse_projections=True)
            assert_likeliest(model, outputs, ROUNDING[torch.bfloat16])
        handle.remove()
        assert set(seen) == {torch.bfloat16}

    def test_a_kept_manager_follows_it(self, model) -> None:
        inputs = {"generation_config": greedy(12), "persistent_manager": True, "async_batching": True}
        plain = model.generate_batch(PROMPTS, **inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.generate_batch(PROMPTS, **inputs)
            assert_likeliest(model, list(rounded.values()), ROUNDING[torch.bfloat16])
        again = model.generate_batch(PROMPTS, **inputs)
        model.destroy_cached_continuous_batching_manager()
        assert tokens(again.values()) == tokens(plain.values())
        assert tokens(rounded.values()) != tokens(plain.values())

    def test_of_the_start_counts_though_it_was_warmed_up_without(self, model) -> None:
        manager = model.init_continuous_batching(greedy(12), async_batching=True)
        manager.warmup()
        with torch.autocast("cpu", torch.bfloat16):
            manager.start()
        manager.add_requests(PROMPTS)
        manager.stop(keep_for_next_session=True)
        found = list(manager)
        manager.destroy()
        with torch.autocast("cpu", torch.bfloat16):
            expected = generated(model)
        assert tokens(sorted(found, key=lambda output: output.request_id)) == tokens(expected)

    @pytest.mark.parametrize("family", ["bloom", "mamba2", "lfm2"])
    def test_models_that_do_not_run_packed_have_it_too(self, family) -> None:
        model = small_model(family)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model.generate_batch(PROMPTS, generation_config=greedy(12), async_batching=True)
            assert_likeliest(model, list(outputs.values()), 2 * ROUNDING[torch.bfloat16])  # recurrences add up

    def test_generate_with_the_engine_as_its_loop_has_it_too(self, model) -> None:
        ids = torch.tensor(PROMPTS[:1])
        settings = {"attention_mask": torch.ones_like(ids), "generation_config": greedy(12)}
        with torch.autocast("cpu", torch.bfloat16):
            plain = model.generate(ids, **settings)
            ours = model.generate(ids, custom_generate=transformers_async_cb.generate, **settings)
        model.destroy_cached_continuous_batching_manager()
        assert torch.equal(ours, plain)
