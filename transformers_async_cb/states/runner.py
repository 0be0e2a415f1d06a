"""Steps of models that keep states: rows that decode in one forward, prompts beside them."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from transformers import ContinuousBatchingConfig

from ..attention import LayerShape, Place, Step, computing
from ..config import AsyncBatchingConfig
from ..graphs import StepKey
from ..groups import PageGroup, PageLayout
from ..inputs import MOST_PARTS, Bucket, StepArrays
from ..model import ModelLoan
from ..request import Rows
from ..runner import Runner
from ..sampling import Flavour
from ..scheduler import Plan
from ..sequential import MOST_POSITIONS
from ..settings import EngineSettings, Mode, Workload, resolve_engine
from .kept import Kept


# Tokens of a page that is no storage: a few large ones are counted sooner.
COUNTED = 2048


class Group(NamedTuple):
    """Sequences of a step that follow one another and go through the model together: `count` tokens of each."""

    first: int
    sequences: int
    count: int
    begins: bool  # without a state
    row: int  # of the first sequence, if those of the others follow; -1: they are anywhere

    @property
    def decodes(self) -> bool:
        """Whether it is what the host has shared out in `StepArrays.work`: rows that decode come first."""
        return self.first == 0 and self.count == 1 and not self.begins


class StateKey(NamedTuple):
    """A step that is not captured, as `StateRunner` needs it."""

    bucket: Bucket
    flavour: Flavour
    groups: tuple[Group, ...]


class StateRunner(Runner):
    """Runs plans on a model that keeps states. Each of these has a table with a slot for every row, beside the pages
    of the layers that attend.

    Rows that decode are one forward of the model, a token of each, on the states of these rows; what the model leaves
    goes back to the tables. Where the rows lie side by side it works on the tables themselves. Prompts are forwards of
    their own, with those that happen to be as long; one that begins reads no state, so a row that changes hands need
    not be cleared. A step in which all rows decode is captured where steps are, with its rows anywhere.

    Args:
        loan (`ModelLoan`): the model, borrowed.
        kept (`Kept`): what it keeps.
        rows (`Rows`): the running requests.
        settings (`EngineSettings`): every size.
    """

    def __init__(self, loan: ModelLoan, kept: Kept, rows: Rows, settings: EngineSettings) -> None:
        self._kept = kept
        self.tables_of_states: list[torch.Tensor] = []
        super().__init__(loan, kept.shapes, rows, settings)
        self.pads = self.graphs.on

    def take_pages(self) -> None:
        super().take_pages()
        if self.tables_of_states:
            return
        self.tables_of_states = [state.table(self.rows.count + 1, self.device) for state in self._kept.states]
        for table, state in zip(self.tables_of_states, self._kept.states, strict=True):
            if self._debug and table.is_floating_point():
                table.fill_(torch.nan)
            table.select(state.dim, self.padding_row).zero_()

    def release_pages(self) -> None:
        self.tables_of_states.clear()
        super().release_pages()

    def _fork(self, sources: torch.Tensor, copies: torch.Tensor) -> None:
        super()._fork(sources, copies)
        from_rows, rows = sources[:, 0], copies[:, 0]
        for table, state in zip(self.tables_of_states, self._kept.states, strict=True):
            table.index_copy_(state.dim, rows.long(), table.index_select(state.dim, from_rows))

    def key_for(self, plan: Plan) -> StepKey | StateKey:
        if self.pads and plan.decodes == len(plan.rows):
            return super().key_for(plan)
        starting = plan.starts == 0
        alike = [(1, False)] * plan.decodes
        alike += zip(plan.counts[plan.decodes :].tolist(), starting[plan.decodes :].tolist(), strict=True)
        groups, first = [], 0
        for (count, begins), members in itertools.groupby(alike):
            rows = plan.rows[first : first + sum(1 for _ in members)]
            together = bool((np.diff(rows) == 1).all())
            groups.append(Group(first, len(rows), count, begins, int(rows[0]) if together else -1))
            first += len(rows)
        bucket = Bucket(plan.tokens, len(plan.rows), plan.decodes == len(plan.rows))
        return StateKey(bucket, self.flavour(plan), tuple(groups))

    def _in_parts(self, plan: Plan, key: StepKey | StateKey) -> np.ndarray:
        first = self._groups(key)[0]
        return np.arange(min(first.sequences, len(plan.rows)) if first.decodes else 0)

    def _groups(self, key: StepKey | StateKey) -> tuple[Group, ...]:
        return key.groups if isinstance(key, StateKey) else (Group(0, key.bucket.rows, 1, False, -1),)

    def captures(self, key: StepKey | StateKey) -> bool:
        return isinstance(key, StepKey)

    def _forward(
        self, key: StepKey | StateKey, a: StepArrays, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        logits, at, every = [], 0, key.flavour.scored > 0
        for group in self._groups(key):
            tokens = slice(at, at := at + group.sequences * group.count)
            rows = a.rows[group.first : group.first + group.sequences].long()
            slots = self._slots(group, rows)
            cache = self._kept.begin() if group.begins else self._kept.resume(slots)
            with computing(self._steps(a, group, tokens), self.backend) if self.layers else nullcontext():
                found, states = self._kept.advance(
                    cache, *(x[tokens].view(group.sequences, group.count) for x in (ids, positions)), every
                )
            self._keep(group, rows, slots, states)
            logits.append(found.flatten(0, 1))
        return torch.cat(logits)[keep] if every else torch.cat(logits)

    def _slots(self, group: Group, rows: torch.Tensor) -> list[torch.Tensor]:
        """The states of a group: the tables' own where its rows lie side by side, or copies."""
        tables = zip(self.tables_of_states, self._kept.states, strict=True)
        if group.row >= 0:
            return [table.narrow(state.dim, group.row, group.sequences) for table, state in tables]
        return [] if group.begins else [table.index_select(state.dim, rows) for table, state in tables]

    def _keep(self, group: Group, rows: torch.Tensor, slots: list[torch.Tensor], states: list[torch.Tensor]) -> None:
        """Write what the model has left to the tables, but for what it has written there."""
        if group.row >= 0:
            for slot, new in zip(slots, states, strict=True):
                if slot.data_ptr() != new.data_ptr():
                    slot.copy_(new)
            return
        for table, state, new in zip(self.tables_of_states, self._kept.states, states, strict=True):
            table.index_copy_(state.dim, rows, new)

    def _steps(self, a: StepArrays, group: Group, tokens: slice) -> list[Step]:
        """The part of a step that attention has to know of for a group of sequences, by group of layers."""
        sequences = slice(group.first, group.first + group.sequences)
        n, on_device = group.sequences, {"dtype": torch.int32, "device": self.device}
        starts = torch.arange(0, n * group.count + 1, group.count, **on_device)
        work, counts = a.work, a.counts
        if group.count > 1:
            work, counts = torch.zeros(1, **on_device), torch.arange(0, n + 1, n, **on_device)
        elif not group.decodes:
            work = torch.arange(1, n + 1, **on_device) * MOST_PARTS**2  # each in one part
        return [
            Step(
                page_table, a.token_rows[tokens], a.positions[tokens], a.rows[sequences], starts,
                a.lengths[sequences], counts, work, self.counters, decode_only=group.count == 1,
            )
            for page_table in self.page_tables
        ]  # fmt: skip


