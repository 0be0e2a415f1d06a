"""Models whose weights accelerate has put elsewhere answer what they answered before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import generate_alone, greedy, new_model, random_prompts
from transformers import AutoModelForCausalLM, PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.matrix.small import small_model


PROMPTS = random_prompts(6, longest=60)
PARTS = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "cpu", "lm_head": "disk",
}  # fmt: skip


def device_map(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder / "saved")
    return AutoModelForCausalLM.from_pretrained(folder / "saved", device_map=PARTS, offload_folder=folder / "off")


KINDS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "in host memory": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "in host memory, a layer at a time": lambda model, folder: accelerate.cpu_offload(
        model, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"]
    ),
    "on disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu") or model,
    "partly on disk": lambda model, folder: accelerate.dispatch_model(model, PARTS, "cpu", offload_dir=folder),
    "loaded with a device map": device_map,
}


def generated(model: PreTrainedModel, **settings) -> list[list[int]]:
    own = AsyncBatchingConfig(**settings)
    outputs = model.generate_batch(PROMPTS, generation_config=greedy(12), async_batching=own)
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs.values()]


def answers(model: PreTrainedModel) -> list[list[int]]:
    return [generate_alone(model, prompt, greedy(12)) for prompt in PROMPTS]


@pytest.mark.parametrize("put", KINDS.values(), ids=KINDS)
def test_offloaded_weights_are_fetched_for_a_step(put, tmp_path) -> None:
    model = new_model("llama")
    expected = answers(model)
    model = put(model, tmp_path)
    assert generated(model, sequential_fallback=False, compile_layers=True, fuse_projections=True) == expected
    assert any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", ["bloom", "mamba2", "lfm2"])
def test_offloaded_models_run_as_others_of_their_kind(family, tmp_path) -> None:
    model = small_model(family)
    expected = answers(model)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert generated(model) == expected


def test_a_model_without_weights_is_refused() -> None:
    config = new_model("llama").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"no weights in model\.embed_tokens: they are on the meta device"):
        generated(model)


@pytest.mark.gpu
def test_weights_offloaded_from_a_gpu_are_fetched_for_a_step() -> None:
    model = new_model("llama")
    expected = answers(model)
    model = accelerate.cpu_offload(model, execution_device="cuda:0")
    assert generated(model, sequential_fallback=False) == expected


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize("current", [0, 1])
def test_models_on_each_of_two_gpus_run_at_the_same_time(current: int) -> None:
    """Whichever of them is the current one of the threads that ask."""
    models = [new_model("llama").to(f"cuda:{i}") for i in range(2)]
    expected = answers(models[0])

    def ask(model: PreTrainedModel) -> list[list[int]]:
        torch.cuda.set_device(current)
        return generated(model, sequential_fallback=False)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            assert list(threads.map(ask, models)) == [expected] * 2


@pytest.mark.gpu
@TWO_GPUS
def test_a_model_on_two_gpus_runs_one_sequence_at_a_time(log) -> None:
    model = new_model("llama")
    expected = answers(model)
    second = ("model.layers.1", "model.norm", "lm_head")
    model = accelerate.dispatch_model(model, {part: int(part in second) for part in PARTS})
    with log.at_level(logging.WARNING):
        assert generated(model) == expected
        assert generated(model, overlap=False) == expected
    assert "is spread over cuda:0, cuda:1" in log.text
