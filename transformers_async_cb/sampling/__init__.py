"""From logits to token ids, on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..gpu import runs_triton
from . import reference
from .truncation import TRUNCATED_WORDS, truncate


__all__ = ["PARAMETER_WORDS", "TRUNCATED_WORDS", "Flavour", "Parameters", "pick", "truncate"]


# One word each of a row's sampling parameters; temperature, top-p and min-p are float32 bits.
PARAMETER_WORDS = 6


class Flavour(NamedTuple):
    """What the rows of a step need: what nobody needs is not computed."""

    sampled: bool = False
    filtered: bool = False
    logprobs: bool = False
    shaped: bool = False
    masked: bool = False
    truncated: int = 0  # rows with rare rules that there is room for: see `truncation`
    ranked: bool = False  # log-probabilities of the model's own
    scored: int = 0  # tokens of prompts, whose own are wanted, that there is room for


class Parameters(NamedTuple):
    """Sampling parameters of `R` rows, as columns of an int32 table `[R, PARAMETER_WORDS]`: all of one stride.

    A row whose temperature is 0 is greedy, whatever its other parameters say. One more parameter is one more field
    here, one more word in the table, and its line in each backend's rule for what may be drawn.
    """

    temperature: torch.Tensor  # float32 [R], 0 for greedy
    top_p: torch.Tensor  # float32 [R], 1 for off
    min_p: torch.Tensor  # float32 [R], 0 for off
    top_k: torch.Tensor  # int32 [R], 0 for off
    seed_low: torch.Tensor  # int32 [R]
    seed_high: torch.Tensor  # int32 [R]

    @classmethod
    def from_table(cls, table: torch.Tensor) -> Parameters:
        floats = table.view(torch.float32)
        return cls(*floats.unbind(1)[:3], *table.unbind(1)[3:])


def pick(
    logits: torch.Tensor, parameters: Parameters, positions: torch.Tensor, flavour: Flavour
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next token of each row: by Triton kernels on CUDA where triton is installed, by the reference elsewhere.

    A row's token depends on its logits, parameters and position alone, not on what else is in the batch: the noise is
    a hash of (seed, position, vocabulary index), added in the manner of Gumbel-max sampling
    (https://arxiv.org/abs/1611.01144). Nor does it depend on where it is picked: see `reference`.

    Args:
        logits (`torch.Tensor`): `[R, V]`, any float dtype.
        parameters (`Parameters`): of the same rows.
        positions (`torch.Tensor`): int32 `[R]`, index in its sequence of the token to be picked.
        flavour (`Flavour`): what to compute.

    Returns:
        ids int32 `[R]`, and with `flavour.logprobs` the log-probability of each under the distribution it was picked
        from, float32 `[R]`. Where logits are NaN, the id of the first of them.
    """
    if runs_triton(logits):
        from . import triton

        return triton.pick(logits, parameters, positions, flavour)
    return reference.pick(logits, parameters, positions, flavour)