def resolve_states(
    loan: ModelLoan,
    kept: Kept,
    batching: ContinuousBatchingConfig,
    own: AsyncBatchingConfig,
    workload: Workload,
) -> EngineSettings:
    """As `resolve_engine`, for a model that keeps states. Their tables take of the memory of the cache, half of it at
    most, which bounds the rows. Where no layer attends, pages are no storage, and there are enough of them. Where a
    prompt is one piece, pages outside of a window are there until the request ends."""
    attending = kept.shapes
    if not kept.continues:
        attending = {place: shape._replace(window=0, chunk=0) for place, shape in attending.items()}
    counted = {Place(loan.model, 0): LayerShape(1, kept.kept_per_token, 0, torch.uint8)}
    settings = resolve_engine(loan, attending or counted, batching, own, workload)
    layout = settings.layout
    rows, row_limit, pages, page_limit = settings.rows, settings.row_limit, settings.pages, settings.page_limit
    page_size, columns = settings.page_size, settings.columns
    if batching.num_blocks is None:
        memory = page_limit * layout.page_bytes
        taken = 2 * kept.bytes  # of a row, with the copy that a step may work on
        row_limit = max(1, min(row_limit, memory // 2 // taken))
        rows = min(rows, row_limit)
        page_limit = max(1, (memory - rows * taken) // layout.page_bytes)
        pages = min(pages, page_limit)
    if not attending:
        longest = max(min(loan.stated_positions or MOST_POSITIONS, MOST_POSITIONS), workload.longest)
        if batching.num_blocks is None:
            page_size = COUNTED
            pages = page_limit = rows * -(-longest // page_size)
        columns = -(-longest // page_size)
        layout = PageLayout((PageGroup(page_size),), (), {})
    if (room := layout.longest(pages)) is not None:
        columns = min(columns, -(-room // page_size))
    longest = columns * page_size
    return settings._replace(
        page_size=page_size,
        layout=layout,
        pages=pages,
        page_limit=page_limit,
        rows=min(rows, pages // len(layout.groups) or 1),
        row_limit=row_limit,
        columns=columns,
        max_tokens=min(longest, loan.position_limit()[0] or longest),
        token_budget=settings.token_budget if kept.continues else longest + rows,
        fused=False,
        compiled=False,
        reuse=False,
        host_pages=0,
        mode=Mode.HYBRID if attending else Mode.STATES,
        whole_prompts=0 if kept.continues else settings.token_budget,
    )
