"""What stands in for a cache where keys and values lie in pages."""

from __future__ import annotations

import torch


class OnPages:
    """A cache that keeps no keys and values: attention writes them itself. Masks are made by others, as if nothing was
    there yet, and positions are given."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class TokensBefore(OnPages):
    """Says for each packed token how many came before it less its place in the batch. A model that counts positions by
    its cache, and adds places to that (as Llama 4 does for the temperature of its attention), has positions.

    Args:
        positions (`torch.Tensor`): `[1, T]`.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self._offsets = positions[0] - torch.arange(positions.shape[1], device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return self._offsets
