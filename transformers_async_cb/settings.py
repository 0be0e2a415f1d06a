"""From transformers' configs to the numbers the engine runs with; what cannot be honoured is refused here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from numbers import Integral, Real
from typing import Any, NamedTuple

import psutil
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .attention import LayerShape, Place, choose_backend
from .config import AsyncBatchingConfig
from .gpu import free_memory
from .groups import PageLayout
from .logits import LOGITS_FIELDS, OWN_LOGITS_FIELDS, LogitsSettings, Processor
from .logprobs import MOST_LIKELIEST
from .model import ModelLoan
from .request import Sampling


logger = logging.get_logger(f"transformers.{__name__}")

# transformers' default page size, which we cannot tell from a user's own 256, and ours.
THEIR_PAGE_SIZE = 256
PAGE_SIZE = 16

# The highest temperature: all tokens are as likely, long before float32 has no room for it times a draw.
HOTTEST = 1e30

# `GenerationConfig` fields this engine acts on, and fields that change nothing of what `generate_batch` returns.
_HONOURED = {
    "max_new_tokens", "max_length", "eos_token_id", "stop_strings", "max_time", "do_sample", "temperature", "top_k",
    "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "num_return_sequences",
} | LOGITS_FIELDS  # fmt: skip
_WITHOUT_EFFECT = {
    "bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config",
    "return_dict_in_generate", "early_stopping", "length_penalty", "disable_compile", "compile_config",
    "transformers_version", "continuous_batching_config", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "diversity_penalty", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "assistant_early_exit", "max_matching_ngram_size", "is_assistant", "generation_kwargs", "prefill_chunk_size",
    "low_memory",
}  # fmt: skip
# What `generate` takes for a field that nobody has set, and other values that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "num_beams": (1,), "num_beam_groups": (1,), "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,), "guidance_scale": (1.0,), "renormalize_logits": (False, True),
}  # fmt: skip

# `ContinuousBatchingConfig` fields that are not honoured yet: the values that ask for nothing, and what is missing.
_UNSUPPORTED_BATCHING: dict[str, tuple[tuple, str]] = {
    "q_padding_interval_size": ((0,), "the engine chooses its padding itself"),
    "kv_padding_interval_size": ((0,), "the engine does not pad keys and values"),
    "varlen_compile_config": ((None,), "AsyncBatchingConfig(compile_layers=...) decides that"),
    "decode_compile_config": ((None,), "AsyncBatchingConfig(compile_layers=...) decides that"),
    "default_compile_level": ((0,), "AsyncBatchingConfig(compile_layers=...) decides that"),
    "scheduler_type": (("fifo",), "the engine schedules first come, first served"),
    "use_default_compile_configs": (
        (None, False),
        "AsyncBatchingConfig(compile_layers=...) decides that",
    ),
}


class GenerationSettings(NamedTuple):
    """What a `GenerationConfig` means for a request, once merged the way `generate` does."""

    max_new_tokens: int | None
    max_length: int | None
    eos_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    max_time: float  # seconds
    sequences: int  # answers to a prompt
    decoder_start: int | None  # the token that the decoder of an encoder-decoder begins with
    sampling: Sampling  # all but the seed
    logits: LogitsSettings | None

    def new_tokens(self, prompt_length: int, max_position_embeddings: int | None, name: str) -> int:
        """How many tokens a prompt may get, by `generate`'s rules.

        Raises:
            ValueError: the limit leaves no room for a token; the message starts with `name`.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        limit = self.max_length
        if limit is None:  # `generate`'s default: twenty tokens, within what the model has positions for
            limit = min(prompt_length + 20, max_position_embeddings or prompt_length + 20)
        if prompt_length >= limit:
            raise ValueError(
                f"{name}: the prompt has {prompt_length} tokens, max_length is {limit}; raise it or set max_new_tokens"
            )
        return limit - prompt_length


