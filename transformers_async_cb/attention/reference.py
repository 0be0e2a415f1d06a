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
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sequences with as many new tokens are computed together: the pages that they look back on gathered, padded to
    the most."""
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
        positions = step.positions[tokens][:, :, None]  # [n, count, 1]
        firsts = torch.zeros_like(positions)
        if window:
            firsts = (positions - window + 1).clamp_min(0)
        if chunk:
            firsts = positions - positions % chunk
        columns = firsts[:, 0] // key_pages.shape[1]  # [n, 1]: there may be none before
        first = columns * key_pages.shape[1]
        most = max(lengths[b] - f for b, f in zip(group, first[:, 0].tolist(), strict=True))
        span = torch.arange(-(-most // key_pages.shape[1]), device=query.device)
        table = step.page_table[step.rows[chosen][:, None], (columns + span).clamp_max(step.page_table.shape[1] - 1)]
        at = (first + torch.arange(most, device=query.device))[:, None]  # [n, 1, most]
        hidden = (at >= step.lengths[chosen][:, None, None]) | (at < firsts[:, :1])  # not written yet, or another's
        seen = (at <= positions) & (at >= firsts)
        keys, values = (
            pages[table].flatten(1, 2)[:, :most].masked_fill(hidden[:, 0, :, None, None], 0).transpose(1, 2)
            for pages in (key_pages, value_pages)
        )
        queries = query[tokens].transpose(1, 2)
        if softcap or sinks is not None:
            result = _softmax_attention(queries, keys, values, seen[:, None], scaling, softcap, sinks)
        else:
            result = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=seen[:, None], scale=scaling, enable_gqa=True
            )
        out[tokens] = result.transpose(1, 2)
    return out


def _softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scaling: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What torch's own attention does, and scores that are capped, and sinks."""
    heads = query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sinks = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    return scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value
