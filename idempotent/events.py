"""What happened, for logs, metrics and traces.

A hook is any callable that takes an Event. Hooks are given to `configure(hooks=[...])`; the default is `log_event`,
and `OpenTelemetryHook` and `PrometheusHook` are there beside it.
An event never holds an argument, a result or a readable key: the key appears as its digest.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["Event", "EventName", "Hook", "Observed", "log_event"]

EventName = Literal[
    "claimed",
    "replayed",
    "waited",
    "busy",
    "completed",
    "failed",
    "released",
    "taken_over",
    "lease_lost",
    "mismatched",
    "unknown",
    "not_stored",
    "unprotected",
    "backend_error",
    "broken",
]


Observed = Literal["would_replay", "would_wait", "would_refuse"]
Counted = EventName | Observed | Literal["disagreed"]
"""What `stats()` counts."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one call or lock."""

    name: EventName
    namespace: str
    """The namespace of the key; by default the function's module and name."""
    key_digest: str
    """Digest of namespace and key, as errors name it."""
    backend: str
    """Which kind of backend: "local", "redis", "postgresql", ..."""
    token: int | None = None
    """The fencing token; None where there is none (yet)."""
    age: float | None = None
    """Seconds since the record reached its state; None where that says nothing."""
    error: str | None = None
    """The class name of the error that caused the event; None: no error did."""
    observed: Observed | None = None
    """Under `configure(mode="observe")`: it did not happen, and this is what enforcement would have done; None: it did."""
    agrees: bool | None = None
    """With "would_replay": whether the recorded outcome is the one that the call came to; None: it cannot be told."""


class Hook(Protocol):
    """What is told of every event: any callable that takes it. What it returns is not looked at.

    It is called in the thread or task of the call, between its steps, so it should be quick and must not block an event
    loop. What it raises is logged, and goes no further: a hook cannot break a call.
    """

    def __call__(self, event: Event, /) -> object:
        """Take note of `event`."""
        ...


logger = logging.getLogger("idempotent")
logger.addHandler(logging.NullHandler())  # an application that configures no logging is not written to

_LEVELS: dict[EventName, int] = {
    "claimed": logging.DEBUG,
    "replayed": logging.DEBUG,
    "waited": logging.DEBUG,
    "busy": logging.DEBUG,
    "completed": logging.DEBUG,
    "failed": logging.DEBUG,
    "released": logging.DEBUG,
    "taken_over": logging.WARNING,
    "lease_lost": logging.WARNING,
    "mismatched": logging.WARNING,
    "unknown": logging.WARNING,
    "not_stored": logging.ERROR,
    "unprotected": logging.ERROR,
    "backend_error": logging.WARNING,
    "broken": logging.WARNING,
}


def log_event(event: Event) -> None:
    """The default hook: one line to the logger `idempotent`, with the event's fields as `extra["event"]`.

    Ordinary steps are DEBUG; what somebody should look at is WARNING; a broken promise (`not_stored`, `unprotected`)
    is ERROR. What is only observed is INFO; where a call would be refused, or answers disagreed, WARNING.
    """
    level = _LEVELS[event.name]
    if event.observed is not None:
        level = logging.WARNING if event.observed == "would_refuse" or event.agrees is False else logging.INFO
    if not logger.isEnabledFor(level):
        return
    details = [f"key={event.key_digest}", f"backend={event.backend}"]
    fields = ("token", event.token), ("age", event.age), ("error", event.error), ("agrees", event.agrees)
    details += [f"{name}={value}" for name, value in fields if value is not None]
    if event.observed is not None:
        details.append(f"event={event.name}")
    logger.log(
        level, "%s %s %s", event.observed or event.name, event.namespace, " ".join(details), extra={"event": event}
    )


def wanted(hooks: Sequence[Hook], name: EventName, observed: Observed | None = None) -> bool:
    """Whether any hook would do something with this event; building it costs more than asking."""
    if len(hooks) == 1 and hooks[0] is log_event:
        return logger.isEnabledFor(_LEVELS[name] if observed is None else logging.WARNING)
    return bool(hooks)


def dispatch(hooks: Sequence[Hook], event: Event) -> None:
    """Give `event` to every hook. A hook that raises is logged: telling of a call must not break the call."""
    for hook in hooks:
        try:
            hook(event)
        except Exception:
            logger.exception("the hook %r failed on the event %s", hook, event.name)
