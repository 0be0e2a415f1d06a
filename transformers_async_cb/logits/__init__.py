"""What is done to logits before a token is picked: penalties, biases and bans, then a user's own processors, then the
mask of a grammar."""

from __future__ import annotations

import torch

from ..gpu import runs_triton
from . import reference
from .custom import Call, Processor, Processors
from .settings import LOGITS_FIELDS, OWN_LOGITS_FIELDS, LogitsSettings
from .shaping import SHAPING_WORDS, Listed, Rule, Shaping, Tables


__all__ = [
    "LOGITS_FIELDS", "OWN_LOGITS_FIELDS", "SHAPING_WORDS", "Call", "Listed", "LogitsSettings", "Processor",
    "Processors", "Rule", "Shaping", "Tables", "mask", "shape",
]  # fmt: skip


def shape(
    logits: torch.Tensor, tables: Tables, shaped: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor
) -> None:
    """Shape the logits of some sequences, in place: by a Triton kernel on CUDA where triton is installed, by the
    reference elsewhere, which waits for the device.

    Each rule reads a logit as float32 and writes it in its own dtype.

    Args:
        logits (`torch.Tensor`): `[B, V]`, any float dtype; written.
        tables (`Tables`): of all rows.
        shaped (`torch.Tensor`): int32 `[B]`, the sequences to shape, then -1.
        rows (`torch.Tensor`): int32 `[B]`, of the sequences.
        lengths (`torch.Tensor`): int32 `[B]`, tokens of each so far.
    """
    if runs_triton(logits):
        from . import triton

        return triton.shape(logits, tables, shaped, rows, lengths)
    return reference.shape(logits, tables, shaped, rows, lengths)


def mask(logits: torch.Tensor, masked: torch.Tensor, masks: torch.Tensor) -> None:
    """Set the logits of all tokens that a mask leaves out to -inf, in place: by a Triton kernel on CUDA where triton
    is installed, by the reference elsewhere, which waits for the device.

    Args:
        logits (`torch.Tensor`): `[B, V]`, any float dtype; written.
        masked (`torch.Tensor`): int32 `[M]`, the sequences to mask, then -1.
        masks (`torch.Tensor`): int32 `[M, words]`, a bit for each token that may come, the lowest bit first. Tokens
            that have none may not.
    """
    if runs_triton(logits):
        from . import triton

        return triton.mask(logits, masked, masks)
    return reference.mask(logits, masked, masks)
