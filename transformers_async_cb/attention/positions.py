"""Positions for models that count them by their cache."""

from __future__ import annotations

import torch


class TokensBefore:
    """Stands in for a cache: holds nothing, and says for each packed token how many came before it less its place in
    the batch. A model that adds places to that (as Llama 4 does for the temperature of its attention) has positions.

    Args:
        positions (`torch.Tensor`): `[1, T]`.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self._offsets = positions[0] - torch.arange(positions.shape[1], device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return self._offsets

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As if nothing was there yet: masks are made by others."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value