def resolve_generation(
    model: PreTrainedModel, generation_config: GenerationConfig | None, overrides: dict[str, Any]
) -> GenerationSettings:
    """Merge settings as `generate` does: keyword arguments, then the given config, then the model's, then defaults.

    Raises:
        ValueError: an unknown keyword, a value out of range, or a setting that is not supported.
    """
    merged = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    merged.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    own = {name: value for name, value in overrides.items() if name in OWN_LOGITS_FIELDS}
    unknown = merged.update(**{name: value for name, value in overrides.items() if name not in own})
    if unknown:
        raise ValueError(f"unknown keyword arguments: {sorted(unknown)} (a typo in a generation setting?)")
    do_sample = bool(merged.do_sample)
    if (merged.num_beams or 1) != 1:
        raise ValueError(
            f"num_beams={merged.num_beams!r}: async_batching does not search with beams; leave num_beams at 1, or use "
            "model.generate"
        )
    for name in vars(GenerationConfig()):
        value = getattr(merged, name, None)
        if (
            name.startswith("_")
            or name in _HONOURED | _WITHOUT_EFFECT
            or value in (None, False, [], {}, *_NEUTRAL.get(name, ()))
        ):
            continue
        raise ValueError(f"{name}={value!r} is not supported with async_batching yet")
    if merged.max_new_tokens is not None:
        check_max_new_tokens(merged.max_new_tokens, "generation_config")
    if not isinstance(merged.max_length, Integral | None):
        raise ValueError(f"max_length must be an integer, got {merged.max_length!r}")
    sequences = 1 if merged.num_return_sequences is None else merged.num_return_sequences
    if isinstance(sequences, bool) or not isinstance(sequences, Integral) or sequences < 1:
        raise ValueError(f"num_return_sequences must be an integer of 1 or more, got {sequences!r}")
    start = merged.decoder_start_token_id if merged.decoder_start_token_id is not None else merged.bos_token_id
    return GenerationSettings(
        max_new_tokens=merged.max_new_tokens,
        max_length=merged.max_length,
        eos_ids=eos_ids(merged.eos_token_id, "generation_config"),
        stop_strings=check_stop_strings(merged.stop_strings, "generation_config"),
        max_time=check_seconds(merged.max_time, "max_time", "generation_config"),
        sequences=int(sequences),
        decoder_start=start[0] if isinstance(start, list) and len(start) == 1 else start,
        sampling=_sampling(merged) if do_sample else Sampling(),
        logits=LogitsSettings.of(merged, own, model.get_input_embeddings().num_embeddings),
    )


def _sampling(config: GenerationConfig) -> Sampling:
    """All but the seed, of a config that samples."""

    def number(name: str, default: float) -> float:
        value = getattr(config, name)
        return default if value is None else float(value)

    top_k = 50 if config.top_k is None else config.top_k
    if not isinstance(top_k, Integral):
        raise ValueError(f"top_k={top_k!r} must be an integer")
    sampling = Sampling(
        temperature=number("temperature", 1.0),
        top_k=min(int(top_k), 2**31 - 1),
        top_p=number("top_p", 1.0),
        min_p=number("min_p", 0.0),
        typical_p=number("typical_p", 1.0),
        epsilon_cutoff=number("epsilon_cutoff", 0.0),
        eta_cutoff=number("eta_cutoff", 0.0),
        top_h=number("top_h", 0.0),
    )
    if not sampling.temperature > 0:
        raise ValueError(
            f"temperature={sampling.temperature} must be above 0 to sample; for greedy decoding, do_sample=False"
        )
    if sampling.temperature > HOTTEST:
        raise ValueError(f"temperature={sampling.temperature} must be at most {HOTTEST:g}")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (off) or more")
    for name in ("top_p", "typical_p"):
        if not 0 < getattr(sampling, name) <= 1:
            raise ValueError(f"{name}={getattr(sampling, name)} must be above 0 and at most 1 (off)")
    for name in ("min_p", "top_h"):
        if not 0 <= getattr(sampling, name) <= 1:
            raise ValueError(f"{name}={getattr(sampling, name)} must be between 0 (off) and 1")
    for name in ("epsilon_cutoff", "eta_cutoff"):
        if not 0 <= getattr(sampling, name) < 1:
            raise ValueError(f"{name}={getattr(sampling, name)} must be 0 (off) or more, and below 1")
    return sampling


