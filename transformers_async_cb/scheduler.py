"""Who runs in the next step, how many tokens each, on which pages; and what a finished step means."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from transformers.generation.continuous_batching.requests import GenerationOutput

from .admission import Admission
from .endings import Endings
from .line import Line
from .offload import HostPages, Move
from .prefill import Prefill
from .request import MOST_MASKED, MOST_MASKED_PROMPTS, Phase, Request, Rows
from .scoring import Scoring
from .tables import PageTables


class Plan(NamedTuple):
    """One step: `S` sequences, decoding ones first. A sequence is one row's next tokens."""

    rows: np.ndarray  # int64 [S]
    starts: np.ndarray  # int64 [S] position of the first token
    counts: np.ndarray  # int64 [S] tokens
    samples: np.ndarray  # bool [S] whether the last token's logits become a token
    decodes: int  # the first so many rows decode: their one token is on the device
    fresh: list[int]  # rows that begin with this step, all among `rows`
    cells: np.ndarray  # int64 [P] entries of the flat page tables that change
    pages: np.ndarray  # int32 [P] what they become
    forks: np.ndarray  # int32 [F, words] rows and pages that others begin as copies of, see `Admission.take_forks`
    sampled: bool  # a row samples rather than takes the largest logit
    filtered: bool  # a row samples with top-k, top-p or min-p
    shaped: bool  # something is done to the logits of a row
    processed: bool  # by processors of the user's
    masked: bool  # only some tokens may come next in a row
    truncated: np.ndarray  # int64 sequences that sample with a rare rule
    ranked: np.ndarray  # int64 sequences whose token is wanted with its log-probability
    scored: list[tuple[int, int, int]]  # sequence, first position and number of prompt tokens wanted with theirs

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def scores(self) -> int:
        """Tokens of prompts whose log-probabilities are wanted."""
        return sum(count for _, _, count in self.scored)


