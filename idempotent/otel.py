"""Events as OpenTelemetry metrics and, if asked for, spans. Names follow its semantic conventions' style."""

import threading
from collections import OrderedDict
from typing import Any

from idempotent.events import Event, EventName

__all__ = ["OpenTelemetryHook"]

_BEGINS: frozenset[EventName] = frozenset(("claimed", "taken_over"))
_ENDS: frozenset[EventName] = frozenset(("completed", "failed", "released", "not_stored", "lease_lost", "broken"))
_WRONG: frozenset[EventName] = frozenset(("not_stored", "lease_lost", "unprotected", "broken"))
"""What makes a span an error, besides an error that the function raised."""
_OPEN = 10_000
"""Spans that are open at most: a run that is cancelled, or whose coroutine is thrown away, may tell of no end."""


class OpenTelemetryHook:
    """A hook for `configure(hooks=[...])` that counts every event, and may trace runs.

    The counter is `idempotent.events`, unit `{event}`, with the attributes `idempotent.event`, `idempotent.namespace`,
    `idempotent.backend` and, where an error caused the event, `error.type`. What is only observed
    (`configure(mode="observe")`) is the event `would_replay`, `would_wait` or `would_refuse`, the first with
    `idempotent.agrees` where that can be told. A key is never among them. The digest of
    the key is an attribute of spans alone, `idempotent.key.digest`, beside `idempotent.token`.

    Args:
        spans: True: a run, from its claim to its outcome, is a span `idempotent <namespace>`, a child of the span in
            which the call was made; what happens without a run (a replay, a wait) is an event of that span.
        meter_provider: where metrics go; None: the global one.
        tracer_provider: where spans go; None: the global one.

    Raises:
        ImportError: the extra `otel` is not installed.
    """

    def __init__(self, *, spans: bool = False, meter_provider: Any = None, tracer_provider: Any = None) -> None:
        try:
            from opentelemetry import metrics, trace
        except ImportError as error:
            raise ImportError("OpenTelemetryHook needs opentelemetry: pip install 'idempotent-py[otel]'") from error
        meter = metrics.get_meter("idempotent", meter_provider=meter_provider)
        self._counter = meter.create_counter(
            "idempotent.events", unit="{event}", description="What happened to calls and locks."
        )
        self._trace = trace
        self._tracer = trace.get_tracer("idempotent", tracer_provider=tracer_provider) if spans else None
        self._open: OrderedDict[tuple[str, str, int | None], Any] = OrderedDict()
        self._lock = threading.RLock()  # a signal's handler may call while this thread holds it

    def __call__(self, event: Event) -> None:
        """Take note of `event`."""
        attributes: dict[str, str | int | bool] = {
            "idempotent.event": event.observed or event.name,
            "idempotent.namespace": event.namespace,
            "idempotent.backend": event.backend,
        }
        if event.error is not None:
            attributes["error.type"] = event.error
        if event.agrees is not None:
            attributes["idempotent.agrees"] = event.agrees
        self._counter.add(1, attributes)
        if self._tracer is not None:
            self._span(event, self._tracer)

    def _span(self, event: Event, tracer: Any) -> None:
        run = event.namespace, event.key_digest, event.token
        if event.name in _BEGINS:
            attributes = {
                "idempotent.namespace": event.namespace,
                "idempotent.backend": event.backend,
                "idempotent.key.digest": event.key_digest,
                "idempotent.token": event.token or 0,
            }
            span = tracer.start_span(f"idempotent {event.namespace}", attributes=attributes)
            with self._lock:
                self._open[run] = span
                lost = self._open.popitem(last=False)[1] if len(self._open) > _OPEN else None
            if lost is not None:
                lost.end()
        with self._lock:
            span = self._open.get(run)
            ended = event.name in _ENDS or (event.name == "unknown" and event.error is not None)
            if ended:
                self._open.pop(run, None)
        if span is None:
            span, ended = self._trace.get_current_span(), False
        told = {"idempotent.key.digest": event.key_digest}
        if event.error is not None:
            told["error.type"] = event.error
        span.add_event(f"idempotent.{event.observed or event.name}", told)
        if ended:
            if event.error is not None:
                span.set_attribute("error.type", event.error)
            if event.error is not None or event.name in _WRONG:
                span.set_status(self._trace.StatusCode.ERROR, event.name)
            span.end()

    def __repr__(self) -> str:
        return f"OpenTelemetryHook(spans={self._tracer is not None})"
