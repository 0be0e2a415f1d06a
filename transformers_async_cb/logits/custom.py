"""A user's own logits processors, called as `generate` calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


Processor = Callable[[torch.LongTensor, torch.FloatTensor], torch.FloatTensor]


class Processors:
    """Those of one request. What the calling thread has enqueued so far on its current stream comes before them.

    Args:
        owner (`str`): the request, as errors name it.
        processors (`tuple[Processor, ...]`): called one after the other.
        device (`torch.device`): where they will be.
    """

    def __init__(self, owner: str, processors: tuple[Processor, ...], device: torch.device) -> None:
        self._owner = owner
        self._processors = processors
        self._ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._error: str | None = None
        self._failed_at = -1

    def __repr__(self) -> str:
        return f"Processors({[getattr(p, '__qualname__', type(p).__qualname__) for p in self._processors]})"

    def error_at(self, length: int) -> str | None:
        """Why the token after so many cannot be picked, if it cannot."""
        return self._error if self._failed_at == length else None

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Process the logits of one sequence, in place; no more once one processor has failed.

        Args:
            input_ids (`torch.Tensor`): int64 `[n]`, prompt and answer.
            logits (`torch.Tensor`): `[V]`, any float dtype; written.
        """
        if self._error is not None:
            return
        if self._ready is not None:
            torch.cuda.current_stream(logits.device).wait_event(self._ready)
        scores, shape = logits.to(torch.float32, copy=True)[None], (1, len(logits))
        for processor in self._processors:
            try:
                scores = processor(input_ids[None], scores)
                if scores.shape != shape:
                    raise ValueError(f"it returned scores of shape {tuple(scores.shape)}, not {shape}")
            except Exception as error:
                name = getattr(processor, "__name__", type(processor).__name__)
                self._error = f"{self._owner}: its logits processor {name} raised {type(error).__name__}: {error}"
                self._failed_at = len(input_ids)
                return
        logits.copy_(scores[0])


class Call(NamedTuple):
    """Processors for a sequence of a step."""

    sequence: int
    row: int
    length: int  # tokens so far
    processors: Processors
