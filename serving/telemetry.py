"""What the online API tells of itself: figures for Prometheus, spans for OpenTelemetry, and logs that name nobody."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from recsys.errors import SetupError
from recsys.version import __version__

LOG = logging.getLogger("recsys.online")
SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
"""Bounds of the histograms' buckets; between 1 and 10 ms they lie as near as answers do."""
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@dataclass(slots=True)
class Call:
    """One request, from its first byte to its last."""

    method: str
    started: float
    """When its head was there."""
    read: float = 0.0
    """When its body was there: from then on an answer is waited for."""
    deadline: float = 0.0
    """When an answer is no longer wanted."""
    id: str = ""
    parent: str = ""
    route: str = ""
    status: int = 0
    arm: str = ""
    bundle: str = ""
    source: str = ""
    fallback: str = ""
    stages: dict[str, float] = field(default_factory=dict)


class Requests:
    """Figures of finished requests, kept as plain numbers and shaped when they are read: counting takes a tenth of the time.

    One thread alone may count.
    """

    def __init__(self) -> None:
        self.requests: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.answers: defaultdict[str, int] = defaultdict(int)
        self.fallbacks: defaultdict[str, int] = defaultdict(int)
        self.routes: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * (len(SECONDS) + 2))
        self.stages: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * (len(SECONDS) + 2))
        """Of each the counts by bucket, the last for what is longer than all, and behind them the sum of seconds."""

    def count(self, call: Call, seconds: float) -> None:
        """One more."""
        self.requests[call.route, str(call.status), call.arm] += 1
        stages = ((self.stages[stage], took) for stage, took in call.stages.items())
        for figures, took in ((self.routes[call.route], seconds), *stages):
            figures[bisect_left(SECONDS, took)] += 1
            figures[-1] += took
        if call.source:
            self.listed(call.source)
        if call.fallback:
            self.fallbacks[call.fallback] += 1

    def listed(self, source: str) -> None:
        """One more list; for calls that give several."""
        self.answers[source] += 1

    def collect(self) -> Iterator[Metric]:
        """As a registry asks for them."""
        requests = CounterMetricFamily("recsys_requests", "Requests.", labels=("route", "status", "arm"))
        for labels, count in list(self.requests.items()):
            requests.add_metric(labels, count)
        yield requests
        for name, meaning, label, figures in (
            ("recsys_answers", "Lists by what made them.", "source", self.answers),
            ("recsys_fallbacks", "Lists that are not the best.", "reason", self.fallbacks),
        ):
            counter = CounterMetricFamily(name, meaning, labels=(label,))
            for value, count in list(figures.items()):
                counter.add_metric((value,), count)
            yield counter
        for name, meaning, label, kept in (
            ("recsys_request_seconds", "Seconds of a request.", "route", self.routes),
            ("recsys_stage_seconds", "Seconds of a stage.", "stage", self.stages),
        ):
            histogram = HistogramMetricFamily(name, meaning, labels=(label,))
            for value, numbers in list(kept.items()):
                bounds = [*map(str, SECONDS), "+Inf"]
                histogram.add_metric((value,), list(zip(bounds, accumulate(numbers[:-1]), strict=True)), numbers[-1])
            yield histogram


