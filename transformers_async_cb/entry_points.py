"""transformers' three ways into batching, on this engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
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
from .journal import Journal
from .manager import CACHED, AsyncBatchingManager
from .progress import BatchProgress
from .prompts import Prompt, one_by_one
from .request import Request
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
        continuous_batching_config = _batching_config(model, generation_config)
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


def _batching_config(
    model: PreTrainedModel, generation_config: GenerationConfig | None
) -> ContinuousBatchingConfig | None:
    """The one that a generation config may have with it, which transformers calls deprecated."""
    config = model.generation_config if generation_config is None else generation_config
    return getattr(config, "continuous_batching_config", None)


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
    `init_continuous_batching`.

    Args:
        warmup (`bool`): compile and capture the largest steps first, see `AsyncBatchingManager.warmup`.
    """
    if not isinstance(block, int):
        raise ValueError(f"block must be True or False, got {type(block).__name__}: pass configs by their names")
    manager = init_continuous_batching(
        model, generation_config, continuous_batching_config, workload_hints,
        async_batching=async_batching, tokenizer=tokenizer, stopping_criteria=stopping_criteria,
        logits_processor=logits_processor, **overrides,
    )  # fmt: skip
    if warmup and not manager.warmed_up:
        manager.warmup()
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
    request_settings: Sequence[Mapping[str, Any]] | None = None,
    stream: bool = False,
    resume: str | os.PathLike | None = None,
    **overrides: Any,
) -> dict[str, GenerationOutput] | Generator[GenerationOutput]:
    """Generate for all of `inputs` and return their results by request id, in the order of the inputs; where
    `num_return_sequences` asks for more than one, the others of an input follow its first.

    Args are those of transformers' `generate_batch`, and `tokenizer`, `stopping_criteria` and `logits_processor` as
    for `model.generate` (see `AsyncBatchingManager`); but `generation_config` may also be a list with one for each
    input. So may `json_schema`, `regex` and `grammar`, which say what an answer must be (see `add_request`, also for
    `logprobs` and `prompt_logprobs`). Other keyword arguments are generation settings, as for `model.generate`, and
    hold for all. `warmup` changes nothing: the call's own first steps compile and capture what it needs.

    Args:
        inputs: a list of prompts; a padded batch of token ids `[B, T]` with its `attention_mask`, or a dictionary of
            both; or, with a `tokenizer`, texts and chats.
        request_settings (`list[dict]`, *optional*): for each input a dictionary of what `manager.add_request` takes,
            which goes before the settings of the call: `[{"seed": 1, "priority": 2}, {"max_new_tokens": 5}]`.
        stream (`bool`): return a generator of the results as they finish. All has been checked, and the model
            generates, when this returns; closing or dropping the generator ends what is not finished and gives the
            model back.
        resume (`str`, *optional*): a folder for the results as they finish (see `Journal`). The same call with the
            same folder, after this one was killed, generates only what is missing; what is there already comes first
            in a stream. Not on a persistent manager.

    Raises:
        ValueError: an input or a setting is not valid, or `resume` has another run; nothing has run then.
    """
    AsyncBatchingConfig.from_flag(async_batching)
    prompts = one_by_one(inputs, attention_mask)
    configs = generation_config if isinstance(generation_config, Sequence) else None
    settings: dict[str, Any] = {
        "record_timestamps": record_timestamps, "json_schema": json_schema, "regex": regex, "grammar": grammar,
        "logprobs": logprobs, "prompt_logprobs": prompt_logprobs,
    }  # fmt: skip
    if configs is not None:
        settings |= {"generation_config": configs, **overrides}
        generation_config = configs[0] if configs else None
    for i, own in enumerate(request_settings or ()):
        if isinstance(own, Mapping) and own.get("streaming"):
            raise ValueError(f"request_settings[{i}]: streaming has no meaning here, results come when they are whole")
    init = {
        "generation_config": generation_config, "continuous_batching_config": continuous_batching_config,
        "async_batching": async_batching, "tokenizer": tokenizer, "stopping_criteria": stopping_criteria,
        "logits_processor": logits_processor, **overrides,
    }  # fmt: skip
    request_ids, results = run_batch(
        model, prompts, init, settings, request_settings, persistent_manager, progress_bar, resume
    )
    if stream:
        return results
    finished = {output.request_id: output for output in results}
    failed = [request_id for request_id in request_ids if finished[request_id].error is not None]
    if failed:
        logger.error(
            f"{len(failed)} of {len(request_ids)} requests failed, the first with: {finished[failed[0]].error}"
        )
    return {request_id: finished[request_id] for request_id in request_ids}


