"""Prompts on their way into the cache, a chunk of each in a step."""

from __future__ import annotations

from .admission import Admission
from .inputs import SPARE_CELLS
from .logprobs import MOST_SCORED
from .request import MOST_FRESH, Rows
from .scoring import Scoring
from .tables import PageTables


class Prefill:
    """Splits what a step has room for among the prompts that go on, and lets in others while some is left.

    A prompt takes at most half of it while others want some, so that a long one holds nobody up.

    Args:
        rows (`Rows`), tables (`PageTables`): the books.
        admission (`Admission`): lets others in.
        scoring (`Scoring`): says how many log-probabilities a chunk needs.
        whole_prompts (`int`): 0 to cut prompts; otherwise they are computed in one piece, several in a step if they
            have no more tokens than that.
    """

    def __init__(
        self, rows: Rows, tables: PageTables, admission: Admission, scoring: Scoring, whole_prompts: int = 0
    ) -> None:
        self.under_way: list[int] = []  # rows, in the order they were let in
        self._restored: set[int] = set()  # of those, whose parameters the device has not been told of
        self._rows = rows
        self._tables = tables
        self._admission = admission
        self._scoring = scoring
        self._whole_prompts = whole_prompts

    def chunks(self, budget: int) -> tuple[list[tuple[int, int]], dict[int, int]]:
        """`(row, tokens)` of the prompts that go on or begin in a step with room for `budget` tokens; and the rows
        that begin, with the first of their tokens whose pages the device must be told of. A prompt that finds no page
        for its next tokens waits, and lets nobody in."""
        r, tables = self._rows, self._tables
        counts: list[int] = []
        fresh: dict[int, int] = {}
        spare, share, left, scores = SPARE_CELLS, max(1, budget // 2), budget, MOST_SCORED
        stalled = False
        if self._whole_prompts:
            share = left
        coming: set[bytes] = set()
        if self._admission.line:
            offering = (row for row in self.under_way if not r.stale[row])
            coming.update(*(r.request[row].page_keys[r.full_pages[row] :] for row in offering))
        while left > 0:
            if len(counts) == len(self.under_way):
                if stalled:
                    break
                room = min(left, self._whole_prompts - (budget - left)) if self._whole_prompts and counts else left
                admitted = self._admission.admit(spare, coming, room, scores) if len(fresh) < MOST_FRESH else None
                if admitted is None:
                    break
                row, first = admitted
                if r.moving[row]:
                    continue
                fresh[row] = first
                self.under_way.append(row)
                coming.update(r.request[row].page_keys)
                spare -= tables.to_tell(row, first, int(r.computed[row]))
            row = self.under_way[len(counts)]
            count = tables.within(row, int(r.computed[row]), min(self._rest(row), share, left))
            stalled |= count == 0
            count, to_score = self._scoring.within(row, count, scores if self._whole_prompts else -(-scores // 2))
            counts.append(count)
            left -= count
            scores -= to_score
        chunks = []
        for row, count in zip(self.under_way, counts, strict=False):  # what nobody else wants
            start = int(r.computed[row])
            most = tables.within(row, start, min(self._rest(row), count + left))
            to_score = self._scoring.within(row, count, MOST_SCORED)[1]
            most, all_to_score = self._scoring.within(row, most, to_score + scores)
            left -= most - count
            scores -= all_to_score - to_score
            if most:
                chunks.append((row, most))
                tables.extend(row, start + most)
                if row in self._restored:
                    self._restored.remove(row)
                    fresh[row] = start
        done = {row for row, count in chunks if r.computed[row] + count == r.prefill[row]}
        self.under_way = [row for row in self.under_way if row not in done]
        return chunks, fresh

    def _rest(self, row: int) -> int:
        """Tokens that a row may go on with: all to its first sample, or to where others begin as its copies."""
        r, end = self._rows, int(self._rows.prefill[row])
        if self._admission.states and not self._whole_prompts and r.request[row].family is not None:
            fork_point = self._admission.fork_point(r.request[row])
            if r.computed[row] < fork_point:
                end = fork_point
        return end - int(r.computed[row])

    def restore(self, row: int) -> None:
        """A row whose pages have come back from the host goes on."""
        self._restored.add(row)
        self.under_way.append(row)

    def drop(self, row: int) -> None:
        """A row does not go on, if it was about to."""
        self._restored.discard(row)
        if row in self.under_way:
            self.under_way.remove(row)
