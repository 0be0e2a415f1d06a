"""Paged attention in plain torch: runs anywhere, reads lengths back to the host, and defines what is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F


if TYPE_CHECKING:
    from . import Step


def write_pages(
    key: torch.Tensor, value: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, step: Step
) -> None:
    page_size = key_pages.shape[1]
    pages = step.page_table[step.token_rows, step.positions // page_size]
    offsets = step.positions % page_size
    key_pages[pages, offsets] = key
    value_pages[pages, offsets] = value


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    step: Step,
    scaling: float,
    sliding_window: int,
) -> torch.Tensor:
    """Sequences with as many new tokens are computed together: their pages gathered, padded to the longest."""
    write_pages(key, value, key_pages, value_pages, step)
    starts, lengths = step.query_starts.tolist(), step.lengths.tolist()
    out = query.new_zeros(query.shape[0], query.shape[1], value_pages.shape[3])
    by_count: dict[int, list[int]] = {}
    for b, length in enumerate(lengths):
        if length:
            by_count.setdefault(starts[b + 1] - starts[b], []).append(b)
    for count, group in by_count.items():
        chosen = torch.tensor(group, device=query.device)
        tokens = step.query_starts[chosen][:, None] + torch.arange(count, device=query.device)  # [n, count]
        longest = max(lengths[b] for b in group)
        table = step.page_table[step.rows[chosen], : -(-longest // key_pages.shape[1])]
        at = torch.arange(longest, device=query.device)
        beyond = at >= step.lengths[chosen][:, None]  # [n, longest]: not written yet, or another's
        positions = step.positions[tokens][:, :, None]  # [n, count, 1]
        seen = at <= positions
        if sliding_window:
            seen &= at > positions - sliding_window
        keys, values = (
            pages[table].flatten(1, 2)[:, :longest].masked_fill(beyond[:, :, None, None], 0).transpose(1, 2)
            for pages in (key_pages, value_pages)
        )
        result = F.scaled_dot_product_attention(
            query[tokens].transpose(1, 2), keys, values, attn_mask=seen[:, None], scale=scaling, enable_gqa=True
        )
        out[tokens] = result.transpose(1, 2)
    return out