class Metrics:
    """Figures of one application, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # as many lines again, which nobody reads
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Requests()
        registry.register(self.requests)
        self.underfilled = Counter("recsys_underfilled", "Lists of fewer items than were asked for.", registry=registry)
        self.store_errors = Counter("recsys_store_errors", "Times that the store did not answer.", registry=registry)
        self.events = Counter("recsys_events_added", "Events kept.", registry=registry)
        self.queue = Gauge("recsys_queue_length", "Requests that wait for their turn.", registry=registry)
        self._swaps = Counter("recsys_swaps", "Bundles that replaced another.", ("arm",), registry=registry)
        self._failed = Counter("recsys_failed_loads", "Bundles that were not taken.", ("arm",), registry=registry)
        self._bundles = Gauge("recsys_bundle", "1 for each loaded bundle.", ("id", "arm"), registry=registry)
        self._loaded: dict[str, str] = {}

    def loaded(self, arm: str, bundle: str) -> None:
        """An arm serves a bundle, in the place of the one before."""
        before = self._loaded.get(arm)
        if before is not None:
            self._swaps.labels(arm).inc()
            self._bundles.remove(before, arm)
        self._bundles.labels(bundle, arm).set(1)
        self._loaded[arm] = bundle

    def failed(self, arm: str) -> None:
        """An arm could not take a bundle."""
        self._failed.labels(arm).inc()

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self.registry)


class Tracer:
    """A span for each request, with its stages as children; sent in batches by a thread of its own."""

    def __init__(self, processor: Any) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        about = Resource.create({"service.name": "recsys", "service.version": __version__})
        self._provider = TracerProvider(resource=about, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("recsys", __version__)
        self._kind, self._within = SpanKind.SERVER, set_span_in_context
        self._wrong = Status(StatusCode.ERROR)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, url: str) -> Tracer:
        """Spans to a collector's address, over HTTP; an address without a path gets /v1/traces.

        Raises SetupError: the packages are not there.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise SetupError(
                f"tracing needs OpenTelemetry ({error}); run `pip install attention-recommender[tracing]`, or leave --trace out"
            ) from None
        base = url.rstrip("/")
        address = base if base.endswith("/v1/traces") else f"{base}/v1/traces"
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))

    def record(self, call: Call, seconds: float) -> None:
        """One finished request."""
        end = time.time_ns()
        start = end - int(seconds * 1e9)
        context = self._propagator.extract({"traceparent": call.parent}) if call.parent else None
        said: dict[str, str | int] = {
            "http.request.method": call.method,
            "http.route": call.route,
            "http.response.status_code": call.status,
            "recsys.request_id": call.id,
            "recsys.bundle": call.bundle,
            "recsys.arm": call.arm,
            "recsys.source": call.source,
            "recsys.fallback": call.fallback,
        }
        told: dict[str, Any] = {key: value for key, value in said.items() if value != ""}
        span = self._tracer.start_span(f"{call.method} {call.route}", context, self._kind, told, start_time=start)
        if call.status >= 500:
            span.set_status(self._wrong)
        inside, at = self._within(span), start
        for stage, took in call.stages.items():
            child = self._tracer.start_span(stage, inside, start_time=at)
            at += int(took * 1e9)
            child.end(at)
        span.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def tracer(url: str, environment: Mapping[str, str] = os.environ) -> Tracer | None:
    """Where spans go: to `url`, else where the environment says, else nowhere. Raises SetupError: as Tracer.to."""
    address = url or environment.get(ENDPOINT, "")
    return Tracer.to(address) if address else None


class Lines(logging.Formatter):
    """A record as one JSON object; of an exception its type and where it was raised, never its words, which may name a user."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        event = str(record.msg).partition("\n")[0] if record.exc_info else record.getMessage()
        told: dict[str, Any] = {"time": f"{moment[:23]}Z", "level": record.levelname.lower(), "event": event}
        told |= record.__dict__.get("about", {})
        if record.exc_info and record.exc_info[0] is not None:
            frames = traceback.extract_tb(record.exc_info[2])
            told["error"] = record.exc_info[0].__name__
            told["traceback"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return msgspec.json.encode(told).decode()


def about(**told: str | int | float) -> dict[str, Any]:
    """What a line of the log says beside its event, as the `extra` of the call; nothing that names a user or an item."""
    return {"about": {name: value for name, value in told.items() if value != ""}}


def log_request(call: Call, seconds: float) -> None:
    """One line for a finished request."""
    if LOG.isEnabledFor(logging.INFO):
        told = about(
            request_id=call.id,
            route=call.route,
            method=call.method,
            status=call.status,
            milliseconds=round(seconds * 1000, 3),
            bundle=call.bundle,
            arm=call.arm,
            source=call.source,
            fallback=call.fallback,
        )
        LOG.info("request", extra=told)


def speak() -> None:
    """From now on this process logs JSON lines on stderr, also what its server says."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name, level in (("recsys", logging.INFO), ("uvicorn", logging.INFO), ("", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True
    logging.captureWarnings(True)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # the library's own advice: nobody reads the caller's line
