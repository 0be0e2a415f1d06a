"""The model on loan, and an engine that fits it."""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.utils import logging

from . import compiling, self_check
from .choices import Choice, explain, explain_sequential, explain_states
from .config import AsyncBatchingConfig
from .engine import Engine
from .metrics import Metrics
from .model import ModelLoan, NotPaged
from .progress import show_warm_up
from .request import Sampling
from .sequential import Opening, resolve_sequential
from .settings import EngineSettings, Mode, Workload, resolve_engine
from .states import Kept, resolve_states


logger = logging.get_logger(f"transformers.{__name__}")


class EngineKeeper:
    """Borrows the model, and keeps the engine that was built last for as long as it fits the model and the workload.

    `lock` is held by whoever starts or stops the loop, pauses it, or takes the model from it.

    Args:
        model (`PreTrainedModel`): borrowed by `prepare`; whoever holds the lock may give `loan` back.
        batching (`ContinuousBatchingConfig`), own (`AsyncBatchingConfig`): what engines are built with.
    """

    def __init__(self, model: PreTrainedModel, batching: ContinuousBatchingConfig, own: AsyncBatchingConfig) -> None:
        self.loan = ModelLoan(model)
        self.own = own
        self.engine: Engine | None = None
        self.choices: list[Choice] = []  # of the engine that was built last
        self.lock = threading.RLock()
        self._batching = batching
        self.mode = Mode.PAGES  # of the engine that was built last, or is to be built
        self._best = Mode.PAGES  # that was not found impossible
        self._why_not_paged = ""  # what made the best worse
        self._why = ""  # not `Mode.PAGES`
        self._last_metrics = Metrics()  # of the engine before

    def prepare(self, workload: Workload, given: Collection[str] = ()) -> None:
        """Borrow the model, and have an engine that fits it, the workload and the calling thread's autocast.

        Args:
            given: names of inputs that requests give the model beside token ids. With any, sequences run one at a
                time.

        Raises:
            ValueError: the model is not supported, or there is no memory for the cache.
        """
        autocast = self.loan.autocast
        self.loan.note_autocast()
        alone = self._alone(given)
        if self.loan.out:
            fits = self.loan.autocast == autocast and not (alone and self.loan.batched)
            if fits and self.engine.lanes.alive:
                return
            self.loan.give_back()
        if not alone:
            self._turn_to(self._best, self._why_not_paged)
        elif self.own.sequential_fallback:
            self._turn_to(Mode.SEQUENCES, alone)
        else:
            raise NotPaged(alone)
        while True:
            try:
                self._build(workload)
                return
            except NotPaged as reason:
                self._why_not_paged = self._why_not_paged or str(reason)
                self._fall_back(reason)

    def _alone(self, given: Collection[str]) -> str:
        """Why sequences are to run one at a time, whatever the model, if they are."""
        if self.own.one_at_a_time:
            return "one_at_a_time=True, as set"
        return f"requests give the model {', '.join(sorted(given))} beside token ids" if given else ""

    def _fall_back(self, reason: NotPaged) -> None:
        """Have the next engine run the model in the next best way, or raise why it cannot be run in the best."""
        mode = self.mode.next_best
        if mode is None or (mode is Mode.SEQUENCES and not self.own.sequential_fallback):
            raise NotPaged(self._why_not_paged) from reason
        self._best = mode
        self._turn_to(mode, self._why_not_paged)

    def _turn_to(self, mode: Mode, why: str) -> None:
        """Have the next engine run the model that way."""
        if mode is Mode.SEQUENCES and self.mode is not mode:
            logger.warning(f"{mode.value}, which is slow: {why}")
        self.mode, self._why = mode, why
        self.loan.paged, self.loan.batched = mode.paged, mode is not Mode.SEQUENCES

    def warm_up(self, workload: Workload, sampling: Sampling, given: Collection[str] = ()) -> None:
        """Prepare, and have the engine compile and capture what its largest steps need."""
        self.prepare(workload, given)
        try:  # on a thread like the loop's, to which what is compiled is bound
            with ThreadPoolExecutor(1, thread_name_prefix="async-batching-warmup") as executor:
                self.engine.lanes.enter()
                warm_up = executor.submit(self.engine.warm_up, sampling)
                if not self.engine.warm:
                    show_warm_up(self.engine, warm_up)
                warm_up.result()
        except BaseException:
            self.drop()
            self.loan.give_back()
            raise

    def drop(self) -> None:
        """Keep the engine no longer, if there is one."""
        engine, self.engine = self.engine, None
        if engine is not None:
            self._last_metrics = engine.metrics()
            engine.lanes.close()
            self.loan.separate_products()

    def metrics(self) -> Metrics:
        """The engine's, or those of the last one when it was dropped."""
        engine = self.engine
        return self._last_metrics if engine is None else engine.metrics()

    def _build(self, workload: Workload) -> None:
        self.loan.borrow()
        try:
            # The engine's thread writes to what is made here: no inference tensors, whatever the caller's mode.
            with torch.inference_mode(False), torch.no_grad():
                engine = self.engine
                if engine is None or engine.settings.mode is not self.mode or not engine.fits(workload):
                    self.drop()
                    self.engine = self._new_engine(workload)
                self.engine.attach()
        except BaseException:
            self.loan.give_back()
            raise

    def _new_engine(self, workload: Workload) -> Engine:
        loan, configs = self.loan, (self._batching, self.own, workload)
        if loan.device.type == "cuda" and self.mode is Mode.PAGES and self.own.compile_layers is not False:
            compiling.get_ready()
        found, settings = self._resolve(workload)
        if self.mode is Mode.PAGES:
            self.choices = explain(settings, loan, *configs)
        elif self.mode is Mode.SEQUENCES:
            self.choices = explain_sequential(settings, self._why, *configs)
        else:
            self.choices = explain_states(settings, found, self._why, *configs)
        if self.own.self_check and self.mode is not Mode.SEQUENCES:
            self_check.check(loan, found, settings, lambda: self._resolve(workload))
        for choice in self.choices:
            logger.info(str(choice))
        return Engine(loan, found, settings)

    def _resolve(self, workload: Workload) -> tuple[self_check.Found | Opening, EngineSettings]:
        """What a trial run finds of the model in this mode, and the settings that fit it."""
        loan, configs = self.loan, (self._batching, self.own, workload)
        if self.mode is Mode.PAGES:
            found = loan.probe()
            return found, resolve_engine(loan, found, *configs)
        if self.mode is Mode.SEQUENCES:
            found = Opening(loan)
            found.try_out()
            return found, resolve_sequential(loan, found, *configs)
        found = Kept(loan)
        return found, resolve_states(loan, found, *configs)
