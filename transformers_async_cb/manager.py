"""What a user holds: requests in, results out, start and stop."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from .choices import Choice
from .config import AsyncBatchingConfig
from .door import Door
from .engine import Engine
from .holds import Holds
from .keeper import EngineKeeper
from .loop_thread import LoopThread
from .mailbox import Mailbox, Outbox
from .metrics import Metrics
from .prompts import Prompt
from .recorder import Recorder
from .request import Request
from .settings import Mode, Workload, check_batching
from .streams import TokenStream
from .submission import Submission
from .timeline import check_file, write


logger = logging.get_logger(f"transformers.{__name__}")

# Where a persistent manager waits on the model; transformers' own is under another name, so neither finds the other's.
CACHED = "_async_batching_manager"


class AsyncBatchingManager:
    """Generates for many requests at once on a thread of its own.

    Made by `model.init_continuous_batching(async_batching=True)`; the methods are those of transformers'
    `ContinuousBatchingManager`. One that nobody holds any more ends as `stop(block=False)` has it end.

    Args:
        model (`PreTrainedModel`): borrowed from `start` to `stop`, and as it was before and after.
        generation_config (`GenerationConfig`, *optional*): as for `model.generate`; copied.
        continuous_batching_config (`ContinuousBatchingConfig`, *optional*): copied.
        async_config (`AsyncBatchingConfig`, *optional*): settings of this engine alone.
        workload (`Workload`, *optional*): what is known of the requests, to size the cache.
        overrides (`dict`, *optional*): generation settings that go before `generation_config`'s.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's; stop strings, texts, chats and structured
            output need it.
        stopping_criteria (`list[StoppingCriteria]`, *optional*): ask these after each token. They are called on the
            engine's thread, which waits for them, with the request's ids (int64 `[1, n]` on the CPU, prompt and
            answer) and `scores=None`; one object serves all requests. One that raises ends that request alone.
        logits_processor (`list[LogitsProcessor]`, *optional*): change the logits with these, after all that the
            generation settings do to them, and before sampling. They are called for one request at a time, on a thread
            of the engine's, with ids int64 `[1, n]` and scores float32 `[1, V]` on the model's device; one object
            serves all requests. After a request's last token they may be called for one more, which is discarded. One
            that raises ends that request alone. Steps with them are not captured, and wait while they wait.

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
        tokenizer: PreTrainedTokenizerBase | None = None,
        stopping_criteria: list[StoppingCriteria] | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
    ) -> None:
        self.model = model
        self.continuous_batching_config = copy.deepcopy(continuous_batching_config) or ContinuousBatchingConfig()
        self.async_config = async_config or AsyncBatchingConfig()
        check_batching(self.continuous_batching_config)
        self.workload = workload or Workload()
        self._keeper = EngineKeeper(model, self.continuous_batching_config, self.async_config)
        self._door = Door(self._keeper.loan, self.continuous_batching_config.seed)
        self.configure(generation_config, overrides, tokenizer, stopping_criteria, logits_processor)
        self._mailbox = Mailbox(self.continuous_batching_config.max_queue_size)
        self._outbox = Outbox()
        self._submission = Submission(self._door, self._mailbox)
        self._holds = Holds(self._keeper, self._mailbox)
        self._loop = LoopThread(self._keeper, self._holds, self._door.live, self._mailbox, self._outbox)

    def configure(
        self,
        generation_config: GenerationConfig | None,
        overrides: dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stopping_criteria: list[StoppingCriteria] | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
    ) -> None:
        """Set the generation settings of the requests that are added from now on."""
        self._door.configure(generation_config, overrides or {}, tokenizer, stopping_criteria, logits_processor)

    def take_up(
        self,
        generation_config: GenerationConfig | None,
        overrides: dict[str, Any] | None,
        workload: Workload,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stopping_criteria: list[StoppingCriteria] | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
    ) -> None:
        """Begin another session of a manager that was kept. Results that nobody asked for are gone."""
        self.configure(generation_config, overrides, tokenizer, stopping_criteria, logits_processor)
        self.workload = workload
        self._outbox.clear()

    @contextmanager
    def claimed(self) -> Generator[None]:
        """Within, no other thread starts, stops or takes up this manager."""
        with self._keeper.lock:
            yield

    def hand_back(self, outputs: list[GenerationOutput]) -> None:
        """Offer results again that were meant for somebody else."""
        self._outbox.put(outputs)

    def model_digest(self) -> tuple:
        """What tells this model from others, the same in every process: its class, and exact sums over its weights
        (which are not there for some kinds of quantised ones)."""
        sums = self._keeper.loan.weights()[0]
        return type(self.model).__name__, sums if isinstance(sums, list) else None

    def __del__(self) -> None:
        """Nobody can stop it any more. One that was kept goes with its model, which nobody needs back."""
        loop = vars(self).get("_loop")  # there is none if a setting was not supported
        if loop is not None and getattr(self.model, CACHED, None) is not self:
            loop.abandon()

    def __reduce__(self) -> tuple:
        """A kept manager hangs on its model; a copy of the model has none."""
        return type(None), ()

    # ------------------------------------------------------------------------------------------------ control

    @property
    def _engine(self) -> Engine | None:
        return self._keeper.engine

    @property
    def mode(self) -> Mode:
        """How the model is run: the best way, unless that was tried and is not possible."""
        return self._keeper.mode

    @property
    def choices(self) -> list[Choice]:
        """What the engine that was built last was built with, and why."""
        return self._keeper.choices

    @property
    def fatal_error(self) -> BaseException | None:
        """What ended the last run before its time, if anything did."""
        return self._loop.fatal_error

    @property
    def warmed_up(self) -> bool:
        return self._engine is not None and self._engine.warm

    @property
    def longest_sequence(self) -> int:
        """Tokens of prompt and answer that there is room for in one request, once the manager has been warmed up."""
        return self._engine.settings.max_tokens

    def is_running(self) -> bool:
        return self._loop.is_running()

    def warmup(self) -> None:
        """Do before `start` what takes long: borrow the model, build the engine, its cache included, and compile and
        capture what the largest steps need. A kept engine is taken up again if it fits the model and the workload.

        Raises:
            ValueError: the model is not supported, or there is no memory for the cache.
        """
        with self._keeper.lock:
            if self.is_running():
                logger.warning("the manager is running already")
                return
            self._keeper.warm_up(self.workload, self._door.sampling, self._door.given)

    def start(self) -> None:
        """Begin to generate. Requests added before are taken first."""
        with self._keeper.lock:
            if self.is_running():
                logger.warning("the manager is running already")
                return
            self._loop.start(self.workload, self._door.given)

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Finish the requests that are there, take no more, and give the model back.

        Args:
            block (`bool`): wait for that; `join` does it later.
            timeout (`float`, *optional*): wait at most so many seconds.
            keep_for_next_session (`bool`): keep the manager on the model for the next call.
            hard_stop (`bool`): end the requests that are not finished with an error instead.

        Raises:
            RuntimeError: called from inside a pause.
        """
        if self._holds.here:
            raise RuntimeError("cannot stop the manager from inside a pause: leave the `pause` context first")
        settle = self._stay if keep_for_next_session else partial(self._leave, self._keeper)
        self._loop.stop(settle, block, timeout, hard_stop)

    def _stay(self) -> None:
        """Wait on the model for the next session, engine and all."""
        if self.fatal_error is not None:
            self._leave(self._keeper)
            return
        setattr(self.model, CACHED, self)
        self._mailbox.reopen()

    @staticmethod
    def _leave(keeper: EngineKeeper) -> None:
        """Leave nothing behind on the model. Not a method: a loop that has yet to end would hold the manager."""
        keeper.drop()
        kept: AsyncBatchingManager | None = getattr(keeper.loan.model, CACHED, None)
        if kept is not None and kept._keeper is keeper:
            delattr(keeper.loan.model, CACHED)

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        """Wait for a stop that was asked for, at most so many seconds.

        Args:
            stop_trigger_time (`float`): when that was, of `time.perf_counter`, for the log.
        """
        if self._loop.join(timeout):
            logger.info(f"the manager stopped after {time.perf_counter() - stop_trigger_time:.2f} s")

    def destroy(self) -> None:
        """Finish the requests that are there, and leave nothing on the model. Safe to call more than once."""
        self.stop()

    @contextmanager
    def pause(self) -> Generator[None]:
        """Hold the loop with nothing in flight and the model as it was, to use it or to change its weights in place;
        requests stay. Several threads may pause at once.

        Raises:
            RuntimeError: the loop is not running.
        """
        self._check_running()
        with self._holds.pause():
            yield

    def _check_running(self) -> None:
        if not self.is_running():
            raise RuntimeError("cannot pause, the manager is not running")
        self._check_elsewhere()

    def _check_elsewhere(self) -> None:
        if self._loop.here:
            raise RuntimeError(
                "cannot hold the manager from one of its own threads, on which stopping criteria, logits processors "
                "and hooks are called"
            )

    @contextmanager
    def update_weights(self, in_flight: str = "keep") -> Generator[PreTrainedModel]:
        """Hold the loop as `pause` does, to change the weights of the model inside: in place, or by giving parameters
        other storage. On CUDA, what this thread's current stream does inside comes after all steps before and before
        all after. Prompts find no keys and values of the old weights in the cache.

        Args:
            in_flight (`str`): what becomes of requests that are under way. `"keep"`: they go on, and of the tokens so
                far they keep the keys and values that the old weights gave. `"recompute"`: those are computed again
                with the new weights. `"drain"`: they are finished with the old weights first; requests that are added
                meanwhile wait.

        Raises:
            ValueError: `in_flight` is none of these.
            RuntimeError: the loop is not running, or could not finish requests for `"drain"`.
        """
        if in_flight not in ("keep", "recompute", "drain"):
            raise ValueError(f"in_flight must be 'keep', 'recompute' or 'drain', got {in_flight!r}")
        if in_flight == "drain" and (self._holds.asleep or self._holds.here):
            raise RuntimeError("cannot finish requests now: the manager sleeps, or this thread holds a pause")
        self._check_running()
        with self._holds.pause(drain=in_flight == "drain"):
            if in_flight == "recompute":
                with self._keeper.lock:  # of several at once, each has its turn
                    self._engine.scheduler.preempt_all()
            yield self.model

    def sleep(self) -> None:
        """Hand the memory of keys and values to whoever wants it, until `wake`; the model is the caller's meanwhile,
        as in a pause. Requests stay, and those under way are computed again. A manager that was kept and does not run
        sleeps until the next start.
        """
        with self._keeper.lock:  # nobody starts the loop between the look and the sleep
            if not self.is_running():
                self._holds.sleep(running=False)
                return
        self._check_elsewhere()
        self._holds.sleep(running=True)

    def wake(self) -> None:
        """End a sleep: take the memory back, and go on with the model as it is now.

        Raises:
            torch.OutOfMemoryError: it is not there; the manager still sleeps.
        """
        self._holds.wake()

    # ------------------------------------------------------------------------------------------------ measuring

    def metrics(self) -> Metrics:
        """What the engine does and has done; any thread may ask at any time, and the loop does not wait for it."""
        metrics = self._keeper.metrics()
        return replace(metrics, waiting=metrics.waiting + self._mailbox.count)

    @contextmanager
    def trace(self, file: str) -> Generator[None]:
        """Within, note what the host and the device do, and then write it: a trace that https://ui.perfetto.dev opens
        (`.json`), or a picture (`.png`, `.svg`, `.pdf`). The loop stands still for a moment at the begin and the end.

        Raises:
            ValueError: the file's name ends otherwise, a picture without matplotlib, or nothing was generated.
            RuntimeError: what the loop does is being noted already.
        """
        check_file(file)
        with self.recording() as recorder:
            yield
        write(file, [self._loop.timeline_of(recorder)])

    @contextmanager
    def recording(self) -> Generator[Recorder]:
        """Within, the loop notes what it does; after it, the recorder may be read."""
        if self._loop.recorder is not None:
            raise RuntimeError("this manager's timeline is being recorded already")
        self._check_elsewhere()
        recorder = Recorder()
        self._loop.set_recorder(recorder)
        try:
            yield recorder
        finally:
            self._loop.set_recorder(None)

    # ------------------------------------------------------------------------------------------------ requests

    def add_request(
        self,
        input_ids: Prompt,
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        stop_strings: str | list[str] | None = None,
        max_time: float | None = None,
        stopping_criteria: list[StoppingCriteria] | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
        json_schema: str | dict | type | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        **per_request: Any,
    ) -> str:
        """Add one request. Its own generation settings are merged as a call's are: its keyword arguments go before its
        config, or the manager's settings if it has none, and the model's come last.

        Args:
            input_ids (`Prompt`): the prompt's token ids (a list, an array or a 1-D tensor); or, when the manager has a
                `tokenizer`, a text, or a chat as a list of messages.
            request_id (`str`, *optional*): must not be in use; `req_0`, `req_1`, ... by default.
            max_new_tokens (`int`, *optional*): the generation config's by default.
            streaming (`bool`): deliver an output for each token, not only the last.
            record_timestamps (`bool`): note when each token came, in seconds of `time.perf_counter`.
            eos_token_id (`int` or `list[int]`, *optional*): the generation config's by default.
            stop_strings (`str` or `list[str]`, *optional*): end the request with the token that completes one of them,
                as `model.generate` does; the generation config's by default. They need the manager's `tokenizer`.
            max_time (`float`, *optional*): end the request with the first token that comes so many seconds after its
                computation began, which is after any wait for room; the generation config's by default.
            stopping_criteria (`list[StoppingCriteria]`, *optional*): in place of the manager's.
            logits_processor (`list[LogitsProcessor]`, *optional*): in place of the manager's.
            json_schema (`str`, `dict` or a Pydantic model, *optional*): the answer is JSON of this schema. This and
                the next two exclude each other, and need xgrammar and the manager's `tokenizer`. They end with an EOS,
                or, if the request has none, when no token can follow; what the limit cuts off is incomplete. Tokens
                that do not fit are left out after all other settings and processors, before sampling.
            regex (`str`, *optional*): the whole answer matches this.
            grammar (`str`, *optional*): the answer follows this grammar, in the EBNF of GBNF
                (https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md) with the rule `root` on top.
            generation_config (`GenerationConfig`, *optional*): in place of all the manager's settings.
            stop_in_answer (`bool`): stop strings end the request only where they lie in the answer; by default they
                may begin in the prompt, as for `model.generate`.
            seed (`int`, *optional*): decides what is sampled, whatever the request's id. Not the same as the
                `ContinuousBatchingConfig`'s, from which and the id the seed is made by default.
            priority (`int`, *optional*): requests with a higher one go first, among those that wait for room; 0 by
                default. It is the last to be preempted, too.
            deadline (`float`, *optional*): seconds from now after which the request fails, finished or not.
            logprobs (`int`, *optional*): 0 gives each generated token's log-probability, in the output's `logprobs`;
                n the n likeliest in its place too, in `top_logprobs`, up to 20. They are the model's own, the
                log-softmax of its logits; those of `ContinuousBatchingConfig(return_logprobs=True)`, whose place they
                take, are of the distribution that the token was drawn from.
            prompt_logprobs (`int`, *optional*): the same for the prompt's tokens after the first, in
                `prompt_logprobs` and `prompt_top_logprobs`. Such a prompt is computed anew, a part at a time.
            per_request: any other generation setting, such as `do_sample=True, temperature=0.7`. With
                `num_return_sequences=3` two more results come, of `{request_id}__child#0` and `{request_id}__child#1`;
                each has a seed of its own, and the prompt is computed once. And `presence_penalty`,
                `frequency_penalty` and `logit_bias` (a dictionary from token ids to what is added to their logits),
                which mean what they do in OpenAI's interface. And what the model's `generate` takes beside token ids,
                by the same names and for this request alone: `pixel_values=..., image_grid_thw=...`. Tensors are
                copied. Such requests run where sequences run one at a time; for encoder-decoders, `input_ids` are the
                encoder's, and `decoder_input_ids=...` what the decoder begins with.

        Returns:
            The request's id, which is also that of its first sequence.

        With `ContinuousBatchingConfig(max_queue_size=...)` this waits until fewer requests than that wait to begin.

        Raises:
            ValueError: the prompt or a setting is not valid; the message names the request. Others go on.
            ImportError: `json_schema`, `regex` or `grammar` was given, and xgrammar is not installed.
            RuntimeError: the manager is stopping or has failed, or nothing takes requests out of a full queue.
        """
        settings = {
            "max_new_tokens": max_new_tokens, "streaming": streaming, "record_timestamps": record_timestamps,
            "eos_token_id": eos_token_id, "stop_strings": stop_strings, "max_time": max_time,
            "stopping_criteria": stopping_criteria, "logits_processor": logits_processor,
            "json_schema": [json_schema], "regex": [regex], "grammar": [grammar], **per_request,
        }  # fmt: skip
        request_ids = None if request_id is None else [request_id]
        return self._submission.add([input_ids], request_ids, settings, None, self._may_wait)[0]

    def add_requests(
        self,
        inputs: Sequence[Prompt],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        request_settings: Sequence[Mapping[str, Any]] | None = None,
        wait: bool = True,
        **per_request: Any,
    ) -> list[str]:
        """Add several requests: all of them, or none if one is not valid. See `add_request`; settings hold for all,
        but `generation_config`, `json_schema`, `regex` and `grammar` may be lists with one for each, and
        `request_settings` one dictionary for each, with whatever `add_request` takes, which goes before the settings
        of all. With `wait=False` a queue that has no room for them raises `mailbox.QueueFull`, a `RuntimeError`.
        """
        settings = {
            "max_new_tokens": max_new_tokens, "streaming": streaming, "record_timestamps": record_timestamps,
            **per_request,
        }  # fmt: skip
        return self._submission.add(inputs, None, settings, request_settings, wait and self._may_wait)

    def add_batch(
        self,
        inputs: Sequence[Prompt],
        request_ids: list[str] | None,
        settings: dict[str, Any],
        request_settings: Sequence[Mapping[str, Any]] | None = None,
        choose: Callable[[list[Request]], list[Request]] = list,
        roomy: bool = False,
    ) -> list[str]:
        """Add a call's requests before the manager starts, whatever the bound of the queue, and size the cache for
        them rather than for whatever may come.

        Args:
            roomy (`bool`): size it for somewhat larger calls too, which will follow.
            choose (`Callable`): which of the requests to add, once all have been checked; it may raise.

        Returns:
            The ids of all sequences, chosen or not.
        """
        sequence_ids = self._submission.add_chosen(inputs, request_ids, settings, request_settings, choose)
        self.size_for_pending()
        if roomy:  # powers of two: however calls grow, few engines are built
            self.workload = Workload(*(1 << (size - 1).bit_length() for size in self.workload))
        return sequence_ids

    def sequence_ids(self, request_ids: list[str]) -> list[str]:
        """Those ids, each followed by those of its other sequences, as far as they have not ended."""
        return self._submission.sequence_ids(request_ids)

    def size_for_pending(self) -> None:
        """Size the cache for the requests added so far, rather than for whatever may come."""
        lengths = [min(request.total_limit, 2**31) for request in self._mailbox.pending()]
        self.workload = Workload(len(lengths), max(lengths, default=0), sum(lengths))

    @property
    def _may_wait(self) -> bool:
        """Whether something takes requests out of the queue while this thread waits."""
        return self.is_running() and not self._holds.here and not self._loop.here

    def cancel_request(self, request_id: str) -> None:
        """End a request: its result has the tokens so far and an error that says so. The id of a request with several
        sequences ends all of them that go on, a child's that one alone. Unknown ids are ignored."""
        self._submission.cancel(request_id)

    def cancel_sequences(self, sequence_ids: Iterable[str]) -> None:
        """As `cancel_request`, but a sequence that is the first of several ends alone too."""
        self._submission.cancel_sequences(sequence_ids)

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

    def stream(self, request_id: str, tokenizer: PreTrainedTokenizerBase | None = None) -> TokenStream:
        """The tokens of a request as they come, for `async for` on the running asyncio loop, in place of the queue:

            request_id = manager.add_request(prompt, streaming=True)
            async for token in manager.stream(request_id):
                ...

        Closing the iterator, or dropping it, before the end cancels the request. Results of the request that came
        before are not lost; without `streaming=True` all tokens come at the end.

        Args:
            request_id (`str`): one that was added, and whose results nobody else takes.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): yield what each token adds to the text instead (`str`,
                never a part of a character, special tokens left out); what they add together is
                `tokenizer.decode(generated_tokens, skip_special_tokens=True)`.

        Raises:
            ValueError: there is no such request, or its result was taken.
            RuntimeError: no asyncio loop is running; from the iterator, the request failed.
        """
        loop = asyncio.get_running_loop()
        with self._outbox.lock:
            if request_id not in self._door.live and not self._outbox.holds(request_id):
                raise ValueError(f"there is no request {request_id!r}, or its result was taken already")
            stream = TokenStream(request_id, self.cancel_request, tokenizer)
            self._outbox.handle(request_id, stream.taker(), loop)
        return stream
