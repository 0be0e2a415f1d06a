"""What a user gets for a request: transformers' own record, and what only this engine has to add."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from transformers.generation.continuous_batching.requests import GenerationOutput


@dataclass
class AsyncGenerationOutput(GenerationOutput):
    """A `GenerationOutput` with more in it.

    Log-probabilities per token come as the device wrote them, int32 `[tokens, 1 + 2 * n]`: the token's own as float32
    bits, then the ids of the `n` likeliest in its place, the likeliest first, each with its own. The properties make
    lists of them on the thread that reads those, not on the engine's.

    Args:
        ranked (`np.ndarray`, *optional*): of the generated tokens.
        prompt_ranked (`np.ndarray`, *optional*): of the prompt's tokens after the first.
    """

    ranked: np.ndarray | None = field(default=None, repr=False, compare=False)
    prompt_ranked: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def top_logprobs(self) -> list[dict[int, float]] | None:
        """For each generated token the likeliest in its place, with their log-probabilities, the likeliest first;
        `None` if the request did not ask for any."""
        return likeliest_logprobs(self.ranked)

    @property
    def prompt_logprobs(self) -> list[float] | None:
        """The log-probability of each of the prompt's tokens after the first; `None` if not asked for."""
        return None if self.prompt_ranked is None else own_logprobs(self.prompt_ranked)

    @property
    def prompt_top_logprobs(self) -> list[dict[int, float]] | None:
        """As `top_logprobs`, for the prompt's tokens after the first."""
        return likeliest_logprobs(self.prompt_ranked)


def own_logprobs(ranked: np.ndarray) -> list[float]:
    """The log-probabilities of the tokens themselves."""
    return ranked[:, 0].view(np.float32).tolist()


def likeliest_logprobs(ranked: np.ndarray | None) -> list[dict[int, float]] | None:
    """Those of the likeliest in their place; `None` where there are none."""
    if ranked is None or ranked.shape[1] == 1:
        return None
    ids, values = ranked[:, 1::2].tolist(), ranked[:, 2::2].view(np.float32).tolist()
    return [dict(zip(*of_token, strict=True)) for of_token in zip(ids, values, strict=True)]
