"""The engines, each as a context in which one function generates."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.utils import WorkloadHints

from ..config import AsyncBatchingConfig
from .workload import Workload


# Prompts and how many new tokens each shall get, to the new tokens of each.
Generate = Callable[[list[list[int]], list[int]], list[list[int]]]


def ours(
    model: PreTrainedModel, workload: Workload, batch_size: int, overlap: bool
) -> AbstractContextManager[Generate]:
    config = ContinuousBatchingConfig(allow_block_sharing=False)  # or later runs would find the prompts of the first
    return _batched(model, async_batching=AsyncBatchingConfig(overlap=overlap), continuous_batching_config=config)


def theirs(
    model: PreTrainedModel, workload: Workload, batch_size: int, use_async: bool
) -> AbstractContextManager[Generate]:
    """transformers' own batching. Its cache takes nearly all the memory there is, which only a GPU has ready at once:
    elsewhere it gets a twentieth."""
    share = None if model.device.type == "cuda" else 0.05
    config = ContinuousBatchingConfig(
        use_async_batching=use_async, max_memory_percent=share, allow_block_sharing=False
    )
    return _batched(model, continuous_batching_config=config)


@contextmanager
def _batched(model: PreTrainedModel, **options: Any) -> Generator[Generate]:
    """transformers' entry points, with a manager that is kept from one call to the next."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # transformers' own

    def generate(prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=max(limits), do_sample=False, eos_token_id=-1)
        kwargs = copy.deepcopy(options) | {"generation_config": config, "persistent_manager": True}
        if min(limits) == max(limits):
            outputs = list(model.generate_batch(prompts, **kwargs).values())
        else:  # limits of its own for each request are the manager's to take
            hints = WorkloadHints(
                max_prompt_length=max(map(len, prompts)), max_generated_length=max(limits), num_requests=len(prompts)
            )
            with model.continuous_batching_context_manager(workload_hints=hints, **kwargs) as manager:
                names = [
                    manager.add_request(prompt, max_new_tokens=limit)
                    for prompt, limit in zip(prompts, limits, strict=True)
                ]
                results = [manager.get_result() for _ in prompts]
            by_name = {output.request_id: output for output in results if output is not None}
            outputs = [by_name.get(name) for name in names]
        if failed := [output and output.error for output in outputs if output is None or output.error is not None]:
            raise RuntimeError(f"{len(failed)} of {len(prompts)} requests failed, the first with: {failed[0]}")
        return [output.generated_tokens for output in outputs]

    try:
        yield generate
    finally:
        model.destroy_cached_continuous_batching_manager()


@contextmanager
def padded(model: PreTrainedModel, workload: Workload, batch_size: int) -> Generator[Generate]:
    """`model.generate` for `batch_size` prompts at a time, padded on the left; each batch runs to its longest limit,
    and what a request gets beyond its own is thrown away."""

    def generate_batch(prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(max_new_tokens=max(limits), do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        ).tolist()
        return [answer[width : width + limit] for answer, limit in zip(answers, limits, strict=True)]

    def generate(prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        batches = [slice(begin, begin + batch_size) for begin in range(0, len(prompts), batch_size)]
        return [answer for batch in batches for answer in generate_batch(prompts[batch], limits[batch])]

    yield generate


@contextmanager
def vllm(model: PreTrainedModel, workload: Workload, batch_size: int) -> Generator[Generate]:
    """vLLM in a process of its own, with a copy of the model's weights. Follows the offline API of vLLM 0.26
    (https://docs.vllm.ai/en/v0.26.0/api/vllm/entrypoints/llm/), without tokenizer and without prefix cache, which
    would remember the prompts from one run to the next."""
    from vllm import LLM, SamplingParams, TokensPrompt

    def generate(prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        parameters = [
            SamplingParams(temperature=0, ignore_eos=True, max_tokens=limit, detokenize=False) for limit in limits
        ]
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return [list(answer.outputs[0].token_ids) for answer in engine.generate(asked, parameters, use_tqdm=False)]

    free, total = torch.cuda.mem_get_info(model.device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=workload.prompt_tokens[1] + workload.new_tokens[1],
            gpu_memory_utilization=0.9 * free / total,
            enable_prefix_caching=False,
        )
        try:
            yield generate
        finally:
            engine.llm_engine.engine_core.shutdown()


ENGINES: dict[str, Callable[[PreTrainedModel, Workload, int], AbstractContextManager[Generate]]] = {
    "ours": partial(ours, overlap=True),
    "ours-no-overlap": partial(ours, overlap=False),
    "transformers": partial(theirs, use_async=False),
    "transformers-async": partial(theirs, use_async=True),
    "generate": padded,
    "vllm": vllm,
}


def missing(engine: str) -> str | None:
    """Why an engine cannot be measured here, if it cannot."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vllm is not installed: pip install vllm"
    return None
