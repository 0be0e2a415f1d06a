"""What a manager says of itself while it runs."""

from __future__ import annotations

import importlib
import sys
import threading

import pytest
import transformers
from conftest import batching, greedy, random_prompts, shared_model

from transformers_async_cb import metrics
from transformers_async_cb.metrics import Meter, Metrics, Percentiles


def test_counts_what_a_run_did() -> None:
    prompts = random_prompts(6, 40)
    manager = shared_model("llama").init_continuous_batching(greedy(7), async_batching=True)
    assert manager.metrics() == Metrics()
    manager.add_requests(prompts)
    assert manager.metrics().waiting == 6
    manager.start()
    manager.stop()
    m = manager.metrics()
    assert (m.running, m.waiting, m.finished, m.failed) == (0, 0, 6, 0)
    assert m.tokens_in == m.looked_up - m.found == sum(map(len, prompts))
    assert m.tokens_out == 6 * 7
    assert m.steps == 7
    assert m.pages_used == 0 < m.pages
    assert m.host_ms > 0
    assert m.device_ms > 0
    assert 0 < m.queue_seconds.p50 <= m.queue_seconds.p90 <= m.queue_seconds.p99
    assert m.queue_seconds.p50 < m.first_token_seconds.p50


def test_shows_what_runs_meanwhile() -> None:
    with shared_model("llama").continuous_batching_context_manager(greedy(200), async_batching=True) as manager:
        name = manager.add_request([1, 2, 3], streaming=True)
        for output in manager.request_id_iter(name):
            if len(output.generated_tokens) == 40:
                m = manager.metrics()
                break
        manager.cancel_request(name)
    assert (m.running, m.waiting) == (1, 0)
    assert m.pages_used >= 2
    assert m.tokens_out >= 40
    assert m.tokens_out_per_second > 0
    assert manager.metrics().failed == 1
    assert "1 running, 0 waiting; tokens/s: " in str(m)


def test_counts_prompts_found_in_the_cache_and_preemptions() -> None:
    prompt = random_prompts(1, 64, 64)[0]
    config = batching(num_blocks=20, page_size=4, max_batch_tokens=96)
    with shared_model("llama").continuous_batching_context_manager(
        greedy(12), continuous_batching_config=config, async_batching=True
    ) as manager:
        for _ in range(2):
            manager.get_result(manager.add_request(prompt))
        found = manager.metrics().found
        names = manager.add_requests(random_prompts(4, 16, 16), max_new_tokens=40)
        for name in names:
            manager.get_result(name)
        m = manager.metrics()
    assert 0 < found < len(prompt)
    assert m.preempted > 0
    assert m.finished == 6
    assert len(manager.metrics().first_token_seconds) == 3


def test_preempted_requests_have_one_first_token() -> None:
    config = batching(num_blocks=20, page_size=4, max_batch_tokens=96)
    manager = shared_model("llama").init_continuous_batching(
        greedy(40), continuous_batching_config=config, async_batching=True
    )
    manager.add_requests(random_prompts(4, 16, 16))
    manager.start()
    meter, scheduler = manager._engine.meter, manager._engine.scheduler
    manager.stop()
    assert scheduler.preemptions > 0
    assert meter.first_token._count == meter.queue._count == 4


def test_does_not_make_the_loop_wait_for_its_readers() -> None:
    """Whoever asks takes no lock, so it can ask while another thread holds all there are."""
    manager = shared_model("llama").init_continuous_batching(greedy(4), async_batching=True)
    manager.warmup()
    seen: list[Metrics] = []
    with manager._submission._lock, manager._keeper.lock, manager._mailbox.lock, manager._outbox.lock:
        reader = threading.Thread(target=lambda: seen.append(manager.metrics()))
        reader.start()
        reader.join(10)
    assert len(seen) == 1
    manager.stop()


def test_is_not_heard_unless_transformers_is_told_to_speak(log, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "LOG_INTERVAL", 0)
    log.set_level("NOTSET", "transformers.transformers_async_cb")  # the console command sets it
    shared_model("llama").generate_batch([[1, 2]], generation_config=greedy(3), async_batching=True)
    assert log.messages == []
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        shared_model("llama").generate_batch([[1, 2]], generation_config=greedy(3), async_batching=True)
    finally:
        transformers.logging.set_verbosity(before)
    assert any("ms on the device" in message for message in log.messages)


class TestRates:
    @pytest.fixture
    def clock(self, monkeypatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
        return now

    def work(self, meter: Meter, clock: list[float], seconds: int, tokens: int) -> None:
        for _ in range(10 * seconds):
            clock[0] += 0.1
            meter.lap("wait")
            meter.steps += 1
            meter.tokens_out += tokens
            meter.tick()

    def test_are_those_of_the_last_seconds(self, clock) -> None:
        meter = Meter()
        self.work(meter, clock, 60, 1)
        self.work(meter, clock, 20, 5)
        recent = meter._recent()
        assert recent.tokens_out / recent.time == pytest.approx(50)
        assert recent.steps == pytest.approx(10 * metrics.WINDOW, abs=20)

    def test_are_zero_when_nothing_ran_for_long(self, clock) -> None:
        meter = Meter()
        self.work(meter, clock, 5, 1)
        clock[0] += 60
        assert meter._recent().tokens_out == 0

    def test_begin_anew_after_a_time_of_nothing(self, clock) -> None:
        meter = Meter()
        self.work(meter, clock, 5, 1)
        clock[0] += 60
        meter.lap("idle")
        self.work(meter, clock, 2, 3)
        recent = meter._recent()
        assert recent.tokens_out / recent.time == pytest.approx(30)


def test_percentiles_are_of_the_last_values() -> None:
    latencies = metrics.Latencies()
    assert latencies.percentiles() == Percentiles(0.0, 0.0, 0.0)
    latencies.add([1000.0] * 50)
    latencies.add([float(i) for i in range(1024)])
    assert latencies.percentiles().p50 == pytest.approx(511.5)
    assert latencies.percentiles().p99 < 1023


class TestPrometheus:
    def test_gets_the_numbers_of_a_manager(self) -> None:
        from prometheus_client import CollectorRegistry, generate_latest

        from transformers_async_cb.prometheus import ManagerCollector

        registry = CollectorRegistry()
        with shared_model("llama").continuous_batching_context_manager(greedy(5), async_batching=True) as manager:
            registry.register(ManagerCollector(manager, {"model": "tiny"}))
            manager.get_result(manager.add_request([1, 2, 3]))
            text = generate_latest(registry).decode()
        assert 'async_batching_tokens_out_total{model="tiny"} 5.0' in text
        assert 'async_batching_tokens_in_total{model="tiny"} 3.0' in text
        assert 'async_batching_requests_running{model="tiny"} 0.0' in text
        assert 'async_batching_first_token_seconds{model="tiny",quantile="0.99"}' in text
        assert registry.get_sample_value("async_batching_requests_finished_total", {"model": "tiny"}) == 1

    def test_is_named_when_it_is_not_there(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
        monkeypatch.delitem(sys.modules, "transformers_async_cb.prometheus", raising=False)
        with pytest.raises(ImportError, match=r"pip install 'transformers-async-cb\[metrics\]'"):
            importlib.import_module("transformers_async_cb.prometheus")
