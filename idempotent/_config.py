"""Process-wide defaults, and the backends that URLs name."""

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, urlsplit

from idempotent._options import Duration, seconds
from idempotent.backends.base import Backend
from idempotent.errors import ProcessLocalWarning
from idempotent.events import Hook, log_event

__all__ = ["DEFAULT", "Default", "Duration", "Settings", "configure", "open_backend", "seconds", "settings"]


class Default(Enum):
    """The type of DEFAULT: an option that was not given, so that `configure` decides it."""

    DEFAULT = "default"

    def __repr__(self) -> str:
        return "DEFAULT"


DEFAULT: Final = Default.DEFAULT


@dataclass(frozen=True, slots=True)
class Settings:
    """The defaults of options that a decorator does not name; durations in seconds."""

    backend: Backend | str | None = field(default=None, repr=False)  # a URL may hold a password
    ttl: float = 86_400.0
    remember: float | None = None
    lease: float = 30.0
    wait: float | None = 30.0
    error_ttl: Mapping[type[Exception], Duration] | None = None
    on_crash: str | Callable[..., Any] = "rerun"
    on_outage: Literal["raise", "run"] = "raise"
    near_cache: int = 0
    serializer: Any = None
    mode: Literal["enforce", "observe"] = "enforce"
    hooks: tuple[Hook, ...] = (log_event,)


settings = Settings()
"""What `configure` last made. Replaced as a whole, so that `is` tells whether anything changed."""


def configure(
    *,
    backend: Backend | str | None | Default = DEFAULT,
    ttl: Duration | Default = DEFAULT,
    remember: Duration | None | Default = DEFAULT,
    lease: Duration | Default = DEFAULT,
    wait: Duration | None | Default = DEFAULT,
    error_ttl: Mapping[type[Exception], Duration] | None | Default = DEFAULT,
    on_crash: str | Callable[..., Any] | Default = DEFAULT,
    on_outage: Literal["raise", "run"] | Default = DEFAULT,
    near_cache: int | Default = DEFAULT,
    serializer: Any = DEFAULT,
    mode: Literal["enforce", "observe"] | Default = DEFAULT,
    hooks: Sequence[Hook] | Default = DEFAULT,
) -> None:
    """Set process-wide defaults for every decorated function; what is not named stays as it is.

    Functions read them at their first call, not at import, and again when they change. What a decorator names itself
    always wins. The options mean what they mean to `idempotent`.

    Args:
        backend: a Backend or its URL, which is checked at once, but not connected to; None: `IDEMPOTENT_URL` in the environment, else a process-local backend.
        ttl: seconds or timedelta; how long an outcome is replayed.
        remember: seconds or timedelta past the ttl for which a key is remembered; None: not at all.
        lease: seconds or timedelta; how long a claim stands unrenewed.
        wait: seconds or timedelta a duplicate waits; 0: not at all; None: without limit.
        error_ttl: errors to record and replay, and for how long.
        on_crash: "rerun", "raise" or a probe.
        on_outage: "raise" or "run".
        near_cache: how many settled records of each function a process keeps copies of; 0: none.
        serializer: how results become bytes; None: JSON by the return annotation.
        mode: "enforce"; or "observe": every call runs its function and returns its value, and events tell what would
            have been replayed, waited for or refused. For adopting the decorator on a live system: locks, middleware and
            functions with `within=` are not observed.
        hooks: callables that take each Event; an empty list: none. The default writes to the logger `idempotent`.

    Raises:
        TypeError, ValueError: an option is not what it should be; nothing is changed.
    """
    global settings
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("backend", backend),
            ("ttl", ttl),
            ("remember", remember),
            ("lease", lease),
            ("wait", wait),
            ("error_ttl", error_ttl),
            ("on_crash", on_crash),
            ("on_outage", on_outage),
            ("near_cache", near_cache),
            ("serializer", serializer),
            ("mode", mode),
            ("hooks", hooks),
        )
        if value is not DEFAULT
    }
    settings = replace(settings, **checked(given))


