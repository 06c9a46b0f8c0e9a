"""What the shipped hooks tell the real libraries, and that no hook can break a call."""

import asyncio
from collections.abc import Callable
from typing import Any, get_args

import pytest
from colours import COLOURS, Colour
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from idempotent import (
    Event,
    FingerprintMismatch,
    Lock,
    OpenTelemetryHook,
    PrometheusHook,
    configure,
    idempotent,
    otel,
)
from idempotent._record import LOCKS, RecordId
from idempotent.events import EventName


class DeclinedError(Exception):
    pass


def pay(order: str, amount: int = 1) -> str:
    if order == "SECRET bad":
        raise DeclinedError("SECRET reason")
    return "SECRET result"


def live(colour: Colour) -> Any:
    """A run, two replays, an error and a caller's mistake; the function."""
    function = colour.define(pay, backend="local://", namespace="shop.pay", key="{order}")
    for _ in range(3):
        assert colour.call(function, "SECRET order") == "SECRET result"
    with pytest.raises(DeclinedError):
        colour.call(function, "SECRET bad")
    with pytest.raises(FingerprintMismatch):
        colour.call(function, "SECRET order", 2)
    return function


LIVED = {"claimed": 2, "completed": 1, "replayed": 2, "released": 1, "mismatched": 1}


class Telemetry:
    """An OpenTelemetry of its own, in memory."""

    def __init__(self) -> None:
        self.reader, self.exporter = InMemoryMetricReader(), InMemorySpanExporter()
        self.meters, self.tracers = MeterProvider([self.reader]), TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))

    def hook(self, **options: Any) -> OpenTelemetryHook:
        return OpenTelemetryHook(meter_provider=self.meters, tracer_provider=self.tracers, **options)

    def points(self) -> list[Any]:
        found = self.reader.get_metrics_data()
        assert found is not None
        (resource,) = found.resource_metrics
        (scope,) = resource.scope_metrics
        (metric,) = scope.metrics
        assert (scope.scope.name, metric.name, metric.unit) == ("idempotent", "idempotent.events", "{event}")
        return list(metric.data.data_points)

    @property
    def spans(self) -> Any:
        return self.exporter.get_finished_spans()


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


def test_opentelemetry_counts_every_event_and_no_attribute_is_a_key(colour: Colour, telemetry: Telemetry) -> None:
    configure(hooks=[telemetry.hook()])
    function = live(colour)
    counted: dict[str, int] = {}
    for point in telemetry.points():
        attributes = dict(point.attributes)
        counted[attributes["idempotent.event"]] = point.value
        error = attributes.pop("error.type", None)
        assert error == ("DeclinedError" if attributes["idempotent.event"] == "released" else None)
        assert attributes.keys() == {"idempotent.event", "idempotent.namespace", "idempotent.backend"}
        assert (attributes["idempotent.namespace"], attributes["idempotent.backend"]) == ("shop.pay", "local")
    assert counted == LIVED == function.stats()
    assert telemetry.spans == ()  # which nobody asked for


def test_a_run_is_a_span_of_its_call_and_what_happens_without_a_run_is_an_event_of_the_callers(
    colour: Colour, telemetry: Telemetry
) -> None:
    configure(hooks=[telemetry.hook(spans=True)])
    with telemetry.tracers.get_tracer("test").start_as_current_span("request") as request:
        live(colour)
    ran, declined, asked = telemetry.spans
    assert asked.name == "request"
    for span in (ran, declined):
        assert span.name == "idempotent shop.pay"
        assert span.parent.span_id == request.get_span_context().span_id
        assert span.attributes["idempotent.namespace"] == "shop.pay"
        assert span.attributes["idempotent.backend"] == "local"
        assert span.attributes["idempotent.token"] > 0
    assert ran.attributes["idempotent.key.digest"] == RecordId("shop.pay", "SECRET order").digest
    assert [event.name for event in ran.events] == ["idempotent.claimed", "idempotent.completed"]
    assert ran.status.status_code is trace.StatusCode.UNSET
    assert [event.name for event in declined.events] == ["idempotent.claimed", "idempotent.released"]
    assert (declined.status.status_code, declined.attributes["error.type"]) == (trace.StatusCode.ERROR, "DeclinedError")
    assert [event.name for event in asked.events] == ["idempotent.replayed"] * 2 + ["idempotent.mismatched"]
    assert not any("SECRET" in span.to_json() for span in telemetry.spans)


