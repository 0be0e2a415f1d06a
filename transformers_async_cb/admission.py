"""Which waiting request gets a row, and the pages it begins with: found, shared, or empty."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .line import Line
from .logprobs import MOST_SCORED
from .offload import HostPages
from .pages import Pages, extend_keys
from .request import MOST_MASKED_PROMPTS, Phase, Request, Rows
from .tables import Found, PageTables


# Pages that a request waits for, if another is computing them: fewer it computes itself.
WORTH_WAITING = 4


class Admission:
    """Lets requests in, in their order, as long as there are rows, and pages for all their tokens so far.

    A request begins with what is there already. Sequences of one request share the full pages of its prompt, and each
    begins with a copy of the page that holds the rest: they compute the prompt's last token alone, whose logits are
    wanted. Other requests hold the pages that are known to contain what they begin with. One that was preempted takes
    what it has on the host and finds nowhere else, and runs when that has come in.

    Args:
        line (`Line`): who waits.
        rows (`Rows`), row_of (`dict`), tables (`PageTables`), host (`HostPages`): the books.
        max_tokens (`int`): positions one request may use.
        reserve (`int`): pages that are left free while anything runs.
        reuse (`bool`): whether requests that begin alike share pages.
        whole_prompts (`bool`): whether prompts are computed in one piece.
        states (`bool`): whether rows have states beside their pages, which can be copied only as they are.
        refuse (`Callable`): ends a request that can never be let in.
    """

    def __init__(
        self,
        line: Line,
        rows: Rows,
        row_of: dict[str, int],
        tables: PageTables,
        host: HostPages,
        max_tokens: int,
        reserve: int,
        reuse: bool,
        whole_prompts: bool,
        states: bool,
        refuse: Callable[[Request, str], None],
    ) -> None:
        self.line = line
        self.rows = rows
        self.row_of = row_of
        self.tables = tables
        self.pages = tables.pool
        self.host = host
        self.max_tokens = max_tokens
        self.reserve = reserve
        self.reuse = reuse
        self.whole_prompts = whole_prompts
        self.states = states
        self.looked_up = 0  # tokens of requests when they were let in
        self.reused = 0  # of those, tokens whose keys and values were there
        self._refuse = refuse
        self._forks: list[list[int]] = []
        self._fresh: set[int] = set()  # rows whose page tables the device has not been told of

    def admit(self, most_found: int, coming: set[bytes], left: int, scores: int) -> tuple[int, int] | None:
        """Give the first in line that can have one a row, and pages for all its tokens so far; of what others have
        computed, at most `most_found` pages. If its next pages are `coming`, the line waits for them, and if the step
        has no `scores` left for its prompt, or not enough of them or of tokens for one that is not cut, for the next
        step.

        Returns:
            The row, and the first of its tokens whose pages the device must be told of. A row that waits for pages
            from the host (`rows.moving`) brings its whole lines along.
        """
        r = self.rows
        while r.free and (request := self.line.first()) is not None:
            if request.constraint is not None and self._masked_prompts() >= MOST_MASKED_PROMPTS:
                return None
            tokens = len(request.tokens)
            if tokens > self.tables.most_tokens:
                self._refuse(request, self._too_long(request))
                continue
            source, kept = None, self._tokens_on_host(request)
            if self.whole_prompts:
                to_score = request.prompt_length - 1 - request.prompt_scores.known if request.unscored else 0
                if to_score > MOST_SCORED:
                    self._refuse(
                        request,
                        f"request {request.id} asks for log-probabilities of {to_score} tokens of its prompt, of a "
                        f"model whose prompts are computed in one piece: {MOST_SCORED} are allowed",
                    )
                    continue
                if tokens > left or to_score > scores:
                    return None
            elif request.family is not None and not kept:
                source = self._source(request)
                if source is None and (leader := self._computing(request)) is not None:
                    self.line.hold_first_back(leader)
                    continue
            if source is None and request.unscored and not scores:
                return None
            found = self.tables.nothing
            if source is None or tokens > request.prompt_length:  # it was preempted, and may find its own
                found = self._find(request, most_found, set() if kept else coming)
                if found is None:
                    return None
            if source is not None and found.tokens >= request.prompt_length:
                source = None
            if source is not None:
                self.tables.give_back(found)
                found = self.tables.share(source, request.prompt_length - 1)
            computed = max(found.tokens, kept)
            found = self.tables.trim(found, computed)
            free = self.pages.free - self.tables.missing(found, tokens, computed)
            if not self.leaves_room(free - self.tables.to_come_at_begin(tokens, computed)):
                self.tables.give_back(found)
                return None
            self.line.pop()
            row = r.take(request, min(request.total_limit, self.max_tokens + 1))  # the last token needs no position
            self.row_of[request.id] = row
            self.tables.begin(row, found, tokens, computed)
            r.full_pages[row] = found.tokens // self.pages.page_size
            r.computed[row] = computed
            if source is not None:
                r.stale[row] = r.stale[source]
                self._fork(source, row)
            elif request.family is not None:
                request.family.leader = request
            if request.family is not None:
                request.family.rows.append(row)
            self.looked_up += tokens
            self.reused += found.tokens
            if kept > found.tokens:
                firsts = [found.tokens // group.page_size for group in self.tables.groups]
                r.in_flight[row] = self.host.move_in(row, request, firsts)
                r.moving[row] = True
                return row, computed
            self.host.drop(request)
            self._fresh.add(row)
            return row, 0 if source is None else computed
        return None

    def take_forks(self) -> np.ndarray:
        """The forks of a plan that is complete: int32 `[F, 2 + 2 * groups]`, a row and a page of it in each group, and
        the row and pages that begin as their copies. The page is the padding page where the shared pages hold all but
        the last token."""
        forks, self._forks = self._forks, []
        self._fresh.clear()
        return np.array(forks, np.int32).reshape(-1, 2 + 2 * len(self.tables.groups))

    def leaves_room(self, free: int) -> bool:
        """Whether `free` pages are enough beside the running rows: each that may outgrow its pages will want another
        (its last token needs no place)."""
        r = self.rows
        if self.tables.forgets:
            prompts = np.flatnonzero((r.phase == Phase.RUNNING) & (r.computed < r.prefill))
            free -= self.tables.to_come(prompts, r.prefill[prompts])
        if free >= max((r.count - r.free) * len(self.tables.groups), self.reserve):  # even if all of them do
            return True
        running = np.flatnonzero(r.phase == Phase.RUNNING)
        growing = self.tables.growing(running, r.limit[running])
        return free >= max(growing, self.reserve if growing else 0)

    def note_full_pages(self, row: int) -> None:
        """Let others find the pages of a row that are full of tokens whose values are known."""
        if not self.reuse or self.rows.stale[row]:
            return
        r, request = self.rows, self.rows.request[row]
        known = int(r.known[row])
        full = min(known, int(r.computed[row])) // self.pages.page_size
        if full > r.full_pages[row]:
            self.tables.note_full(row, request.page_keys, r.tokens[row, :known], int(r.full_pages[row]), full)
            r.full_pages[row] = full

    def _masked_prompts(self) -> int:
        """Rows whose prompts are being computed, and whose first tokens a grammar narrows down."""
        r = self.rows
        return int((r.masked & (r.phase == Phase.RUNNING) & (r.computed < r.prefill)).sum())

    def _too_long(self, request: Request) -> str:
        """Why a request can never be let in."""
        tokens, page_size = len(request.tokens), self.pages.page_size
        needed, room = self.tables.layout.pages_at_length(tokens), self.pages.count
        if tokens > self.tables.columns * page_size:
            needed, room = self.pages.needed(tokens), min(room, self.tables.columns)
        return (
            f"request {request.id} needs {needed} pages of {page_size} tokens for its {tokens} tokens, the cache has "
            f"{room} for one request"
        )

    def _tokens_on_host(self, request: Request) -> int:
        """How many of a request's first tokens have their pages on the host."""
        columns = self.host.columns(request) if self.host.count else []
        return columns[0].stop * self.tables.groups[0].page_size if columns else 0

    def _find(self, request: Request, most: int, coming: set[bytes]) -> Found | None:
        """Hold the pages that have what a request begins with; `None` if it is worth waiting for more."""
        if not self.reuse or request.shaping is not None:  # which looks at all tokens, as they are computed
            return self.tables.nothing
        page_size = self.pages.page_size
        extend_keys(request.page_keys, request.tokens, page_size)
        # The last token is computed, whose logits are wanted, and so is what has yet to be scored.
        there = request.prompt_scores.known if request.unscored else len(request.tokens) - 1
        keys = request.page_keys[: min(most // len(self.tables.groups), there // page_size)]
        found = self.tables.find(keys, len(keys) * page_size)
        begin, worth_waiting = found.tokens // page_size, max(WORTH_WAITING, self.tables.layout.grain // page_size)
        wanted = keys[begin : begin + worth_waiting]
        if len(wanted) == worth_waiting and coming.issuperset(wanted):
            self.tables.give_back(found)
            return None
        return found

    def fork_point(self, request: Request) -> int:
        """Tokens that must have been computed before others of a request's family can begin as its copies. A state is
        copied before the prompt's last token, whose logits all of them want; pages at any time after, as long as those
        that it looks back on are there."""
        return request.prompt_length - 1 if self.states else request.prompt_length

    def _source(self, request: Request) -> int | None:
        """A row that has the prompt of a request, if there is one that can be copied."""
        r, needed = self.rows, self.fork_point(request)
        for row in request.family.rows:
            there = 0 < r.computed[row] == needed if self.states else r.computed[row] >= needed
            there = there and self.tables.can_share(row, request.prompt_length - 1)
            if there and row not in self._fresh and not r.moving[row]:
                return row
        return None

    def _computing(self, request: Request) -> Request | None:
        """Another that is computing the prompt, and can be copied then."""
        r, needed = self.rows, self.fork_point(request)
        for row in request.family.rows:
            coming = r.computed[row] < needed or (not self.states and (r.moving[row] or row in self._fresh))
            if r.phase[row] == Phase.RUNNING and coming:
                return r.request[row]
        return None

    def _fork(self, source: int, row: int) -> None:
        """Let a row that holds the full pages of the source's prompt begin behind the prompt's last token but one."""
        request, tables = self.rows.request[row], self.tables
        copied, copies = [], []
        for g, group in enumerate(tables.groups):
            shared, rest = divmod(request.prompt_length - 1, group.page_size)
            copied.append(tables.pages[g, source, shared] if rest else Pages.PADDING)
            copies.append(tables.pages[g, row, shared] if rest else Pages.PADDING)
        self._forks.append([source, *copied, row, *copies])
        request.page_keys = self.rows.request[source].page_keys[: (request.prompt_length - 1) // self.pages.page_size]
