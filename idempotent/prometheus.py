"""Events as a Prometheus counter."""

from typing import Any, get_args

from idempotent.events import Event, EventName

__all__ = ["PrometheusHook"]


class PrometheusHook:
    """A hook for `configure(hooks=[...])` that counts every event in `idempotent_events_total`.

    The labels are `event`, `namespace` and `backend`. A key is never among them, nor its digest, nor an error. All events
    of a function are there from its first one on, the others at 0. That first one may well be scraped as 1, and
    `increase()` sees no change in a series that begins at 1: an alert has to ask for new series, too, as README's do.
    What is only observed (`configure(mode="observe")`) counts as `would_replay`, `would_wait` or `would_refuse`, and as
    `disagreed` where the replay would have been another.

    Args:
        registry: the registry that the counter belongs to; None: prometheus_client's own.

    Raises:
        ImportError: the extra `prometheus` is not installed.
        ValueError: the registry has a counter of this name: one hook serves all functions.
    """

    def __init__(self, *, registry: Any = None) -> None:
        try:
            from prometheus_client import REGISTRY, Counter
        except ImportError as error:
            raise ImportError(
                "PrometheusHook needs prometheus-client: pip install 'idempotent-py[prometheus]'"
            ) from error
        self._counter = Counter(
            "idempotent_events",
            "What happened to calls and locks.",
            ("event", "namespace", "backend"),
            registry=REGISTRY if registry is None else registry,
        )
        self._seen: set[tuple[str, str]] = set()

    def __call__(self, event: Event) -> None:
        """Take note of `event`."""
        place = event.namespace, event.backend
        if place not in self._seen:
            for name in get_args(EventName):
                self._counter.labels(name, *place)
            self._seen.add(place)
        self._counter.labels(event.observed or event.name, *place).inc()
        if event.agrees is False:
            self._counter.labels("disagreed", *place).inc()

    def __repr__(self) -> str:
        return "PrometheusHook()"
