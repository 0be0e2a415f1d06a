"""What an engine was built with, and why: for the log and the doctor."""

from __future__ import annotations

from typing import NamedTuple

from transformers import ContinuousBatchingConfig

from .config import AsyncBatchingConfig
from .gpu import triton_error
from .groups import PageGroup
from .model import ModelLoan
from .runner import row_buckets, token_buckets
from .settings import THEIR_PAGE_SIZE, EngineSettings, Workload, stated_page_size
from .states import Kept


_FETCHED = "accelerate fetches weights when they are needed"


class Choice(NamedTuple):
    """One of the settings: what it is called, what was chosen, and why or by which setting of the user's."""

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value} ({self.reason})"


def explain(
    settings: EngineSettings,
    loan: ModelLoan,
    batching: ContinuousBatchingConfig,
    own: AsyncBatchingConfig,
    workload: Workload,
) -> list[Choice]:
    """Why `resolve_engine` chose what it did, given the same."""
    cuda = loan.device.type == "cuda"
    return [
        _cache(settings, batching, workload, cuda),
        _pages(settings, batching),
        _requests(settings, batching, workload),
        Choice(
            "tokens a step",
            f"up to {settings.token_budget:,}",
            "max_batch_tokens, as set"
            if batching.max_batch_tokens
            else f"the default on {'CUDA' if cuda else 'a CPU'}, or one for each request",
        ),
        _sizes(settings, cuda),
        _attention(settings, own, cuda),
        Choice("graphs", _on(settings.graphs), _why_graphs(settings, loan, batching)),
        Choice("compiled layers", _on(settings.compiled), _why(loan, own.compile_layers, "compile_layers")),
        Choice("joined projections", _on(settings.fused), _why_fused(loan, own)),
        Choice(
            "shared prefixes", _on(settings.reuse),
            "the default" if settings.reuse else "allow_block_sharing=False, as set",
        ),
        Choice("overlap", _on(settings.overlap), _why_overlap(settings, own)),
    ]  # fmt: skip


def explain_sequential(
    settings: EngineSettings,
    why: str,
    batching: ContinuousBatchingConfig,
    own: AsyncBatchingConfig,
    workload: Workload,
) -> list[Choice]:
    """The same for an engine that runs one sequence at a time; `why` is what a model on pages would lack."""
    return [
        Choice("sequences", settings.mode.value, why),
        Choice("cache", f"{settings.pages * settings.page_size:,} tokens", "num_blocks, or what there is memory for"),
        _requests(settings, batching, workload),
        Choice("overlap", _on(settings.overlap), _why_overlap(settings, own)),
    ]


def explain_states(
    settings: EngineSettings,
    kept: Kept,
    why: str,
    batching: ContinuousBatchingConfig,
    own: AsyncBatchingConfig,
    workload: Workload,
) -> list[Choice]:
    """The same for an engine that keeps a state for each row."""
    cuda = kept.device.type == "cuda"
    choices = [
        Choice("sequences", settings.mode.value, why),
        Choice(
            "states", f"{kept.bytes / 2**20:.2f} MiB a row, {settings.rows * kept.bytes / 2**30:.2f} GiB",
            "as many as there are rows",
        ),
        _requests(settings, batching, workload),
        Choice(
            "prompts", "in one piece" if settings.whole_prompts else f"up to {settings.token_budget:,} tokens a step",
            "the model begins a prompt, but goes on with one token at a time" if settings.whole_prompts
            else "the model goes on from a state with any number of tokens",
        ),
        Choice("overlap", _on(settings.overlap), _why_overlap(settings, own)),
    ]  # fmt: skip
    if kept.shapes:
        choices[1:1] = [
            _cache(settings, batching, workload, cuda), _attention(settings, own, cuda)
        ]  # fmt: skip
    return choices


