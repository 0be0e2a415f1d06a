"""Which captured step computes a plan: graphs that only count their replays stand in for CUDA's."""

import pytest
import torch

from transformers_async_cb import graphs as module
from transformers_async_cb.graphs import Graphs, StepKey, worth_a_graph
from transformers_async_cb.inputs import Bucket
from transformers_async_cb.sampling import Flavour


WORTH = 8192


class CountingGraph:
    def __init__(self):
        self.replays = 0

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"

    def capture_end(self): ...

    def replay(self):
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CountingGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return Graphs(on=True, worth=WORTH)


def decoding(rows: int, **flavour: bool) -> StepKey:
    return StepKey(Bucket(rows, rows, True), Flavour(**flavour))


def mixed(tokens: int, rows: int) -> StepKey:
    return StepKey(Bucket(tokens, rows, False), Flavour())


def computed(graphs: Graphs, key: StepKey) -> list[str]:
    """What happens to a step that comes."""
    happened = []
    graphs.run(key, lambda: happened.append("computed"), lambda: happened.append("recorded"))
    return happened


def capture(graphs: Graphs, *keys: StepKey) -> None:
    for key in keys:
        computed(graphs, key)
        computed(graphs, key)


def test_a_step_is_computed_then_captured_then_replayed(graphs):
    key = decoding(32)
    assert [computed(graphs, key) for _ in range(4)] == [["computed"], ["recorded"], [], []]
    assert graphs._graphs[key].replays == 3


def test_a_step_that_is_not_captured_is_computed_by_the_smallest_one_that_holds_it(graphs):
    assert graphs.choose(decoding(16)) == decoding(16), "nothing is captured yet"
    capture(graphs, decoding(256), decoding(64), mixed(512, 16), mixed(256, 256))
    assert graphs.choose(decoding(16)) == decoding(64)
    assert graphs.choose(decoding(64)) == decoding(64)
    assert graphs.choose(decoding(72)) == decoding(256)
    assert graphs.choose(mixed(128, 16)) == mixed(256, 256)
    assert graphs.choose(mixed(300, 16)) == mixed(512, 16)


@pytest.mark.parametrize("wanted", [decoding(512), mixed(64, 16), decoding(16, sampled=True)])
def test_a_step_that_none_holds_is_computed_as_it_comes(graphs, wanted):
    capture(graphs, decoding(256))
    assert graphs.choose(wanted) == wanted


def test_a_step_gets_a_graph_of_its_own_when_its_padding_would_have_paid_for_it(graphs):
    capture(graphs, decoding(256))
    padding = 256 - 16
    by_another = [graphs.choose(decoding(16)) for _ in range(WORTH // padding)]
    assert by_another == [decoding(256)] * len(by_another)
    assert graphs.choose(decoding(16)) == decoding(16)
    assert computed(graphs, decoding(16)) == ["computed"]
    assert graphs.choose(decoding(16)) == decoding(16)
    assert computed(graphs, decoding(16)) == ["recorded"]
    assert graphs.choose(decoding(8)) == decoding(16)


def test_what_is_voided_is_computed_anew(graphs):
    capture(graphs, decoding(256))
    graphs.clear()
    assert graphs.choose(decoding(16)) == decoding(16)
    assert [computed(graphs, decoding(256)) for _ in range(3)] == [["computed"], ["recorded"], []]


def test_a_step_that_cannot_be_recorded_is_computed_and_none_is_tried_again(graphs, monkeypatch):
    warnings = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    happened = []

    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    for _ in range(3):
        graphs.run(decoding(4), lambda: happened.append("computed"), fail)
    assert happened == ["computed"] * 3
    assert not graphs.on
    assert warnings == [
        "steps cannot be captured as CUDA graphs, they run as they come: "
        "operation not permitted when stream is capturing"
    ]
    assert graphs.choose(decoding(2)) == decoding(2)


def test_what_the_allocator_caches_is_freed_for_a_graph(graphs, monkeypatch):
    happened = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("freed"))

    def record() -> None:
        happened.append("recorded")
        if "freed" not in happened:
            raise torch.OutOfMemoryError("no memory")

    computed(graphs, decoding(4))
    graphs.run(decoding(4), lambda: happened.append("computed"), record)
    assert happened == ["recorded", "freed", "recorded"]
    assert graphs.captured == [decoding(4)]
    assert graphs.on


def test_graphs_that_are_there_are_used_when_memory_has_no_room_for_more(graphs, monkeypatch):
    warnings = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def exhaust() -> None:
        raise torch.OutOfMemoryError("no memory")

    capture(graphs, decoding(16))
    happened = []
    for _ in range(3):
        graphs.run(decoding(32), lambda: happened.append("computed"), exhaust)
    assert happened == ["computed"] * 3
    assert warnings == ["steps cannot be captured as CUDA graphs, they run as they come: no memory"]
    assert not graphs.on
    assert {graphs.choose(decoding(8)) for _ in range(WORTH)} == {decoding(16)}
    assert computed(graphs, decoding(16)) == []


def test_padding_weighs_more_in_a_larger_model():
    assert worth_a_graph(600_000_000) == 8192
    assert worth_a_graph(8_000_000_000) == 1875
    assert worth_a_graph(10**15) == 1
