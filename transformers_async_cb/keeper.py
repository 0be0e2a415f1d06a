"""The model on loan, and an engine that fits it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.utils import logging

from . import self_check
from .choices import Choice, explain, explain_sequential
from .config import AsyncBatchingConfig
from .engine import Engine
from .metrics import Metrics
from .model import ModelLoan, NotPaged
from .progress import show_warm_up
from .request import Sampling
from .sequential import Opening, resolve_sequential
from .settings import Workload, resolve_engine


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
        self._why_sequential = ""
        self._last_metrics = Metrics()  # of the engine before

    def prepare(self, workload: Workload) -> None:
        """Borrow the model, and have an engine that fits it and the workload.

        Raises:
            ValueError: the model is not supported, or there is no memory for the cache.
        """
        if self.loan.out:
            return
        try:
            self._build(workload)
        except NotPaged as reason:
            if not self.own.sequential_fallback:
                raise
            logger.warning(f"one sequence at a time, each with a cache of its own, which is slow: {reason}")
            self.loan.paged, self._why_sequential = False, str(reason)
            self._build(workload)

    def warm_up(self, workload: Workload, sampling: Sampling) -> None:
        """Prepare, and have the engine compile and capture what its largest steps need."""
        self.prepare(workload)
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
                if self.engine is None or not self.engine.fits(workload):
                    self.drop()
                    self.engine = self._new_engine(workload)
                self.engine.attach()
        except BaseException:
            self.loan.give_back()
            raise

    def _new_engine(self, workload: Workload) -> Engine:
        loan, configs = self.loan, (self._batching, self.own, workload)
        if loan.paged:
            found = loan.probe()
            settings = resolve_engine(loan, found.values(), *configs)
            if self.own.self_check:
                self_check.check(loan, found, settings)
            self.choices = explain(settings, loan, found.values(), *configs)
        else:
            found = Opening(loan.model)
            found.try_out()
            settings = resolve_sequential(loan, found, *configs)
            self.choices = explain_sequential(settings, self._why_sequential, *configs)
        for choice in self.choices:
            logger.info(str(choice))
        return Engine(loan, found, settings)