def check_likeliest(value: int | None, vocabulary: int, setting: str, name: str) -> int | None:
    """How many of the likeliest tokens to list, `None` for no log-probabilities.

    Raises:
        ValueError: not a number that is allowed; the message starts with `name`.
    """
    if value is None:
        return None
    most = min(MOST_LIKELIEST, vocabulary)
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value <= most:
        raise ValueError(
            f"{name}: {setting} must be an integer from 0 (the token's own) to {most} (as many of the likeliest too), "
            f"got {value!r}"
        )
    return int(value)


def check_max_new_tokens(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: max_new_tokens must be an integer of 1 or more, got {value!r}")


def eos_ids(value: int | Iterable[int] | None, name: str) -> tuple[int, ...]:
    """End-of-sequence ids as a tuple, without those that no token has: negative is transformers' way to say none.

    Raises:
        ValueError: one is not an integer; the message starts with `name`.
    """
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    ids = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(i, Integral) for i in ids):
        raise ValueError(f"{name}: eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(int(i) for i in ids if 0 <= i < 2**31)


def check_stop_strings(value: str | Iterable[str] | None, name: str) -> tuple[str, ...]:
    """Stop strings as a tuple, empty for none.

    Raises:
        ValueError: one is not a string, or empty; the message starts with `name`.
    """
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple, set)) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"{name}: stop_strings must be a string or a list of strings, none empty, got {value!r}")
    return tuple(strings)


def check_seconds(value: float | None, setting: str, name: str) -> float:
    """Seconds, infinite for no limit.

    Raises:
        ValueError: not a number of seconds; the message starts with `name`.
    """
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
        raise ValueError(f"{name}: {setting} must be a number of seconds, 0 or more, got {value!r}")
    return float(value)


def check_priority(value: int, name: str) -> int:
    """Raises `ValueError`, whose message starts with `name`, if this is not an integer of 32 bits."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not -(2**31) <= value < 2**31:
        raise ValueError(f"{name}: priority must be an integer of 32 bits, got {value!r}")
    return int(value)


def check_stopping_criteria(value: Iterable[Callable] | None, name: str) -> tuple[Callable, ...]:
    """Criteria as a tuple, empty for none. Raises `ValueError`, whose message starts with `name`."""
    return _callables(value, f"{name}: stopping_criteria must be a list of StoppingCriteria")


def check_logits_processor(value: Iterable[Processor] | None, name: str) -> tuple[Processor, ...]:
    """Processors as a tuple, each once, as `generate` calls them; empty for none. Raises `ValueError`, whose message
    starts with `name`."""
    processors = _callables(value, f"{name}: logits_processor must be a list of LogitsProcessors")
    return tuple(processor for i, processor in enumerate(processors) if processor not in processors[:i])


def _callables(value: Iterable[Callable] | None, allowed: str) -> tuple[Callable, ...]:
    value = () if value is None else value
    if not isinstance(value, (list, tuple)) or not all(callable(each) for each in value):
        raise ValueError(f"{allowed}, got {value!r}")
    return tuple(value)


class Workload(NamedTuple):
    """What is known of the requests beforehand; zeros where nothing is."""

    requests: int = 0
    longest: int = 0  # tokens of prompt and answer
    tokens: int = 0  # of all requests together

    def sizes(self, row_limit: int, page_limit: int, token_budget: int, layout: PageLayout) -> tuple[int, int]:
        """Rows and pages that it can use: all there may be, where nothing is known."""
        rows = min(self.requests or row_limit, row_limit)
        pages = page_limit
        if self.tokens:
            most = layout.pages_at_length(self.longest) * self.requests
            most += sum(group.needed(2 * token_budget) for group in layout.groups if not group.keeps_all)
            all_kept = sum(self.tokens // group.page_size + self.requests for group in layout.groups)
            pages = min(all_kept, most, page_limit)
        return min(rows, pages // len(layout.groups) or 1), pages

    @classmethod
    def from_hints(cls, hints: Any) -> Workload:
        """From transformers' `WorkloadHints`; without a generated length nothing can be concluded but the number."""
        if hints is None:
            return cls()
        if not hints.max_generated_length:
            return cls(requests=hints.num_requests)
        longest = hints.max_prompt_length + hints.max_generated_length
        return cls(hints.num_requests, longest, longest * hints.num_requests)


