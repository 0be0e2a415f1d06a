"""Quantised models answer what `generate` does. Each kind is tested where its package is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import batching, generate_alone, greedy, new_model, random_prompts
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, QuantoConfig, TorchAoConfig

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.model import ModelLoan


PROMPTS = random_prompts(6, longest=60)
ON_PAGES = AsyncBatchingConfig(sequential_fallback=False)


class Int8Linear(nn.Module):
    """What packages put in the place of `nn.Linear`: integers and scales as buffers, and a forward of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def by_hand(folder: Path) -> PreTrainedModel:
    model = new_model("llama")
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))
    return model


def loaded(package: str, config: Callable[[], object]) -> Callable[[Path], PreTrainedModel]:
    def load(folder: Path) -> PreTrainedModel:
        pytest.importorskip(package)
        new_model("llama").save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=torch.float32).eval()

    return load


def torchao(name: str, **settings) -> Callable[[Path], PreTrainedModel]:
    def config() -> TorchAoConfig:
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, name)(**settings))

    return loaded("torchao", config)


INT8, INT4 = torchao("Int8WeightOnlyConfig"), torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4)
KINDS = {
    "a module by hand": by_hand,
    "torchao int8": INT8,
    "torchao int4": INT4,
    "quanto int8": loaded("optimum.quanto", lambda: QuantoConfig(weights="int8")),
    "bitsandbytes nf4": loaded(
        "bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return request.param(tmp_path_factory.mktemp("model"))


def generated(model: PreTrainedModel, **settings) -> list[list[int]]:
    settings = {"generation_config": greedy(12), "async_batching": ON_PAGES, **settings}
    outputs = model.generate_batch(PROMPTS, **settings)
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("fused", [False, True])
def test_they_answer_what_generate_does(model, fused) -> None:
    expected = [generate_alone(model, prompt, greedy(12)) for prompt in PROMPTS]
    own = AsyncBatchingConfig(sequential_fallback=False, fuse_projections=fused)
    few = batching(max_requests_per_batch=4, max_batch_tokens=32)
    assert generated(model, async_batching=own, continuous_batching_config=few) == expected
    assert [generate_alone(model, prompt, greedy(12)) for prompt in PROMPTS] == expected


@pytest.mark.parametrize(
    "load",
    [
        torchao("Int8DynamicActivationInt8WeightConfig"),
        loaded("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    ],
    ids=["torchao int8 int8", "bitsandbytes int8"],
)
def test_products_that_quantise_their_input_are_a_matter_of_rounding(load, tmp_path) -> None:
    """Some even look at all tokens of a batch together; in `generate` a batch rounds otherwise than its rows do."""
    model = load(tmp_path)
    for prompt, answer in zip(PROMPTS, generated(model), strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.max(1).values - chosen <= 5e-2 * logits.abs().max(1).values).all()


@pytest.mark.parametrize("load", [by_hand, INT8], ids=["a module by hand", "torchao int8"])
class TestWeights:
    def test_prompts_are_found_again_while_they_stay_and_computed_anew_when_they_change(self, load, tmp_path) -> None:
        model = load(tmp_path)
        generated(model, persistent_manager=True)
        manager = model._async_batching_manager
        generated(model, persistent_manager=True)
        assert manager._engine.scheduler.admission.reused > 0
        reused = manager._engine.scheduler.admission.reused
        weight = model.model.layers[0].self_attn.v_proj.weight
        getattr(weight, "qdata", weight).mul_(-1)
        assert generated(model, persistent_manager=True) == [generate_alone(model, p, greedy(12)) for p in PROMPTS]
        assert manager._engine.scheduler.admission.reused == reused
        manager.destroy()

    def test_tell_models_apart(self, load, tmp_path) -> None:
        one, same, other = load(tmp_path / "a"), load(tmp_path / "b"), load(tmp_path / "c")
        weight = other.model.layers[1].mlp.up_proj.weight
        getattr(weight, "qdata", weight)[3, 4] += 1
        digests = [ModelLoan(model).weights() for model in (one, same, other)]
        assert digests[0] == digests[1] != digests[2]

    def test_that_moved_void_what_was_captured(self, load, tmp_path) -> None:
        model = load(tmp_path)
        loan = ModelLoan(model)
        before = loan.baked_in()
        assert loan.baked_in() == before
        linear = model.model.layers[0].self_attn.v_proj
        if isinstance(linear, Int8Linear):
            linear.weight = linear.weight.clone()
        else:
            linear.weight.qdata = linear.weight.qdata.clone()
        assert loan.baked_in() != before
