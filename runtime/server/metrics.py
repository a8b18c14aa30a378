"""What Prometheus reads at ``/metrics``. Each application counts for itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flashvlm_export.runtime.server.answering import Answerer, Done

# Milliseconds on a datacenter GPU, tens of seconds on a small processor.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts requests, and shows what the model is busy with."""

    def __init__(self, answerer: Answerer) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Busy(answerer))
        self._requests = Counter(
            "flashvlm_requests",
            "chat completions by how they ended: 200, an error's status, or gone",
            ["outcome"],
            registry=registry,
        )
        self._first = Histogram(
            "flashvlm_time_to_first_token_seconds",
            "from the request's last byte to the answer's first text",
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = Histogram(
            "flashvlm_stage_seconds", "of answered requests, by stage", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._visual = Counter("flashvlm_visual_tokens", "of answered requests, before pruning", registry=registry)
        self._kept = Counter("flashvlm_kept_tokens", "visual tokens of answered requests after it", registry=registry)
        self._new = Counter("flashvlm_answer_tokens", "tokens of answers", registry=registry)

    def ended(self, outcome: str) -> None:
        """Count a request: the status of its response, or ``gone`` where nobody waited for one."""
        self._requests.labels(outcome).inc()

    def first_text(self, seconds: float) -> None:
        """Note the time to the first text of an answer."""
        self._first.observe(seconds)

    def answered(self, done: Done) -> None:
        """Note how an answer went."""
        for stage, ms in done.stage_ms.items():
            self._stages.labels(stage).observe(ms / 1e3)
        self._visual.inc(done.visual_tokens)
        self._kept.inc(done.kept_tokens)
        self._new.inc(done.new_tokens)

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Busy(Collector):
    """What an answerer knows, read when it is asked for."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer

    def collect(self) -> Iterator[Metric]:
        load = self._answerer.load()
        if load is None:
            return
        yield GaugeMetricFamily("flashvlm_queue_requests", "requests that wait", load.waiting)
        yield GaugeMetricFamily("flashvlm_running_requests", "requests that are being answered", load.under_way)
        yield HistogramMetricFamily(
            "flashvlm_batch_size",
            "requests that were encoded together",
            buckets=_buckets(load.batch_sizes),
            sum_value=sum(size * count for size, count in load.batch_sizes.items()),
        )
        yield CounterMetricFamily("flashvlm_image_cache_hits", "images that were encoded before", load.cache.hits)
        yield CounterMetricFamily("flashvlm_image_cache_misses", "images that were not", load.cache.misses)
        yield GaugeMetricFamily("flashvlm_image_cache_bytes", "memory of encoded images", load.cache.size_bytes)


def _buckets(sizes: Mapping[int, int]) -> list[tuple[str, float]]:
    """Return how many batches were at most as large as each bound."""
    bounds = [(str(bound), bound) for bound in _SIZES] + [("+Inf", float("inf"))]
    return [(name, sum(count for size, count in sizes.items() if size <= bound)) for name, bound in bounds]
