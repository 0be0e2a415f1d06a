"""What is right, in plain torch, on any device."""

from __future__ import annotations

import torch

from .entries import ENTRY_WORDS, RANKED_WORDS


# Rows that are looked at at once: each takes several times its logits while it is.
_SLICE = 128


def rank(logits: torch.Tensor, entries: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    rows, tokens, counts = entries.view(-1, ENTRY_WORDS).long().unbind(1)
    ranked = entries.new_zeros(len(rows), RANKED_WORDS)
    for used in (rows >= 0).nonzero()[:, 0].split(_SLICE):
        own, token = rows[used], tokens[used]
        token = torch.where(token < 0, picked[own.clamp_max(len(picked) - 1)].long(), token)
        x = logits[own].float()
        logprobs = x.log_softmax(-1)
        ranked[used, 0] = logprobs.gather(1, token[:, None])[:, 0].view(torch.int32)
        if most := int(counts[used].max()):
            ids = likeliest(x, most)
            ranked[used, 1 : 1 + 2 * most : 2] = ids.int()
            ranked[used, 2 : 2 + 2 * most : 2] = logprobs.gather(1, ids).view(torch.int32)
    return ranked


def likeliest(x: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the `count` largest of each row of float32 `x`, int64; of equals, the lowest first."""
    bits = (x + 0.0).view(torch.int32)  # -0 is 0
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    backwards = 0x7FFFFFFF - torch.arange(x.shape[1], device=x.device)
    return 0x7FFFFFFF - ((keys << 32) + backwards).topk(count).values % 2**32
