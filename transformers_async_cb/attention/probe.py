"""What a borrowed model asks of attention: seen in a trial run in which attention answers zero."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from . import ON_LOAN, LayerShape, Place


NAME = "async_batching_probe"

# Keyword arguments that a model may hand to its attention function without asking for anything we do not do.
_HARMLESS = frozenset({
    "cache_position", "dropout", "is_causal", "logits_to_keep", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "position_ids",
    "return_dict", "scaling", "softcap", "use_cache",
})  # fmt: skip


class Probe:
    """What one forward pass under `NAME` showed.

    Attributes:
        shapes (`dict`): of each call of attention, in the order they came.
        inputs (`list`): queries, keys and values of the last token, `[heads, dim]`, of each call.
    """

    def __init__(self) -> None:
        self.shapes: dict[Place, LayerShape] = {}
        self.inputs: list[torch.Tensor] = []
        self._turns: Counter[nn.Module] = Counter()
        self._sources: dict[tuple, Place] = {}
        self._masks: list[tuple[torch.Tensor, Callable, PreTrainedConfig | None]] = []

    def mask(
        self, mask_function: Callable, tokens: int, device: torch.device, config: PreTrainedConfig | None
    ) -> torch.Tensor:
        """A stand-in for the mask that `mask_function` describes, known again by its identity."""
        mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bool, device=device)
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
        s_aux: torch.Tensor | None,
        others: dict[str, object],
    ) -> torch.Tensor:
        name = type(module).__name__
        unknown = sorted(k for k, v in others.items() if k not in _HARMLESS and v is not None)
        if unknown:
            raise NotImplementedError(f"{name} asks attention for {', '.join(unknown)}")
        if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise NotImplementedError(f"{name} asks for attention that is not causal")
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % kv_heads:
            raise NotImplementedError(f"{name} has {heads} query heads for {kv_heads} key heads")
        if s_aux is not None and s_aux.shape != (heads,):
            raise NotImplementedError(f"{name} has sinks of the shape {list(s_aux.shape)}, not one for each head")
        window, chunk = sliding_window or 0, 0
        if attention_mask is not None:
            window, chunk = self._span(name, attention_mask, window)
        place = Place(module, self._turns[module])
        self._turns[module] += 1
        kind = key.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else key.dtype
        tensors = tuple((x.data_ptr(), x.shape, x.stride()) for x in (key, value))
        source = self._sources.setdefault(tensors, place)
        self.shapes[place] = LayerShape(
            kv_heads, key.shape[3], value.shape[3], dtype, window, chunk, None if source == place else source
        )
        self.inputs += [x[0, :, -1] for x in (query, key, value)]  # views: nobody else gets their memory meanwhile
        return query.new_zeros(query.shape[0], query.shape[2], heads, value.shape[3], dtype=dtype)

    def _span(self, name: str, mask: torch.Tensor, window: int) -> tuple[int, int]:
        """The window and the chunk that make a causal mask this one: `window`, where the layer states it, or else a
        number of the config's. Masks are looked at where those of other kinds would differ."""
        known = next((entry for entry in self._masks if entry[0] is mask), None)
        if known is None:
            raise NotImplementedError(f"{name} asks for a mask of its own")
        _, mask_function, config = known
        stated = {v for v in vars(config).values() if type(v) is int and 0 < v < 2**20} if config else set()
        corners = {*stated, *range(48), *(2**i for i in range(6, 18)), window}
        at = torch.tensor(sorted({c + d for c in corners for d in (-1, 0, 1) if c + d >= 0}), device=mask.device)
        query, key = at[:, None], at[None, :]
        zero = torch.zeros((), dtype=torch.long, device=mask.device)
        try:
            found = mask_function(zero, zero, query, key).expand(len(at), len(at))
        except Exception as error:
            raise NotImplementedError(f"{name} asks for a mask that depends on its inputs") from error
        spans = [(window, 0)]
        if not window:
            spans += [span for size in sorted(stated) for span in ((size, 0), (0, size))]
        for span in spans:
            reach, chunk = span
            first = query - reach + 1 if reach else query // chunk * chunk if chunk else 0
            if torch.equal(found, (key <= query) & (key >= first)):
                return span
        kind = f"the window of {window} that it states" if window else "causal attention, in windows or chunks"
        raise NotImplementedError(f"{name} asks for a mask that is not {kind}")


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
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    return _current().attend(module, query, key, value, attention_mask, sliding_window, s_aux, others), None


def _mask(
    *_: object,
    q_length: int,
    mask_function: Callable,
    device: torch.device | None = None,
    config: PreTrainedConfig | None = None,
    **__: object,
) -> torch.Tensor:
    return _current().mask(mask_function, q_length, device or torch.device("cpu"), config)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