class Scheduler:
    """Decode first, then prompts in chunks, then new requests, under a token budget; the highest priority first, and
    within one, first come, first served. A row that a grammar narrows down skips each step that is planned before its
    last token is known.

    A request is admitted when all its tokens so far have pages (where old ones are given back on the way, as many as
    it holds at once). When a decoding row finds no page, or a prompt finds none while nothing decodes, the last in
    line is preempted: it gives its pages back after its last step and is computed again later. Where there are host
    pages and that is cheaper, its full pages are copied there first, and back later. The first is never preempted, so
    a pool that fits one request finishes them all.

    Args:
        rows (`Rows`), tables (`PageTables`): the books.
        token_budget (`int`): tokens one step may hold, at least the number of rows.
        max_tokens (`int`): positions one request may use.
        reserve (`float`): share of the pages that admission leaves free while anything runs.
        reuse (`bool`): whether requests that begin alike share pages.
        host_pages (`int`): pages on the host for those that were preempted.
        whole_prompts (`int`): 0 to cut prompts; otherwise they are computed in one piece, several in a step if they
            have no more tokens than that. Then a step must have room for the longest beside the rows that decode.
        states (`bool`): whether rows have states beside their pages, see `Admission`.
    """

    def __init__(
        self,
        rows: Rows,
        tables: PageTables,
        token_budget: int,
        max_tokens: int,
        reserve: float = 0.0,
        reuse: bool = True,
        host_pages: int = 0,
        whole_prompts: int = 0,
        states: bool = False,
    ) -> None:
        self.rows = rows
        self.tables = tables
        self.pages = tables.pool
        self.host = HostPages(host_pages, self.pages.page_size)
        self.token_budget = token_budget
        self.max_tokens = max_tokens
        self.line = Line()
        self.row_of: dict[str, int] = {}  # of requests that have a row, and no result yet
        self.admission = Admission(
            self.line, rows, self.row_of, tables, self.host, max_tokens, int(reserve * self.pages.count), reuse,
            whole_prompts > 0, states, refuse=self._refuse,
        )  # fmt: skip
        self._scoring = Scoring(rows)
        self._prefill = Prefill(rows, tables, self.admission, self._scoring, whole_prompts)
        self._endings = Endings(rows, max_tokens)
        self._next_masked = 0  # row whose turn it is, where a step has no room for all masks
        self.preemptions = 0
        self.offloaded = self.restored = 0  # of those, how many were copied to the host, and back
        self.discarded = 0  # tokens sampled for requests that had ended
        self._outputs: list[GenerationOutput] = []

    # ------------------------------------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Have a request stand in line, unless it was cancelled on its way here."""
        if request.finished_time < 0:
            self.line.join(request)

    def cancel(self, request: Request, reason: str) -> None:
        """End a request now, wherever it is. One that has ended already stays as it is."""
        if request.finished_time >= 0:
            return
        row = self.row_of.get(request.id)
        if row is not None:
            self._end(row, reason)
        else:  # it stays in the heap until its turn comes, which is when `_admit` leaves it out
            self._refuse(request, reason)

    def fail_all(self, reason: str) -> None:
        """End every request with `reason`; the rows stay held until their steps retire."""
        for row in list(self.row_of.values()):
            self._end(row, reason)
        while (request := self.line.first()) is not None:
            self._refuse(request, reason)

    def preempt_all(self) -> None:
        """Have all tokens of every running request computed again. Nothing may be in flight."""
        for row in list(self.row_of.values()):
            self.preemptions += 1
            self.rows.phase[row] = Phase.PREEMPTED
            self._prefill.drop(row)
            self._release(row)

    def forget(self) -> None:
        """What pages hold is worth nothing to requests to come, as the model has changed. Nor is what running requests
        will add to theirs: it depends on what they have."""
        self.pages.forget()
        self.host.forget()
        self.rows.stale[list(self.row_of.values())] = True

    def save_all(self) -> None:
        """Copy the running requests' tokens so far into them, for whoever ends them without this scheduler."""
        for row in self.row_of.values():
            self.rows.save(row)

    @property
    def idle(self) -> bool:
        return not self.line and not self.row_of and not self.host.under_way

    def take_outputs(self) -> list[GenerationOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def check_books(self) -> None:
        """When nothing runs, nothing may be held. Raises `RuntimeError` with what is."""
        held = {
            "pages": self.pages.count - self.pages.free,
            "rows": self.rows.count - self.rows.free,
            "host pages": self.host.count - self.host.free,
            "steps and moves in flight": int(self.rows.in_flight.sum()),
            "prefilling rows": len(self._prefill.under_way),
            "requests held back": self.line.held_back,
        }
        if any(held.values()):
            raise RuntimeError(f"the books do not balance, still held while idle: {held}")

    # ------------------------------------------------------------------------------------------------ plan

    def plan(self) -> Plan | None:
        """The next step, or `None` when nothing can run before a step retires or a request comes."""
        self._end_what_is_late(time.perf_counter())
        while True:
            decoding = self._decoding_rows()
            chunks, fresh = self._prefill.chunks(self.token_budget - len(decoding))
            if len(decoding) or chunks:
                break
            if not (waiting := self._prefill.under_way):
                return None
            if not self._make_room(self.tables.lacking(waiting[0], int(self.rows.computed[waiting[0]]))):
                return None
        r = self.rows
        rows = np.concatenate([decoding, np.array([row for row, _ in chunks], np.int64)])
        counts = np.ones(len(rows), np.int64)
        counts[len(decoding) :] = [count for _, count in chunks]
        starts = r.computed[rows]
        ends = starts + counts
        samples = ends >= r.prefill[rows]
        scored = self._scoring.of_prompts(rows, starts, ends, len(decoding))
        cells, pages = self.tables.cells(rows, starts, ends, len(decoding), fresh)
        r.computed[rows] = ends
        for row, _ in chunks:  # later steps find the pages written
            self.admission.note_full_pages(row)
            request = r.request[row]
            if request.family is not None and r.computed[row] >= self.admission.fork_point(request):
                self.line.let_go(request.family)
        r.total[rows] += samples
        r.in_flight[rows] += 1
        return Plan(
            rows, starts, counts, samples, len(decoding), list(fresh), cells, pages,
            self.admission.take_forks(),
            bool(r.sampled[rows].any()), bool(r.filtered[rows].any()), bool(r.shaped[rows].any()),
            bool((r.processed[rows] & samples).any()), bool((r.masked[rows] & samples).any()),
            np.flatnonzero(r.truncated[rows]), np.flatnonzero((r.likeliest[rows] >= 0) & samples), scored,
        )  # fmt: skip

    def _end_what_is_late(self, now: float) -> None:
        if now < self.line.next_deadline:
            return
        requests = [*(self.rows.request[row] for row in self.row_of.values()), *self.line]
        leaders = [r for r in requests if r.family is not None and r.family.leader is r]
        requests += [request for leader in leaders for request in leader.family.held_back]
        for request in requests:
            if request.deadline <= now:
                seconds = request.deadline - request.created_time
                self.cancel(request, f"request {request.id} was not finished by its deadline, {seconds:.3g} s")
        self.line.next_deadline = min((r.deadline for r in requests if r.finished_time < 0), default=np.inf)

    def _decoding_rows(self) -> np.ndarray:
        """Rows that decode in this step, each with a page for its token: int64 `[D]`."""
        r = self.rows
        while True:
            running = (r.phase == Phase.RUNNING) & (r.computed >= r.prefill) & (r.total < r.limit)
            ready = self._with_room_for_masks(np.flatnonzero(running & ~(r.masked & (r.known < r.total))))
            starts = r.computed[ready]
            wanted = self.tables.wanted(starts)
            short = int(wanted.sum()) - self.pages.free
            if short <= 0:
                break
            if not self._make_room(short):
                needy = self._in_line(ready[wanted > 0])
                served = np.cumsum(self.tables.wanted(r.computed[needy])) <= self.pages.free
                ready = np.setdiff1d(ready, needy[~served])  # the later ones skip this step
                starts = r.computed[ready]
                break
        self.tables.open(ready, starts)
        return ready

    def _with_room_for_masks(self, ready: np.ndarray) -> np.ndarray:
        """`ready` without the rows whose masks find no room, which take turns."""
        r = self.rows
        masked = ready[r.masked[ready]]
        room = MOST_MASKED - MOST_MASKED_PROMPTS
        if len(masked) <= room:
            return ready
        in_turn = masked[np.argsort((masked - self._next_masked) % r.count)]
        self._next_masked = int(in_turn[room])
        return np.setdiff1d(ready, in_turn[room:])

    def _make_room(self, short: int) -> bool:
        """Preempt the last row in line for a shortage of `short` pages. `False`: enough are on their way back."""
        r = self.rows
        done = (r.phase >= Phase.PREEMPTED) | ((r.phase == Phase.RUNNING) & (r.total >= r.limit))
        coming = self.tables.held(done)
        if self.tables.forgets:
            going_on = np.flatnonzero((r.phase == Phase.RUNNING) & ~done & (r.in_flight > 0) & ~r.moving)
            coming += self.tables.dying(going_on, r.computed[going_on])
        if coming >= short:
            return False
        candidates = np.flatnonzero((r.phase == Phase.RUNNING) & (r.total < r.limit))
        if len(candidates) == 1:
            if coming:
                return False
            row = int(candidates[0])
            needs = self.tables.layout.pages_at_length(int(r.total[row]))
            self._end(
                row,
                f"request {r.request[row].id} needs {needs} pages of {self.pages.page_size} tokens at length "
                f"{r.total[row]}, the cache has {self.pages.count}",
            )
            return True
        row = int(self._in_line(candidates)[-1])
        self.preemptions += 1
        r.phase[row] = Phase.PREEMPTED
        self._prefill.drop(row)
        if not r.in_flight[row]:
            self._leave(row)
        return True

    def _in_line(self, rows: np.ndarray) -> np.ndarray:
        """The rows by priority, the highest first, and by arrival."""
        return rows[np.lexsort((self.rows.arrival[rows], -self.rows.priority[rows]))]

    # ------------------------------------------------------------------------------------------------ retire

    def retire(
        self, plan: Plan, ids: np.ndarray, logprobs: np.ndarray | None, ranked: np.ndarray | None = None
    ) -> None:
        """Take the tokens of a finished step: `ids` int32 `[S]`, `logprobs` float32 `[S]`, both in plan order; and
        what `rank` has to say of the plan's `ranked`, then of its `scored`."""
        r = self.rows
        r.in_flight[plan.rows] -= 1
        live = plan.samples & (r.phase[plan.rows] <= Phase.PREEMPTED)
        self.discarded += int(plan.samples.sum() - live.sum())
        refused: dict[int, str] = {}
        if plan.processed or plan.masked or r.given[plan.rows].any():
            refused = self._endings.refused(plan.rows[live], ids[live])
        if refused:
            live &= ~np.isin(plan.rows, list(refused))
        rows, tokens = plan.rows[live], ids[live]
        now = time.perf_counter()
        if ranked is not None:
            self._scoring.note(plan, live, ranked)
        r.append(rows, tokens, None if logprobs is None else logprobs[live], now)
        ended, errors = self._endings.find(rows, tokens, now, plan.masked)
        streams = r.streaming[rows] & ~ended
        if streams.any():
            its_logprobs = None if logprobs is None else logprobs[live][streams]
            self._outputs += r.stream(rows[streams], tokens[streams], its_logprobs, now)
        for row in rows[ended].tolist():
            self._end(row, errors.get(row))
        for row, error in refused.items():
            self._end(row, error)
        drained = plan.rows[(r.in_flight[plan.rows] == 0) & (r.phase[plan.rows] >= Phase.PREEMPTED)]
        for row in drained:
            self._leave(int(row))
        if self.tables.forgets:
            going_on = r.phase[plan.rows] == Phase.RUNNING
            self.tables.release_behind(plan.rows[going_on], (plan.starts + plan.counts)[going_on])

    def landed(self, move: Move) -> None:
        """A move of pages is done."""
        r, row = self.rows, move.row
        self.host.under_way -= 1
        r.in_flight[row] -= 1
        if move.out:
            self.tables.keep(row, move.group, move.first)
        if r.in_flight[row]:
            return
        r.moving[row] = False
        if r.phase[row] != Phase.RUNNING:
            self._release(row)
            return
        self.restored += 1
        self.host.drop(r.request[row])
        self.admission.note_full_pages(row)
        self._prefill.restore(row)

    def _end(self, row: int, error: str | None) -> None:
        """The request's result is out; the row follows when its last step has retired."""
        r = self.rows
        request = r.save(row)
        request.finish(error)
        self._outputs.append(request.output())
        self.line.pass_on(request)
        r.phase[row] = Phase.ENDED
        self._prefill.drop(row)
        del self.row_of[request.id]
        if not r.in_flight[row]:
            self._release(row)

    def _leave(self, row: int) -> None:
        """No step in flight reads the row any more: it is free, once what is worth it has been copied to the host."""
        r = self.rows
        preempted = r.phase[row] == Phase.PREEMPTED
        if self.host.count and preempted and not r.shaped[row] and not r.stale[row]:  # history does not travel
            self.admission.note_full_pages(row)
            request = r.request[row]
            if moves := self.host.move_out(row, request, self.tables.full_columns(row, int(r.computed[row]))):
                self.offloaded += 1
                r.in_flight[row] = moves
                r.moving[row] = True
                for group, columns in enumerate(self.host.columns(request)):
                    self.tables.keep(row, group, columns.stop)
                return
        self._release(row)

    def _release(self, row: int) -> None:
        """Nothing in flight reads the row any more: its pages and the row itself are free."""
        r = self.rows
        self.admission.note_full_pages(row)
        request = r.request[row]
        if request.family is not None:
            request.family.rows.remove(row)
        if r.phase[row] == Phase.PREEMPTED:
            r.save(row)
            del self.row_of[request.id]
            self.line.stand(request)
        else:
            self.host.drop(request)
        self.tables.release(row)
        r.give_back(row)

    def _refuse(self, request: Request, reason: str) -> None:
        request.finish(reason)
        self.host.drop(request)
        self._outputs.append(request.output())
        self.line.pass_on(request)