def test_without_a_span_around_it_a_replay_tells_nobody_and_breaks_nothing(telemetry: Telemetry) -> None:
    configure(hooks=[telemetry.hook(spans=True)])
    live(COLOURS[0])
    assert len(telemetry.spans) == 2


def test_a_hold_of_a_lock_is_a_span_too(telemetry: Telemetry) -> None:
    configure(hooks=[telemetry.hook(spans=True)])
    with Lock("SECRET account", backend="local://"):
        assert telemetry.spans == ()
    (held,) = telemetry.spans
    assert [event.name for event in held.events] == ["idempotent.claimed", "idempotent.released"]
    assert held.attributes["idempotent.key.digest"] == RecordId("", "SECRET account", LOCKS).digest
    assert held.status.status_code is trace.StatusCode.UNSET


def test_spans_whose_end_is_never_told_do_not_pile_up(telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel, "_OPEN", 2)
    hook = telemetry.hook(spans=True)
    for number in range(5):
        hook(Event("claimed", "n", f"digest-{number}", "local", token=1))
    assert len(telemetry.spans) == 3
    assert len(hook._open) == 2


def test_prometheus_counts_every_event_from_0_and_no_label_is_a_key(colour: Colour) -> None:
    registry = CollectorRegistry()
    configure(hooks=[PrometheusHook(registry=registry)])
    live(colour)
    for name in get_args(EventName):
        labels = {"event": name, "namespace": "shop.pay", "backend": "local"}
        assert registry.get_sample_value("idempotent_events_total", labels) == LIVED.get(name, 0)
    text = generate_latest(registry).decode()
    assert "SECRET" not in text
    assert RecordId("shop.pay", "SECRET order").digest not in text
    with pytest.raises(ValueError, match="idempotent_events"):
        PrometheusHook(registry=registry)


def test_what_is_only_observed_is_counted_as_such(colour: Colour, telemetry: Telemetry) -> None:
    registry = CollectorRegistry()
    configure(mode="observe", hooks=[PrometheusHook(registry=registry), telemetry.hook()])
    answers = iter("aab")
    function = colour.define(lambda: next(answers), backend="local://", namespace="shop.observed")
    assert [colour.call(function) for _ in range(3)] == ["a", "a", "b"]
    place = {"namespace": "shop.observed", "backend": "local"}
    for name, count in {"completed": 1, "replayed": 0, "would_replay": 2, "disagreed": 1}.items():
        assert registry.get_sample_value("idempotent_events_total", {"event": name, **place}) == count
    agreed = {point.attributes["idempotent.agrees"] for point in telemetry.points() if len(point.attributes) == 4}
    assert agreed == {True, False}


# ----------------------------------------------------------------------------------- a hook cannot break a call


def broken(event: Event) -> None:
    raise RuntimeError(f"the meter is out at {event.name}")


def test_a_hook_that_raises_at_every_event_changes_nothing_for_the_caller(
    colour: Colour, backend_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    configure(hooks=[broken, lambda event: seen.append(event.name)])
    function = colour.define(pay, backend=backend_url, namespace="shop.pay", key="{order}")
    for _ in range(3):
        assert colour.call(function, "SECRET order") == "SECRET result"
    with pytest.raises(DeclinedError):
        colour.call(function, "SECRET bad")
    with pytest.raises(FingerprintMismatch):
        colour.call(function, "SECRET order", 2)
    assert colour.call(function.peek, "SECRET bad") is None  # released all the same
    assert {name: seen.count(name) for name in seen} == LIVED
    assert len(caplog.records) == len(seen)
    assert all(record.exc_info for record in caplog.records)


def test_a_hook_that_raises_does_not_end_the_heartbeat() -> None:
    configure(hooks=[broken])
    runs: list[str] = []

    async def main() -> None:
        @idempotent(backend="local://", namespace="slow", key="k", lease=0.3)
        async def slow() -> str:
            runs.append("run")
            await asyncio.sleep(0.8)
            return "done"

        assert await asyncio.gather(*(slow() for _ in range(3))) == ["done"] * 3

    asyncio.run(main())
    assert runs == ["run"]


def test_any_callable_is_a_hook() -> None:
    seen: list[Event] = []
    hooks: list[Callable[[Event], object]] = [seen.append, seen.__contains__]
    configure(hooks=hooks)
    assert idempotent(backend="local://", namespace="n", key="k")(lambda: 1)() == 1
    assert [event.name for event in seen] == ["claimed", "completed"]
