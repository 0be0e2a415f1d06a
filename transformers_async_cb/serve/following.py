"""The requests of one call, followed on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..door import sequence_id
from ..manager import AsyncBatchingManager
from ..output import AsyncGenerationOutput, likeliest_logprobs, own_logprobs
from ..text import AnswerText
from . import spelling
from .spelling import Spelling


class Call(NamedTuple):
    """What a client asks for, ready for the engine."""

    prompts: list[list[int]]
    n: int  # choices for each prompt
    limit: int  # new tokens
    eos_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    settings: dict[str, Any]  # keyword arguments of `add_requests`, beside these
    stream: bool
    echo: list[str] | None  # texts of the prompts, for answers that begin with theirs
    special_tokens: bool  # whether the answers' text has them


class ScoredToken(NamedTuple):
    """A token, its log-probability (a prompt's first has none), and those of the likeliest in its place."""

    token: Spelling
    logprob: float | None
    likeliest: list[tuple[Spelling, float]]


class News(NamedTuple):
    """What one choice of an answer has gained."""

    choice: int
    text: str
    scored: list[ScoredToken]  # new tokens, if asked for; the text of some may be held back
    finish_reason: str | None  # "stop" or "length" once it is finished
    error: str | None  # why it has failed


@dataclass(slots=True)
class _Choice:
    index: int
    text: AnswerText
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class Following:
    """Adds the requests of a call to a manager, and says what their answers gain.

    Of what a request has sent since the last look only the last counts, which has all tokens so far: a client that
    reads slowly, or an event loop that is busy, gets more at a time.

    Args:
        manager (`AsyncBatchingManager`): running, with the tokenizer.
        tokenizer (`PreTrainedTokenizerBase`): decodes the answers, on the event loop.
        call (`Call`): what to generate.
    """

    def __init__(self, manager: AsyncBatchingManager, tokenizer: PreTrainedTokenizerBase, call: Call) -> None:
        self._manager = manager
        self._tokenizer = tokenizer
        self._call = call
        self._choices: dict[str, _Choice] = {}
        self._latest: dict[str, AsyncGenerationOutput] = {}
        self._arrived = asyncio.Event()

    def add(self) -> list[str]:
        """Add all requests, or none; returns their ids. May be called on any thread.

        Raises:
            ValueError: the engine does not take one.
            RuntimeError: the engine takes no more requests.
            QueueFull: too many wait already.
        """
        call = self._call
        return self._manager.add_requests(
            call.prompts, max_new_tokens=call.limit, streaming=call.stream, eos_token_id=list(call.eos_ids),
            stop_strings=list(call.stop_strings), wait=False, **call.settings,
        )  # fmt: skip

    def begin(self, request_ids: list[str]) -> None:
        """Have the results of the requests that were added come here."""
        sequence_ids = [sequence_id(name, number) for name in request_ids for number in range(self._call.n)]
        for index, request_id in enumerate(sequence_ids):
            text = AnswerText(self._tokenizer, self._call.stop_strings, self._call.special_tokens)
            self._choices[request_id] = _Choice(index, text)
            self._manager.register_result_handler(request_id, self._note)

    async def news(self) -> AsyncIterator[News]:
        """What the choices gain, until all are finished."""
        while not all(choice.finished for choice in self._choices.values()):
            await self._arrived.wait()
            self._arrived.clear()
            latest, self._latest = self._latest, {}
            for request_id, output in latest.items():
                choice = self._choices[request_id]
                if not choice.finished:
                    yield self._gain(choice, output)

    def _note(self, output: AsyncGenerationOutput) -> None:
        self._latest[output.request_id] = output
        self._arrived.set()

    def _gain(self, choice: _Choice, output: AsyncGenerationOutput) -> News:
        known = len(choice.tokens)
        new = output.generated_since(known)
        scored = self._score(new, output.ranked_since(known)) if "logprobs" in self._call.settings else []
        choice.tokens += new
        ended = output.is_finished()
        text = choice.text.add(self._spoken(new, ended), last=ended)
        if self._call.echo is not None and not known and output.error is None:
            text = self._call.echo[choice.index // self._call.n] + text
            if "prompt_logprobs" in self._call.settings:
                first = ScoredToken(spelling.spell(self._tokenizer, output.prompt_ids[0]), None, [])
                scored = [first, *self._score(output.prompt_ids[1:], output.prompt_ranked), *scored]
        reason = error = None
        if ended and output.error is not None:
            error = output.error
        elif choice.text.stopped or (ended and not self._reached_limit(choice)):
            reason = "stop"
        elif ended:
            reason = "length"
        choice.finished = ended or reason is not None
        # The text may have a stop string that the tokens lack, as the engine reads them. Where there are several
        # sequences the id of the first is that of all.
        if not ended and choice.finished and self._call.n == 1:
            self._manager.cancel_request(output.request_id)
        return News(choice.index, text, scored, reason, error)

    def _spoken(self, tokens: list[int], ended: bool) -> list[int]:
        """Those that are text: the EOS that ends an answer is none, even where special tokens are."""
        ends = ended and self._call.special_tokens and tokens and tokens[-1] in self._call.eos_ids
        return tokens[:-1] if ends else tokens

    def _score(self, tokens: list[int], ranked: np.ndarray) -> list[ScoredToken]:
        """Tokens with their log-probabilities, as `AsyncGenerationOutput` has them."""
        spell = partial(spelling.spell, self._tokenizer)
        likeliest = likeliest_logprobs(ranked) or [{}] * len(tokens)
        return [
            ScoredToken(spell(token), logprob, [(spell(other), value) for other, value in in_its_place.items()])
            for token, logprob, in_its_place in zip(tokens, own_logprobs(ranked), likeliest, strict=True)
        ]

    def _reached_limit(self, choice: _Choice) -> bool:
        return len(choice.tokens) >= self._call.limit and choice.tokens[-1] not in self._call.eos_ids

    def cancel(self) -> None:
        """End what is not finished: nobody waits for it any more."""
        for request_id, choice in self._choices.items():
            if not choice.finished:
                choice.finished = True
                self._manager.cancel_request(request_id)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, of prompts and answers."""
        prompt = sum(map(len, self._call.prompts))
        answer = sum(len(choice.tokens) for choice in self._choices.values())
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
