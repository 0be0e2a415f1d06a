"""What a request's settings do to its logits before a token is picked: penalties, biases, bans."""

from __future__ import annotations

import torch

from ..gpu import runs_triton
from . import reference
from .settings import LOGITS_FIELDS, OWN_LOGITS_FIELDS, LogitsSettings
from .shaping import SHAPING_WORDS, Listed, Rule, Shaping, Tables


__all__ = [
    "LOGITS_FIELDS", "OWN_LOGITS_FIELDS", "SHAPING_WORDS", "Listed", "LogitsSettings", "Rule", "Shaping", "Tables",
    "shape",
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
