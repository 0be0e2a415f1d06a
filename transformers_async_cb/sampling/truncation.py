"""Rare rules for what may be drawn: top-h, typical-p, and the cutoffs epsilon and eta.

They have no kernels. The rows that use one, padded to a power of four, go through plain torch on the device, their
top-k, top-p and min-p with them: three sorts of the vocabulary for each. A step in which nobody uses one is not
touched.

As in `reference`, masses and what is added up are integers, so that a row may draw the same tokens on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .reference import below_largest, kept, log, mass


# Logits looked at at once: each takes some hundred bytes while it is.
_SLICE = 2**21

# Tokens that top-h looks at: transformers' number.
_MOST_OF_TOP_H = 100


class Truncation(NamedTuple):
    """What may be drawn in `R` rows, as columns of a table of int32 words: `[R]` each."""

    top_k: torch.Tensor  # int32, 0 for off
    temperature: torch.Tensor  # float32, as all that follow
    top_p: torch.Tensor  # 1 for off
    min_p: torch.Tensor  # 0 for off
    typical_p: torch.Tensor  # 1 for off
    epsilon: torch.Tensor  # 0 for off
    eta: torch.Tensor  # 0 for off
    top_h: torch.Tensor  # 0 for off

    @classmethod
    def from_words(cls, words: torch.Tensor) -> Truncation:
        return cls(words[:, 0], *words[:, 1:].view(torch.float32).unbind(1))


# Of a row to be truncated: which one, and its `Truncation`.
TRUNCATED_WORDS = 1 + len(Truncation._fields)


def truncate(logits: torch.Tensor, truncated: torch.Tensor) -> None:
    """Set to -inf what some rows may not draw, in place.

    Args:
        logits (`torch.Tensor`): `[R, V]`, any float dtype; written.
        truncated (`torch.Tensor`): int32 `[N * TRUNCATED_WORDS]`, each row at most once; -1 for no
            row.
    """
    for words in truncated.view(-1, TRUNCATED_WORDS).split(max(1, _SLICE // logits.shape[1])):
        used, rows = words[:, :1] >= 0, words[:, 0].long().clamp_min(0)
        dropped = used & ~truncation_keeps(logits[rows].float(), Truncation.from_words(words[:, 1:]))
        # Added, not copied: where there is no row, nothing is added to one that may be another's.
        logits.index_add_(0, rows, torch.where(dropped, -torch.inf, 0.0).to(logits.dtype))


def truncation_keeps(logits: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """Which tokens may be drawn, bool `[R, V]`: transformers' `TopHLogitsWarper`, those of `reference.kept`,
    `TypicalLogitsWarper`, `EpsilonLogitsWarper` and `EtaLogitsWarper`, one after the other. Of equally likely ones,
    top-h takes the lowest ids first."""
    scores = below_largest(logits, logits.amax(-1, keepdim=True), truncation.temperature)
    keep = _top_h_keeps(scores, truncation.top_h)
    keep &= kept(logits.masked_fill(~keep, -torch.inf), truncation)
    keep &= _typical_keeps(scores, keep, truncation.typical_p)

    _, total, _ = _moments(scores, keep)
    keep &= _above(scores, keep, log(truncation.epsilon) + _log_of(total)) | (truncation.epsilon <= 0)[:, None]

    _, total, mean = _moments(scores, keep)
    log_eta = log(truncation.eta)  # the cutoff is the lower of eta and its root over the exponential of the entropy
    keep &= (
        _above(scores, keep, torch.minimum(log_eta + _log_of(total), 0.5 * log_eta - mean))
        | (truncation.eta <= 0)[:, None]
    )
    return keep


def _top_h_keeps(scores: torch.Tensor, top_h: torch.Tensor) -> torch.Tensor:
    """The likeliest tokens that have together at most that share of the entropy, and at least one."""
    ordered, index = scores.sort(dim=-1, descending=True, stable=True)
    ordered, index = ordered[:, :_MOST_OF_TOP_H], index[:, :_MOST_OF_TOP_H]
    masses = mass(ordered)
    entropy = _times(masses, _log_of(masses.sum(-1))[:, None] - ordered).cumsum(-1)
    keep = entropy <= _share(entropy[:, -1], top_h)[:, None]
    keep[:, 0] = True
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index, keep) | (top_h <= 0)[:, None]


def _typical_keeps(scores: torch.Tensor, keep: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """The tokens whose surprise is closest to the entropy, until they have that share of the mass. What all surprises
    have in common, the logarithm of the mass, is in the entropy too, and left out of both."""
    masses, total, mean = _moments(scores, keep)
    distance = torch.where(keep, (mean[:, None] + scores).abs(), torch.inf)
    ordered, index = distance.sort(dim=-1)
    missing = masses.gather(1, index).cumsum(-1) < _share(total, typical_p).clamp_min(1)[:, None]
    last = ordered.gather(1, missing.sum(-1, keepdim=True).clamp_max(scores.shape[1] - 1))
    return (distance <= last) | (typical_p >= 1)[:, None]


def _above(scores: torch.Tensor, keep: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Tokens with a score of at least `floor` `[R]`, and in any case the likeliest of those still kept."""
    likeliest = scores.masked_fill(~keep, -torch.inf).amax(-1)
    return ~(scores < torch.minimum(floor, likeliest)[:, None])


def _moments(scores: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masses of the tokens still kept, int64 `[R, V]`, their sum, int64 `[R]`, and how far below the likeliest of all
    tokens they are on average, float32 `[R]`."""
    masses = mass(scores) * keep
    total = masses.sum(-1)
    return masses, total, _times(masses, -scores).sum(-1).float() / (total.float() * 64)


def _times(masses: torch.Tensor, surprise: torch.Tensor) -> torch.Tensor:
    """Masses times numbers from 0 to 80, int64 in units of 2**-46, so that 2**17 or more of them can be added up."""
    return masses * (surprise.clamp_max(80) * 2.0**20 + 0.5).long() >> 14


def _share(total: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return (total.double() * share.double()).long()


def _log_of(total: torch.Tensor) -> torch.Tensor:
    """The logarithm of a sum of masses."""
    return log(total.float() * 2.0**-40)