def reset() -> None:
    """Forget what `configure` set and which backends URLs opened. For tests."""
    global settings, _said_local
    settings = Settings()
    _said_local = False
    _backends.clear()


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with durations as seconds; a TypeError or ValueError that names the first wrong one."""
    result = dict(options)
    for name in ("ttl", "lease"):
        if name in result:
            result[name] = seconds(name, result[name])
    if result.get("wait") is not None:
        result["wait"] = seconds("wait", result["wait"], zero=True)
    size = result.get("near_cache", 0)
    if type(size) is not int:
        raise TypeError(f"near_cache must be a whole number, not {size!r}")
    if size < 0:
        raise ValueError(f"near_cache must be 0 or more, not {size}")
    if result.get("remember") is not None:
        result["remember"] = seconds("remember", result["remember"])
    if result.get("error_ttl") is not None:
        result["error_ttl"] = _error_ttl(result["error_ttl"])
    backend = result.get("backend")
    if backend is not None and not isinstance(backend, (str, Backend)):
        raise TypeError(
            f"backend must be a Backend or a URL, not {type(backend).__name__};"
            " wrap a client or an engine: RedisBackend(client), SQLBackend(engine)"
        )
    if isinstance(backend, str):
        _check_at_once(backend)
    on_crash = result.get("on_crash", "rerun")
    if on_crash not in ("rerun", "raise") and not callable(on_crash):
        raise ValueError(f'on_crash must be "rerun", "raise" or a callable probe, not {on_crash!r}')
    if result.get("on_outage", "raise") not in ("raise", "run"):
        raise ValueError(f'on_outage must be "raise" or "run", not {result["on_outage"]!r}')
    if result.get("mode", "enforce") not in ("enforce", "observe"):
        raise ValueError(f'mode must be "enforce" or "observe", not {result["mode"]!r}')
    if "hooks" in result:
        if isinstance(result["hooks"], str) or not isinstance(result["hooks"], Iterable):
            raise TypeError(f"hooks must be a list of callables that take an Event, not {result['hooks']!r}")
        result["hooks"] = tuple(result["hooks"])
        for hook in result["hooks"]:
            if not callable(hook):
                raise TypeError(f"hooks must be callables that take an Event, not {hook!r}")
    serializer = result.get("serializer")
    if serializer is not None and not (hasattr(serializer, "dumps") and hasattr(serializer, "loads")):
        raise TypeError(f"serializer must have dumps(value) and loads(bytes), which {serializer!r} has not")
    return result


def _error_ttl(table: Any) -> dict[type[Exception], float]:
    if not isinstance(table, Mapping):
        raise TypeError(f"error_ttl must be a mapping of exception classes to durations, not {table!r}")
    result: dict[type[Exception], float] = {}
    for cls, ttl in table.items():
        if not (isinstance(cls, type) and issubclass(cls, Exception)):
            raise TypeError(f"error_ttl names {cls!r}, which is no subclass of Exception")
        result[cls] = seconds(f"error_ttl[{cls.__name__}]", ttl)
    return result


_REDIS = ("redis", "rediss", "unix")
_SQL = ("sqlite", "postgresql", "postgres", "mysql", "mariadb")
_NODES = ("+sentinel", "+cluster")
_SCHEMES = (
    "local://, redis://, rediss://, unix://, redis+sentinel://, redis+cluster://,"
    " sqlite:///, postgresql://, mysql://, mariadb://"
)


def check_url(url: str) -> str:
    """The scheme of `url`, without a driver. Raises ValueError for a URL that no backend serves.

    Its errors show nothing of what follows the scheme: a password that was not escaped may stand anywhere in it.
    """
    found = re.match(r"([a-z][a-z0-9.-]*)(\+[a-z0-9_.+-]*)?://", url, re.IGNORECASE)
    if found is None:
        raise ValueError(f"no backend serves this URL, which begins with no scheme; there are {_SCHEMES}")
    scheme, driver = found[1].lower(), found[2]
    if scheme in ("redis", "rediss") and driver is not None and driver.lower() in _NODES:
        return scheme  # RedisBackend reads its hosts
    if scheme not in _SQL and (driver or scheme not in ("local", *_REDIS)):
        raise ValueError(f"no backend serves the URL scheme {found[0][:-3]!r}; there are {_SCHEMES}")
    try:
        parts = urlsplit(url)
        readable = parts.port != 0 and not (scheme in _SQL and parts.netloc.count("@") > 1)
    except ValueError:
        readable = False
    if not readable:
        raise ValueError(
            "the host or port in the URL cannot be read: a port is 1 to 65535, and in a user name or password"
            " / ? # @ [ ] are written %2F %3F %23 %40 %5B %5D"
        )
    return scheme


def _check_at_once(url: str) -> None:
    """Raise what is wrong with `url` where it is named. A plain one is known to be right without its library."""
    scheme = check_url(url)
    no_file = scheme == "sqlite" and url.rpartition("/")[2] in ("", ":memory:")
    if no_file or "?" in url or "+" in url.partition("://")[0]:
        with contextlib.suppress(ImportError):  # told at the first call, which needs it
            open_backend(url)


_backends: dict[str, Backend] = {}
_lock = threading.Lock()


def open_backend(url: str) -> Backend:
    """The backend that `url` names: one per URL and process, however often it is asked for.

    `local://` (option `maxsize=` in the query), `redis://`, `rediss://`, `unix://`, `redis+sentinel://`,
    `redis+cluster://`, `sqlite:///file`, `postgresql://`, `mysql://`, `mariadb://`. Options in the query: `prefix=` and
    `replicas=` (Redis), `table=` (SQL), `timeout=` (seconds). Nothing is connected before the first call.

    Raises:
        TypeError: it is no text.
        ValueError: no backend serves this URL.
        ImportError: the backend's library or driver is not installed; the message names the extra that brings it.
    """
    if not isinstance(url, str):
        raise TypeError(f"open_backend takes a URL, not {type(url).__name__}")
    with _lock:
        backend = _backends.get(url)
        if backend is None:
            backend = _backends[url] = _open(url)
        return backend


def _open(url: str) -> Backend:
    scheme = check_url(url)
    if scheme == "local":
        from idempotent.backends.local import LocalBackend

        options = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
        maxsize = options.pop("maxsize", "65536")
        if options or not maxsize.isdecimal():
            wrong = ", ".join(options) or repr(maxsize)
            raise ValueError(f"local:// takes maxsize=, a whole number, and nothing else; not {wrong}")
        return LocalBackend(int(maxsize))
    if scheme in _REDIS:
        from idempotent.backends.redis import RedisBackend

        return RedisBackend(url)
    from idempotent.backends.sql import SQLBackend

    return SQLBackend(url)


def resolve_backend(given: Backend | str | None) -> Backend:
    """The backend of a function that named `given`; None: the configured default."""
    backend = settings.backend if given is None else given
    if backend is None:
        backend = os.environ.get("IDEMPOTENT_URL") or None
    if backend is None:
        _say_local_once()
        backend = "local://"
    return open_backend(backend) if isinstance(backend, str) else backend


_said_local = False


def _say_local_once() -> None:
    global _said_local
    with _lock:
        said, _said_local = _said_local, True
    if said:
        return
    try:
        warnings.warn(
            "no backend is configured, so records live in this process only and other processes run the same call"
            " again; set IDEMPOTENT_URL or call configure(backend=...). configure(backend='local://') says it is meant",
            ProcessLocalWarning,
            stacklevel=2,
        )
    except ProcessLocalWarning:  # a filter makes it an error, which every call is to get
        _said_local = False
        raise


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
