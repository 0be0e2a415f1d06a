"""What a user gets for a request: transformers' own record, and what only this engine has to add."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from .logprobs import Words


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

    def generated_since(self, count: int) -> list[int]:
        """`generated_tokens[count:]`."""
        return self.generated_tokens[count:]

    def ranked_since(self, count: int) -> np.ndarray:
        """`ranked[count:]`, of a request that asked for log-probabilities."""
        return self.ranked[count:]


@dataclass(slots=True, eq=False)
class Streamed:
    """What a request has streamed so far. It only grows, and the request's outputs share it."""

    prompt: np.ndarray  # int32 [prompt]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    timestamps: list[float] = field(default_factory=list)


class StreamedOutput(AsyncGenerationOutput):
    """The output of a request that goes on, with what it has generated so far.

    There is one for each token. Lists are made when they are first read, by whoever reads them: made beforehand, each
    as long as the answer so far, they would take the engine's thread longer than all else it does. Copied or pickled
    it is an `AsyncGenerationOutput`.

    Args:
        streamed (`Streamed`): what the request's outputs share, of which this one has the tokens so far.
        words (`Words`, *optional*): of these tokens, if log-probabilities were asked for.
        timed (`bool`): whether it has timestamps.
    """

    status = RequestStatus.DECODING

    def __init__(
        self,
        request_id: str,
        created_time: float,
        lifespan: tuple[float, float],
        streamed: Streamed,
        words: Words | None,
        timed: bool,
        prompt_ranked: np.ndarray | None,
    ) -> None:
        self.request_id = request_id
        self.created_time = created_time
        self.lifespan = lifespan
        self.prompt_ranked = prompt_ranked
        self._streamed = streamed
        self._count = len(streamed.tokens)
        self._words = words
        self._timed = timed

    @cached_property
    def prompt_ids(self) -> list[int]:
        return self._streamed.prompt.tolist()

    @cached_property
    def generated_tokens(self) -> list[int]:
        return self._streamed.tokens[: self._count]

    @cached_property
    def logprobs(self) -> list[float]:
        return self._streamed.logprobs[: self._count] if self._words is None else own_logprobs(self.ranked)

    @cached_property
    def timestamps(self) -> list[float] | None:
        return self._streamed.timestamps[: self._count] if self._timed else None

    @cached_property
    def ranked(self) -> np.ndarray | None:
        return None if self._words is None else self._words.since(0)

    def generated_since(self, count: int) -> list[int]:
        return self._streamed.tokens[count : self._count]

    def ranked_since(self, count: int) -> np.ndarray:
        return self._words.since(count)

    def __reduce__(self) -> tuple:
        return AsyncGenerationOutput, tuple(getattr(self, of.name) for of in fields(self))


def own_logprobs(ranked: np.ndarray) -> list[float]:
    """The log-probabilities of the tokens themselves."""
    return ranked[:, 0].view(np.float32).tolist()


def likeliest_logprobs(ranked: np.ndarray | None) -> list[dict[int, float]] | None:
    """Those of the likeliest in their place; `None` where there are none."""
    if ranked is None or ranked.shape[1] == 1:
        return None
    ids, values = ranked[:, 1::2].tolist(), ranked[:, 2::2].view(np.float32).tolist()
    return [dict(zip(*of_token, strict=True)) for of_token in zip(ids, values, strict=True)]
