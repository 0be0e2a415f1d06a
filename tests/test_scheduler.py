"""The books, driven without a model: whatever ends, is cancelled or runs short, they balance and nobody is lost."""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb.pages import Pages
from transformers_async_cb.request import Phase, Request, Rows
from transformers_async_cb.scheduler import MOST_FRESH, Plan, Scheduler


VOCABULARY = 40
DEPTH = pytest.mark.parametrize("depth", [1, 2], ids=["in turn", "overlap"])


def new_request(
    arrival: int, prompt: int, limit: int, eos_ids: tuple[int, ...] = (), streaming: bool = False
) -> Request:
    tokens = np.array([token_of(arrival, position) for position in range(prompt)], np.int32)
    return Request(f"r{arrival}", tokens, prompt, limit, eos_ids=eos_ids, streaming=streaming, arrival=arrival)


def token_of(arrival: int, position: int) -> int:
    """What stands, or will be sampled, at a position of a request: the same however often it is computed."""
    return hash((arrival, position)) % VOCABULARY


def answer_of(request: Request) -> list[int]:
    tokens = []
    for position in range(request.prompt_length, request.total_limit):
        tokens.append(token_of(request.arrival, position))
        if tokens[-1] in request.eos_ids:
            break
    return tokens


class Device:
    """What a device would make of the plans, in the order they are launched: a page table, and who wrote where."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        rows, pages = scheduler.rows, scheduler.pages
        self.table = np.zeros(rows.count * rows.pages.shape[1], np.int32)
        self.columns = rows.pages.shape[1]
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}
        self.page_size = pages.page_size

    def compute(self, plan: Plan) -> np.ndarray:
        """Write each token's position and read those before it; returns the sampled ids."""
        self.table[plan.cells] = plan.pages
        arrivals = self.scheduler.rows.arrival[plan.rows].tolist()
        sequences = list(zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), arrivals, strict=True))
        for row, start, count, arrival in sequences:
            for position in range(start, start + count):
                self.cache[self.where(row, position)] = (arrival, position)
        for row, start, count, arrival in sequences:
            for position in range(start + count):
                found = self.cache.get(self.where(row, position))
                assert found == (arrival, position), f"row {row} of r{arrival} reads {found} at position {position}"
        return np.array([token_of(arrival, start + count) for _, start, count, arrival in sequences], np.int32)

    def where(self, row: int, position: int) -> tuple[int, int]:
        page = int(self.table[row * self.columns + position // self.page_size])
        assert page != Pages.PADDING
        return page, position % self.page_size


class Simulation:
    """The engine's loop with a device that only keeps books, and a look at all invariants in every turn."""

    def __init__(
        self, depth: int, pages: int, page_size: int, rows: int, budget: int, longest: int, reserve: float = 0.0
    ) -> None:
        columns = min(pages, -(-longest // page_size))
        self.depth = depth
        self.rows, self.pages = Rows(rows, columns, with_logprobs=False), Pages(pages, page_size)
        self.scheduler = Scheduler(self.rows, self.pages, budget, columns * page_size, reserve)
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
        self.check_books()
        if self.flights and (plan is None or len(self.flights) == self.depth):
            self.retire()
        else:
            assert plan is not None or self.scheduler.idle, "requests wait and nothing happens"
        self.outputs += self.scheduler.take_outputs()
        self.check_books()

    def retire(self) -> None:
        plan, ids = self.flights.popleft()
        self.scheduler.retire(plan, ids, None)

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

    def running(self) -> dict[int, int]:
        """Row by arrival of the requests that go on."""
        r = self.rows
        rows = np.flatnonzero((r.phase == Phase.RUNNING) & (r.total < r.limit))
        return dict(zip(r.arrival[rows].tolist(), rows.tolist(), strict=True))

    def check_preempted(self, before: dict[int, int]) -> None:
        waiting = {arrival for arrival, _ in self.scheduler.waiting}
        preempted = {a for a, row in before.items() if a in waiting or self.rows.phase[row] == Phase.PREEMPTED}
        assert not preempted or min(before) not in preempted, "the oldest was preempted"

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
        assert (np.diff(r.arrival[prompts]) > 0).all(), "prompts go first come, first served"
        assert (ends[:-1] == r.prefill[prompts[:-1]]).all(), "only the last prompt of a step may be cut"
        assert set(plan.fresh) <= set(prompts.tolist())
        assert all(plan.starts[rows.tolist().index(row)] == 0 for row in plan.fresh)
        if plan.fresh and self.scheduler.waiting:
            assert max(r.arrival[plan.fresh]) < min(self.scheduler.waiting)[0], "an older request still waits"

    def check_books(self) -> None:
        r = self.rows
        held = [row for row in range(r.count) if r.phase[row] != Phase.FREE]
        pages = np.concatenate([r.pages[row, : r.page_count[row]] for row in held] + [np.empty(0, np.int32)])
        assert len(np.unique(pages)) == len(pages), "two rows hold one page"
        assert Pages.PADDING not in pages
        assert len(pages) == self.pages.count - self.pages.free
        assert r.free == r.count - len(held)
        assert (r.page_count[held] * self.pages.page_size >= r.computed[held]).all()
        assert (r.known[held] <= r.total[held]).all()
        in_flight = np.zeros(r.count, int)
        for plan, _ in self.flights:
            in_flight[plan.rows] += 1
        assert (in_flight == r.in_flight).all()
        assert all(in_flight[row] for row in held if r.phase[row] >= Phase.PREEMPTED), "a row is held for nothing"


@pytest.fixture(params=range(12), ids=lambda seed: f"seed {seed}")
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


def random_requests(rng: random.Random, count: int, longest: int, streaming: bool = False) -> Iterator[Request]:
    """Of at most `longest` tokens, prompt and answer; about half of them end by an EOS."""
    for arrival in range(count):
        total = rng.randint(2, longest)
        prompt = rng.randint(1, total - 1)
        eos_ids = tuple(rng.sample(range(VOCABULARY), rng.choice((0, 1, 4))))
        yield new_request(arrival, prompt, total - prompt, eos_ids, streaming)


@DEPTH
class TestRandomRuns:
    @staticmethod
    def simulation(rng: random.Random, depth: int, longest: int = 40, spare: int = 20) -> Simulation:
        """A pool that fits the longest request and has up to `spare` pages more."""
        page_size = rng.choice((1, 2, 3, 4, 8))
        pages = -(-(longest - 1) // page_size) + rng.randint(0, spare)
        rows = rng.randint(1, min(12, pages))
        return Simulation(
            depth, pages, page_size, rows, max(rows, rng.randint(1, 30)), longest, rng.choice((0, 0, 0.3))
        )

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
        assert simulation.scheduler.idle
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
