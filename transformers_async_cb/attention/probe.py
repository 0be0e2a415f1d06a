"""What a borrowed model asks of attention: seen in a trial run in which attention answers zero."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from . import ON_LOAN, LayerShape


NAME = "async_batching_probe"

# Keyword arguments that a model may hand to its attention function without asking for anything we do not do.
_HARMLESS = frozenset({
    "cache_position", "dropout", "is_causal", "logits_to_keep", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "position_ids",
    "return_dict", "scaling", "sliding_window", "use_cache",
})  # fmt: skip


class Probe:
    """What one forward pass under `NAME` showed.

    Attributes:
        shapes (`dict`): of each module that attended.
        windows (`list`): sliding window of each, 0 for none, in the order they came.
        inputs (`list`): queries, keys and values of the last token, `[heads, dim]`, in the order they came.
    """

    def __init__(self) -> None:
        self.shapes: dict[nn.Module, LayerShape] = {}
        self.windows: list[int] = []
        self.inputs: list[torch.Tensor] = []
        self._masks: list[tuple[torch.Tensor, Callable, PreTrainedConfig | None]] = []

    def mask(self, mask_function: Callable, device: torch.device, config: PreTrainedConfig | None) -> torch.Tensor:
        """A stand-in for the mask that `mask_function` describes, known again by its identity."""
        mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool, device=device)
        self._masks.append((mask, mask_function, config))
        return mask

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sliding_window: int | None,
        others: dict[str, object],
    ) -> torch.Tensor:
        name = type(module).__name__
        unknown = sorted(k for k, v in others.items() if k not in _HARMLESS and v is not None)
        if unknown:
            raise NotImplementedError(f"{name} asks attention for {', '.join(unknown)}")
        if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise NotImplementedError(f"{name} asks for attention that is not causal")
        if attention_mask is not None:
            self._check_mask(name, attention_mask, sliding_window or 0)
        if module in self.shapes:
            raise NotImplementedError(f"{name} attends more than once in a forward pass")
        if query.shape[1] % key.shape[1]:
            raise NotImplementedError(f"{name} has {query.shape[1]} query heads for {key.shape[1]} key heads")
        self.shapes[module] = LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype)
        self.windows.append(sliding_window or 0)
        self.inputs += [x[0, :, -1] for x in (query, key, value)]
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    def _check_mask(self, name: str, mask: torch.Tensor, window: int) -> None:
        """The mask must be causal, within the layer's window: looked at where masks of other kinds would differ."""
        known = next((entry for entry in self._masks if entry[0] is mask), None)
        if known is None:
            raise NotImplementedError(f"{name} asks for a mask of its own")
        _, mask_function, config = known
        corners = {v for v in vars(config).values() if type(v) is int and 0 < v < 2**20} if config else set()
        corners |= {*range(48), *(2**i for i in range(6, 18)), window}
        at = torch.tensor(sorted({c + d for c in corners for d in (-1, 0, 1) if c + d >= 0}), device=mask.device)
        query, key = at[:, None], at[None, :]
        expected = (key <= query) & ((key > query - window) if window else torch.ones_like(key, dtype=torch.bool))
        zero = torch.zeros((), dtype=torch.long, device=mask.device)
        try:
            found = mask_function(zero, zero, query, key).expand_as(expected)
        except Exception as error:
            raise NotImplementedError(f"{name} asks for a mask that depends on its inputs") from error
        if not torch.equal(found, expected):
            kind = f"a window of {window}" if window else "causal attention"
            raise NotImplementedError(f"{name} asks for a mask that is more than {kind}")


class _Probing(threading.local):
    probe: Probe | None = None


_probing = _Probing()


@contextmanager
def probing() -> Generator[Probe]:
    """Within, forward passes on this thread of a model whose attention is `NAME` are noted."""
    _probing.probe = Probe()
    try:
        yield _probing.probe
    finally:
        _probing.probe = None


def _current() -> Probe:
    if _probing.probe is None:
        raise RuntimeError(ON_LOAN)
    return _probing.probe


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    return _current().attend(module, query, key, value, attention_mask, sliding_window, others), None


def _mask(
    *_: object, mask_function: Callable, device: torch.device | None = None, config: PreTrainedConfig | None = None,
    **__: object,
) -> torch.Tensor:  # fmt: skip
    return _current().mask(mask_function, device or torch.device("cpu"), config)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
