"""transformers' three ways into batching, on this engine."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from .config import AsyncBatchingConfig
from .manager import CACHED, AsyncBatchingManager
from .progress import BatchProgress
from .prompts import Prompt, one_by_one
from .settings import Workload


logger = logging.get_logger(f"transformers.{__name__}")


def init_continuous_batching(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
    *,
    async_batching: bool | AsyncBatchingConfig = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stopping_criteria: list[StoppingCriteria] | None = None,
    logits_processor: list[LogitsProcessor] | None = None,
    **overrides: Any,
) -> AsyncBatchingManager:
    """A manager for `model`, not started; the persistent one if there is one and its settings are the same.

    Args are those of transformers' `init_continuous_batching`, and `tokenizer`, `stopping_criteria` and
    `logits_processor` as for `model.generate` (see `AsyncBatchingManager`); other keyword arguments are generation
    settings.
    """
    own = AsyncBatchingConfig.from_flag(async_batching)
    workload = workload_hints if isinstance(workload_hints, Workload) else Workload.from_hints(workload_hints)
    if continuous_batching_config is None:
        continuous_batching_config = getattr(generation_config, "continuous_batching_config", None)
    cached: AsyncBatchingManager | None = getattr(model, CACHED, None)
    if cached is not None and cached.is_running():
        raise RuntimeError("this model is generating already: stop the manager that has it first")
    if cached is None:
        return AsyncBatchingManager(
            model, generation_config, continuous_batching_config, own, workload, overrides, tokenizer,
            stopping_criteria, logits_processor,
        )  # fmt: skip
    if own != cached.async_config or continuous_batching_config not in (None, cached.continuous_batching_config):
        raise ValueError(
            "this model has a persistent manager with other settings: call "
            "model.destroy_cached_continuous_batching_manager() first"
        )
    cached.take_up(generation_config, overrides, workload, tokenizer, stopping_criteria, logits_processor)
    return cached


@contextmanager
def continuous_batching_context_manager(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    block: bool = True,
    timeout: float | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    persistent_manager: bool = False,
    warmup: bool = True,
    workload_hints: Any = None,
    *,
    async_batching: bool | AsyncBatchingConfig = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stopping_criteria: list[StoppingCriteria] | None = None,
    logits_processor: list[LogitsProcessor] | None = None,
    **overrides: Any,
) -> Generator[AsyncBatchingManager]:
    """A started manager; stopped at the end of the block, at once if that ends with an exception. See
    `init_continuous_batching`."""
    manager = init_continuous_batching(
        model, generation_config, continuous_batching_config, workload_hints,
        async_batching=async_batching, tokenizer=tokenizer, stopping_criteria=stopping_criteria,
        logits_processor=logits_processor, **overrides,
    )  # fmt: skip
    manager.start()
    try:
        yield manager
    except BaseException:
        manager.stop(hard_stop=True)
        raise
    manager.stop(block=block, timeout=timeout, keep_for_next_session=persistent_manager)


def destroy_cached_manager(model: PreTrainedModel) -> None:
    """Forget the persistent manager, if there is one."""
    manager: AsyncBatchingManager | None = getattr(model, CACHED, None)
    if manager is not None:
        manager.destroy()


def generate_batch(
    model: PreTrainedModel,
    inputs: Sequence[Prompt] | torch.Tensor | Mapping[str, Any],
    generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    persistent_manager: bool = False,
    warmup: bool = True,
    *,
    async_batching: bool | AsyncBatchingConfig = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stopping_criteria: list[StoppingCriteria] | None = None,
    logits_processor: list[LogitsProcessor] | None = None,
    attention_mask: torch.Tensor | Sequence[Sequence[int]] | None = None,
    json_schema: str | dict | type | Sequence[str | dict | type | None] | None = None,
    regex: str | Sequence[str | None] | None = None,
    grammar: str | Sequence[str | None] | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    **overrides: Any,
) -> dict[str, GenerationOutput]:
    """Generate for all of `inputs` and return their results by request id, in the order of the inputs; where
    `num_return_sequences` asks for more than one, the others of an input follow its first.

    Args are those of transformers' `generate_batch`, and `tokenizer`, `stopping_criteria` and `logits_processor` as
    for `model.generate` (see `AsyncBatchingManager`); but `generation_config` may also be a list with one for each
    input. So may `json_schema`, `regex` and `grammar`, which say what an answer must be (see `add_request`, also for
    `logprobs` and `prompt_logprobs`). Other keyword arguments are generation settings, as for `model.generate`, and
    hold for all.

    `inputs` may be a padded batch of token ids `[B, T]` with its `attention_mask`, a dictionary of both, or, with a
    `tokenizer`, texts and chats.

    Raises:
        ValueError: an input or a setting is not valid; nothing has run then.
    """
    AsyncBatchingConfig.from_flag(async_batching)
    prompts = one_by_one(inputs, attention_mask)
    if len(prompts) == 0:
        return {}
    configs = generation_config if isinstance(generation_config, Sequence) else None
    if configs is not None:
        generation_config = configs[0] if configs else None
    cached: AsyncBatchingManager | None = getattr(model, CACHED, None)
    with nullcontext() if cached is None else cached.claimed():
        manager = init_continuous_batching(
            model, generation_config, continuous_batching_config, None, async_batching=async_batching,
            tokenizer=tokenizer, stopping_criteria=stopping_criteria, logits_processor=logits_processor, **overrides,
        )  # fmt: skip
        # Everything is checked before anything runs, and the cache is sized for what was checked.
        own = {} if configs is None else {"generation_config": configs, **overrides}
        request_ids = manager.add_requests(
            prompts,
            record_timestamps=record_timestamps,
            json_schema=json_schema,
            regex=regex,
            grammar=grammar,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **own,
        )
        request_ids = manager.sequence_ids(request_ids)
        manager.size_for_pending()
        try:
            manager.start()
        except BaseException:
            manager.destroy()
            raise
    finished: dict[str, GenerationOutput] = {}
    wanted, others = set(request_ids), []
    try:
        with BatchProgress(len(request_ids), progress_bar) as progress:
            while len(finished) < len(request_ids):
                output = progress.next_result(manager)
                if output is None:
                    break
                if output.request_id not in wanted:  # was added to a kept manager before this call
                    others.append(output)
                    continue
                finished[output.request_id] = output
                progress.update()
    except BaseException:
        manager.destroy()
        raise
    manager.stop(keep_for_next_session=persistent_manager)
    manager.hand_back(others)
    failed = [request_id for request_id in request_ids if finished[request_id].error is not None]
    if failed:
        logger.error(
            f"{len(failed)} of {len(request_ids)} requests failed, the first with: {finished[failed[0]].error}"
        )
    return {request_id: finished[request_id] for request_id in request_ids}
