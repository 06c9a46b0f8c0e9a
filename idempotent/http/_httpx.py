"""Transports for httpx."""

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self, TypeVar, cast

import anyio
import httpx

from idempotent._drive import drive
from idempotent._options import Duration
from idempotent.http._retry import SMALL, Policy, Reply, is_in_progress, retried

__all__ = ["AsyncIdempotencyTransport", "IdempotencyTransport"]

T = TypeVar("T")

_LOST = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)


def _has_body_at_hand(request: httpx.Request) -> bool:
    """Whether the body can be sent again: not that of a generator, a file or an upload, unless it has been read."""
    if isinstance(request.stream, httpx.ByteStream):  # a redirected request has only the stream of the first
        return True
    try:
        return request.content is not None
    except httpx.RequestNotRead:
        return False


def _keyed(policy: Policy, request: httpx.Request) -> bool:
    """Give the request its key, unless it has one, and say whether it may be sent again."""
    if request.method not in policy.methods:
        return False
    if policy.header not in request.headers:
        request.headers[policy.header] = policy.field_for(request.method, str(request.url))
    return _has_body_at_hand(request)


def _sends(transport: T, method: str) -> T:
    """The transport. Raises TypeError for what is none of this colour."""
    if isinstance(transport, type) or not hasattr(transport, method):
        example = "httpx.HTTPTransport()" if method == "handle_request" else "httpx.AsyncHTTPTransport()"
        raise TypeError(f"transport must have {method}(), as {example} has, and is {transport!r}")
    return transport


def _is_small(response: httpx.Response) -> bool:
    length = response.headers.get("content-length", "")
    return length.isascii() and length.isdecimal() and int(length) <= SMALL


def _reply(response: httpx.Response, body: bytes | None) -> Reply:
    headers = response.headers
    again = headers.get("retry-after")
    told = is_in_progress(headers.get("content-type", ""), body, again)
    if body is not None:
        response = httpx.Response(
            response.status_code,
            headers=headers,
            stream=httpx.ByteStream(body),
            extensions=response.extensions,
        )
    return Reply(response.status_code, again, told, response)


class IdempotencyTransport(httpx.BaseTransport):
    """`httpx.Client(transport=IdempotencyTransport())`: one key for each POST and PATCH, kept while it is retried.

    A key that the request has already is kept. A request is sent again when no answer came, and after 425, 429, 500,
    502, 503, 504 and a 409 that says "in progress"; every other answer is given back at once. A body that cannot be
    sent again (a generator, a file, an upload) is sent once.

    Args:
        transport: what sends. None: `httpx.HTTPTransport()`.
        retries: how often a request is sent again.
        backoff: seconds or timedelta of the first pause; it doubles, and is shortened by up to a half at random.
        max_pause: seconds or timedelta of the longest pause; a `Retry-After` that asks for more ends the retries.
        methods: those that get a key.
        header: the field of the key.
        quoted: whether the key is sent as a structured-field string, as the draft asks; False: bare.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.
    """

    def __init__(
        self,
        transport: httpx.BaseTransport | None = None,
        *,
        retries: int = 4,
        backoff: Duration = 0.5,
        max_pause: Duration = 60,
        methods: Iterable[str] = ("POST", "PATCH"),
        header: str = "Idempotency-Key",
        quoted: bool = True,
    ) -> None:
        self._inner = httpx.HTTPTransport() if transport is None else _sends(transport, "handle_request")
        self._policy = Policy(
            retries=retries, backoff=backoff, max_pause=max_pause, methods=methods, header=header, quoted=quoted
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send, as often as it takes."""
        if not _keyed(self._policy, request):
            return self._inner.handle_request(request)

        async def send() -> Reply:
            response = self._inner.handle_request(request)
            if not _is_small(response):
                return _reply(response, None)
            try:
                # Not by iter_raw, which refuses an answer that has been read already: a mock's is.
                return _reply(response, b"".join(cast("httpx.SyncByteStream", response.stream)))
            finally:
                response.close()

        async def discard(response: httpx.Response) -> None:
            response.close()

        async def sleep(pause: float) -> None:
            time.sleep(pause)

        response: httpx.Response = drive(retried(self._policy, send, lost=_LOST, discard=discard, sleep=sleep))
        return response

    def close(self) -> None:
        """Close what sends."""
        self._inner.close()

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._inner.__exit__(exc_type, exc_value, traceback)


class AsyncIdempotencyTransport(httpx.AsyncBaseTransport):
    """`httpx.AsyncClient(transport=AsyncIdempotencyTransport())`: as IdempotencyTransport, for async code."""

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        retries: int = 4,
        backoff: Duration = 0.5,
        max_pause: Duration = 60,
        methods: Iterable[str] = ("POST", "PATCH"),
        header: str = "Idempotency-Key",
        quoted: bool = True,
    ) -> None:
        self._inner = httpx.AsyncHTTPTransport() if transport is None else _sends(transport, "handle_async_request")
        self._policy = Policy(
            retries=retries, backoff=backoff, max_pause=max_pause, methods=methods, header=header, quoted=quoted
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send, as often as it takes."""
        if not _keyed(self._policy, request):
            return await self._inner.handle_async_request(request)

        async def send() -> Reply:
            response = await self._inner.handle_async_request(request)
            if not _is_small(response):
                return _reply(response, None)
            try:
                stream = cast("httpx.AsyncByteStream", response.stream)
                return _reply(response, b"".join([part async for part in stream]))
            finally:
                await response.aclose()

        async def discard(response: httpx.Response) -> None:
            await response.aclose()

        response: httpx.Response = await retried(self._policy, send, lost=_LOST, discard=discard, sleep=anyio.sleep)
        return response

    async def aclose(self) -> None:
        """Close what sends."""
        await self._inner.aclose()

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._inner.__aexit__(exc_type, exc_value, traceback)
