"""Redis of several nodes: which of them answers for a key, and how a command finds it. One flow for both colours.

Nobody tells us when that changes; a command finds out. A node that refuses, does not answer, says MOVED, or is a
replica by now loses what it answered for, and the next try asks those who know: the sentinels, or any node of the
cluster. `RedisBackend` sends again within the deadline of the command.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    MasterDownError,
    MovedError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from idempotent._signals import TaskWaiter, ThreadWaiter
from idempotent.backends._redis_links import Address, Link, NodeLost, Send, is_refused

__all__ = ["Cluster", "Map", "NodesLink", "Sentinels"]

_HOPS = 5
"""How often a command follows a redirection before it is taken for lost."""
_SLOTS = 16_384


class Map(Protocol):
    """What is known of the nodes at this moment; shared by all threads and loops of a process."""

    question: tuple[str, ...]
    """The command whose reply `learn` takes."""

    def of(self, key: str) -> Address | None:
        """The node that answers for `key`; None: it has to be found."""
        ...

    def nodes(self) -> list[Address]:
        """Every node that answers for some key; empty: they have to be found."""
        ...

    def advisers(self) -> list[Address]:
        """Whom to ask the question, the most promising first."""
        ...

    def unproven(self, reply: Any) -> list[Address]:
        """The nodes of a reply that have to say themselves that they are primaries, before it is learnt."""
        ...

    def learn(self, reply: Any, adviser: Address) -> None:
        """Take the reply of `adviser`."""
        ...

    def moved(self, slot: int, address: Address) -> None:
        """A node says who answers for the keys of `slot`."""
        ...

    def lost(self, address: Address) -> None:
        """`address` answers for nothing any more."""
        ...

    def avoid(self, adviser: Address) -> None:
        """Ask `adviser` last."""
        ...


class _Advised:
    def __init__(self, seeds: Sequence[Address]) -> None:
        self._advisers = list(seeds)

    def advisers(self) -> list[Address]:
        return list(self._advisers)

    def avoid(self, adviser: Address) -> None:
        others = [each for each in self._advisers if each != adviser]
        if len(others) < len(self._advisers):
            self._advisers = [*others, adviser]


class Sentinels(_Advised):
    """A primary that sentinels choose."""

    def __init__(self, seeds: Sequence[Address], service: str) -> None:
        super().__init__(seeds)
        self.question: tuple[str, ...] = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        self._primary: Address | None = None

    def of(self, key: str) -> Address | None:
        return self._primary

    def nodes(self) -> list[Address]:
        return [] if self._primary is None else [self._primary]

    def unproven(self, reply: Any) -> list[Address]:
        # A sentinel that was cut off from the others may name an old one.
        return [(reply[0].decode(), int(reply[1]))] if reply else []

    def learn(self, reply: Any, adviser: Address) -> None:
        if reply:
            (self._primary,) = self.unproven(reply)
        else:
            self.avoid(adviser)

    def moved(self, slot: int, address: Address) -> None:
        self._primary = None

    def lost(self, address: Address) -> None:
        if self._primary == address:
            self._primary = None


class Cluster(_Advised):
    """The primaries of a cluster, by slot."""

    question: tuple[str, ...] = ("CLUSTER", "SLOTS")

    def __init__(self, seeds: Sequence[Address]) -> None:
        super().__init__(seeds)
        self._slots: list[Address | None] = [None] * _SLOTS

    def of(self, key: str) -> Address | None:
        return self._slots[key_slot(key.encode())]

    def nodes(self) -> list[Address]:
        # Where a slot is missing, its node is, too.
        return [] if None in self._slots else sorted({address for address in self._slots if address is not None})

    def unproven(self, reply: Any) -> list[Address]:
        return []  # a node that does not answer for a key says MOVED

    def learn(self, reply: Any, adviser: Address) -> None:
        slots: list[Address | None] = [None] * _SLOTS
        for first, last, primary, *_ in reply:
            # No host: the one that was asked. "?": it has a name that it does not know.
            host = primary[0].decode() if primary[0] not in (None, b"", b"?") else adviser[0]
            slots[first : last + 1] = [(host, primary[1])] * (last + 1 - first)
        self._slots = slots
        known = self._advisers
        self._advisers = known + [address for address in self.nodes() if address not in known]

    def moved(self, slot: int, address: Address) -> None:
        self._slots[slot] = address

    def lost(self, address: Address) -> None:
        self._slots = [None if each == address else each for each in self._slots]
        self.avoid(address)


class NodesLink:
    """Sends each command to the node that answers for its key.

    Args:
        map: shared by both colours.
        node: makes the link to an address, for commands.
        adviser: the same for the question of the map, where that takes other credentials.
        patience: seconds that one node may take; another may answer within what is left.
    """

    def __init__(
        self,
        map: Map,  # noqa: A002  the word for it
        node: Callable[[Address], Link],
        adviser: Callable[[Address], Link] | None,
        patience: float,
    ) -> None:
        self._map = map
        self._make_node, self._make_adviser = node, adviser
        self._patience = patience
        self._nodes: dict[Address, Link] = {}
        self._advisers: dict[Address, Link] = self._nodes if adviser is None else {}
        self._any = node(map.advisers()[0])

    @property
    def waiter(self) -> type[ThreadWaiter | TaskWaiter]:
        return self._any.waiter

    async def sleep(self, pause: float) -> None:
        await self._any.sleep(pause)

    def _node(self, address: Address) -> Link:
        return self._nodes.get(address) or self._nodes.setdefault(address, self._make_node(address))

    def _adviser(self, address: Address) -> Link:
        make = self._make_adviser or self._make_node
        return self._advisers.get(address) or self._advisers.setdefault(address, make(address))

    async def senders(self, deadline: float) -> Sequence[Send]:
        return [partial(self.send_to, address) for address in await self.addresses(deadline)]

    async def addresses(self, deadline: float) -> list[Address]:
        """Every node that answers for some key. Raises NodeLost where none does for some of them."""
        if not self._map.nodes():
            await self._find(min(deadline, time.monotonic() + self._patience))
        nodes = self._map.nodes()
        if not nodes:
            raise NodeLost("no node answers for some of the keys")
        return nodes

    def answers(self, address: Address, key: str) -> bool:
        """Whether that node is known to answer for `key`."""
        return self._map.of(key) == address

    async def send(self, command: tuple[Any, ...], deadline: float, *more: tuple[Any, ...]) -> Any:
        """The reply of the node that answers for the key: the word behind the script and the number of keys."""
        until = min(deadline, time.monotonic() + self._patience)
        key = command[3]
        address = self._map.of(key)
        if address is None:
            await self._find(until)
            address = self._map.of(key)
        if address is None:
            raise NodeLost("no node answers for this key")
        for _ in range(_HOPS):
            try:
                return await self.send_to(address, command, until, *more)
            except ResponseError as error:
                redirected = _redirected(error, address)
                if redirected is None:
                    raise
                asks, slot, target = redirected
            if asks:  # this key has moved already, and others of its slot have not
                _, *replies = await self.send_to(target, ("ASKING",), until, command, *more)
                return replies if more else replies[0]
            self._map.moved(slot, target)
            address = target
        self._map.lost(address)
        raise NodeLost(f"{_text(address)}: the nodes do not agree on who answers for this key")

    async def send_to(self, address: Address, command: tuple[Any, ...], deadline: float, *more: tuple[Any, ...]) -> Any:
        """The reply of one node. Where it is none that answers for anything, the map is told."""
        until = min(deadline, time.monotonic() + self._patience)
        try:
            return await self._node(address).send(command, until, *more)
        except (AuthenticationError, AuthorizationError):
            raise
        except (RedisError, OSError, TimeoutError) as error:
            if isinstance(error, ResponseError):
                if not (isinstance(error, (ReadOnlyError, MasterDownError)) or str(error).startswith("MASTERDOWN")):
                    raise
            self._map.lost(address)
            raise NodeLost(f"{_text(address)}: {str(error) or 'no reply'}") from error

    async def _find(self, until: float) -> None:
        """Ask who answers for the keys. Raises what all advisers are the reason of, if none can be asked."""
        failures: list[Exception] = []
        handled = sys.exception()
        advisers = self._map.advisers()
        for number, adviser in enumerate(advisers):
            now = time.monotonic()
            share = (until - now) / min(3, len(advisers) - number)
            try:
                reply = await self._adviser(adviser).send(self._map.question, now + share)
            except (RedisError, OSError, TimeoutError) as error:
                self._map.avoid(adviser)
                failures.append(error)
                continue
            for address in self._map.unproven(reply):
                await self._confirm_role(address, adviser, until)
            self._map.learn(reply, adviser)
            return
        final = (ResponseError, AuthenticationError, AuthorizationError)
        if all(is_refused(error, handled) or isinstance(error, final) for error in failures):
            raise failures[-1]
        raise NodeLost(f"nobody tells which node to ask: {failures[-1] or 'no reply'}") from failures[-1]

    async def _confirm_role(self, address: Address, adviser: Address, until: float) -> None:
        """Have what an adviser named say itself that it is a primary."""
        try:
            role = await self.send_to(address, ("ROLE",), until)
        except NodeLost:
            self._map.avoid(adviser)
            raise
        if role[0] != b"master":
            self._map.avoid(adviser)
            raise NodeLost(f"{_text(address)} is said to be the primary, and is a replica")

    def close(self) -> None:
        for link in [*self._nodes.values(), *self._advisers.values()]:
            link.close()

    async def aclose(self) -> None:
        for link in [*self._nodes.values(), *self._advisers.values()]:
            await link.aclose()


def _redirected(error: ResponseError, asked: Address) -> tuple[bool, int, Address] | None:
    """Whether to ask first, the slot, and the node that a redirection names; None: it is none.

    redis-py makes a class of it, or leaves the text as it came: it depends on the version.
    """
    word, _, rest = str(error).partition(" ")
    if isinstance(error, AskError):
        word, rest = "MOVED" if isinstance(error, MovedError) else "ASK", str(error)
    if word not in ("MOVED", "ASK"):
        return None
    slot, _, where = rest.partition(" ")
    host, _, port = where.rpartition(":")
    return word == "ASK", int(slot), (asked[0] if host in ("", "?") else host, int(port))


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
