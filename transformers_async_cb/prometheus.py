"""A manager's metrics for Prometheus. Needs `prometheus-client`, which the extra `metrics` installs."""

from __future__ import annotations

from collections.abc import Iterator

from .manager import AsyncBatchingManager
from .metrics import Metrics


try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        f"metrics for Prometheus need prometheus-client: pip install 'transformers-async-cb[metrics]' ({error})"
    ) from error


PREFIX = "async_batching_"

# Names of Prometheus' kind, with the field of `Metrics` and what it is.
_GAUGES = {
    "requests_running": ("running", "Requests that are being computed"),
    "requests_waiting": ("waiting", "Requests that wait to be computed"),
    "kv_pages_used": ("pages_used", "Pages of the cache that requests hold"),
    "kv_pages": ("pages", "Pages of the cache"),
    "kv_page_tokens": ("page_size", "Tokens a page of the cache holds"),
    "host_step_milliseconds": ("host_ms", "The host's own work for a step, mean of the last seconds"),
    "device_step_milliseconds": ("device_ms", "A step on the device, mean of the last seconds"),
    "graphs": ("graphs", "Steps captured as CUDA graphs"),
}
_COUNTERS = {
    "requests_finished": ("finished", "Requests that ended with all their tokens"),
    "requests_failed": ("failed", "Requests that ended with an error"),
    "preemptions": ("preempted", "How often a request gave its pages back, to be computed again"),
    "offloaded": ("offloaded", "How often the pages of such a request were copied to the host instead"),
    "restored": ("restored", "How often they were copied back"),
    "prompt_tokens": ("looked_up", "Tokens of the requests that were let in"),
    "prompt_tokens_found": ("found", "Of those, tokens that were in the cache already"),
    "tokens_in": ("tokens_in", "Tokens of prompts that were computed"),
    "tokens_out": ("tokens_out", "Tokens generated"),
    "steps": ("steps", "Steps that ended"),
}
_LATENCIES = {
    "queue_seconds": "From when a request was added to when its computation began, of the last requests",
    "first_token_seconds": "From when a request was added to its first token, of the last requests",
}


class ManagerCollector(Collector):
    """What `manager.metrics()` says, each time Prometheus asks.

        from prometheus_client import REGISTRY, start_http_server
        REGISTRY.register(ManagerCollector(manager))
        start_http_server(9400)

    Counters begin anew with each engine that the manager builds, as Prometheus expects of a process that restarts.

    Args:
        manager (`AsyncBatchingManager`): running or not.
        labels (`dict[str, str]`, *optional*): for all metrics, to tell several managers of a process apart.
    """

    def __init__(self, manager: AsyncBatchingManager, labels: dict[str, str] | None = None) -> None:
        self._manager = manager
        self._labels = labels or {}

    def describe(self) -> list:
        """Nothing: a registry then takes the names as they come."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        metrics: Metrics = self._manager.metrics()
        names, values = list(self._labels), list(self._labels.values())
        for family, fields in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (field, text) in fields.items():
                metric = family(PREFIX + name, text, labels=names)
                metric.add_metric(values, getattr(metrics, field))
                yield metric
        for name, text in _LATENCIES.items():
            metric = GaugeMetricFamily(PREFIX + name, text, labels=[*names, "quantile"])
            for quantile, seconds in zip(("0.5", "0.9", "0.99"), getattr(metrics, name), strict=True):
                metric.add_metric([*values, quantile], seconds)
            yield metric