def _cache(
    settings: EngineSettings,
    batching: ContinuousBatchingConfig,
    workload: Workload,
    cuda: bool,
) -> Choice:
    layout = settings.layout
    gib = settings.pages * layout.page_bytes / 2**30
    room = f"{layout.capacity(settings.pages, settings.max_tokens):,} tokens"
    spans = [group.window or group.chunk for group in layout.groups if not group.keeps_all]
    if spans:
        short = layout.capacity(settings.pages, min(spans))
        room += f" in requests of {settings.max_tokens:,}, {short:,} in those of {min(spans):,}"
    if batching.num_blocks is not None:
        reason = "num_blocks, as set"
    elif settings.pages < settings.page_limit:
        reason = "what these requests can use"
    elif not cuda and not workload.tokens and batching.max_memory_percent is None:
        reason = "2 GiB on a CPU, or half of the free memory"
    else:
        share = (0.9 if cuda else 0.5) if batching.max_memory_percent is None else batching.max_memory_percent
        reason = f"{share:.0%} of the free memory"
    return Choice("cache", f"{room}, {gib:.2f} GiB", reason)


def _pages(settings: EngineSettings, batching: ContinuousBatchingConfig) -> Choice:
    sizes = [f"{group.page_size} tokens{_of_group(group)}" for group in settings.layout.groups]
    reason = "the default" if stated_page_size(batching) == THEIR_PAGE_SIZE else "page_size, as set"
    return Choice("pages", f"of {' or '.join(sizes)}", reason)


def _of_group(group: PageGroup) -> str:
    if group.keeps_all:
        return ""
    return " in layers with " + (f"a window of {group.window:,}" if group.window else f"chunks of {group.chunk:,}")


def _requests(settings: EngineSettings, batching: ContinuousBatchingConfig, workload: Workload) -> Choice:
    if settings.rows < settings.row_limit:
        reason = "as many as there are" if workload.requests == settings.rows else "a page for each"
    elif batching.max_requests_per_batch:
        reason = "max_requests_per_batch, as set"
    else:
        reason = "the default"
    return Choice("requests at once", f"up to {settings.rows:,}", reason)


def _sizes(settings: EngineSettings, cuda: bool) -> Choice:
    if not cuda:
        return Choice("sizes of steps", "as they come", "nothing is captured on a CPU")
    decode, mixed = len(row_buckets(settings.rows)), len(token_buckets(settings.token_budget))
    return Choice(
        "sizes of steps", f"{decode} for decoding, {mixed} with prompts", "at most an eighth of a step is padding"
    )


def _attention(settings: EngineSettings, own: AsyncBatchingConfig, cuda: bool) -> Choice:
    if own.attention_backend != "auto":
        reason = "attention_backend, as set"
    elif settings.backend == "triton":
        reason = "the model is on CUDA, and triton is there"
    else:
        reason = f"triton cannot be imported: {triton_error()}" if cuda else "triton needs a CUDA device"
    return Choice("attention", settings.backend, reason)


def _why_graphs(settings: EngineSettings, loan: ModelLoan, batching: ContinuousBatchingConfig) -> str:
    if settings.graphs:
        return "the default on CUDA"
    if loan.device.type != "cuda":
        return "CUDA has them"
    if loan.placement.offloaded:
        return _FETCHED
    return (
        "the reference attention cannot be captured" if settings.backend == "reference" else "use_cuda_graph, as set"
    )


def _why_overlap(settings: EngineSettings, own: AsyncBatchingConfig) -> str:
    if settings.overlap:
        return "the default: the host prepares a step while the one before computes"
    return "use_async_batching=False, as set" if own.overlap else "overlap=False, as set"


def _why_fused(loan: ModelLoan, own: AsyncBatchingConfig) -> str:
    if loan.autocast is not None:
        return "torch.autocast casts weights at each use"
    return _why(loan, own.fuse_projections, "fuse_projections")


def _why(loan: ModelLoan, value: bool | None, name: str) -> str:
    if loan.placement.offloaded:
        return _FETCHED
    if value is not None:
        return f"{name}={value}, as set"
    return "the default on CUDA" if loan.device.type == "cuda" else "the default on a CPU"


def _on(value: bool) -> str:
    return "on" if value else "off"
