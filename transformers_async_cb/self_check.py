"""Before a model first runs batched: a few tokens of two requests, their logits beside those that `generate` gets."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from huggingface_hub.constants import HF_HOME
from transformers.utils import logging

from . import __version__
from .attention import LayerShape, Place
from .graphs import StepKey
from .inputs import StepArrays
from .lanes import Slot
from .model import ModelLoan, NotPaged, difference
from .pages import Pages
from .request import Request, Rows
from .runner import Runner
from .scheduler import Scheduler
from .sequential import Opening
from .settings import EngineSettings
from .states import Kept, StateRunner
from .tables import PageTables


logger = logging.get_logger(f"transformers.{__name__}")

# What passed, by classes and digest: of this process, and of others where a check took longer than so many seconds.
_passed: set[tuple[frozenset[type], str]] = set()
FILE = Path(HF_HOME) / "transformers_async_cb" / "checked.json"
WORTH_NOTING = 0.5

# Tokens of the shorter prompt, at least; the longer one has twice as many.
SHORTEST = 24
NEW_TOKENS = 4
# Multiplications that prompts long enough for every window may take on a CPU, and on a GPU: about a second.
_MOST_WORK = {"cpu": 2e10, "cuda": 1e14}
# How far the logits of a sequence may be off, as a share of their size, in the median.
_CLOSE, _CLOSE_ROUNDED = 1e-3, 0.1

Found = dict[Place, LayerShape] | Kept


class Trial(NamedTuple):
    """What a request got."""

    tokens: list[int]  # prompt and answer
    logits: list[torch.Tensor]  # `[V]` after the prompt, and after each token but the last


class _Noting:
    """Mixed into a runner: keeps the logits of its last step."""

    def _forward(
        self, key: StepKey, a: StepArrays, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        logits = super()._forward(key, a, ids, positions, keep)
        self.logits = logits.clone()
        return logits


class _NotingRunner(_Noting, Runner):
    """On pages."""


class _NotingStateRunner(_Noting, StateRunner):
    """With states."""


@torch.no_grad()
def check(
    loan: ModelLoan, found: Found, settings: EngineSettings, resolve: Callable[[], tuple[Found, EngineSettings]]
) -> None:
    """Compare, unless a model of such modules and this config has passed before. One that has functions of the user's
    is always compared, and other processes are trusted with the classes of transformers and torch alone: of others,
    the code may have changed.

    Two prompts are computed, one in two chunks if it may be cut, then a few tokens decoded, on a small cache of the
    check's own. Where the device can compute that many tokens in about a second, they go beyond each window. A model
    in half precision that is off is compared again in float32: where it chooses among experts, rounding alone can make
    any difference.

    Args:
        loan (`ModelLoan`): the model, borrowed. It is given back in between, and borrowed again.
        found (`dict` or `Kept`): what `loan.probe()` found, or what the model keeps.
        settings (`EngineSettings`): of the engine to come.
        resolve (`Callable`): finds the two anew, for a model whose dtype has changed.

    Raises:
        NotPaged: the logits differ.
    """
    begin, rounds = time.perf_counter(), loan.rounds
    classes, digest = frozenset(map(type, loan.model.modules())), _digest(loan, settings)
    as_written = not loan.users_functions()
    shared = as_written and all(each.__module__.partition(".")[0] in ("transformers", "torch") for each in classes)
    if as_written and ((classes, digest) in _passed or (shared and digest in _read_file())):
        return
    try:
        _compare(loan, found, settings, _CLOSE_ROUNDED if rounds else _CLOSE)
    except NotPaged as refusal:
        if not rounds:
            raise
        try:
            with loan.in_float32():
                _compare(loan, *resolve(), _CLOSE)
        except Exception as error:
            logger.info(f"compared again in float32: {error}")
            raise refusal from error
        finally:
            resolve()  # what the loan has noted of the model is of its dtype again
    if as_written:
        _passed.add((classes, digest))
    if shared and time.perf_counter() - begin > WORTH_NOTING:
        _write_file(digest)


def _compare(loan: ModelLoan, found: Found, settings: EngineSettings, close: float) -> None:
    """Raises `NotPaged` if logits are further off than that."""
    model = loan.model
    with_states = isinstance(found, Kept)
    length = _prompt_length(loan, found.shapes if with_states else found)
    prompts = [_tokens(count, loan.vocabulary) for count in (2 * length, length)]
    try:
        trials = _in_steps(loan, found, settings, prompts)
    except Exception as error:
        if not with_states or isinstance(error, torch.OutOfMemoryError):
            raise
        raise NotPaged(f"{type(model).__name__} fails with batched states: {type(error).__name__}: {error}") from error
    loan.give_back()
    loan.paged = False
    try:
        loan.borrow()
        opening = Opening(loan)
        expected = [_one_by_one(opening, trial, len(prompt)) for trial, prompt in zip(trials, prompts, strict=True)]
    except ValueError as error:
        logger.info(f"{type(model).__name__} cannot be compared with generate: {error}")
        return
    finally:
        loan.give_back()
        loan.paged = settings.mode.paged
        loan.borrow()
    for trial, logits in zip(trials, expected, strict=True):
        off = statistics.median(difference(a, b) for a, b in zip(trial.logits, logits, strict=True))
        if not off <= close:
            batched = "with batched states" if with_states else "on pages"
            raise NotPaged(
                f"{type(model).__name__} gets other logits {batched} of async_batching than in generate, off by "
                f"{off:.1%} of their size in a trial of {len(trial.tokens)} tokens"
            )


def _in_steps(loan: ModelLoan, found: Found, settings: EngineSettings, prompts: list[np.ndarray]) -> list[Trial]:
    """What the engine computes for the prompts: the first in two chunks if prompts are cut, the second whole beside
    the first of them."""
    longest = max(map(len, prompts)) + NEW_TOKENS
    columns = -(-longest // settings.page_size)
    budget = sum(map(len, prompts)) if settings.whole_prompts else max(map(len, prompts))
    small = settings._replace(
        pages=settings.layout.pages_for(longest) * len(prompts), rows=len(prompts), columns=columns,
        token_budget=budget,
        fused=False, compiled=False, graphs=False, logprobs=False, reuse=False, host_pages=0, debug=False,
    )  # fmt: skip
    rows = Rows(small.rows, with_logprobs=False)
    tables = PageTables(small.rows, columns, small.layout, Pages(small.pages, small.page_size))
    scheduler = Scheduler(
        rows, tables, small.token_budget, longest, reuse=False, whole_prompts=small.whole_prompts
    )  # fmt: skip
    noting = _NotingStateRunner if isinstance(found, Kept) else _NotingRunner
    runner = noting(loan, found, rows, small)
    runner.attach()
    slot = Slot(runner.words_in, runner.words_out, runner.device)
    requests = [Request(str(i), p, len(p), NEW_TOKENS, arrival=i) for i, p in enumerate(prompts)]
    logits: dict[str, list[torch.Tensor]] = {request.id: [] for request in requests}
    for request in requests:
        scheduler.add(request)
    while (plan := scheduler.plan()) is not None:
        key = runner.key_for(plan)
        runner.stage(plan, key, slot.array_in)
        slot.device_in.copy_(slot.host_in)
        runner.take(key, slot, forks=0)
        runner.step(key, slot, words_back := runner.words_back(plan, key), calls=[])
        for i in np.flatnonzero(plan.samples):
            logits[rows.request[plan.rows[i]].id].append(runner.logits[i])
        scheduler.retire(plan, *runner.results(plan, key, slot.device_out[:words_back].cpu().numpy()))
    return [Trial(request.tokens.tolist(), logits[request.id]) for request in requests]


def _one_by_one(opening: Opening, trial: Trial, prompt_length: int) -> list[torch.Tensor]:
    """The logits that `generate` gets for the same tokens."""
    sequence = opening.begin(prompt_length)
    ids = torch.tensor([trial.tokens[:-1]], device=trial.logits[0].device)
    pieces = [ids[:, :prompt_length], *ids[:, prompt_length:].split(1, dim=1)]
    return [sequence.advance(piece)[0] for piece in pieces]


def _prompt_length(loan: ModelLoan, shapes: dict[Place, LayerShape]) -> int:
    """Tokens of the shorter prompt: beyond each window and chunk, if that is not too much work."""
    model = loan.model
    windows = [shape.window or shape.chunk for shape in shapes.values()]
    work = sum(parameter.numel() for parameter in model.parameters()) * 6  # two prompts, twice
    most = _MOST_WORK.get(loan.device.type, _MOST_WORK["cpu"]) / work
    wanted = max([SHORTEST, *(window + 3 for window in windows)])
    positions = loan.position_limit()[0] or 2 * wanted + NEW_TOKENS
    return int(min(max(SHORTEST, min(wanted, most)), max(1, (positions - NEW_TOKENS) // 2)))


def _tokens(count: int, vocabulary: int) -> np.ndarray:
    """Token ids, int32 `[count]`; the first two are often for padding, and left out if there are others."""
    return ((2 + (31 * np.arange(count)) % max(1, min(vocabulary, 512) - 2)) % vocabulary).astype(np.int32)


def _digest(loan: ModelLoan, settings: EngineSettings) -> str:
    """Of all that decides whether a model passes."""
    model = loan.model
    of_it = (
        [(name, type(m).__module__, type(m).__qualname__) for name, m in model.named_modules()],
        model.config.to_dict(),
        sorted({f"{type(p).__name__} {p.dtype}" for p in model.parameters()}), str(loan.autocast),
        loan.device.type, settings.mode.name, settings.backend, settings.page_size,
        transformers.__version__, torch.__version__, __version__,
    )  # fmt: skip
    return hashlib.blake2b(repr(of_it).encode(), digest_size=16).hexdigest()


def _read_file() -> list[str]:
    try:
        return json.loads(FILE.read_text())
    except (OSError, ValueError):
        return []


def _write_file(digest: str) -> None:
    try:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        beside = FILE.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps([*_read_file(), digest]))
        beside.replace(FILE)
    except OSError as error:
        logger.info(f"that a model has passed its check is not noted in {FILE}: {error}")
