"""When a request with a key is sent again, and under which key: the same for every client library.

The flow is written once, as `async def`; sync clients drive it.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import UTC
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from random import random
from typing import Any, NamedTuple

import orjson

from idempotent._options import Duration, seconds
from idempotent.http._fields import checked_name, is_token
from idempotent.keys import check_key, new_key

__all__ = ["Policy", "Reply", "idempotency_scope", "is_in_progress", "retried"]

_scope: ContextVar[str | None] = ContextVar("idempotent_http_scope", default=None)

SMALL = 1 << 20
"""Bytes up to which an answer of known length is read at once, so that one that is cut short counts as lost."""
_AGAIN = frozenset((425, 429, 500, 502, 503, 504))


@contextlib.contextmanager
def idempotency_scope(key: str | None = None) -> Iterator[str]:
    """What is sent in here, however often, is one operation: requests of one method and URL bear the same key.

    For retry loops outside the client. One scope, one operation: the same URL with another body is answered 422. Tasks
    that are started in here are in the scope too, threads are not.

    Args:
        key: what names the operation, such as an order's id, so that another process can carry on with it; the keys
            that are sent are digests of it. None: a fresh one, which is yielded.

    Raises:
        KeyRequired, InvalidKey: the key is empty, too long, or holds control characters.
    """
    token = _scope.set(new_key() if key is None else check_key(key))
    try:
        yield _scope.get() or ""
    finally:
        _scope.reset(token)


class Reply(NamedTuple):
    """What came back."""

    status: int
    retry_after: str | None
    in_progress: bool
    native: Any


class Policy:
    """What is sent with a key and how often; durations in seconds.

    Args:
        retries: how often a request is sent again.
        backoff: the first pause; it doubles, and is shortened by up to a half at random.
        max_pause: the longest pause. A `Retry-After` that asks for more ends the retries.
        methods: those that get a key.
        header: the field of the key.
        quoted: whether the key is sent as a structured-field string, as the draft asks. False: bare, for servers that
            take the quotes for a part of it.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.
    """

    def __init__(
        self,
        *,
        retries: int,
        backoff: Duration,
        max_pause: Duration,
        methods: Iterable[str],
        header: str,
        quoted: bool,
    ) -> None:
        if isinstance(retries, bool) or not isinstance(retries, int):
            raise TypeError(f"retries must be a whole number, not {retries!r}")
        if retries < 0:
            raise ValueError(f"retries must not be negative, and is {retries}")
        if isinstance(methods, str):
            raise TypeError(f"methods must be a tuple of methods, such as ({methods!r},)")
        if not isinstance(methods, Iterable):
            raise TypeError(f"methods must be a tuple of methods, not {methods!r}")
        named = frozenset(methods)
        for method in named:
            if not is_token(method) or method != method.upper():
                raise ValueError(f"methods must be HTTP methods in capitals, not {method!r}")
        if not isinstance(quoted, bool):
            raise TypeError(f"quoted must be True or False, not {quoted!r}")
        self.retries = retries
        self.backoff = seconds("backoff", backoff)
        self.max_pause = seconds("max_pause", max_pause)
        self.methods = named
        self.header = checked_name("header", header)
        self.quoted = quoted

    def field_for(self, method: str, url: str) -> str:
        """A new request's header value: fresh, or in a scope the same for one method and URL."""
        scope = _scope.get()
        if scope is None:
            key = new_key()
        else:
            text = f"{len(scope)}:{scope}:{method}:{url}"
            key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return f'"{key}"' if self.quoted else key

    def pause_after(self, reply: Reply | None, sent: int) -> float | None:
        """Seconds until the request is sent again, which was sent `sent` times; None: it is not.

        `reply` None: none came.
        """
        if sent > self.retries:
            return None
        pause = min(self.backoff * 2.0 ** min(sent - 1, 60), self.max_pause) * (0.5 + random() / 2)
        if reply is None:
            return pause
        if reply.status not in _AGAIN and not (reply.status == 409 and reply.in_progress):
            return None
        asked = None if reply.retry_after is None else _seconds_of(reply.retry_after)
        if asked is None:
            return pause
        return None if asked > self.max_pause else asked + random() * min(self.backoff, 1.0)


def _seconds_of(retry_after: str) -> float | None:
    """The seconds that a Retry-After asks for, itself seconds or an HTTP-date; None: it cannot be read."""
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # the form of asctime, which is obsolete but still to be read, and means UTC
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return None


def is_in_progress(content_type: str, body: bytes | None, retry_after: str | None) -> bool:
    """Whether a 409 says that the first request still runs: a problem of the type `...in-progress`.

    Where the body is not at hand, or is no problem that names its type, a `Retry-After` says so.
    """
    told = retry_after is not None
    if body is None or not content_type.lower().startswith("application/problem+json"):
        return told
    try:
        found = orjson.loads(body)
    except ValueError:
        return told
    kind = found.get("type", "about:blank") if isinstance(found, dict) else "about:blank"
    return told if kind == "about:blank" else str(kind).endswith("in-progress")


async def retried(
    policy: Policy,
    send: Callable[[], Awaitable[Reply]],
    *,
    lost: tuple[type[Exception], ...],
    final: tuple[type[Exception], ...] = (),
    discard: Callable[[Any], Awaitable[None]],
    sleep: Callable[[float], Awaitable[None]],
) -> Any:
    """Send until an answer is to be given back, and give back that one; or raise what was raised last.

    `lost` are the errors that leave open whether the request was served, or say that it was not yet; those of them that
    are `final` would come again.
    """
    sent = 0
    while True:
        sent += 1
        try:
            reply = await send()
        except lost as error:
            pause = None if isinstance(error, final) else policy.pause_after(None, sent)
            if pause is None:
                raise
        else:
            pause = policy.pause_after(reply, sent)
            if pause is None:
                return reply.native
            await discard(reply.native)
        await sleep(pause)
