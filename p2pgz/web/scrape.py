"""Writes the node's metrics out, in the text format that the scraper takes. Called by `web.site`.

The library that does it is loaded by the first who asks: a node that nobody watches does without its 50 ms.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from p2pgz.telemetry.histogram import Histogram
from p2pgz.web.metrics import METRICS, Measures

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family


class _Collector:
    """The library's view of one moment."""

    def __init__(self, measures: Measures) -> None:
        self._measures = measures

    def collect(self) -> Iterable[Family]:
        """Called by the library."""
        from prometheus_client import core

        for metric in METRICS:
            labels = list(metric.labels)
            samples = metric.read(self._measures)
            name = f"p2pgz_{metric.name}"
            if metric.kind == "histogram":
                family = core.HistogramMetricFamily(name, metric.meaning, labels=labels)
                for values, value in samples:
                    assert isinstance(value, Histogram)
                    family.add_metric(list(values), buckets=value.buckets(), sum_value=value.total_seconds)
                yield family
                continue
            kinds = {"counter": core.CounterMetricFamily, "gauge": core.GaugeMetricFamily}
            simple = kinds[metric.kind](name, metric.meaning, labels=labels)
            for values, value in samples:
                simple.add_metric(list(values), value)
            yield simple


def render(measures: Measures, accept: str) -> tuple[bytes, str]:
    """The text of a scrape and its media type: OpenMetrics if the scraper takes it, else Prometheus's text."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(measures))
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


def load() -> None:
    """Load the library; some 50 ms."""
    import prometheus_client  # noqa: F401
