"""What Prometheus reads at `/metrics`."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .engine import Engine
from .image_jobs import ImageJob, StoryJob


# Seconds: from a refusal to many images of the many-step decoder
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """
    Requests by route and status, their seconds by route, the engine's queues and what it has made, and the process.

    Args:
        engine: What is watched.
    """

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "llada_uni_requests", "Requests that are over", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "llada_uni_request_seconds",
            "From a request's first line to its answer's end",
            ["route"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.registry.register(EngineCollector(engine))
        ProcessCollector(registry=self.registry)

    def count(self, route: str, status: int, seconds: float) -> None:
        """A request that is over."""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)


class EngineCollector(Collector):
    """The engine at the moment it is asked for."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self.engine
        waiting = GaugeMetricFamily("llada_uni_waiting", "Requests in the queue", labels=["kind"])
        running = GaugeMetricFamily("llada_uni_running", "Requests under work", labels=["kind"])
        for kind, queue, num_running in (
            ("text", engine.texts, engine.num_texts_running),
            ("image", engine.images, engine.num_running(ImageJob)),
            ("story", engine.stories, engine.num_running(StoryJob)),
        ):
            waiting.add_metric([kind], len(queue))
            running.add_metric([kind], num_running)
        yield waiting
        yield running
        yield CounterMetricFamily("llada_uni_text_tokens", "Tokens of text answers", value=engine.num_text_tokens)
        yield CounterMetricFamily("llada_uni_images", "Images made", value=engine.num_images)
        yield GaugeMetricFamily("llada_uni_alive", "Whether the engine's threads live", value=float(engine.is_alive))
