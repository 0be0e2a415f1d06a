"""The books, driven without a model: whatever ends, is cancelled or runs short, they balance and nobody is lost."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb import prefill
from transformers_async_cb.groups import PageGroup, PageLayout, most_held
from transformers_async_cb.logprobs import RANKED_WORDS, PromptScores, no_words
from transformers_async_cb.offload import Move
from transformers_async_cb.pages import Pages
from transformers_async_cb.request import MOST_FRESH, Family, Phase, Request, Rows
from transformers_async_cb.scheduler import Plan, Scheduler
from transformers_async_cb.tables import PageTables


VOCABULARY = 40
DEPTH = pytest.mark.parametrize("depth", [1, 2], ids=["in turn", "overlap"])


def new_request(arrival: int, prompt: int, limit: int, eos_ids: tuple[int, ...] = (), **settings) -> Request:
    tokens = np.array([token_of(arrival, position) for position in range(prompt)], np.int32)
    return Request(f"r{arrival}", tokens, prompt, limit, eos_ids=eos_ids, arrival=arrival, **settings)


def new_family(arrival: int, prompt: int, limit: int, count: int, **settings) -> list[Request]:
    """Sequences of one prompt. Arrivals of all but the first state which of how long a prompt they are: `token_of`."""
    arrivals = [arrival, *(arrival + 10**3 * number + 10**6 * prompt for number in range(1, count))]
    family = Family()
    family.members += [new_request(a, prompt, limit, family=family, **settings) for a in arrivals]
    return family.members


def token_of(arrival: int, position: int) -> int:
    """What stands, or will be sampled, at a position of a request: the same however often it is computed. Every third
    request begins like others, and those of a family begin with the prompt of the first."""
    if position < arrival // 10**6:
        arrival %= 10**3
    writer = -5 - arrival % 3 if position < arrival * 7 % 23 else arrival
    return hash((writer, position)) % VOCABULARY


@functools.cache
def beginning(arrival: int, position: int) -> tuple[int, ...]:
    """What the key and value at a position are made of: all tokens up to there."""
    return (*(beginning(arrival, position - 1) if position else ()), token_of(arrival, position))


def answer_of(request: Request) -> list[int]:
    tokens = []
    for position in range(request.prompt_length, request.total_limit):
        tokens.append(token_of(request.arrival, position))
        if tokens[-1] in request.eos_ids:
            break
    return tokens


def ranked_words(arrival: int, position: int, words: int) -> range:
    """What is said of the token at a position of a request: of a family's prompt, the same to all."""
    if position < arrival // 10**6:
        arrival %= 10**3
    first = hash((arrival, position)) % 10**9
    return range(first, first + words)


class Device:
    """What a device would make of the plans, in the order they are launched: page tables, who wrote where, and what
    went into the state of each row, where rows have states."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.groups = scheduler.tables.groups
        self.tables = np.zeros((len(self.groups), scheduler.rows.count + 1, scheduler.tables.columns), np.int32)
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}
        self.on_host: dict[tuple[int, int], tuple[int, ...]] = {}
        self.states: dict[int, tuple[int, ...]] = {}

    def move(self, move: Move) -> None:
        """Copy pages to the host or back, with the row's line of the page table."""
        if not move.out:
            self.tables[:, move.row] = self.scheduler.tables.pages[:, move.row]
        page_size = self.groups[move.group].page_size
        for column, host_page in enumerate(move.host_pages.tolist(), move.first):
            for offset in range(page_size):
                here, there = self.where(move.group, move.row, column * page_size + offset), (host_page, offset)
                if move.out:
                    self.on_host[there] = self.cache[here]
                else:
                    self.cache[here] = self.on_host[there]

    def compute(self, plan: Plan) -> np.ndarray:
        """Write each token's position and read those before it; returns the sampled ids."""
        self.empty()
        for fork in plan.forks:
            (source, *copied), (row, *pages) = fork.reshape(2, -1).tolist()
            self.tables[:, row] = self.tables[:, source]
            self.states[row] = self.states.get(source)
            for group, copy, page in zip(self.groups, copied, pages, strict=True):
                for offset in range(group.page_size) if page else ():
                    self.cache[page, offset] = self.cache.get((copy, offset))
        self.tables.reshape(-1)[plan.cells] = plan.pages
        arrivals = self.scheduler.rows.arrival[plan.rows].tolist()
        sequences = list(zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), arrivals, strict=True))
        for row, start, count, arrival in sequences if self.scheduler.admission.states else ():
            assert not start or self.states[row] == beginning(arrival, start - 1), "it goes on from another state"
            self.states[row] = beginning(arrival, start + count - 1)
        for row, start, count, arrival in sequences:
            for position, g in itertools.product(range(start, start + count), range(len(self.groups))):
                page, _ = where = self.where(g, row, position)
                assert self.scheduler.pages._holders[page] == 1, "a page that others hold is written"
                self.cache[where] = (g, *beginning(arrival, position))
        for row, start, count, arrival in sequences:
            for g, group in enumerate(self.groups):
                for position in range(group.first_seen(start), start + count):
                    found = self.cache.get(self.where(g, row, position))
                    assert found == (g, *beginning(arrival, position)), f"r{arrival} reads {found} at {position}"
        return np.array([token_of(arrival, start + count) for _, start, count, arrival in sequences], np.int32)

    def rank(self, plan: Plan) -> np.ndarray:
        """What is said of the tokens whose log-probabilities are wanted: `ranked_words`."""
        rows = self.scheduler.rows
        tokens = [(sequence, int(plan.starts[sequence] + plan.counts[sequence])) for sequence in plan.ranked]
        tokens += [(sequence, first + 1 + i) for sequence, first, count in plan.scored for i in range(count)]
        words = [ranked_words(rows.arrival[plan.rows[sequence]], at, RANKED_WORDS) for sequence, at in tokens]
        return np.array(words, np.int32).reshape(-1, RANKED_WORDS)

    def where(self, g: int, row: int, position: int) -> tuple[int, int]:
        column, offset = divmod(position, self.groups[g].page_size)
        page = int(self.tables[g, row, column])
        assert page != Pages.PADDING
        return page, offset

    def empty(self) -> None:
        """What is in pages that nobody holds, or may want again, is gone."""
        emptied = self.scheduler.pages.take_emptied()
        if emptied and len(gone := np.concatenate(emptied)):
            self.cache = {where: what for where, what in self.cache.items() if where[0] not in gone}


