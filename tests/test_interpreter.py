"""The interpreter's switch interval and its garbage collector while an engine runs."""

import gc
import sys
import weakref

import pytest
from conftest import greedy, shared_model

from transformers_async_cb.interpreter import INTERVAL, collect, undisturbed


@pytest.fixture
def interval():
    before = sys.getswitchinterval()
    yield sys.setswitchinterval
    sys.setswitchinterval(before)


def about(seconds: float):
    return pytest.approx(seconds, abs=2e-6)  # kept in whole microseconds


def test_the_interval_is_short_while_an_engine_runs_and_then_what_it_was(interval):
    interval(0.004)
    seen = []
    model = shared_model("llama")
    with model.continuous_batching_context_manager(greedy(4), async_batching=True) as manager:
        name = manager.add_request([1, 2, 3], streaming=True)
        seen += [sys.getswitchinterval() for _ in manager.request_id_iter(name)]
    assert seen == [about(INTERVAL)] * 4
    assert sys.getswitchinterval() == about(0.004)


def test_the_last_to_leave_gives_it_back_and_a_shorter_one_is_left_alone(interval):
    interval(0.004)
    with undisturbed():
        with undisturbed():
            assert sys.getswitchinterval() == about(INTERVAL)
        assert sys.getswitchinterval() == about(INTERVAL)
    assert sys.getswitchinterval() == about(0.004)
    interval(0.0001)
    with undisturbed():
        assert sys.getswitchinterval() == about(0.0001)


def test_the_collector_leaves_alone_what_was_there_before_an_engine_ran():
    model, seen = shared_model("llama"), []
    with model.continuous_batching_context_manager(greedy(4), async_batching=True) as manager:
        name = manager.add_request([1, 2, 3], streaming=True)
        seen += [gc.get_freeze_count() for _ in manager.request_id_iter(name)]
    assert min(seen) > 100_000
    assert gc.get_freeze_count() == 0


def test_it_does_so_though_python_has_frozen_some_itself(monkeypatch):
    frozen = gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)  # Python 3.12's, when it has started
    with undisturbed():
        assert frozen() > 100_000
    assert frozen() == 0


def test_what_the_user_has_frozen_stays_frozen():
    gc.freeze()
    try:
        with undisturbed():
            pass
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()


def test_what_is_left_alone_can_be_collected_all_the_same():
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    gone = weakref.ref(Cycle())
    with undisturbed():
        gc.collect()
        assert gone() is not None
        collect()
        assert gone() is None
        assert gc.get_freeze_count() > 100_000
    assert gc.get_freeze_count() == 0