def run_batch(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    init: dict[str, Any],
    settings: dict[str, Any],
    request_settings: Sequence[Mapping[str, Any]] | None = None,
    keep: bool = False,
    progress_bar: bool = False,
    resume: str | os.PathLike | None = None,
) -> tuple[list[str], Generator[GenerationOutput]]:
    """Check the requests of a call, all before any runs, and start them on a manager of `model`'s.

    Args:
        init (`dict`): keyword arguments of `init_continuous_batching`.
        settings (`dict`), request_settings (`list[dict]`, *optional*): of `manager.add_requests`.
        keep (`bool`): keep the manager on the model afterwards.

    Returns:
        The ids of all results in the order of the prompts, and the results as they finish. The manager is stopped at
        the end of those, or when their generator is closed, which cancels the requests of this call; others that it
        has are finished.
    """
    if len(prompts) == 0:
        return [], (output for output in ())
    journal = request_ids = None
    choose: Callable[[list[Request]], list[Request]] = list
    if resume is not None:
        journal, request_ids = Journal(resume), [f"req_{i}" for i in range(len(prompts))]
        batching = init["continuous_batching_config"] or _batching_config(model, init["generation_config"])
        batching = batching or ContinuousBatchingConfig()
        seed = batching.seed
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu")) if journal.seed is None else journal.seed
        init = init | {"continuous_batching_config": replace(batching, seed=seed)}

        def choose(requests: list[Request]) -> list[Request]:
            return journal.begin(requests, seed, manager.model_digest(), batching.return_logprobs)

    cached: AsyncBatchingManager | None = getattr(model, CACHED, None)
    try:
        with nullcontext() if cached is None else cached.claimed():
            manager = init_continuous_batching(model, **init)
            request_ids = manager.add_batch(prompts, request_ids, settings, request_settings, choose, roomy=keep)
            left = set(request_ids).difference(() if journal is None else journal.finished)
            if left:
                try:
                    manager.start()
                except BaseException:
                    manager.stop(hard_stop=True)
                    raise
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    results = _results(manager, left, keep, BatchProgress(len(request_ids), progress_bar), journal)
    next(results)
    return request_ids, results


def _results(
    manager: AsyncBatchingManager, left: set[str], keep: bool, progress: BatchProgress, journal: Journal | None
) -> Generator[GenerationOutput]:
    """First `None`, so that the generator has begun and closing it stops the manager; then the results."""
    others: list[GenerationOutput] = []
    with progress, nullcontext() if journal is None else closing(journal):
        try:
            yield None
            for output in () if journal is None else journal.finished.values():
                progress.update()
                yield output
            while left and (output := progress.next_result(manager)) is not None:
                if output.request_id not in left:  # was added to a kept manager before this call
                    others.append(output)
                    continue
                left.remove(output.request_id)
                if journal is not None:
                    journal.add(output)
                progress.update()
                yield output
        except GeneratorExit:
            manager.cancel_sequences(left)
            manager.stop(keep_for_next_session=keep)
            while (output := manager.get_result(timeout=0)) is not None:
                if output.request_id not in left:
                    others.append(output)
            manager.hand_back(others)
            raise
        except BaseException:
            manager.stop(hard_stop=True)
            raise
        manager.stop(keep_for_next_session=keep)
    manager.hand_back(others)
