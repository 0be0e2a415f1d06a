"""From logits to token ids, on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch


# One word each of a row's sampling parameters; temperature and top-p are float32 bits.
PARAMETER_WORDS = 5

# Rows that are sampled at once: each takes a dozen times its logits while it is.
_SLICE = 128


class Flavour(NamedTuple):
    """What the rows of a step need: what nobody needs is not computed."""

    sampled: bool = False
    filtered: bool = False
    logprobs: bool = False


class Parameters(NamedTuple):
    """Sampling parameters of `R` rows, as columns of an int32 table `[R, PARAMETER_WORDS]`."""

    temperature: torch.Tensor  # float32 [R], 0 for greedy
    top_p: torch.Tensor  # float32 [R]
    top_k: torch.Tensor  # int32 [R], 0 for off
    seed_low: torch.Tensor  # int32 [R]
    seed_high: torch.Tensor  # int32 [R]

    @classmethod
    def from_table(cls, table: torch.Tensor) -> Parameters:
        floats = table.view(torch.float32)
        return cls(floats[:, 0], floats[:, 1], table[:, 2], table[:, 3], table[:, 4])


def pick(
    logits: torch.Tensor, parameters: Parameters, positions: torch.Tensor, flavour: Flavour
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next token of each row.

    A row's token depends on its logits, seed and position alone, not on what else is in the batch: the noise is a
    hash of (seed, position, vocabulary index), added in the manner of Gumbel-max sampling
    (https://arxiv.org/abs/1611.01144).

    Args:
        logits (`torch.Tensor`): `[R, V]`, any float dtype.
        parameters (`Parameters`): of the same rows.
        positions (`torch.Tensor`): int32 `[R]`, index in its sequence of the token to be picked.
        flavour (`Flavour`): what to compute.

    Returns:
        ids int32 `[R]`, and with `flavour.logprobs` the log-probability of each under the distribution it was picked
        from, float32 `[R]`.
    """
    if not flavour.sampled and not flavour.logprobs:
        return logits.argmax(-1).int(), None
    if len(logits) > _SLICE:
        slices = zip(
            logits.split(_SLICE), zip(*(column.split(_SLICE) for column in parameters), strict=True),
            positions.split(_SLICE), strict=True,
        )  # fmt: skip
        picked = [pick(part, Parameters(*columns), at, flavour) for part, columns, at in slices]
        ids, logprobs = zip(*picked, strict=True)
        return torch.cat(ids), torch.cat(logprobs) if flavour.logprobs else None
    scores = logits.float()
    if flavour.sampled:
        greedy = (parameters.temperature == 0)[:, None]
        scores = scores / torch.where(greedy, 1.0, parameters.temperature[:, None])
        if flavour.filtered:
            scores = _keep_top(scores, parameters.top_k, parameters.top_p, greedy)
        noise = _exponential(parameters.seed_low, parameters.seed_high, positions, scores.shape[-1])
        ids = torch.where(greedy, scores, scores - noise.log()).argmax(-1)
    else:
        ids = scores.argmax(-1)
    if not flavour.logprobs:
        return ids.int(), None
    logprobs = scores.gather(1, ids[:, None])[:, 0] - scores.logsumexp(-1)
    return ids.int(), logprobs


def _keep_top(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, greedy: torch.Tensor) -> torch.Tensor:
    """Scores `[R, V]` with all but the `top_k` largest, and of those all but the smallest set of mass `top_p`, at
    minus infinity; the order and the ties of transformers' `TopKLogitsWarper`, then `TopPLogitsWarper`."""
    vocabulary = scores.shape[-1]
    ordered, index = scores.sort(dim=-1, descending=True, stable=True)
    count = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary).long()
    smallest = ordered.gather(1, count[:, None] - 1)
    ordered = ordered.masked_fill(ordered < smallest, -torch.inf)
    mass = ordered.softmax(-1).cumsum(-1)
    dropped = torch.zeros_like(ordered, dtype=torch.bool)
    dropped[:, 1:] = (mass[:, :-1] >= top_p[:, None]) & (top_p[:, None] < 1)
    ordered = ordered.masked_fill(dropped, -torch.inf)
    return torch.where(greedy, scores, torch.empty_like(scores).scatter_(1, index, ordered))


def _exponential(
    seed_low: torch.Tensor, seed_high: torch.Tensor, positions: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Exponentially distributed noise, float32 `[R, vocabulary]`; the race that the smallest `noise / p` wins picks
    an index with probability p."""
    counter = _mix((positions.long() * 0x9E3779B1 + seed_low.long()) & 0xFFFFFFFF)
    first = _mix(counter ^ (seed_high.long() & 0xFFFFFFFF))
    second = _mix(first + 0x7F4A7C15)
    index = torch.arange(vocabulary, device=positions.device)
    bits = _mix(_mix(index ^ first[:, None]) + second[:, None])
    uniform = (bits.float() + 0.5) * 2.0**-32  # in (0, 1]: fine-grained near 0, where rare tokens win
    return -torch.log1p(-uniform)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers (held in int64) in which every input bit moves every output bit: the finalizer of
    MurmurHash3 (https://github.com/aappleby/smhasher)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
