"""What a user holds: requests in, results out, start and stop."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from .config import AsyncBatchingConfig
from .engine import Engine, Mailbox
from .model import ModelLoan
from .request import Request, Sampling
from .settings import (
    Workload,
    check_batching,
    check_max_new_tokens,
    eos_ids,
    resolve_engine,
    resolve_generation,
)


logger = logging.get_logger(__name__)


class Outbox:
    """Results on their way to whoever asks for them, by request or in the order they came."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._results: dict[str, deque[GenerationOutput]] = {}
        self._handlers: dict[str, tuple[Callable[[GenerationOutput], None], asyncio.AbstractEventLoop]] = {}
        self.open = False  # whether more may come

    def set_open(self, is_open: bool) -> None:
        with self._condition:
            self.open = is_open
            self._condition.notify_all()

    def put(self, outputs: list[GenerationOutput]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        with self._condition:
            for output in outputs:
                entry = self._handlers.get(output.request_id)
                if entry is None:
                    self._results.setdefault(output.request_id, deque()).append(output)
                else:
                    by_loop.setdefault(entry[1], []).append((entry[0], output))
                    if output.is_finished():
                        del self._handlers[output.request_id]
            self._condition.notify_all()
        for loop, calls in by_loop.items():
            try:
                loop.call_soon_threadsafe(_call_all, calls)
            except RuntimeError:  # the loop of whoever asked is gone; the engine's other requests go on
                logger.warning(f"dropping {len(calls)} results, the event loop of their handlers is closed")

    def handle(self, request_id: str, callback: Callable, loop: asyncio.AbstractEventLoop) -> None:
        with self._condition:
            early = self._results.pop(request_id, None)
            if early is None or not early[-1].is_finished():
                self._handlers[request_id] = (callback, loop)
        if early:
            loop.call_soon_threadsafe(_call_all, [(callback, output) for output in early])

    def get(self, request_id: str | None, timeout: float | None) -> GenerationOutput | None:
        def ready() -> bool:
            return bool(self._results) if request_id is None else request_id in self._results

        with self._condition:
            self._condition.wait_for(lambda: ready() or not self.open, timeout)
            if not ready():
                return None
            key = next(iter(self._results)) if request_id is None else request_id
            queued = self._results[key]
            output = queued.popleft()
            if not queued:
                del self._results[key]
            return output


def _call_all(calls: list[tuple[Callable[[GenerationOutput], None], GenerationOutput]]) -> None:
    for callback, output in calls:
        callback(output)


class AsyncBatchingManager:
    """Generates for many requests at once on a thread of its own.

    Made by `model.init_continuous_batching(async_batching=True)`; the methods are those of transformers'
    `ContinuousBatchingManager`.

    Args:
        model (`PreTrainedModel`): borrowed from `start` to `stop`, and as it was before and after.
        generation_config (`GenerationConfig`, *optional*): as for `model.generate`; copied.
        continuous_batching_config (`ContinuousBatchingConfig`, *optional*): copied.
        async_config (`AsyncBatchingConfig`, *optional*): settings of this engine alone.
        workload (`Workload`, *optional*): what is known of the requests, to size the cache.
        overrides (`dict`, *optional*): generation settings that go before `generation_config`'s.

    Raises:
        ValueError: a setting or the model is not supported; the message says what and why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        async_config: AsyncBatchingConfig | None = None,
        workload: Workload | None = None,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.continuous_batching_config = continuous_batching_config or ContinuousBatchingConfig()
        self.async_config = async_config or AsyncBatchingConfig()
        check_batching(self.continuous_batching_config)
        self.workload = workload or Workload()
        self.configure(generation_config, overrides)
        self._loan = ModelLoan(model)
        self._vocabulary = self._loan.vocabulary
        self._learned_positions = self._loan.learned_positions()
        self._stated_positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._seed = self.continuous_batching_config.seed
        if self._seed is None:
            self._seed = int(torch.randint(2**62, ()))  # follows `torch.manual_seed`, as `generate` does
        self._outbox = Outbox()
        self._mailbox = Mailbox()
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._counter = 0
        self._arrivals = 0
        self._live: set[str] = set()
        self._paused_here = threading.local()
        self.fatal_error: BaseException | None = None

    def configure(self, generation_config: GenerationConfig | None, overrides: dict[str, Any] | None = None) -> None:
        """Set the generation settings of the requests that are added from now on."""
        self.generation = resolve_generation(self.model, generation_config, overrides or {})

    # ------------------------------------------------------------------------------------------------ control

    @property
    def warmed_up(self) -> bool:
        return self._engine is not None

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def warmup(self) -> None:
        """Borrow the model and build the engine, cache included, before `start` does. A kept engine is taken up again
        unless the workload has grown past what it was sized for.

        Raises:
            ValueError: the model is not supported, or there is no memory for the cache.
        """
        if self._loan.out:
            return
        self._loan.borrow()
        if self._engine is not None and self.workload.longest <= self._engine.longest:
            self._engine.runner.attach()
            return
        self._drop_engine()
        try:
            shapes = self._loan.probe()
            settings = resolve_engine(
                self.model, shapes.values(), self._learned_positions, self.continuous_batching_config,
                self.async_config, self.workload,
            )  # fmt: skip
            logger.info(f"async batching with {settings}")
            with torch.no_grad():
                self._engine = Engine(self._loan, shapes, settings)
                self._engine.runner.attach()
        except BaseException:
            self._loan.give_back()
            raise

    def start(self) -> None:
        """Begin to generate. Requests added before are taken first."""
        if self.is_running():
            logger.warning("the manager is running already")
            return
        self.warmup()
        self._engine.lanes.enter()
        self._mailbox.reopen()
        self._outbox.set_open(True)
        self.fatal_error = None
        self._thread = threading.Thread(target=self._run, name="async-batching", daemon=True)
        self._thread.start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Finish the requests that are there, take no more, and give the model back.

        Args:
            block (`bool`): wait for that. Otherwise the model is given back by the next `stop` or `destroy`.
            timeout (`float`, *optional*): wait at most so many seconds.
            keep_for_next_session (`bool`): keep the manager on the model for the next call.
            hard_stop (`bool`): end the requests that are not finished with an error instead.

        Raises:
            RuntimeError: called from inside a pause.
        """
        if getattr(self._paused_here, "depth", 0):
            raise RuntimeError("cannot stop the manager from inside a pause: leave the `pause` context first")
        if self._thread is not None:
            self._mailbox.ask_to_stop(hard_stop)
            if not block:
                return
            self._thread.join(timeout)
            if self._thread.is_alive():
                logger.warning(f"the manager did not stop within {timeout} s")
                return
            self._thread = None
        else:
            self._close_mailbox("the manager was stopped before it was started")
        if self._engine is not None:
            self._engine.lanes.leave()
        self._loan.give_back()
        if keep_for_next_session:
            self.model._async_batching_manager = self
            self._mailbox.reopen()
        if not keep_for_next_session or self.fatal_error is not None:
            self._drop_engine()

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.lanes.close()
            self._engine = None

    def destroy(self) -> None:
        """Stop, failing what is not finished. Safe to call more than once."""
        self.stop(block=True, hard_stop=True)

    @contextmanager
    def pause(self) -> Generator[None]:
        """Hold the loop with nothing in flight, to use the model or change its weights in place; requests stay.

        Raises:
            RuntimeError: the loop is not running.
        """
        if not self.is_running():
            raise RuntimeError("cannot pause, the manager is not running")
        self._mailbox.pause()
        self._paused_here.depth = getattr(self._paused_here, "depth", 0) + 1
        self._engine.lanes.leave()
        try:
            yield
        finally:
            self._paused_here.depth -= 1
            self._engine.lanes.enter()
            self._mailbox.resume()

    def _run(self) -> None:
        reason = "it has stopped"
        try:
            self._engine.run(self._mailbox, self._deliver)
        except BaseException as error:
            logger.error(f"async batching failed: {error}", exc_info=True)
            self.fatal_error = error
            reason = f"the engine failed with {type(error).__name__}: {error}"
            self._engine.scheduler.fail_all(reason)
            self._deliver(self._engine.scheduler.take_outputs())
        finally:
            self._close_mailbox(reason)
            self._outbox.set_open(False)

    def _close_mailbox(self, reason: str) -> None:
        unread = self._mailbox.close(reason)
        for request in unread:
            request.finish(reason)
        self._deliver([request.output() for request in unread])

    def _deliver(self, outputs: list[GenerationOutput]) -> None:
        if not outputs:
            return
        with self._lock:
            self._live.difference_update(output.request_id for output in outputs if output.is_finished())
        self._outbox.put(outputs)

    # ------------------------------------------------------------------------------------------------ requests

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **per_request: Any,
    ) -> str:
        """Add one request.

        Args:
            input_ids (`Sequence[int]`): the prompt's token ids; a list, an array or a 1-D tensor.
            request_id (`str`, *optional*): must not be in use; `req_0`, `req_1`, ... by default.
            max_new_tokens (`int`, *optional*): the generation config's by default.
            streaming (`bool`): deliver an output for each token, not only the last.
            record_timestamps (`bool`): note when each token came, in seconds of `time.perf_counter`.
            eos_token_id (`int` or `list[int]`, *optional*): the generation config's by default.

        Returns:
            The request's id.

        Raises:
            ValueError: the prompt or a setting is not valid; the message names the request. Others go on.
            RuntimeError: the manager is stopping or has failed.
        """
        self._refuse_per_request(per_request)
        with self._lock:
            if request_id is None:
                request_id = self._next_id()
            requests = self._prepare(
                [(request_id, input_ids)], max_new_tokens, streaming, record_timestamps, eos_token_id
            )
            self._mailbox.post(*requests)
            self._live.add(request_id)
        return request_id

    def add_requests(
        self,
        inputs: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **per_request: Any,
    ) -> list[str]:
        """Add several requests: all of them, or none if one is not valid. See `add_request`."""
        self._refuse_per_request(per_request)
        with self._lock:
            counter = self._counter
            named = [(self._next_id(), input_ids) for input_ids in inputs]
            try:
                requests = self._prepare(named, max_new_tokens, streaming, record_timestamps, None)
                self._mailbox.post(*requests)
            except BaseException:
                self._counter = counter
                raise
            self._live.update(request_id for request_id, _ in named)
        return [request_id for request_id, _ in named]

    def size_for_pending(self) -> None:
        """Size the cache for the requests added so far, rather than for whatever may come."""
        lengths = [min(request.total_limit, 2**31) for request in self._mailbox.pending()]
        self.workload = Workload(len(lengths), max(lengths, default=0), sum(lengths))

    def cancel_request(self, request_id: str) -> None:
        """End a request: its result comes with the tokens so far and an error that says so. Unknown ids are ignored."""
        self._mailbox.cancel(request_id)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next result, of one request or of any; `None` after `timeout` seconds, or when no more will come."""
        return self._outbox.get(request_id, timeout)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, until the manager has stopped and all are out."""
        while True:
            output = self.get_result()
            if output is None:
                return
            yield output

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Results of one request, the finished one last."""
        while True:
            output = self.get_result(request_id)
            if output is None:
                return
            yield output
            if output.is_finished():
                return

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        """Call `callback` with each result of a request, on the running asyncio loop, in place of the queue."""
        self._outbox.handle(request_id, callback, asyncio.get_running_loop())

    def _next_id(self) -> str:
        while (request_id := f"req_{self._counter}") in self._live:
            self._counter += 1
        self._counter += 1
        return request_id

    def _refuse_per_request(self, per_request: dict[str, Any]) -> None:
        if per_request:
            raise ValueError(f"settings of a single request are not supported yet: {sorted(per_request)}")

    def _prepare(
        self,
        named: list[tuple[str, Sequence[int]]],
        max_new_tokens: int | None,
        streaming: bool,
        record_timestamps: bool,
        eos_token_id: int | list[int] | None,
    ) -> list[Request]:
        """Check everything a user gave, then make the requests."""
        requests = []
        for request_id, input_ids in named:
            name = f"request {request_id}"
            if request_id in self._live:
                raise ValueError(f"{name}: this id is in use, choose another or wait for its result")
            tokens = self._check_prompt(name, input_ids)
            if max_new_tokens is None:
                limit = self.generation.new_tokens(len(tokens), self._stated_positions, name)
            else:
                check_max_new_tokens(max_new_tokens, name)
                limit = max_new_tokens
            sampling = Sampling()
            if self.generation.temperature:
                digest = hashlib.blake2b(f"{self._seed}:{request_id}".encode(), digest_size=8).digest()
                sampling = Sampling(
                    self.generation.temperature,
                    self.generation.top_k,
                    self.generation.top_p,
                    int.from_bytes(digest, "little"),
                )
            requests.append(
                Request(
                    id=request_id,
                    tokens=tokens,
                    prompt_length=len(tokens),
                    max_new_tokens=limit,
                    sampling=sampling,
                    eos_ids=self.generation.eos_ids if eos_token_id is None else eos_ids(eos_token_id),
                    streaming=streaming,
                    record_timestamps=record_timestamps,
                    arrival=self._arrivals + len(requests),
                )
            )
        self._arrivals += len(requests)
        return requests

    def _check_prompt(self, name: str, input_ids: Sequence[int]) -> np.ndarray:
        try:
            tokens = np.asarray(input_ids.cpu() if isinstance(input_ids, torch.Tensor) else input_ids)
        except ValueError:
            tokens = np.empty((0, 0))
        if tokens.ndim != 1:
            raise ValueError(f"{name}: the prompt must be one flat sequence of token ids")
        if not len(tokens):
            raise ValueError(f"{name}: the prompt is empty, it needs at least one token id")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"{name}: the prompt must hold integer token ids, not {type(input_ids[0]).__name__}")
        if tokens.min() < 0 or tokens.max() >= self._vocabulary:
            wrong = tokens[(tokens < 0) | (tokens >= self._vocabulary)][0]
            raise ValueError(f"{name}: token id {wrong} is outside the vocabulary, 0 to {self._vocabulary - 1}")
        if self._learned_positions is not None and len(tokens) > self._learned_positions:
            raise ValueError(
                f"{name}: the prompt has {len(tokens)} tokens, the model has {self._learned_positions} learned positions"
            )
        return tokens.astype(np.int32)
