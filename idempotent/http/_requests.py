"""An adapter for requests."""

import time
from collections.abc import Iterable
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from idempotent._drive import drive
from idempotent._options import Duration
from idempotent.http._retry import Policy, Reply, is_in_progress, retried

__all__ = ["IdempotencyAdapter"]

_LOST = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_FINAL = (requests.exceptions.SSLError,)
"""A certificate that is not accepted."""


class IdempotencyAdapter(HTTPAdapter):
    """`session.mount("https://", IdempotencyAdapter())`: one key for each POST and PATCH, kept while it is retried.

    A key that the request has already is kept. A request is sent again when no answer came, and after 425, 429, 500,
    502, 503, 504 and a 409 that says "in progress"; every other answer is given back at once. A body that cannot be
    sent again (a generator, a file) is sent once.

    Args:
        retries: how often a request is sent again.
        backoff: seconds or timedelta of the first pause; it doubles, and is shortened by up to a half at random.
        max_pause: seconds or timedelta of the longest pause; a `Retry-After` that asks for more ends the retries.
        methods: those that get a key.
        header: the field of the key.
        quoted: whether the key is sent as a structured-field string, as the draft asks; False: bare.
        options: of `requests.adapters.HTTPAdapter`.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.
    """

    __attrs__ = [*HTTPAdapter.__attrs__, "_policy"]  # noqa: RUF012  what is pickled, as the base class says it

    def __init__(
        self,
        *,
        retries: int = 4,
        backoff: Duration = 0.5,
        max_pause: Duration = 60,
        methods: Iterable[str] = ("POST", "PATCH"),
        header: str = "Idempotency-Key",
        quoted: bool = True,
        **options: Any,
    ) -> None:
        self._policy = Policy(
            retries=retries, backoff=backoff, max_pause=max_pause, methods=methods, header=header, quoted=quoted
        )
        super().__init__(**options)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,  # noqa: FBT002  as the base class has it
        *args: Any,
        **kwargs: Any,
    ) -> requests.Response:
        """Send, as often as it takes."""
        policy, once = self._policy, super().send
        if request.method not in policy.methods:
            return once(request, stream, *args, **kwargs)
        if policy.header not in request.headers:
            request.headers[policy.header] = policy.field_for(request.method or "", request.url or "")
        body: Any = request.body
        if not isinstance(body, (bytes, str, type(None))):
            return once(request, stream, *args, **kwargs)

        async def send() -> Reply:
            response = once(request, stream, *args, **kwargs)
            again = response.headers.get("retry-after")
            body = None if stream else response.content  # one that is cut short counts as lost
            told = is_in_progress(response.headers.get("content-type", ""), body, again)
            return Reply(response.status_code, again, told, response)

        async def discard(response: requests.Response) -> None:
            response.close()

        async def sleep(pause: float) -> None:
            time.sleep(pause)

        response: requests.Response = drive(
            retried(policy, send, lost=_LOST, final=_FINAL, discard=discard, sleep=sleep)
        )
        return response