class Mode(Enum):
    """How an engine runs its model, the best first."""

    PAGES = "tokens of all sequences packed, keys and values on pages"
    HYBRID = "a state for each row, keys and values on pages"
    STATES = "a state for each row"
    SEQUENCES = "one sequence at a time, each with a cache of its own"

    @property
    def paged(self) -> bool:
        """Whether the model's attention is ours."""
        return self in (Mode.PAGES, Mode.HYBRID)

    @property
    def next_best(self) -> Mode | None:
        modes = list(Mode)
        return next(iter(modes[modes.index(self) + 1 :]), None)


class EngineSettings(NamedTuple):
    """Everything that is fixed when an engine is built. `row_limit` and `page_limit` bound what any workload gets."""

    page_size: int  # tokens, of the group of layers that has the most pages
    layout: PageLayout
    pages: int
    page_limit: int
    rows: int  # requests in a step, at most
    row_limit: int
    token_budget: int  # tokens in a step, at most
    columns: int  # pages of one request, at most
    max_tokens: int  # positions of one request, at most
    host_pages: int  # for requests that were preempted
    reserve: float  # share of the pages that admission leaves free while anything runs
    backend: str
    fused: bool
    compiled: bool
    graphs: bool
    logprobs: bool
    reuse: bool
    overlap: bool
    debug: bool
    mode: Mode = Mode.PAGES
    whole_prompts: int = 0  # 0: prompts are cut; or computed in one piece, several in a step up to so many tokens

    def fit(self, workload: Workload) -> bool:
        """Whether an engine of these settings serves `workload` as well as a new one would."""
        longest = min(workload.longest, self.layout.longest(self.page_limit) or workload.longest)
        rows, pages = workload.sizes(self.row_limit, self.page_limit, self.token_budget, self.layout)
        return longest <= self.columns * self.page_size and rows <= self.rows and pages <= self.pages


def check_batching(config: ContinuousBatchingConfig) -> None:
    """Raises `ValueError` for a setting that is not honoured yet, or out of range."""
    for name, (neutral, reason) in _UNSUPPORTED_BATCHING.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            raise ValueError(
                f"ContinuousBatchingConfig({name}={value!r}) is not supported with async_batching: {reason}"
            )

    def check(name: str, value: Any, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"ContinuousBatchingConfig({name}={value!r}) must be {allowed}")

    for name in ("num_blocks", "max_batch_tokens", "max_requests_per_batch"):
        value = getattr(config, name)
        check(name, value, value is None or _is(Integral, value, 1), "an integer of 1 or more, or None")
    size = stated_page_size(config)
    check("page_size", size, _is(Integral, size, 1), "an integer of 1 or more")
    bound = config.max_queue_size
    check("max_queue_size", bound, _is(Integral, bound, 0), "an integer of 0 (any) or more")
    seed = config.seed
    check("seed", seed, seed is None or _is(Integral, seed, -math.inf), "an integer, or None")
    space, share = config.cpu_offload_space, config.cpu_offload_space_safety_threshold
    of_space = "a number of GiB, 0 or more, or None for what there is"
    check("cpu_offload_space", space, space is None or (_is(Real, space, 0) and space < math.inf), of_space)
    check("cpu_offload_space_safety_threshold", share, _is(Real, share, 0) and share <= 1, "a number from 0 to 1")
    for name in ("max_memory_percent", "safety_margin"):
        value = getattr(config, name)
        check(name, value, value is None or (_is(Real, value, 0) and value <= 1), "a number from 0 to 1, or None")
    graphs = config.use_cuda_graph
    both = graphs if isinstance(graphs, (tuple, list)) else (graphs, graphs)
    valid = graphs is None or (len(both) == 2 and all(isinstance(each, bool) for each in both))
    check("use_cuda_graph", graphs, valid, "True, False, None or a pair of these two")


