"""What a request gives the model beside its settings and the tokens that it goes on from: images, features, the prompt
of an encoder."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel


# Arguments of a model's forward that are the engine's to give, or settings.
_NOT_INPUTS = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "logits_to_keep", "return_dict",
    "encoder_outputs", "decoder_inputs_embeds", "decoder_attention_mask", "decoder_position_ids", "cache_position",
    "past_key_values", "cache_params", "past_buckets_states", "mems", "state", *vars(GenerationConfig()),
}  # fmt: skip


def input_names(model: PreTrainedModel) -> frozenset[str]:
    """What a request may give the model as keyword arguments: those of its forward that are its inputs."""
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset(p.name for p in parameters if p.kind != p.VAR_KEYWORD) - _NOT_INPUTS


def has_own_generate(model: PreTrainedModel) -> bool:
    """Whether its `generate` is another than that of all models, and may do what is not seen from within: switch
    adapters, run another model, change the answer."""
    return type(model).generate is not GenerationMixin.generate


class ModelInputs:
    """Those of one request, copied to the CPU: the caller may change theirs.

    Args:
        values (`Mapping`): keyword arguments of `generate`, tensors and arrays among them.
        encoder_ids (`np.ndarray`, *optional*): int32 `[n]`, what an encoder reads. The request's own tokens are the
            decoder's then.

    Attributes:
        error (`str`, *optional*): what came of computing with them, if that failed.
    """

    def __init__(self, values: Mapping[str, Any], encoder_ids: np.ndarray | None = None) -> None:
        self._values = _each(dict(values), _on_cpu)
        self.encoder_ids = encoder_ids
        self.error: str | None = None

    @property
    def names(self) -> list[str]:
        return sorted(self._values)

    def __repr__(self) -> str:
        """The same for the same inputs, in every process."""
        digest = hashlib.blake2b(digest_size=16)

        def feed(value: Any) -> None:
            if isinstance(value, torch.Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
            else:
                digest.update(repr(value).encode())

        for name in self.names:
            digest.update(name.encode())
            _each(self._values[name], feed)
        feed(None if self.encoder_ids is None else self.encoder_ids.tolist())
        return f"ModelInputs({digest.hexdigest()})"

    def on(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of `generate`, tensors on `device`; the encoder's prompt among them."""
        values = dict(self._values)
        if self.encoder_ids is not None:
            values["input_ids"] = torch.from_numpy(self.encoder_ids.astype(np.int64))[None]
            values["attention_mask"] = torch.ones_like(values["input_ids"])
        return _each(values, lambda value: value.to(device) if isinstance(value, torch.Tensor) else value)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value`, with all that is in its lists and dictionaries changed."""
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each(part, change) for part in value)
    return change(value)
