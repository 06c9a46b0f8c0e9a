"""Runs that outlast the client: an async application in a task of its own, and the steps around it."""

import asyncio
import functools
from collections.abc import Coroutine
from typing import Any, TypeVar

from idempotent import _aio
from idempotent.http._exchange import Exchange, Verdict
from idempotent.http._rules import Response

__all__ = ["ASYNC", "begin", "failed", "settle", "uninterrupted"]

R = TypeVar("R")

ASYNC = _aio.ASYNC

_left: set[asyncio.Task[Any]] = set()
"""Tasks whose callers are gone; a loop keeps no task alive by itself."""


async def uninterrupted(run: Coroutine[Any, Any, R]) -> R:
    """Await `run` in a task of its own, so that a server that cancels a request whose client is gone does not end it.

    Cancelled once, it waits for the task all the same, so that what is around the application stays until it is done;
    cancelled again (anyio's scopes do so at once, and without end) it leaves the task to itself.
    """
    task = asyncio.ensure_future(run)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.done():
            raise
        _left.add(task)
        task.add_done_callback(_end)
        await asyncio.wait([task])
        raise


def _end(task: asyncio.Task[Any]) -> None:
    _left.discard(task)
    if not task.cancelled():
        task.exception()  # nobody is left to be told; what it means for the key is done


async def begin(exchange: Exchange) -> Response | None:
    """Claim the key; the answer to a duplicate or a refusal, or None: the application is to run."""
    try:
        return await exchange.begin()
    except BaseException as error:
        await failed(exchange, error)
        answer = exchange.refusal(error)
        if answer is None:
            raise
        return answer


async def settle(exchange: Exchange, response: Response, *, whole: bool = True) -> Verdict:
    """Record the answer, shielded from cancellation."""
    return await _aio.finish(functools.partial(exchange.settle, response, whole=whole))


async def failed(exchange: Exchange, error: BaseException) -> None:
    """Free the key, shielded from cancellation."""
    if isinstance(error, GeneratorExit):
        exchange.drop()
    else:
        await _aio.finish(functools.partial(exchange.abandon, error))
