"""Attention over the paged cache: what transformers calls, and the one custom op behind it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from . import reference


NAME = "async_batching"

# Keyword arguments that a model may hand to its attention function without asking for anything we do not do.
_HARMLESS = frozenset({
    "cache_position", "dropout", "is_causal", "logits_to_keep", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "past_key_values", "position_embeddings", "position_ids", "return_dict", "scaling",
    "sliding_window", "use_cache",
})  # fmt: skip


class Step(NamedTuple):
    """What attention must know of a step: `T` packed tokens of `B` sequences, all int32 on the model's device.

    Padding tokens belong to the padding row, whose page table is all padding page; padding sequences have length 0.
    """

    page_table: torch.Tensor  # [rows + 1, columns]
    token_rows: torch.Tensor  # [T] row of each token
    positions: torch.Tensor  # [T] position in its sequence of each token
    rows: torch.Tensor  # [B] row of each sequence
    query_starts: torch.Tensor  # [B + 1] first token of each sequence
    lengths: torch.Tensor  # [B] tokens in the cache after this step
    decode_only: bool  # one token a sequence


class LayerShape(NamedTuple):
    """What the cache needs to know of one attention layer."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class StepHolder:
    """Where the layers of one model find the current step, and which thread may run it."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.thread: int | None = None

    def __enter__(self) -> StepHolder:
        self.thread = threading.get_ident()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread = self.step = None


@dataclass(slots=True)
class PagedLayer:
    """Keys and values of one attention layer. Two storages: views of one would make a compiler copy the pool."""

    key_pages: torch.Tensor  # [pages, page_size, kv_heads, key_dim]
    value_pages: torch.Tensor  # [pages, page_size, kv_heads, value_dim]
    holder: StepHolder
    backend: str

    ATTRIBUTE = "_async_batching_layer"


class LayerProbe:
    """Stands in for the cache during one forward, and notes the shape of each attention layer that asks for it."""

    def __init__(self) -> None:
        self.shapes: dict[nn.Module, LayerShape] = {}

    def note(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if module in self.shapes:
            raise NotImplementedError(f"{type(module).__name__} attends more than once in a forward pass")
        if query.shape[1] % key.shape[1]:
            raise NotImplementedError(
                f"{type(module).__name__} has {query.shape[1]} query heads for {key.shape[1]} key heads"
            )
        self.shapes[module] = LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The function registered with `AttentionInterface`.

    Args:
        query (`torch.Tensor`): `[1, heads, T, key_dim]`.
        key (`torch.Tensor`): `[1, kv_heads, T, key_dim]`.
        value (`torch.Tensor`): `[1, kv_heads, T, value_dim]`.

    Returns:
        `[1, T, heads, value_dim]`, and no weights.
    """
    layer = getattr(module, PagedLayer.ATTRIBUTE, None)
    if isinstance(layer, LayerProbe):
        _refuse_unknown(module, attention_mask, kwargs)
        return layer.note(module, query, key, value), None
    if layer is None or layer.holder.thread != threading.get_ident():
        raise RuntimeError(
            "this model is generating with async_batching and cannot be called from elsewhere meanwhile: stop the "
            "manager first"
        )
    step = layer.holder.step
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = paged_attention(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
        layer.key_pages, layer.value_pages, *step, scaling, sliding_window or 0, layer.backend,
    )  # fmt: skip
    return out[None], None


def _refuse_unknown(module: nn.Module, attention_mask: torch.Tensor | None, kwargs: dict[str, object]) -> None:
    """A model that asks its attention function for something we do not do must not get a wrong answer."""
    unknown = sorted(name for name, value in kwargs.items() if name not in _HARMLESS and value is not None)
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if kwargs.get("is_causal") is False:
        unknown.append("attention that is not causal")
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} asks attention for {', '.join(unknown)}")


@torch.library.custom_op(
    "transformers_async_cb::paged_attention", mutates_args=("key_pages", "value_pages"), device_types=None
)
def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    token_rows: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    decode_only: bool,
    scaling: float,
    sliding_window: int,
    backend: str,
) -> torch.Tensor:
    """Write the keys and values of `T` packed tokens to their pages, then attend causally over each sequence.

    Args:
        query (`torch.Tensor`): `[T, heads, key_dim]`.
        key (`torch.Tensor`): `[T, kv_heads, key_dim]`; each key head serves `heads / kv_heads` query heads.
        value (`torch.Tensor`): `[T, kv_heads, value_dim]`.
        key_pages (`torch.Tensor`), value_pages (`torch.Tensor`): see `PagedLayer`; written.
        page_table ... decode_only: see `Step`.
        scaling (`float`): factor on the scores.
        sliding_window (`int`): each token attends to so many, itself included; 0 for all before it.
        backend (`str`): `"reference"` or `"triton"`.

    Returns:
        `[T, heads, value_dim]`; what padding tokens get is not defined.
    """
    if backend == "triton":
        from . import triton as implementation
    else:
        implementation = reference
    step = Step(page_table, token_rows, positions, rows, query_starts, lengths, decode_only)
    implementation.write_pages(key, value, key_pages, value_pages, step)
    return implementation.attend(query, key_pages, value_pages, step, scaling, sliding_window)


@paged_attention.register_fake
def _(query, key, value, key_pages, value_pages, *_):
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def choose_backend(wanted: str, device: torch.device) -> str:
    """The backend for `device`. Raises `ValueError` if the one that is wanted cannot run there."""
    if wanted == "auto":
        return "triton" if device.type == "cuda" and _triton_error() is None else "reference"
    if wanted == "triton":
        if device.type != "cuda":
            raise ValueError(f"attention_backend='triton' needs a CUDA device, the model is on {device}")
        if (error := _triton_error()) is not None:
            raise ValueError(f"attention_backend='triton' needs the triton package: {error}")
    return wanted


def _triton_error() -> ImportError | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return error
    return None


AttentionInterface.register(NAME, attention_forward)
