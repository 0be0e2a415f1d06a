"""The loop: plan, stage, launch, retire, with up to two batches in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from .graphs import StepKey
from .interpreter import undisturbed
from .lanes import Lanes, Slot
from .mailbox import Mailbox
from .metrics import Meter, Metrics
from .model import ModelLoan
from .offload import PageCopies
from .pages import Pages
from .recorder import Recorder, StepSize
from .request import MOST_FRESH, Request, Rows, Sampling
from .runner import Runner
from .scheduler import Plan, Scheduler
from .sequential import Opening, SequentialRunner
from .settings import EngineSettings, Mode, Workload
from .states import Kept, StateRunner
from .tables import PageTables


logger = logging.get_logger(f"transformers.{__name__}")


RUNNERS = {
    Mode.PAGES: Runner, Mode.HYBRID: StateRunner, Mode.STATES: StateRunner, Mode.SEQUENCES: SequentialRunner,
}  # fmt: skip


class Flight(NamedTuple):
    """A step on its way."""

    plan: Plan
    key: StepKey
    slot: Slot
    step: int


class Engine:
    """Continuous batching over one borrowed model.

        CPU       plan N+1 · stage · launch │ wait for N │ retire N │ plan N+2 · stage · launch │ wait for N+1 │ ...
        device    ──────────── step N ──────────────┤├──────── step N+1 ──────────────┤├──── step N+2 ───

    `plan` needs no token's value, only lengths, so step N+1 is on its way before the tokens of step N are known. Those
    stay on the device, where the next step reads them. A request that ends at its length limit is known to end when it
    is planned; one that ends by an EOS, a stop string, its time or a criterion of the user's is found out one step
    late, and that step's token for it is discarded.

    `overlap=False` retires each step before the next is planned. It is the same loop with a depth of one.

    Args:
        loan (`ModelLoan`): the model, borrowed.
        found (`dict`, `Kept` or `Opening`): what `loan.probe()` found, what the model keeps if it keeps states, or how
            sequences begin if they run one at a time.
        settings (`EngineSettings`): every size.
    """

    def __init__(self, loan: ModelLoan, found: dict | Kept | Opening, settings: EngineSettings) -> None:
        self.settings = settings
        self._form, self._stated = loan.form(), loan.settings()
        self._loan = loan
        self.depth = Lanes.DEPTH if settings.overlap else 1
        rows = Rows(settings.rows, settings.logprobs)
        pool = Pages(settings.pages, settings.page_size)
        tables = PageTables(settings.rows, settings.columns, settings.layout, pool)
        self.scheduler = Scheduler(
            rows, tables, settings.token_budget, settings.max_tokens, settings.reserve, settings.reuse,
            settings.host_pages, settings.whole_prompts, states=settings.mode in (Mode.HYBRID, Mode.STATES),
        )  # fmt: skip
        self.runner = RUNNERS[settings.mode](loan, found, rows, settings)
        self.lanes = Lanes(self.runner.device, self.runner.words_in, self.runner.words_out, settings.debug)
        self.copies: PageCopies | None = None
        if settings.host_pages:
            self.copies = PageCopies(self.lanes, self.runner, tables, self.scheduler.host)
        self._weights: tuple | None = None
        self.warm = not (settings.compiled or settings.graphs)  # or there is nothing to warm up
        self._warm_up_tokens = (0, 0)  # when a warm-up began, and when it will be done
        self.steps = 0
        self.meter = Meter()
        self.recorder: Recorder | None = None  # set while the loop stands still, by whoever wants to know more

    def fits(self, workload: Workload) -> bool:
        """Whether this engine still runs and fits its model, and serves `workload` as well as a new one would."""
        return self.lanes.alive and self._loan.form() == self._form and self.settings.fit(workload)

    def attach(self) -> None:
        """Take up the model, which may not be what it was: then what pages hold is not what it would compute.

        Raises:
            RuntimeError: its config is not.
        """
        if self._loan.settings() != self._stated:
            raise RuntimeError("the model's config was changed in a pause: stop the manager, and start it again")
        void = self.runner.attach()
        weights = self._loan.weights() if self.settings.reuse or self.settings.host_pages else None
        if void or weights != self._weights:
            self.scheduler.forget()
            self._weights = weights

    def release_cache(self) -> None:
        """Free the device memory of keys and values, with nothing in flight; what ran is computed again. `attach`
        allocates it again."""
        self.scheduler.preempt_all()
        self.scheduler.forget()
        self.runner.release_pages()

    def warm_up(self, sampling: Sampling) -> None:
        """Run made-up requests that fill the largest steps, so that those are compiled and captured before anybody
        waits for them: twice, for a step is captured when it comes the second time.

        Args:
            sampling (`Sampling`): how they pick tokens, which decides what is captured.
        """
        if self.warm:
            return
        s, new_tokens, draw = self.settings, 4, np.random.default_rng(0)
        room = min(s.max_tokens, s.pages // (s.rows * len(s.layout.groups)) * s.page_size) - new_tokens
        length = max(1, min((s.whole_prompts or s.token_budget) // min(s.rows, MOST_FRESH), room))
        passes = 2
        done = self.meter.tokens_out
        self._warm_up_tokens = (done, done + passes * s.rows * new_tokens)
        for _ in range(passes):
            mailbox = Mailbox()
            for row in range(s.rows):
                tokens = draw.integers(self._loan.vocabulary, size=length).astype(np.int32)
                mailbox.post(Request(f"warmup {row}", tokens, length, new_tokens, sampling, arrival=row))
            mailbox.ask_to_stop(hard=False)
            self.run(mailbox, deliver=lambda outputs: None)
        self.scheduler.forget()
        self._warm_up_tokens = (0, 0)
        self.meter = Meter()
        self.scheduler.admission.looked_up = self.scheduler.admission.reused = 0
        self.warm = True

    @torch.no_grad()
    @undisturbed()
    def run(self, mailbox: Mailbox, deliver: Callable[[list[GenerationOutput]], None]) -> None:
        """The loop. Returns when a stop was asked for and every request has ended."""
        if self.runner.device.type == "cuda":
            torch.cuda.set_device(self.runner.device)
        flights: deque[Flight] = deque()
        self._set_clock()
        self._lap("idle")
        while True:
            if mailbox.pausing(self.scheduler.idle):
                while flights:
                    self._retire(flights.popleft())
                while self.scheduler.host.under_way:
                    self._send_pages()
                    self._take_pages(wait=True)
                self._deliver(deliver)
                self._lap("deliver")
                self._set_clock()
                mailbox.park(self.scheduler.idle)
                self._set_clock()
                self._lap("idle")
            idle = self.scheduler.idle and not flights
            self._read(mailbox, wait=idle)
            self._lap("idle" if idle else "read")

            self._take_pages()
            plan = self.scheduler.plan()
            mailbox.note_waiting(len(self.scheduler.line))
            self._lap("plan")
            self._send_pages()
            if plan is not None:
                flights.append(self._launch(plan))
            if flights and (plan is None or len(flights) == self.depth):
                self._retire(flights.popleft())
            elif plan is None and self.scheduler.host.under_way:
                self._take_pages(wait=True)
                self._lap("wait")
            elif plan is None and not self.scheduler.idle:
                raise RuntimeError("requests wait, nothing is in flight, and nothing can be planned")

            self._deliver(deliver)
            self._lap("deliver")
            if self.meter.tick():
                logger.info(str(self.metrics()))
            if not flights and self.scheduler.idle:
                self.scheduler.check_books()
                self.runner.rest()
                if mailbox.done:
                    a = self.scheduler.admission
                    logger.info(f"{a.reused:,} of {a.looked_up:,} tokens of prompts so far were found in the cache")
                    self._set_clock()
                    return

    def _read(self, mailbox: Mailbox, wait: bool) -> None:
        mail = mailbox.read(wait)
        for request in mail.requests:
            self.scheduler.add(request)
        for request in mail.cancelled:
            self.scheduler.cancel(request, f"request {request.id} was cancelled")
        if mailbox.hard:
            self.scheduler.fail_all("the manager was stopped before the request finished")

    def _send_pages(self) -> None:
        if self.copies is not None:
            if moves := self.scheduler.host.take_moves():
                self._poison()  # before pages come in
            self.copies.send(moves)

    def _take_pages(self, wait: bool = False) -> None:
        if self.copies is not None:
            if wait:
                self.copies.wait()
            for move in self.copies.landed():
                self.scheduler.landed(move)

    def _poison(self) -> None:
        """Let it show where pages are read that are free; before they may be written again."""
        emptied = self.scheduler.pages.take_emptied()
        if self.settings.debug and emptied:
            pages = np.concatenate(emptied)
            self.lanes.compute.run(lambda: self.runner.poison(pages))

    def _launch(self, plan: Plan) -> Flight:
        self._poison()  # this step may have taken some pages again
        key = self.runner.key_for(plan)
        slot = self.lanes.stage()
        self.runner.stage(plan, key, slot.array_in)
        self._lap("stage")
        words_back, calls, forks = self.runner.words_back(plan, key), self.runner.calls(plan), len(plan.forks)
        self.lanes.launch(
            slot, self.runner.words(key) + plan.forks.size, words_back,
            take=lambda: self.runner.take(key, slot, forks),
            step=lambda: self.runner.step(key, slot, words_back, calls),
            marked=self.recorder is not None,
        )  # fmt: skip
        self.meter.launch(plan, self.scheduler.rows)
        if self.recorder is not None:
            size = StepSize(self.steps, len(plan.rows), plan.decodes, plan.tokens)
            self.recorder.launched(size, slot.marks)
        self._lap("launch")
        self.steps += 1
        return Flight(plan, key, slot, self.steps - 1)

    def _retire(self, flight: Flight) -> None:
        out = self.lanes.collect(flight.slot)
        self._lap("wait", flight.step)
        seconds = self.lanes.seconds(flight.slot)
        self.meter.retire(flight.plan, self.scheduler.rows, seconds)
        self.scheduler.host.note_computed(flight.plan.tokens, seconds)
        self.scheduler.retire(flight.plan, *self.runner.results(flight.plan, flight.key, out))
        self._lap("retire", flight.step)

    def _deliver(self, deliver: Callable[[list[GenerationOutput]], None]) -> None:
        if outputs := self.scheduler.take_outputs():
            self.meter.deliver(outputs)
            deliver(outputs)

    def _lap(self, phase: str, step: int | None = None) -> None:
        """Note that a phase of the loop has ended, of the next step to launch where not stated."""
        begin, end = self.meter.lap(phase)
        if self.recorder is not None:
            self.recorder.lap(phase, self.steps if step is None else step, begin, end)

    def _set_clock(self) -> None:
        if self.recorder is not None:
            self.recorder.set_clock(*self.lanes.now())

    # For any thread:

    def metrics(self) -> Metrics:
        """What the engine does."""
        return self.meter.metrics(self.scheduler, self.runner.graphs.count, self.runner.warming_up)

    def warm_up_progress(self) -> tuple[int, int]:
        """Tokens of a warm-up that have come, and how many there will be; zeros while there is none."""
        begin, end = self._warm_up_tokens
        return min(self.meter.tokens_out, end) - begin, end - begin