class Simulation:
    """The engine's loop with a device that only keeps books, and a look at all invariants in every turn."""

    def __init__(
        self,
        depth: int,
        pages: int,
        page_size: int,
        rows: int,
        budget: int,
        longest: int,
        reserve: float = 0.0,
        host_pages: int = 0,
        rng: random.Random | None = None,
        groups: tuple[PageGroup, ...] | None = None,
        **kinds: bool | int,
    ) -> None:
        layout = PageLayout(groups or (PageGroup(page_size),), (), {})
        columns = -(-min(longest, layout.longest(pages) or longest) // page_size)
        self.depth = depth
        self.rows, self.pages = Rows(rows, with_logprobs=False), Pages(pages, page_size)
        self.tables = PageTables(rows, columns, layout, self.pages)
        self.scheduler = Scheduler(
            self.rows, self.tables, budget, columns * page_size, reserve, host_pages=host_pages, **kinds
        )
        self.scheduler.host.note_copied(1, 0.0)
        self.scheduler.host.pages_a_move = 2
        self.rng = rng or random.Random(0)
        self.moves: dict[bool, deque[Move]] = {True: deque(), False: deque()}  # out, and in
        self.device = Device(self.scheduler)
        self.flights: deque[tuple[Plan, np.ndarray]] = deque()
        self.requests: dict[str, Request] = {}
        self.outputs: list[GenerationOutput] = []
        self.plans: list[Plan] = []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.requests[request.id] = request
            self.scheduler.add(request)

    def turn(self) -> None:
        before = self.running()
        plan = self.scheduler.plan()
        self.check_preempted(before)
        if plan is not None:
            self.check_plan(plan)
            self.plans.append(plan)
            self.flights.append((plan, self.device.compute(plan)))
        self.device.empty()  # before pages come in
        for move in self.scheduler.host.take_moves():
            self.moves[move.out].append(move)
        self.check_books()
        while any(self.moves.values()) and (self.rng.random() < 0.3 or (plan is None and not self.flights)):
            self.land()
            plan = plan or self.plans[-1]  # that something happened
        if self.flights and (plan is None or len(self.flights) == self.depth):
            self.retire()
        else:
            assert plan is not None or self.scheduler.idle, "requests wait and nothing happens"
        self.outputs += self.scheduler.take_outputs()
        self.check_books()

    def land(self) -> None:
        """One of the two first moves is done: as late as may be, for one out whose pages are taken too early to show,
        and for one in that is waited for too little."""
        move = self.rng.choice([moves for moves in self.moves.values() if moves]).popleft()
        self.device.move(move)
        self.scheduler.landed(move)
        self.check_books()

    def retire(self) -> None:
        plan, ids = self.flights.popleft()
        self.scheduler.retire(plan, ids, None, self.device.rank(plan))

    def run(self) -> None:
        for _ in range(100_000):
            if self.scheduler.idle and not self.flights:
                break
            self.turn()
        else:
            pytest.fail("the requests do not end")
        self.outputs += self.scheduler.take_outputs()
        self.scheduler.check_books()
        assert self.pages.free == self.pages.count

    @property
    def results(self) -> dict[str, GenerationOutput]:
        ended = [output for output in self.outputs if output.status in (RequestStatus.FINISHED, RequestStatus.FAILED)]
        assert len({output.request_id for output in ended}) == len(ended), "a request has ended twice"
        return {output.request_id: output for output in ended}

    # ------------------------------------------------------------------------------------------------ invariants

    def running(self) -> dict[tuple[int, int], int]:
        """Row by place in line of the requests that go on."""
        r = self.rows
        rows = np.flatnonzero((r.phase == Phase.RUNNING) & (r.total < r.limit))
        return {(-r.priority[row], r.arrival[row]): row for row in rows.tolist()}

    def check_preempted(self, before: dict[tuple[int, int], int]) -> None:
        waiting = {place for place, _ in self.scheduler.line.waiting}
        preempted = {p for p, row in before.items() if p in waiting or self.rows.phase[row] == Phase.PREEMPTED}
        assert not preempted or min(before) not in preempted, "the first in line was preempted"

    def check_plan(self, plan: Plan) -> None:
        r, rows = self.rows, plan.rows
        assert len(set(rows.tolist())) == len(rows) > 0
        assert plan.tokens <= self.scheduler.token_budget, "more tokens than the budget"
        assert (plan.counts >= 1).all()
        assert (r.phase[rows] == Phase.RUNNING).all()
        assert (r.total[rows] <= r.limit[rows]).all(), "a row was planned after its limit"
        assert (r.in_flight[rows] <= self.depth).all()
        decodes = slice(plan.decodes)
        assert (plan.starts[decodes] >= r.prefill[rows[decodes]]).all(), "decoding rows come first"
        assert (plan.counts[decodes] == 1).all()
        assert plan.samples[decodes].all()
        prompts = rows[plan.decodes :]
        ends = plan.starts[plan.decodes :] + plan.counts[plan.decodes :]
        assert (ends <= r.prefill[prompts]).all()
        assert ((ends == r.prefill[prompts]) == plan.samples[plan.decodes :]).all()
        full = plan.tokens == self.scheduler.token_budget or plan.scores == prefill.MOST_SCORED
        full |= self.tables.forgets  # and may have found no page
        if self.scheduler.admission.states:  # where others of its family begin as copies
            full |= any(r.request[row].family is not None for row in prompts)
        assert full or (ends == r.prefill[prompts]).all(), "a prompt is cut"
        assert set(plan.fresh) <= set(prompts.tolist())
        assert not r.moving[rows].any() and not r.moving[plan.forks[:, 0]].any(), "pages are not there yet"
        forked = set(plan.forks[:, 1 + len(self.tables.groups)].tolist())
        assert forked <= set(plan.fresh)
        for row in plan.fresh:
            start, prompt = plan.starts[rows.tolist().index(row)], r.request[row].prompt_length
            assert start == prompt - 1 if row in forked else start % self.pages.page_size == 0
        let_go = {r.request[row].family for row in prompts} - {None}
        still = [place for place, request in self.scheduler.line.waiting if request.family not in let_go]
        if plan.fresh and still and not self.scheduler.offloaded:  # who comes from the host was let in before
            fresh = max((-r.priority[row], r.arrival[row]) for row in plan.fresh)
            assert fresh < min(still), "one that is before it in line still waits"

    def check_books(self) -> None:
        r, tables = self.rows, self.tables
        held = [row for row in range(r.count) if r.phase[row] != Phase.FREE]
        lines = [(g, row) for g in range(len(tables.groups)) for row in held]
        pages = np.concatenate(
            [tables.pages[at][tables.first[at] : tables.end[at]] for at in lines] + [np.empty(0, np.int32)]
        )
        assert (np.bincount(pages, minlength=self.pages.count + 1) == self.pages._holders).all()
        assert Pages.PADDING not in pages
        assert len(np.unique(pages)) == self.pages.count - self.pages.free
        assert r.free == r.count - len(held)
        out = r.moving & (r.phase >= Phase.PREEMPTED)
        for g, group in enumerate(tables.groups):
            assert ((tables.end[g] * group.page_size >= r.computed) | out)[held].all()
            step = group.needed(self.depth * self.scheduler.token_budget) + 1
            most = most_held(group, r.known + r.prefill, tables.layout.grain) + (0 if group.keeps_all else step)
            assert (tables.end[g] - tables.first[g] <= most)[held].all(), "more pages than a window and a few steps"
        host = self.scheduler.host
        kept = np.concatenate([*map(host.of, host._of), np.empty(0, np.int64)])
        assert len(np.unique(kept)) == len(kept) == host.count - host.free
        assert host.under_way == sum(map(len, self.moves.values())) + len(host._moves)
        assert (r.known[held] <= r.total[held]).all()
        in_flight = np.zeros(r.count, int)
        for plan, _ in self.flights:
            in_flight[plan.rows] += 1
        for move in (*self.moves[True], *self.moves[False], *host._moves):
            in_flight[move.row] += 1
        assert (in_flight == r.in_flight).all()
        assert all(in_flight[row] for row in held if r.phase[row] >= Phase.PREEMPTED), "a row is held for nothing"


def random_groups(rng: random.Random, page_size: int) -> tuple[PageGroup, ...]:
    """Half of them as most models have them."""
    span, times = rng.randint(1, 20), rng.randint(1, 3)
    window, chunks = PageGroup(page_size, window=span), PageGroup(page_size, chunk=span)
    return rng.choice([
        *[(PageGroup(page_size),)] * 5,
        (window,),
        (chunks,),
        (PageGroup(page_size * times), window),
        (PageGroup(page_size * times), chunks),
        (PageGroup(page_size), PageGroup(page_size * times, window=rng.randint(1, 20)), window),
    ])  # fmt: skip


@pytest.fixture(params=range(20), ids=lambda seed: f"seed {seed}")
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


def random_requests(rng: random.Random, count: int, longest: int, streaming: bool = False) -> Iterator[Request]:
    """Of at most `longest` tokens, prompt and answer; about half of them end by an EOS."""
    for arrival in range(count):
        total = rng.randint(2, longest)
        prompt = rng.randint(1, total - 1)
        eos_ids = tuple(rng.sample(range(VOCABULARY), rng.choice((0, 1, 4))))
        priority = rng.choice((0, 0, 0, 1, 5))
        yield new_request(arrival, prompt, total - prompt, eos_ids, streaming=streaming, priority=priority)


@DEPTH
class TestRandomRuns:
    @staticmethod
    def simulation(rng: random.Random, depth: int, longest: int = 40, spare: int = 20) -> Simulation:
        """A pool that fits the longest request and has up to `spare` pages more."""
        page_size = rng.choice((1, 2, 3, 4, 8))
        groups = random_groups(rng, page_size)
        pages = PageLayout(groups, (), {}).pages_at_length(longest - 1) + rng.randint(0, spare)
        rows = rng.randint(1, min(12, pages))
        return Simulation(
            depth, pages, page_size, rows, max(rows, rng.randint(1, 30)), longest, rng.choice((0, 0, 0.3)),
            host_pages=rng.choice((0, 5, 1000)), rng=rng, groups=groups,
        )  # fmt: skip

    def test_end_every_request_with_its_answer(self, rng: random.Random, depth: int) -> None:
        simulation = self.simulation(rng, depth)
        simulation.add(*random_requests(rng, 40, 40))
        simulation.run()
        results = simulation.results
        assert results.keys() == simulation.requests.keys()
        for request_id, request in simulation.requests.items():
            assert results[request_id].error is None
            assert results[request_id].generated_tokens == answer_of(request)
            assert results[request_id].prompt_ids == request.tokens[: request.prompt_length].tolist()

    def test_give_each_token_its_own_log_probability(
        self, rng: random.Random, depth: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prefill, "MOST_SCORED", most := rng.choice((1, 3, 10)))
        simulation = self.simulation(rng, depth)
        for arrival in range(30):
            total = rng.randint(2, 40)
            prompt = rng.randint(1, total - 1)
            own, of_prompt = rng.choice((None, 0, 2)), rng.choice((None, 0, 2))
            settings = {
                "eos_ids": tuple(rng.sample(range(VOCABULARY), rng.choice((0, 1, 4)))),
                "priority": rng.choice((0, 0, 0, 1, 5)),
                "ranked": None if own is None else no_words(0, own),
                "prompt_scores": None if of_prompt is None else PromptScores(no_words(prompt - 1, of_prompt)),
            }
            simulation.add(*new_family(arrival, prompt, total - prompt, rng.choice((1, 1, 3)), **settings))
        while not simulation.scheduler.idle:
            if rng.random() < 0.05:
                simulation.scheduler.cancel(simulation.requests[rng.choice(list(simulation.requests))], "cancelled")
            simulation.turn()
        simulation.run()
        for request_id, output in simulation.results.items():
            request = simulation.requests[request_id]
            end = request.prompt_length + len(output.generated_tokens)
            for ranked, asked, positions in (
                (output.ranked, request.ranked is not None, range(request.prompt_length, end)),
                (output.prompt_ranked, request.prompt_scores is not None, range(1, request.prompt_length)),
            ):
                assert (ranked is not None) == asked
                if asked:
                    expected = [[*ranked_words(request.arrival, at, ranked.shape[1])] for at in positions]
                    assert ranked.tolist() == (expected if output.error is None else expected[: len(ranked)])
        assert max(plan.scores for plan in simulation.plans) <= most

    def test_end_every_request_that_comes_or_is_cancelled_meanwhile(self, rng: random.Random, depth: int) -> None:
        simulation = self.simulation(rng, depth)
        coming, cancelled = deque(random_requests(rng, 40, 40)), set()
        while coming or not simulation.scheduler.idle:
            if coming and rng.random() < 0.4:
                simulation.add(coming.popleft())
            if simulation.requests and rng.random() < 0.2:
                request_id = rng.choice(list(simulation.requests))
                simulation.scheduler.cancel(simulation.requests[request_id], "cancelled")
                cancelled.add(request_id)
                simulation.check_books()
            simulation.turn()
        simulation.run()
        results = simulation.results
        assert results.keys() == simulation.requests.keys()
        for request_id, request in simulation.requests.items():
            output, answer = results[request_id], answer_of(request)
            if output.error is None:
                assert output.generated_tokens == answer
            else:
                assert request_id in cancelled
                assert output.error == "cancelled"
                assert output.generated_tokens == answer[: len(output.generated_tokens)]

    def test_stream_each_token_once(self, rng: random.Random, depth: int) -> None:
        simulation = self.simulation(rng, depth, longest=25, spare=5)
        simulation.add(*random_requests(rng, 15, 25, streaming=True))
        simulation.run()
        for request_id, request in simulation.requests.items():
            answer = answer_of(request)
            seen = [o.generated_tokens for o in simulation.outputs if o.request_id == request_id]
            assert seen == [answer[: n + 1] for n in range(len(answer))]

    def test_end_all_at_once_when_told_to(self, rng: random.Random, depth: int) -> None:
        simulation = self.simulation(rng, depth)
        simulation.add(*random_requests(rng, 30, 40))
        for _ in range(rng.randint(0, 40)):
            if not simulation.scheduler.idle or simulation.flights:
                simulation.turn()
        simulation.scheduler.fail_all("told to")
        simulation.check_books()
        assert simulation.scheduler.idle or simulation.scheduler.host.under_way
        simulation.run()
        assert simulation.results.keys() == simulation.requests.keys()
        for request_id, output in simulation.results.items():
            answer = answer_of(simulation.requests[request_id])
            assert output.error in (None, "told to")
            assert output.generated_tokens == answer[: len(output.generated_tokens)]

    def test_fail_only_what_does_not_fit(self, rng: random.Random, depth: int) -> None:
        """A pool smaller than some of the requests, and a longest sequence shorter than some."""
        page_size, pages, longest = rng.choice((1, 2, 4)), rng.randint(6, 12), 60
        simulation = Simulation(depth, pages, page_size, rng.randint(1, 6), 12, rng.choice((longest, 20)))
        simulation.add(*random_requests(rng, 30, longest))
        simulation.run()
        room = min(pages * page_size, simulation.scheduler.max_tokens)
        assert simulation.results.keys() == simulation.requests.keys()
        for request_id, request in simulation.requests.items():
            output, answer = simulation.results[request_id], answer_of(request)
            fits = request.prompt_length + len(answer) - 1 <= room
            assert (output.error is None) == fits, output.error
            if fits:
                assert output.generated_tokens == answer
            else:
                assert request_id in output.error
                assert output.generated_tokens == answer[: max(0, room + 1 - request.prompt_length)]


@DEPTH
class TestAPoolThatFitsOneRequest:
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    def test_finishes_them_all(self, depth: int, page_size: int) -> None:
        pages = -(-49 // page_size)
        simulation = Simulation(depth, pages, page_size, min(8, pages), 16, 50)
        simulation.add(*(new_request(arrival, 10, 40) for arrival in range(12)))
        simulation.run()
        for request_id, request in simulation.requests.items():
            assert simulation.results[request_id].generated_tokens == answer_of(request)

    def test_finishes_the_oldest_first(self, depth: int) -> None:
        simulation = Simulation(depth, 49, 1, 8, 16, 50)
        simulation.add(*(new_request(arrival, 10, 40) for arrival in range(6)))
        simulation.run()
        assert list(simulation.results) == [f"r{arrival}" for arrival in range(6)]
        assert simulation.scheduler.preemptions > 0

    def test_with_one_page_less_fails_each_at_its_last_token(self, depth: int) -> None:
        simulation = Simulation(depth, 48, 1, 8, 16, 50)
        simulation.add(*(new_request(arrival, 10, 40) for arrival in range(4)))
        simulation.run()
        for request_id, request in simulation.requests.items():
            output = simulation.results[request_id]
            assert "48" in output.error
            assert output.generated_tokens == answer_of(request)[:39]


@DEPTH
class TestHostPages:
    def run_short(self, depth: int, host_pages: int, **settings) -> Simulation:
        simulation = Simulation(depth, 60, 1, 8, 16, 50, host_pages=host_pages)
        simulation.add(*(new_request(arrival, 10, 40, **settings) for arrival in range(6)))
        simulation.run()
        for request_id, request in simulation.requests.items():
            assert simulation.results[request_id].generated_tokens == answer_of(request)
        assert simulation.scheduler.preemptions > 0
        return simulation

    def test_save_computing_again(self, depth: int) -> None:
        with_host, without = self.run_short(depth, 1000), self.run_short(depth, 0)
        assert 0 < with_host.scheduler.restored <= with_host.scheduler.offloaded <= with_host.scheduler.preemptions
        tokens, needed = sum(plan.tokens for plan in with_host.plans), 6 * 49
        assert tokens <= needed + with_host.scheduler.preemptions
        assert tokens < sum(plan.tokens for plan in without.plans)

    def test_hold_what_there_is_room_for(self, depth: int) -> None:
        simulation = self.run_short(depth, 7)
        assert 0 < simulation.scheduler.offloaded < simulation.scheduler.preemptions

    def test_are_for_no_request_whose_history_is_on_the_device(self, depth: int) -> None:
        assert self.run_short(depth, 1000, shaping=np.zeros(1, np.int32)).scheduler.offloaded == 0

    def test_are_not_taken_where_computing_is_cheaper(self, depth: int) -> None:
        simulation = Simulation(depth, 60, 1, 8, 16, 50, host_pages=1000)
        simulation.scheduler.host._copying = 1.0
        simulation.scheduler.host.note_computed(10, 19.0)
        simulation.add(*(new_request(arrival, 10, 40) for arrival in range(6)))
        simulation.run()
        assert simulation.scheduler.preemptions > 0
        assert simulation.scheduler.offloaded == 0


class TestPlans:
    def test_of_nothing_are_none(self) -> None:
        assert Simulation(1, 10, 4, 4, 16, 40).scheduler.plan() is None

    def test_put_decoding_rows_before_prompts_under_one_budget(self) -> None:
        simulation = Simulation(1, 40, 4, 4, 10, 60)
        simulation.add(new_request(0, 3, 9), new_request(1, 30, 9))
        simulation.turn()
        simulation.turn()
        first, second = simulation.plans
        assert (first.decodes, first.counts.tolist(), first.samples.tolist()) == (0, [3, 7], [True, False])
        assert (second.decodes, second.counts.tolist(), second.samples.tolist()) == (1, [1, 9], [True, False])

    def test_know_the_end_by_length_and_find_an_eos_one_step_late(self) -> None:
        for eos_ids, steps, discarded in (((), 5, 0), ((token_of(0, 4),), None, 1)):
            request = new_request(0, 2, 5, eos_ids)
            answer = answer_of(request)
            simulation = Simulation(2, 10, 4, 4, 16, 40)
            simulation.add(request)
            simulation.run()
            assert len(simulation.plans) == (steps or len(answer) + 1)
            assert simulation.scheduler.discarded == discarded
            assert simulation.results["r0"].generated_tokens == answer

    def test_admit_the_oldest_first_though_a_younger_one_would_fit(self) -> None:
        simulation = Simulation(1, 10, 1, 4, 16, 40)
        simulation.add(new_request(0, 6, 3), new_request(1, 6, 3), new_request(2, 1, 1))
        simulation.turn()
        assert simulation.rows.arrival[simulation.plans[0].rows].tolist() == [0]
        simulation.run()
        assert all(output.error is None for output in simulation.results.values())

    def test_pass_over_a_request_that_can_never_fit(self) -> None:
        simulation = Simulation(1, 10, 1, 4, 16, 40)
        simulation.add(new_request(0, 11, 3), new_request(1, 6, 3))
        simulation.run()
        assert "r0 needs 11 pages" in simulation.results["r0"].error
        assert simulation.results["r1"].error is None

    def test_pass_over_a_request_longer_than_a_row(self) -> None:
        """The pool has the pages, but no row the columns for them."""
        simulation = Simulation(1, 100, 4, 4, 16, 40)
        simulation.add(new_request(0, 5, 3), new_request(1, 41, 3), new_request(2, 60, 3), new_request(3, 5, 3))
        simulation.run()
        assert simulation.results.keys() == simulation.requests.keys()
        assert [simulation.results[i].error is None for i in ("r0", "r1", "r2", "r3")] == [True, False, False, True]

    def test_admit_a_crowd_over_several_steps(self) -> None:
        crowd = 2 * MOST_FRESH + 10
        simulation = Simulation(2, crowd, 4, crowd, 10 * MOST_FRESH, 4)
        simulation.add(*(new_request(i, 1, 3) for i in range(crowd)))
        simulation.run()
        assert [len(plan.fresh) for plan in simulation.plans[:4]] == [MOST_FRESH, MOST_FRESH, 10, 0]
        assert len(simulation.results) == crowd

    def test_leave_the_reserve_free_while_anything_runs(self) -> None:
        simulation = Simulation(1, 20, 1, 8, 64, 40, reserve=0.5)
        simulation.add(*(new_request(arrival, 4, 2) for arrival in range(5)))
        simulation.turn()
        assert len(simulation.plans[0].rows) == 2
        simulation.run()


class TestTheLine:
    def test_is_left_by_priority_and_then_by_arrival(self) -> None:
        simulation = Simulation(1, 40, 4, 1, 16, 40)
        for arrival, priority in enumerate((0, 2, 0, 1, 2)):
            simulation.add(new_request(arrival, 3, 3, priority=priority))
        simulation.run()
        assert list(simulation.results) == ["r1", "r4", "r3", "r0", "r2"]

    def test_ends_with_the_lowest_priority_when_pages_run_out(self) -> None:
        simulation = Simulation(2, 24, 1, 3, 16, 24)
        simulation.add(*(new_request(i, 2, 20, priority=priority) for i, priority in enumerate((0, 7, 3))))
        simulation.run()
        assert simulation.scheduler.preemptions > 0
        assert list(simulation.results) == ["r1", "r2", "r0"]
        assert all(output.error is None for output in simulation.results.values())

    def test_does_not_wait_for_a_long_prompt(self) -> None:
        simulation = Simulation(1, 400, 1, 8, 20, 300)
        simulation.add(new_request(0, 200, 2), *(new_request(arrival, 8, 2) for arrival in range(1, 5)))
        simulation.turn()
        assert simulation.plans[0].counts.tolist() == [10, 8, 2], "half of the budget is for those behind it"
        simulation.run()
        assert list(simulation.results)[-1] == "r0"

    def test_gives_a_long_prompt_what_nobody_else_wants(self) -> None:
        simulation = Simulation(1, 400, 1, 8, 20, 300)
        simulation.add(new_request(0, 60, 2), new_request(1, 3, 2))
        simulation.turn()
        simulation.turn()
        assert [plan.counts.tolist() for plan in simulation.plans] == [[17, 3], [1, 19]]

    def test_is_left_by_who_is_late(self) -> None:
        simulation = Simulation(2, 40, 4, 1, 16, 40)
        simulation.add(
            new_request(0, 3, 30, deadline=0), new_request(1, 3, 5), new_request(2, 3, 5, deadline=float("inf"))
        )
        late_in_the_end = new_request(3, 3, 30)
        late_in_the_end.deadline = late_in_the_end.created_time + 3600
        simulation.add(late_in_the_end)
        simulation.run()
        assert "r0 was not finished by its deadline" in simulation.results["r0"].error
        assert [simulation.results[f"r{i}"].error for i in (1, 2, 3)] == [None] * 3

    def test_is_left_late_by_who_is_running(self) -> None:
        simulation = Simulation(2, 40, 4, 2, 16, 40)
        request = new_request(0, 3, 30)
        simulation.add(request, new_request(1, 3, 30))
        for _ in range(5):
            simulation.turn()
        request.deadline = simulation.scheduler.line.next_deadline = request.created_time
        simulation.run()
        assert simulation.results["r0"].error == "request r0 was not finished by its deadline, 0 s"
        assert 0 < len(simulation.results["r0"].generated_tokens) < 30
        assert simulation.results["r1"].generated_tokens == answer_of(simulation.requests["r1"])


class TestPagesThatHoldABeginning:
    def run_alike(self, page_size: int = 4, pages: int = 100, reuse: bool = True) -> Simulation:
        """Three requests of which the second and third begin with the prompt of the first, one after another."""
        simulation = Simulation(2, pages, page_size, 4, 64, 40)
        simulation.scheduler.admission.reuse = reuse
        for arrival in (3, 6, 9):  # 21, 19 and 17 tokens of one beginning
            simulation.add(new_request(arrival, 24, 6))
            simulation.run()
        for request_id, request in simulation.requests.items():
            assert simulation.results[request_id].generated_tokens == answer_of(request)
        return simulation

    @pytest.mark.parametrize("page_size, reused", [(1, 19 + 17), (4, 16 + 16), (8, 16 + 16), (32, 0)])
    def test_are_not_computed_again(self, page_size: int, reused: int) -> None:
        simulation = self.run_alike(page_size)
        assert simulation.scheduler.admission.looked_up == 3 * 24
        assert simulation.scheduler.admission.reused == reused
        assert sum(plan.tokens for plan in simulation.plans) == 3 * (24 + 5) - reused

    def test_are_computed_again_where_nothing_is_to_be_reused_or_weights_have_changed(self) -> None:
        assert self.run_alike(reuse=False).scheduler.admission.reused == 0
        simulation = self.run_alike()
        before = simulation.scheduler.admission.reused
        simulation.pages.forget()
        assert simulation.pages.free == simulation.pages.count
        simulation.add(new_request(12, 24, 6))
        simulation.run()
        assert simulation.scheduler.admission.reused == before

    def test_are_shared_by_requests_that_run_together(self) -> None:
        simulation = Simulation(2, 100, 4, 4, 24, 40)
        simulation.add(new_request(3, 24, 6))
        simulation.turn()
        simulation.add(new_request(6, 24, 6))
        simulation.turn()
        assert (simulation.pages._holders == 2).sum() == 19 // 4
        simulation.run()
        assert simulation.scheduler.admission.reused == 16

    def test_are_waited_for_while_another_computes_them(self) -> None:
        simulation = Simulation(2, 100, 1, 8, 100, 40)
        simulation.add(*(new_request(arrival, 24, 3) for arrival in (3, 6, 9, 12)))  # 21, 19, 17, 15 tokens alike
        simulation.turn()
        assert simulation.plans[0].tokens == 24
        simulation.turn()
        assert simulation.plans[1].tokens == 1 + (24 - 19) + (24 - 17) + (24 - 15)
        simulation.run()
        assert simulation.scheduler.admission.reused == 19 + 17 + 15
        for request_id, request in simulation.requests.items():
            assert simulation.results[request_id].generated_tokens == answer_of(request)

    def test_are_not_waited_for_when_they_are_few(self) -> None:
        simulation = Simulation(2, 100, 8, 8, 100, 40)
        simulation.add(new_request(3, 24, 3), new_request(6, 24, 3))
        simulation.turn()
        assert simulation.plans[0].tokens == 48

    def test_leave_the_last_token_to_compute(self) -> None:
        simulation = Simulation(1, 100, 4, 4, 64, 40)
        for arrival in (3, 6):
            simulation.add(new_request(arrival, 16, 3))
            simulation.run()
        assert simulation.scheduler.admission.reused == 12
        assert simulation.results["r6"].generated_tokens == answer_of(simulation.requests["r6"])

    def test_are_emptied_when_others_need_them_the_longest_unused_first(self) -> None:
        simulation = Simulation(1, 12, 4, 4, 64, 40)
        for arrival in (3, 4, 6):  # 3 leaves 5 full pages, 4 others, 6 asks for four of the first again
            simulation.add(new_request(arrival, 20, 2))
            simulation.run()
        assert simulation.scheduler.admission.reused == 16
        simulation.add(new_request(5, 30, 2))  # takes what is empty, then what 4 left
        simulation.run()
        simulation.add(new_request(9, 20, 2))
        simulation.run()
        assert simulation.scheduler.admission.reused == 16 + 16

    def test_a_preempted_request_finds_its_own(self) -> None:
        simulation = Simulation(2, 30, 1, 4, 64, 30)
        simulation.add(new_request(1, 10, 20), new_request(2, 10, 20))
        simulation.run()
        assert simulation.scheduler.preemptions > 0
        assert simulation.scheduler.admission.reused > 0
        for request_id, request in simulation.requests.items():
            assert simulation.results[request_id].generated_tokens == answer_of(request)


@DEPTH
class TestFamilies:
    """Requests for several sequences: `r0`, and `r<number><0...0>` for those that share its prompt."""

    def run(self, simulation: Simulation, *requests: Request) -> None:
        simulation.add(*requests)
        simulation.run()
        for request_id, request in simulation.requests.items():
            assert simulation.results[request_id].error is None
            assert simulation.results[request_id].generated_tokens == answer_of(request)

    @pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
    @pytest.mark.parametrize("page_size, prompt", [(4, 21), (4, 20), (4, 3), (1, 9), (32, 21), (8, 1)])
    def test_compute_their_prompt_once(self, depth: int, page_size: int, prompt: int, reuse: bool) -> None:
        simulation = Simulation(depth, 100, page_size, 8, 64, 40)
        simulation.scheduler.admission.reuse = reuse
        self.run(simulation, *new_family(0, prompt, 6, 5))
        assert sum(plan.tokens for plan in simulation.plans) == prompt + 4 + 5 * 5
        assert len(np.concatenate([plan.forks for plan in simulation.plans])) == 4

    def test_share_its_full_pages_and_copy_the_last(self, depth: int) -> None:
        simulation = Simulation(depth, 100, 4, 8, 64, 40)
        simulation.add(*new_family(0, 22, 6, 3))
        simulation.turn()
        simulation.turn()
        assert (simulation.pages._holders == 3).sum() == 5
        assert (simulation.plans[1].forks[:, 1] == simulation.tables.pages[0, 0, 5]).all()
        simulation.run()

    def test_compute_it_in_chunks_while_others_pass_those_that_wait_for_it(self, depth: int) -> None:
        simulation = Simulation(depth, 400, 4, 8, 20, 300)
        self.run(simulation, *new_family(0, 100, 3, 4), new_request(1, 5, 2))
        assert next(iter(simulation.results)) == "r1"
        assert sum(plan.tokens for plan in simulation.plans) == 100 + 3 + 4 * 2 + 5 + 1

    def test_share_it_with_those_that_find_a_row_later(self, depth: int) -> None:
        simulation = Simulation(depth, 100, 4, 2, 64, 40)
        simulation.scheduler.admission.reuse = False
        family = new_family(0, 22, 9, 6)
        for number, request in enumerate(family):
            request.max_new_tokens = 3 + number
        self.run(simulation, *family)
        assert len(np.concatenate([plan.forks for plan in simulation.plans])) == 5

    def test_pass_the_prompt_on_when_who_computes_it_is_cancelled(self, depth: int) -> None:
        for cancelled_after in range(4):
            simulation = Simulation(depth, 100, 4, 8, 10, 60)
            family = new_family(0, 35, 3, 4)
            simulation.add(*family)
            for _ in range(cancelled_after):
                simulation.turn()
            simulation.scheduler.cancel(family[0], "no more")
            simulation.scheduler.cancel(family[1], "no more")
            simulation.run()
            assert [simulation.results[r.id].error for r in family] == ["no more", "no more", None, None]
            assert simulation.results[family[3].id].generated_tokens == answer_of(family[3])

    def test_go_on_when_those_end_that_computed_the_prompt_anew_and_that_came_back_from_the_host(
        self, depth: int
    ) -> None:
        family = first, anew, back, last = new_family(0, 20, 120, 4)
        simulation = Simulation(depth, 150, 1, 3, 6, 150, host_pages=8, reuse=False)
        simulation.add(*family)
        scheduler = simulation.scheduler
        for _ in range(200):
            simulation.turn()
            if scheduler.preemptions == 2 and len(scheduler.row_of) == 1:
                break
        scheduler.cancel(first, "cancelled")
        while scheduler.row_of.keys() != {anew.id, back.id}:
            simulation.turn()
        assert scheduler.rows.computed[scheduler.row_of[anew.id]] < 20
        for request in (back, anew):
            scheduler.cancel(request, "cancelled")
            simulation.turn()
        simulation.run()
        assert simulation.results[last.id].generated_tokens == answer_of(last)

    def test_all_end_by_their_deadline_though_they_were_held_back(self, depth: int) -> None:
        simulation = Simulation(depth, 100, 4, 8, 10, 60)
        simulation.add(*new_family(0, 35, 3, 4, deadline=time.perf_counter() + 0.005))
        simulation.turn()
        time.sleep(0.005)
        simulation.run()
        assert all("deadline" in output.error for output in simulation.results.values())
        assert len(simulation.results) == 4

    def test_all_fail_when_the_prompt_does_not_fit(self, depth: int) -> None:
        simulation = Simulation(depth, 10, 1, 4, 16, 40)
        simulation.add(*new_family(0, 11, 3, 3), new_request(1, 6, 3))
        simulation.run()
        assert [output.error is None for output in simulation.results.values()] == [False, False, False, True]

    @pytest.mark.parametrize("page_size, prompt, tokens", [(4, 21, 21 + 4), (1, 9, 9 + 4), (32, 2, 2 + 4), (8, 1, 5)])
    def test_begin_as_copies_of_a_state_before_the_last_token(
        self, depth: int, page_size: int, prompt: int, tokens: int
    ) -> None:
        simulation = Simulation(depth, 200, page_size, 8, 64, 40, reuse=False, states=True)
        self.run(simulation, *new_family(0, prompt, 6, 5))
        assert sum(plan.tokens for plan in simulation.plans) == tokens + 5 * 5
        assert len(np.concatenate([plan.forks for plan in simulation.plans])) == (4 if prompt > 1 else 0)

    @pytest.mark.parametrize("kind", ["pages", "states", "states, whole prompts"])
    def test_end_every_request_whatever_is_preempted_or_cancelled(
        self, rng: random.Random, depth: int, kind: str
    ) -> None:
        page_size, reuse = rng.choice((1, 2, 3, 4, 8)), rng.random() < 0.5
        groups = random_groups(rng, page_size) if kind != "states, whole prompts" else (PageGroup(page_size),)
        pages = PageLayout(groups, (), {}).pages_at_length(39) + rng.randint(0, 15)
        rows = rng.randint(1, min(10, pages))
        budget, host_pages = max(rows, rng.randint(1, 30)), rng.choice((0, 5, 1000))
        kinds = {"host_pages": host_pages}
        if kind != "pages":
            kinds, reuse = {"states": True}, False
        if kind == "states, whole prompts":
            kinds["whole_prompts"], budget = budget, 40 + rows
        simulation = Simulation(depth, pages, page_size, rows, budget, 40, rng=rng, groups=groups, **kinds)
        simulation.scheduler.admission.reuse = reuse
        coming, cancelled = deque(), set()
        for arrival in range(14):
            total = rng.randint(2, 40)
            prompt, eos_ids = rng.randint(1, total - 1), tuple(rng.sample(range(VOCABULARY), rng.choice((0, 1, 4))))
            settings = {"eos_ids": eos_ids, "priority": rng.choice((0, 0, 1)), "streaming": rng.random() < 0.2}
            coming.append(new_family(arrival, prompt, total - prompt, rng.choice((1, 2, 3, 7)), **settings))
        while coming or not simulation.scheduler.idle:
            if coming and rng.random() < 0.4:
                simulation.add(*coming.popleft())
            if simulation.requests and rng.random() < 0.1:
                request = simulation.requests[rng.choice(list(simulation.requests))]
                for member in request.family.members if rng.random() < 0.5 else [request]:
                    simulation.scheduler.cancel(member, "cancelled")
                    cancelled.add(member.id)
            simulation.turn()
        simulation.run()
        assert simulation.results.keys() == simulation.requests.keys()
        for request_id, request in simulation.requests.items():
            output, answer = simulation.results[request_id], answer_of(request)
            assert output.generated_tokens == (
                answer if output.error is None else answer[: len(output.generated_tokens)]
            )
            assert output.error is None or request_id in cancelled


def test_whole_prompts_share_a_step_up_to_some_tokens() -> None:
    simulation = Simulation(1, 200, 1, 8, 60, 50, reuse=False, whole_prompts=20)
    simulation.add(*(new_request(arrival, prompt, 1) for arrival, prompt in enumerate((8, 12, 1, 45, 3))))
    simulation.run()
    assert [plan.counts.tolist() for plan in simulation.plans] == [[8, 12], [1], [45], [3]]


class TestTime:
    @DEPTH
    def test_goes_on_while_a_request_is_preempted(self, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The clock ticks when it is read; the younger of two waits in the middle, and ends after twelve ticks."""
        now = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda: next(now))
        simulation = Simulation(depth, 16, 1, 2, 16, 16)
        older, younger = new_request(0, 4, 7), new_request(1, 4, 12)
        younger.max_time, younger.record_timestamps = 12, True
        simulation.add(older, younger)
        simulation.run()
        assert simulation.scheduler.preemptions > 0
        output = simulation.results["r1"]
        assert output.error is None
        assert 1 < len(output.generated_tokens) < 12
        assert output.timestamps[-2] <= output.lifespan[0] + 12 < output.timestamps[-1]
        assert output.generated_tokens == answer_of(younger)[: len(output.generated_tokens)]


class TestCancelling:
    def test_a_waiting_request_ends_it_at_once(self) -> None:
        simulation = Simulation(2, 10, 1, 1, 16, 40)
        simulation.add(new_request(0, 3, 5), new_request(1, 3, 5))
        simulation.turn()
        simulation.scheduler.cancel(simulation.requests["r1"], "no more")
        simulation.run()
        assert simulation.results["r1"].error == "no more"
        assert simulation.results["r0"].generated_tokens == answer_of(simulation.requests["r0"])

    def test_a_request_in_flight_keeps_its_pages_until_its_steps_retire(self) -> None:
        simulation = Simulation(2, 10, 1, 2, 16, 40)
        simulation.add(new_request(0, 4, 6))
        simulation.turn()
        assert len(simulation.flights) == 1
        simulation.scheduler.cancel(simulation.requests["r0"], "no more")
        assert simulation.pages.free == 6
        simulation.check_books()
        simulation.turn()
        assert simulation.pages.free == 10
        simulation.run()

    def test_a_half_computed_prompt_frees_its_place(self) -> None:
        simulation = Simulation(1, 60, 1, 4, 8, 60)
        simulation.add(new_request(0, 30, 3), new_request(1, 10, 3))
        simulation.turn()
        simulation.scheduler.cancel(simulation.requests["r0"], "no more")
        simulation.run()
        assert simulation.results["r0"].generated_tokens == []
        assert simulation.results["r1"].error is None

    def test_leaves_no_trace_in_books_that_are_checked(self) -> None:
        simulation = Simulation(1, 10, 1, 2, 16, 40)
        simulation.add(new_request(0, 4, 6))
        simulation.turn()
        with pytest.raises(RuntimeError, match=r"do not balance.*pages.*4"):
            simulation.scheduler.check_books()
        simulation.run()
