"""What is right, in plain torch, on any device.

Other backends must pick the same ids, bit for bit, so nothing that decides depends on the order of a sum or on
anyone's exp or log: masses are integers, and floats see only additions, multiplications and divisions that round as
IEEE 754 says, in the order in which they are written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from . import Flavour, Parameters
    from .truncation import Truncation

# Rows that are picked at once: each takes a dozen times its logits while it is.
_SLICE = 128


def pick(
    logits: torch.Tensor, parameters: Parameters, positions: torch.Tensor, flavour: Flavour
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not flavour.sampled and not flavour.logprobs:
        return logits.argmax(-1).int(), None
    picked = []
    for at in range(0, len(logits), _SLICE):
        rows = slice(at, at + _SLICE)
        of_rows = type(parameters)(*(column[rows] for column in parameters))
        picked.append(_pick(logits[rows].float(), of_rows, positions[rows], flavour))
    ids, logprobs = zip(*picked, strict=True)
    return torch.cat(ids), torch.cat(logprobs) if flavour.logprobs else None


def _pick(
    logits: torch.Tensor, parameters: Parameters, positions: torch.Tensor, flavour: Flavour
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rather than `logits / temperature + noise`, the largest `logits + temperature * noise`: at a temperature of 0,
    the largest logit."""
    if flavour.filtered:
        logits = logits.masked_fill(~kept(logits, parameters), -torch.inf)
    raced = logits
    if flavour.sampled:
        waiting = exponential(parameters.seed_low, parameters.seed_high, positions, logits.shape[-1])
        raced = logits - parameters.temperature[:, None] * log(waiting)
    ids = raced.argmax(-1)
    if not flavour.logprobs:
        return ids.int(), None
    scores = below_largest(logits, logits.amax(-1, keepdim=True), parameters.temperature)
    return ids.int(), scores.gather(1, ids[:, None])[:, 0] - scores.logsumexp(-1)


def kept(logits: torch.Tensor, parameters: Parameters | Truncation) -> torch.Tensor:
    """Which tokens may be drawn, bool `[R, V]`: transformers' `TopKLogitsWarper`, `TopPLogitsWarper` and
    `MinPLogitsWarper`, one after the other.

    All tokens that are as likely as the k-th are among the `top_k`; of those that are as likely as the last that
    `top_p` needs, it takes as many as it needs, the lowest ids first.
    """
    vocabulary = logits.shape[-1]
    temperature, top_p, top_k = parameters.temperature, parameters.top_p, parameters.top_k
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    scores = below_largest(ordered, ordered[:, :1], temperature)
    count = torch.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary).long()
    keep = ~(ordered < ordered.gather(1, count[:, None] - 1))
    masses = mass(scores) * keep
    before = masses.cumsum(-1) - masses
    wanted = (masses.sum(-1).double() * top_p.double()).long().clamp_min(1)
    keep &= (before < wanted[:, None]) | (top_p >= 1)[:, None]
    keep &= ~(scores < log(parameters.min_p)[:, None]) | (parameters.min_p <= 0)[:, None]
    keep |= (temperature == 0)[:, None]
    return torch.empty_like(keep).scatter_(1, index, keep)


def below_largest(logits: torch.Tensor, largest: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Logarithm of each token's probability over that of the likeliest, float32 `[R, V]`; greedy rows have a
    temperature of 1 here."""
    inverse = 1 / torch.where(temperature == 0, 1.0, temperature)
    return torch.where(logits == largest, 0.0, (logits - largest) * inverse[:, None])


def mass(scores: torch.Tensor) -> torch.Tensor:
    """`exp(scores)` of scores up to 0, as int64 in units of 2**-40, so that 2**22 of them can be added up.

    ln 2 is subtracted in two parts, the first of which is exact; the polynomial is that of Cephes' `expf`
    (https://www.netlib.org/cephes).
    """
    scores = torch.where(scores > -40, scores, -40.0)
    halvings = (0.5 - scores * 1.44269502).int()
    x = (scores + halvings.float() * 0.693359375) - halvings.float() * 2.12194442e-4
    y = (1.98756915e-4 * x + 1.39819995e-3) * x + 8.3334519e-3
    y = (((y * x + 4.16657959e-2) * x + 0.166666655) * x + 0.500000012) * (x * x) + x + 1
    return (y * 2.0**24).long() << 16 >> halvings


def log(x: torch.Tensor) -> torch.Tensor:
    """The natural logarithm of positive float32, to 6e-7, and exactly 0 for 1: of all polynomials of this degree, the
    one with the smallest largest error between 1 and 2."""
    bits = x.contiguous().view(torch.int32)
    exponent = ((bits >> 23) - 127).float()
    x = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1
    y = (0.010764511 * x - 0.055145193) * x + 0.13467453
    return exponent * 0.693147182 + ((((y * x - 0.22589801) * x + 0.3282422) * x - 0.49947178) * x + 0.99998116) * x


def exponential(
    seed_low: torch.Tensor, seed_high: torch.Tensor, positions: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Exponentially distributed noise with mean 1 / ln 2, float32 `[R, vocabulary]`; the race that the smallest
    `noise / p` wins picks an index with probability p.

    It is `-log2(1 - u)` of a uniform u: how often 1 can be halved before it falls to `1 - u`, and what is left, again
    by the best polynomial, to 1.1e-6 of it.
    """
    low, high = seed_low.long() & 0xFFFFFFFF, seed_high.long() & 0xFFFFFFFF
    first = mix(mix(positions.long() * 0x9E3779B1 + low) ^ high)
    second = mix(first + 0x7F4A7C15)
    index = torch.arange(vocabulary, device=positions.device)
    bits = mix(mix(index ^ first[:, None]) + second[:, None])
    uniform = (bits.float() + 0.5) * 2.0**-32  # in (0, 1]: fine-grained near 0, where rare tokens win
    rest = (1 - uniform).view(torch.int32)
    early = uniform < 0.5
    halvings = torch.where(early, 0, 126 - (rest >> 23))
    x = torch.where(early, uniform + uniform, 2 - ((rest & 0x7FFFFF) | 0x3F800000).view(torch.float32))
    y = (0.011164904 * x - 0.014380096) * x + 0.023567557
    y = (((y * x + 0.016909504) * x + 0.061118156) * x + 0.18027079) * x + 0.7213482
    return halvings.float() + y * x


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers (held in int64) in which every input bit moves every output bit: the finalizer of
    MurmurHash3 (https://github.com/aappleby/smhasher)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