def _is(kind: type, value: Any, least: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value >= least


def stated_page_size(config: ContinuousBatchingConfig) -> int:
    return config.page_size if hasattr(config, "page_size") else config.block_size  # 5.17 has only `block_size`


def resolve_engine(
    loan: ModelLoan,
    shapes: Mapping[Place, LayerShape],
    batching: ContinuousBatchingConfig,
    own: AsyncBatchingConfig,
    workload: Workload,
) -> EngineSettings:
    """Choose every size that the user has not.

    The cache gets the memory that the workload can use, at most `max_memory_percent` of what is free (default: 0.9 on
    CUDA, where `torch.cuda.set_per_process_memory_fraction` counts too; half elsewhere). `num_blocks` counts blocks of
    the page size stated beside it: the capacity in tokens is the user's, whatever page size runs.

    Raises:
        ValueError: there is no memory for a single page.
    """
    device = loan.device
    cuda = device.type == "cuda"
    position_limit, _ = loan.position_limit()
    stated = stated_page_size(batching)
    page_size = PAGE_SIZE if stated == THEIR_PAGE_SIZE else stated
    # The text model's stated maximum is no limit where positions are computed, but nobody means to go far beyond.
    longest = max(loan.stated_positions or 0, workload.longest)
    layout = PageLayout.of(shapes, page_size, longest)
    row_limit = batching.max_requests_per_batch or (1024 if cuda else 256)
    token_budget = batching.max_batch_tokens or max(2048 if cuda else 512, row_limit)
    row_limit = min(row_limit, token_budget)
    page_bytes = layout.page_bytes
    if batching.num_blocks is not None:
        pages = page_limit = layout.pages_for(batching.num_blocks * stated)
    else:
        page_limit = _free_bytes(device, batching.max_memory_percent) // page_bytes
        if not cuda and not workload.tokens:
            page_limit = min(page_limit, max(1, 2**31 // page_bytes))
        if page_limit < 1:
            raise ValueError(f"no memory for the cache: a page of {page_size} tokens takes {page_bytes:,} bytes")
        _, pages = workload.sizes(1, page_limit, token_budget, layout)
    rows = min(workload.sizes(row_limit, page_limit, token_budget, layout)[0], pages)
    room = layout.longest(pages) or longest
    longest = min(longest, room) if longest else room or pages * page_size
    columns = -(-longest // page_size)
    graphs, in_place = batching.use_cuda_graph, not loan.placement.offloaded
    return EngineSettings(
        page_size=page_size,
        layout=layout,
        pages=pages,
        page_limit=page_limit,
        rows=rows,
        row_limit=row_limit,
        token_budget=token_budget,
        columns=columns,
        max_tokens=min(columns * page_size, position_limit or columns * page_size),
        host_pages=_host_pages(batching, page_bytes),
        reserve=batching.safety_margin or 0.0,
        backend=(backend := choose_backend(own.attention_backend, device)),
        fused=in_place and loan.autocast is None and (cuda if own.fuse_projections is None else own.fuse_projections),
        compiled=in_place and (cuda if own.compile_layers is None else own.compile_layers),
        graphs=in_place and cuda and backend != "reference" and graphs not in (False, (False, False), [False, False]),
        logprobs=batching.return_logprobs,
        reuse=batching.allow_block_sharing,
        overlap=own.overlap and batching.use_async_batching is not False,
        debug=own.debug,
    )


def _host_pages(batching: ContinuousBatchingConfig, page_bytes: int) -> int:
    """Pages that fit in the host memory the user gives, within the share of what is available that is safe."""
    space, share = batching.cpu_offload_space, batching.cpu_offload_space_safety_threshold
    if space == 0:
        return 0
    safe = int(psutil.virtual_memory().available * share)
    wanted = safe if space is None else int(space * 2**30)
    if wanted > safe:
        logger.warning(
            f"cpu_offload_space={space} GiB is more than {share:.0%} of the host memory that is available: it becomes "
            f"{safe / 2**30:.1f} GiB"
        )
        wanted = safe
    if wanted < page_bytes:
        logger.warning(f"cpu_offload_space={space} GiB has no room for a page of {page_bytes:,} bytes: it is off")
    return wanted // page_bytes


def _free_bytes(device: torch.device, share: float | None) -> int:
    if device.type == "cuda":
        return int(free_memory(device) * (0.9 if share is None else share))
    return int(psutil.virtual_memory().available * (0.5 if share is None else share))
