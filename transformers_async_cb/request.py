"""The nouns: one request, how it picks its tokens, and the arrays that hold the running ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from transformers.generation.continuous_batching import RequestStatus

from .grammars import Constraint
from .logits import Processors
from .logprobs import PromptScores, Records, Words
from .model_inputs import ModelInputs
from .output import AsyncGenerationOutput, Streamed, StreamedOutput, own_logprobs
from .sampling import TRUNCATED_WORDS
from .stop_strings import StopStrings, TokenTexts


# Requests that one step may admit. Each takes the host some microseconds, and the device waits for a long plan.
MOST_FRESH = 256

# Requests in one step whose next token a grammar narrows down, and those of them whose prompts are being computed.
# Each sends a bit for every token of the vocabulary; who finds no room has its turn in the next step.
MOST_MASKED, MOST_MASKED_PROMPTS = 128, 32


class Sampling(NamedTuple):
    """How a request picks its tokens: greedily at a `temperature` of 0. 1 turns `top_p` and `typical_p` off, 0 what
    else narrows the choice."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # 64 bits
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    top_h: float = 0.0

    @property
    def filtered(self) -> bool:
        """Whether some tokens may not be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def truncated(self) -> bool:
        """Whether that is by a rare rule, which takes all others along."""
        rare = self.typical_p < 1 or self.epsilon_cutoff > 0 or self.eta_cutoff > 0 or self.top_h > 0
        return self.temperature > 0 and rare

    def truncation(self) -> np.ndarray:
        """The words of a `Truncation`."""
        floats = (
            self.temperature, self.top_p, self.min_p, self.typical_p, self.epsilon_cutoff, self.eta_cutoff, self.top_h
        )  # fmt: skip
        return np.array([self.top_k, *np.array(floats, np.float32).view(np.int32)], np.int32)

    def picking(self) -> Sampling:
        """What is left to do when the truncation is done."""
        return self._replace(top_k=0, top_p=1.0, min_p=0.0) if self.truncated else self


@dataclass(slots=True, eq=False)
class Family:
    """The sequences of one request. One of them computes the prompt, the others then share its pages."""

    members: list[Request] = field(default_factory=list)  # in order, whether they have ended or not
    rows: list[int] = field(default_factory=list)  # of those that run
    leader: Request | None = None  # computes the prompt, or waits to
    held_back: list[Request] = field(default_factory=list)  # until the leader has


@dataclass(slots=True, eq=False)
class Request:
    """One request, from the door to its last token.

    `tokens`, `logprobs` and `timestamps` are current only while the request holds no row; a running request's values
    are in `Rows`.
    """

    id: str
    tokens: np.ndarray  # int32 [prompt + generated so far]
    prompt_length: int
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    stop_strings: StopStrings | None = None
    max_time: float = math.inf  # seconds from `started_time`
    stopping_criteria: tuple[Callable, ...] = ()
    shaping: np.ndarray | None = None  # int32 [words], what is done to its logits
    processors: Processors | None = None  # the user's own; then there is a shaping too
    inputs: ModelInputs | None = None  # of the model, beside its tokens
    constraint: Constraint | None = None  # follows the tokens known, and its mask is that of the next
    streaming: bool = False
    record_timestamps: bool = False
    family: Family | None = None  # where the prompt gets more than one answer
    arrival: int = 0
    priority: int = 0
    deadline: float = float("inf")  # of `time.perf_counter`; then it ends, finished or not
    page_keys: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`, as far as they were needed
    created_time: float = field(default_factory=time.perf_counter)
    status: RequestStatus = RequestStatus.PENDING
    error: str | None = None
    started_time: float = -1
    finished_time: float = -1
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # [generated so far]
    timestamps: np.ndarray = field(default_factory=lambda: np.empty(0, np.float64))  # [generated so far], seconds
    ranked: np.ndarray | None = None  # int32 [generated so far, 1 + 2 * n] as `rank` returns them, if asked for
    prompt_scores: PromptScores | None = None  # if asked for
    streamed: Streamed | None = None  # once there is any

    @property
    def total_limit(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self.prompt_length + self.max_new_tokens

    @property
    def prompt(self) -> np.ndarray:
        """What the user gave, int32 `[n]`: what the tokens begin with, or what an encoder reads."""
        encoder_ids = None if self.inputs is None else self.inputs.encoder_ids
        return self.tokens[: self.prompt_length] if encoder_ids is None else encoder_ids

    @property
    def unscored(self) -> bool:
        """Whether tokens of the prompt have yet to get log-probabilities that were asked for."""
        return self.prompt_scores is not None and not self.prompt_scores.complete

    def start(self) -> None:
        if self.status == RequestStatus.PENDING:
            self.started_time = time.perf_counter()
        self.status = RequestStatus.PREFILLING

    def finish(self, error: str | None = None) -> None:
        self.error = error
        self.status = RequestStatus.FINISHED if error is None else RequestStatus.FAILED
        self.finished_time = time.perf_counter()

    def output(self) -> AsyncGenerationOutput:
        """What the user gets, with copies of the values so far."""
        scores = self.prompt_scores
        return AsyncGenerationOutput(
            request_id=self.id,
            prompt_ids=self.prompt.tolist(),
            generated_tokens=self.tokens[self.prompt_length :].tolist(),
            logprobs=self.logprobs.tolist() if self.ranked is None else own_logprobs(self.ranked),
            error=self.error,
            status=self.status,
            created_time=self.created_time,
            lifespan=(self.started_time, self.finished_time),
            timestamps=self.timestamps.tolist() if self.record_timestamps else None,
            ranked=self.ranked,
            prompt_ranked=None if scores is None else scores.words[: scores.known],
        )

    def stream(self, token: int, logprob: float | None, now: float, words: Words | None) -> StreamedOutput:
        """What the user gets with a token after which the request goes on."""
        if self.streamed is None:
            self.streamed = Streamed(self.prompt)
        self.streamed.tokens.append(token)
        if logprob is not None:
            self.streamed.logprobs.append(logprob)
        if self.record_timestamps:
            self.streamed.timestamps.append(now)
        scores = self.prompt_scores
        return StreamedOutput(
            self.id, self.created_time, (self.started_time, self.finished_time), self.streamed, words,
            self.record_timestamps, None if scores is None else scores.words[: scores.known],
        )  # fmt: skip


class Phase(IntEnum):
    """What a row is doing. From `PREEMPTED` on it is not planned again, and only waits for its last step."""

    FREE = 0
    RUNNING = 1
    PREEMPTED = 2  # still takes the token of its last step, then waits for room again
    ENDED = 3  # its result is out; the token of its last step is discarded


class Rows:
    """The running requests as arrays: one row each, for as long as it runs.

    `known <= total`: a token counts in `total` when the step that samples it is planned, in `known` when its value
    has come back. `computed` counts the tokens whose keys and values are planned to be in the cache. A row decodes
    when all but its last token are computed.

    Args:
        count (`int`): rows there are.
        with_logprobs (`bool`): keep one log-probability a token.
    """

    def __init__(self, count: int, with_logprobs: bool) -> None:
        self.count = count
        self.phase = np.zeros(count, np.int8)
        self.arrival = np.zeros(count, np.int64)
        self.priority = np.zeros(count, np.int64)
        self.prefill = np.zeros(count, np.int64)  # tokens to compute before the first sample
        self.computed = np.zeros(count, np.int64)
        self.prompt_length = np.zeros(count, np.int64)
        self.known = np.zeros(count, np.int64)
        self.total = np.zeros(count, np.int64)
        self.limit = np.zeros(count, np.int64)  # `total` at which the row is done
        self.in_flight = np.zeros(count, np.int32)  # steps and moves of pages that have not come back
        self.moving = np.zeros(count, bool)  # its pages are on their way: out if it was preempted, or back in
        self.streaming = np.zeros(count, bool)
        self.sampled = np.zeros(count, bool)  # not greedy
        self.filtered = np.zeros(count, bool)  # top-k, top-p or min-p
        self.shaped = np.zeros(count, bool)  # something is done to their logits
        self.processed = np.zeros(count, bool)  # by processors of the user's
        self.given = np.zeros(count, bool)  # inputs of the model, beside its tokens
        self.masked = np.zeros(count, bool)  # only some tokens may come: not planned before the last one is known
        self.truncated = np.zeros(count, bool)  # by a rare rule
        self.truncations = np.zeros((count, TRUNCATED_WORDS - 1), np.int32)
        self.likeliest = np.full(count, -1, np.int32)  # to list beside each token's log-probability; -1 for neither
        self.unscored = np.zeros(count, bool)  # tokens of the prompt are still to be scored
        self.records = Records(count)
        self.eos = np.full((count, 1), -1, np.int32)
        self.last_letters = np.zeros(count, np.uint64)  # with which its stop strings end
        self.texts: TokenTexts | None = None  # what tokens add to a text, once a request has stop strings
        self.time_up = np.zeros(count, np.float64)  # the token that comes after it is the last, `time.perf_counter`
        self.asks = np.zeros(count, bool)  # criteria of the user's
        self.full_pages = np.zeros(count, np.int64)  # the first so many (of the smallest size) others may find
        self.stale = np.zeros(count, bool)  # its pages hold what the model, as it is now, would not compute
        self.tokens = np.zeros((count, 64), np.int32)
        self.logprobs = np.zeros((count, 64), np.float32) if with_logprobs else None
        self.timestamps: np.ndarray | None = None  # made when a request first asks for them
        self.request: list[Request | None] = [None] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, request: Request, limit: int) -> int:
        """Give `request` a row and copy its state in. `limit` is the total number of tokens it may reach."""
        row = self._free.pop()
        known = len(request.tokens)
        self._widen(known + 1)
        self.request[row] = request
        self.phase[row] = Phase.RUNNING
        self.arrival[row] = request.arrival
        self.priority[row] = request.priority
        self.prefill[row] = self.known[row] = self.total[row] = known
        self.computed[row] = self.full_pages[row] = self.in_flight[row] = 0
        self.limit[row] = limit
        self.stale[row] = False
        self.prompt_length[row] = request.prompt_length
        self.streaming[row] = request.streaming
        self.sampled[row] = request.sampling.temperature > 0
        self.filtered[row] = request.sampling.picking().filtered
        self.truncated[row] = request.sampling.truncated
        if self.truncated[row]:
            self.truncations[row] = request.sampling.truncation()
        self.shaped[row] = request.shaping is not None
        self.processed[row] = request.processors is not None
        self.given[row] = request.inputs is not None
        self.masked[row] = request.constraint is not None
        if len(request.eos_ids) > self.eos.shape[1]:
            grown = np.full((self.count, len(request.eos_ids)), -1, np.int32)
            grown[:, : self.eos.shape[1]] = self.eos
            self.eos = grown
        self.eos[row] = -1
        self.eos[row, : len(request.eos_ids)] = request.eos_ids
        self.last_letters[row] = 0
        if request.stop_strings is not None:
            self.last_letters[row] = request.stop_strings.last_letters
            self.texts = request.stop_strings.texts  # all running requests have the same
        self.asks[row] = bool(request.stopping_criteria)
        self.tokens[row, :known] = request.tokens
        if self.logprobs is not None:
            self.logprobs[row, request.prompt_length : known] = request.logprobs
        self.likeliest[row] = -1
        if request.ranked is not None:
            self.likeliest[row] = request.ranked.shape[1] // 2
            self.records.take(row, request.ranked)
        self.unscored[row] = request.unscored
        if request.record_timestamps:
            if self.timestamps is None:
                self.timestamps = np.zeros(self.tokens.shape, np.float64)
            self.timestamps[row, request.prompt_length : known] = request.timestamps
        request.start()
        self.time_up[row] = request.started_time + request.max_time
        return row

    def append(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray | None, now: float) -> None:
        """Write the next token's value of each of `rows`."""
        at = self.known[rows]
        if len(rows) and at.max() >= self.tokens.shape[1]:
            self._widen(int(at.max()) + 1)
        self.tokens[rows, at] = tokens
        if self.logprobs is not None:
            self.logprobs[rows, at] = logprobs
        if self.timestamps is not None:
            self.timestamps[rows, at] = now
        self.known[rows] = at + 1

    def stream(
        self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray | None, now: float
    ) -> list[StreamedOutput]:
        """What the users of `rows` get, which go on after the tokens that were appended last."""
        outputs = []
        its_logprobs = [None] * len(rows) if logprobs is None else logprobs.tolist()
        for row, token, logprob in zip(rows.tolist(), tokens.tolist(), its_logprobs, strict=True):
            request, words = self.request[row], None
            if request.ranked is not None:
                words = self.records.read(row, int(self.known[row]) - request.prompt_length)
            outputs.append(request.stream(token, logprob, now, words))
        return outputs

    def save(self, row: int) -> Request:
        """Copy a row's values so far into its request."""
        request, known = self.request[row], int(self.known[row])
        request.tokens = self.tokens[row, :known].copy()
        if self.logprobs is not None:
            request.logprobs = self.logprobs[row, request.prompt_length : known].copy()
        if request.ranked is not None:
            request.ranked = self.records.read(row, known - request.prompt_length).since(0)
        if request.record_timestamps:
            request.timestamps = self.timestamps[row, request.prompt_length : known].copy()
        return request

    def give_back(self, row: int) -> None:
        self.request[row] = None
        self.records.give_back(row)
        self.phase[row] = Phase.FREE
        self._free.append(row)

    def _widen(self, width: int) -> None:
        have = self.tokens.shape[1]
        if width <= have:
            return
        extra = ((0, 0), (0, max(width, 2 * have) - have))
        self.tokens = np.pad(self.tokens, extra)
        if self.logprobs is not None:
            self.logprobs = np.pad(self.logprobs, extra)
        if self.timestamps is not None:
            self.timestamps = np.pad(self.timestamps, extra)
