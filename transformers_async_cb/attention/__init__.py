"""Attention over the paged cache: what transformers calls, and the one custom op behind it."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from ..gpu import triton_error
from . import reference


NAME = "async_batching"


class Step(NamedTuple):
    """What attention must know of a step: `T` packed tokens of `B` sequences, all int32 on the model's device.

    Padding tokens belong to the padding row, whose page table is all padding page; padding sequences have length 0.
    """

    page_table: torch.Tensor  # [rows + 1, columns] of the group whose layer computes
    token_rows: torch.Tensor  # [T] row of each token
    positions: torch.Tensor  # [T] position in its sequence of each token
    rows: torch.Tensor  # [B] row of each sequence
    query_starts: torch.Tensor  # [B + 1] first token of each sequence
    lengths: torch.Tensor  # [B] tokens in the cache after this step
    counts: torch.Tensor  # [2] sequences that decode, and come first; sequences that are not padding
    work: torch.Tensor  # [W] see `inputs.share_out`
    counters: torch.Tensor  # [B * kv_heads or more] zeros that kernels count in, and leave zero
    decode_only: bool  # one token a sequence


class Place(NamedTuple):
    """A place in the forward pass where attention is called: nearly always, one for each module that attends."""

    module: nn.Module
    turn: int  # how often the module has attended before in the same pass


class LayerShape(NamedTuple):
    """What the cache needs to know of one attention layer."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int = 0  # a token attends to so many, itself included; 0: to all before it
    chunk: int = 0  # a token attends to those from the last multiple of this on; 0: to all before it
    source: Place | None = None  # an earlier one with the very same keys and values, whose pages serve for both

    @property
    def bytes_per_token(self) -> int:
        """That it attends to."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class PagedLayer(NamedTuple):
    """Keys and values of one attention layer. Two storages: views of one would make a compiler copy the pool."""

    key_pages: torch.Tensor  # [pages, page_size, kv_heads, key_dim]
    value_pages: torch.Tensor  # [pages, page_size, kv_heads, value_dim]
    group: int = 0  # whose page table it is found by


class Attached(NamedTuple):
    """What a call of attention finds at its module."""

    key_pages: torch.Tensor
    value_pages: torch.Tensor
    group: int
    window: int
    chunk: int


# What a thread of the user's is told that calls the model meanwhile.
ON_LOAN = (
    "this model is generating with async_batching and cannot be called from elsewhere meanwhile: "
    "stop the manager first"
)

# Where the module that attends finds an `Attached` for each of its turns, and counts these if there are several.
ATTRIBUTE = "_async_batching_layers"
TURN = "_async_batching_turn"


class _Computing(threading.local):
    """The step this thread computes, and how. A thread of the user's finds none here."""

    steps: Sequence[Step] | None = None
    backend: ModuleType | None = None


_computing = _Computing()


@contextmanager
def computing(steps: Sequence[Step], backend: str) -> Generator[None]:
    """Within, calls of the borrowed model on this thread compute a step, which differs by page table for each group
    of layers."""
    if backend == "triton":
        from . import triton as implementation
    else:
        implementation = reference
    _computing.steps, _computing.backend = steps, implementation
    try:
        yield
    finally:
        _computing.steps = _computing.backend = None


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The function registered with `AttentionInterface`.

    What else a model may hand over, `probe.py` has looked at: nothing here is ignored that matters. Windows and chunks
    are what it found the model's masks to be.

    Args:
        query (`torch.Tensor`): `[1, heads, T, key_dim]`, or `[B, heads, n, key_dim]` of sequences with as many tokens
            each.
        key (`torch.Tensor`): `[1, kv_heads, T, key_dim]`, or `[B, kv_heads, n, key_dim]`.
        value (`torch.Tensor`): `[1, kv_heads, T, value_dim]`, or `[B, kv_heads, n, value_dim]`.
        softcap (`float`, *optional*): see `paged_attention`.
        s_aux (`torch.Tensor`, *optional*): the sinks, see `paged_attention`.

    Returns:
        `[1, T, heads, value_dim]`, or `[B, n, heads, value_dim]`, and no weights.
    """
    turns = getattr(module, ATTRIBUTE, None)
    if turns is None:
        raise RuntimeError(ON_LOAN)
    attached = turns[0]
    if len(turns) > 1:
        turn = getattr(module, TURN)
        setattr(module, TURN, (turn + 1) % len(turns))
        attached = turns[turn]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    dtype = attached.key_pages.dtype  # autocast's where that is on, as for torch's own attention
    out = paged_attention(
        *(x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value)),
        attached.key_pages, attached.value_pages, scaling, attached.group, attached.window, attached.chunk,
        softcap or 0.0, s_aux,
    )  # fmt: skip
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def current_step(group: int = 0) -> tuple[Step, ModuleType]:
    """The step that the calling thread computes, for a group of layers, and the backend. Raises `RuntimeError` if it
    computes none."""
    if _computing.steps is None:
        raise RuntimeError(ON_LOAN)
    return _computing.steps[group], _computing.backend


@torch.library.custom_op("transformers_async_cb::paged_attention", mutates_args=("key_pages", "value_pages"))
def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    scaling: float,
    group: int = 0,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the keys and values of `T` packed tokens to their pages, then attend causally over each sequence.

    Which tokens these are, the step says that the calling thread computes: as arguments, the shapes of its tensors
    would be among what a compiled layer is specialised for.

    Args:
        query (`torch.Tensor`): `[T, heads, key_dim]`.
        key (`torch.Tensor`): `[T, kv_heads, key_dim]`; each key head serves `heads / kv_heads` query heads.
        value (`torch.Tensor`): `[T, kv_heads, value_dim]`.
        key_pages (`torch.Tensor`), value_pages (`torch.Tensor`): see `PagedLayer`; written.
        scaling (`float`): factor on the scores.
        group (`int`): of the layer, whose page table counts.
        window (`int`): each token attends to so many, itself included; 0 for all before it.
        chunk (`int`): each token attends to those from the last multiple of this on; 0 for all before it. Not both.
        softcap (`float`): bound on the scores, which become `softcap * tanh(score / softcap)`; 0 for none.
        sinks (`torch.Tensor`, *optional*): `[heads]`, a score for each head that takes its share of the weights and
            adds nothing (https://arxiv.org/abs/2309.17453).

    Returns:
        `[T, heads, value_dim]`; what padding tokens get is not defined.

    Raises:
        RuntimeError: the calling thread computes no step.
    """
    step, backend = current_step(group)
    return backend.attend(query, key, value, key_pages, value_pages, step, scaling, window, chunk, softcap, sinks)


@paged_attention.register_fake
def _(query, key, value, *_):
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def choose_backend(wanted: str, device: torch.device) -> str:
    """The backend for `device`. Raises `ValueError` if the one that is wanted cannot run there."""
    if wanted == "auto":
        return "triton" if device.type == "cuda" and triton_error() is None else "reference"
    if wanted == "triton":
        if device.type != "cuda":
            raise ValueError(f"attention_backend='triton' needs a CUDA device, the model is on {device}")
        if (error := triton_error()) is not None:
            raise ValueError(f"attention_backend='triton' needs the triton package: {error}")
    return wanted


AttentionInterface.register(NAME, attention_forward)
