"""Everything a user gives for a request is checked here, before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .model import ModelLoan
from .prompts import Prompt, encode
from .request import Request, Sampling
from .settings import (
    GenerationSettings,
    check_max_new_tokens,
    check_max_time,
    check_stop_strings,
    check_stopping_criteria,
    eos_ids,
)
from .stop_strings import StopStrings, TokenTexts


class Door:
    """Turns what users give into requests, or says what is wrong with it.

    Called with the manager's lock held, but for `let_out`: that is the loop's, and must not wait for a long check.

    Args:
        loan (`ModelLoan`): the model.
        seed (`int`, *optional*): from which each request's own is derived, with its id. Otherwise it is drawn when a
            request first needs one, so that it follows `torch.manual_seed` and greedy decoding leaves that alone.
    """

    def __init__(self, loan: ModelLoan, seed: int | None) -> None:
        self.generation: GenerationSettings | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._criteria: tuple[Callable, ...] = ()
        self._texts: TokenTexts | None = None  # of the tokenizer that stop strings needed last
        self._vocabulary = loan.vocabulary
        self._learned_positions = loan.learned_positions()
        self._stated_positions = loan.stated_positions
        self._seed = seed
        self._counter = 0
        self._arrivals = 0
        self.live: dict[str, Request] = {}  # let in, and without a final result

    def configure(
        self,
        generation: GenerationSettings,
        tokenizer: PreTrainedTokenizerBase | None,
        stopping_criteria: list[Callable] | None,
    ) -> None:
        """Take the settings of the requests that come from now on, or none of them if one is not valid."""
        criteria = check_stopping_criteria(stopping_criteria, "the call")
        self._stop_strings("generation_config", generation.stop_strings, tokenizer)
        self.generation, self._tokenizer, self._criteria = generation, tokenizer, criteria

    def names(self, count: int) -> list[str]:
        """Ids for requests that came without one: `req_0`, `req_1`, ... They count as given out once admitted."""
        names, counter = [], self._counter
        while len(names) < count:
            if (name := f"req_{counter}") not in self.live:
                names.append(name)
            counter += 1
        return names

    def check(
        self,
        request_ids: Iterable[str],
        inputs: Iterable[Prompt],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        stop_strings: str | list[str] | None = None,
        max_time: float | None = None,
        stopping_criteria: list[Callable] | None = None,
        **per_request: Any,
    ) -> list[Request]:
        """The requests, of which none is let in yet.

        Raises:
            ValueError: one is not valid; the message names the request and what is allowed.
        """
        if per_request:
            raise ValueError(f"settings of a single request are not supported yet: {sorted(per_request)}")
        requests = []
        for request_id, input_ids in zip(request_ids, inputs, strict=True):
            name = f"request {request_id}"
            if request_id in self.live:
                raise ValueError(f"{name}: this id is in use, choose another or wait for its result")
            tokens = self._prompt(name, input_ids)
            if max_new_tokens is None:
                limit = self.generation.new_tokens(len(tokens), self._stated_positions, name)
            else:
                check_max_new_tokens(max_new_tokens, name)
                limit = max_new_tokens
            strings = self.generation.stop_strings if stop_strings is None else check_stop_strings(stop_strings, name)
            if stopping_criteria is None:
                criteria = self._criteria
            else:
                criteria = check_stopping_criteria(stopping_criteria, name)
            requests.append(
                Request(
                    id=request_id,
                    tokens=tokens,
                    prompt_length=len(tokens),
                    max_new_tokens=limit,
                    sampling=self._sampling(request_id),
                    eos_ids=self.generation.eos_ids if eos_token_id is None else eos_ids(eos_token_id),
                    stop_strings=self._stop_strings(name, strings, self._tokenizer),
                    max_time=self.generation.max_time if max_time is None else check_max_time(max_time, name),
                    stopping_criteria=criteria,
                    streaming=streaming,
                    record_timestamps=record_timestamps,
                    arrival=self._arrivals + len(requests),
                )
            )
        return requests

    def let_in(self, requests: list[Request]) -> None:
        """From now on their ids are in use."""
        self._arrivals += len(requests)
        self.live.update((request.id, request) for request in requests)
        while f"req_{self._counter}" in self.live:
            self._counter += 1

    def let_out(self, request_ids: Iterable[str]) -> None:
        """Their ids may be used again."""
        for request_id in request_ids:
            self.live.pop(request_id, None)

    def _sampling(self, request_id: str) -> Sampling:
        if not self.generation.temperature:
            return Sampling()
        if self._seed is None:
            self._seed = int(torch.randint(2**62, (), device="cpu"))
        digest = hashlib.blake2b(f"{self._seed}:{request_id}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little")
        return Sampling(self.generation.temperature, self.generation.top_k, self.generation.top_p, seed)

    def _stop_strings(
        self, name: str, strings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase | None
    ) -> StopStrings | None:
        if not strings:
            return None
        if tokenizer is None:
            raise ValueError(
                f"{name}: stop_strings need the model's tokenizer: give it with the call or the manager, tokenizer=..."
            )
        if self._texts is None or not self._texts.are_of(tokenizer):
            if any(request.stop_strings is not None for request in list(self.live.values())):
                raise ValueError(
                    f"{name}: requests with stop strings of another tokenizer have not ended, wait for their results"
                )
            self._texts = TokenTexts(tokenizer)
        return StopStrings(strings, self._texts)

    def _prompt(self, name: str, prompt: Prompt) -> np.ndarray:
        """The prompt as int32 `[tokens]`."""
        input_ids = encode(name, prompt, self._tokenizer)
        if isinstance(input_ids, torch.Tensor):
            if input_ids.is_floating_point():
                raise ValueError(f"{name}: the prompt must hold integer token ids, not {input_ids.dtype}")
            input_ids = input_ids.cpu()
        try:
            tokens = np.asarray(input_ids)
        except ValueError:  # ragged
            tokens = np.empty((0, 0))
        if tokens.ndim != 1:
            raise ValueError(f"{name}: the prompt must be one flat sequence of token ids")
        if not len(tokens):
            raise ValueError(f"{name}: the prompt is empty, it needs at least one token id")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"{name}: the prompt must hold integer token ids, not {tokens.dtype}")
        if tokens.min() < 0 or tokens.max() >= self._vocabulary:
            wrong = tokens[(tokens < 0) | (tokens >= self._vocabulary)][0]
            raise ValueError(f"{name}: token id {wrong} is outside the vocabulary, 0 to {self._vocabulary - 1}")
        if self._learned_positions is not None and len(tokens) > self._learned_positions:
            raise ValueError(
                f"{name}: the prompt has {len(tokens)} tokens, more than the {self._learned_positions} positions that "
                "the model has learned"
            )
        return tokens.astype(np.int32)
