"""Adapters (PEFT) of the model are those of the tokens it generates, as they are switched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import generate_alone, greedy, new_model
from transformers import PreTrainedModel

import transformers_async_cb
from transformers_async_cb import AsyncBatchingConfig


peft = pytest.importorskip("peft")

PROMPT = [7, 3, 9, 11, 2, 5]
LIMIT = 10


def lora(**settings: Any) -> Any:
    """An adapter that changes what the model says from the start."""
    return peft.LoraConfig(
        r=4, lora_alpha=16, init_lora_weights=False, target_modules=["q_proj", "v_proj", "up_proj"], **settings
    )


@pytest.fixture(params=[False, True], ids=["", "fused"])
def own(request: pytest.FixtureRequest) -> AsyncBatchingConfig:
    return AsyncBatchingConfig(fuse_projections=request.param)


@pytest.fixture
def adapted() -> Iterator[PreTrainedModel]:
    """A `PeftModel` with the adapters `one` (in use) and `two`."""
    torch.manual_seed(0)
    model = peft.get_peft_model(new_model("llama"), lora(), adapter_name="one")
    model.add_adapter("two", lora())
    yield model.eval()
    model.destroy_cached_continuous_batching_manager()


@pytest.fixture
def without() -> list[int]:
    """What the model says without an adapter."""
    return generate_alone(new_model("llama"), PROMPT, greedy(LIMIT))


def says(model: PreTrainedModel, own: AsyncBatchingConfig) -> list[int]:
    """The tokens of a kept manager, which has a longer prompt beside this one."""
    outputs = model.generate_batch(
        [PROMPT * 4, PROMPT], generation_config=greedy(LIMIT), persistent_manager=True, async_batching=own
    )
    return list(outputs.values())[1].generated_tokens


def should_say(model: PreTrainedModel) -> list[int]:
    return generate_alone(model, PROMPT, greedy(LIMIT))


def test_that_are_switched_between_calls_of_a_kept_manager_are_seen(adapted, own, without) -> None:
    said = []
    for name in ("one", "two", "one"):
        adapted.set_adapter(name)
        said.append(says(adapted, own))
        assert said[-1] == should_say(adapted)
    assert said[0] == said[2] != said[1]
    with adapted.disable_adapter():
        assert says(adapted, own) == without
    assert without not in said


def test_that_were_merged_or_trained_are_seen(adapted, own, without) -> None:
    said = says(adapted, own)
    adapted.merge_adapter()
    assert says(adapted, own) == should_say(adapted)
    adapted.unmerge_adapter()
    assert says(adapted, own) == said
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B.one" in name:
                parameter.zero_()
    assert says(adapted, own) == without != said


def test_that_transformers_added_are_seen(own, without) -> None:
    model = new_model("llama")
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        model.add_adapter(lora(), name)
    model.eval()
    for names in ("one", "two", ["one", "two"]):
        model.set_adapter(names)
        assert says(model, own) == should_say(model) != without
    model.disable_adapters()
    assert says(model, own) == without
    model.destroy_cached_continuous_batching_manager()


def test_that_are_switched_in_a_pause_are_those_of_the_requests_to_come(adapted, own) -> None:
    expected = {}
    for name in ("two", "one"):
        adapted.set_adapter(name)
        expected[name] = should_say(adapted)
    with adapted.continuous_batching_context_manager(generation_config=greedy(LIMIT), async_batching=own) as manager:
        for name in ("one", "two", "one"):
            with manager.pause():
                adapted.set_adapter(name)
            assert manager.get_result(manager.add_request(PROMPT)).generated_tokens == expected[name]
    assert expected["one"] != expected["two"]


def test_that_magnitudes_and_trained_heads_are_part_of_are_seen(own, without) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(new_model("llama"), lora(use_dora=True, modules_to_save=["lm_head"])).eval()
    assert says(model, own) == should_say(model) != without
    model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_that_are_virtual_tokens_are_those_of_generate_with_the_engine(kind: str) -> None:
    torch.manual_seed(0)
    new_model("llama").generate_batch(
        [PROMPT], generation_config=greedy(LIMIT), async_batching=True
    )  # passes the check
    model = peft.get_peft_model(
        new_model("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    ids = torch.tensor([PROMPT])

    def ask(**how: Any) -> torch.Tensor:
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy(LIMIT), **how
        )

    try:
        assert ask(custom_generate=transformers_async_cb.generate).tolist() == ask().tolist()
    finally:
        model.destroy_cached_continuous_batching_manager()
