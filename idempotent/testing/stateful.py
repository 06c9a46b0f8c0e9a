"""A stateful machine for Hypothesis: commands in any order against a backend, shrunk to the shortest that it gets wrong.

    class Machine(BackendMachine):
        def open(self):
            return MyBackend()

    TestMyBackend = Machine.TestCase

Each reply is compared with what `idempotent._machine` answers to the same history, as in `BackendContract`.
"""

import functools
import time
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from idempotent._record import Granted
from idempotent.backends.base import Backend
from idempotent.testing.contract import ARGUMENTS, BODIES, LONG, OTHERS, Colour, History, Store, promised

__all__ = ["BackendMachine"]

KEYS = st.sampled_from(["a", "a", "a", "b"])
CALLERS = st.sampled_from([0, 1, 2])
FINGERPRINTS = st.sampled_from([ARGUMENTS, ARGUMENTS, ARGUMENTS, OTHERS, b""])
OUTCOMES = st.sampled_from(BODIES)
YES_NO = st.booleans()


class BackendMachine(RuleBasedStateMachine):
    """Three callers and two keys. A subclass says in `open` which backend; its `TestCase` is a unittest for pytest.

    Promises that it checks, besides that each reply is the one of the table: tokens only grow; an outcome never
    changes while it lives; a command sent twice answers the same, and changes nothing; one key leaves the other alone;
    a lapsed key can be claimed.
    """

    colour: ClassVar[Colour] = "sync"
    """Which callers: "sync" or "async"."""
    short: ClassVar[float] = 0.05
    """Seconds: a lease that is let end. Longer for a store whose commands take longer."""

    def open(self) -> Backend:
        """A backend; its store may be shared, as keys are random. It is closed after each history."""
        raise NotImplementedError("a subclass of BackendMachine says in open() which backend it is about")

    def pass_time(self, backend: Any, seconds: float) -> None:
        """Let the store's time pass. Overridden only where its clock stands still otherwise."""
        time.sleep(seconds)

    def __init__(self) -> None:
        super().__init__()
        backend = self.open()
        stands = type(self).pass_time is not BackendMachine.pass_time
        pass_time = functools.partial(self.pass_time, backend) if stands else None
        self._store = Store(backend, self.colour, self.short, pass_time)
        self._store.__enter__()
        self._callers: dict[str, list[History]] = {}
        for key in ("a", "b"):
            first = History(self._store, self._store.rid(key), b"caller 0")
            self._callers[key] = [first, first.by(b"caller 1"), first.by(b"caller 2")]

    def teardown(self) -> None:
        """Close the backend."""
        self._store.__exit__()

    def _send(self, key: str, caller: int, name: str, *, again: bool, **changes: Any) -> Any:
        __tracebackhide__ = True
        one = self._callers[key][caller]

        async def send() -> Any:
            reply = await one.send(f"{name} by caller {caller}", name, **changes)
            if again:
                await one.send(f"{name} by caller {caller}, sent again", name, **changes)
            return reply

        return self._store.run(send())

    @rule(
        key=KEYS,
        caller=CALLERS,
        arguments=FINGERPRINTS,
        takeover=YES_NO,
        over=st.sampled_from(["", "", "", "the token found", "another"]),
        short=YES_NO,
        kept=YES_NO,
        again=YES_NO,
    )
    def claim(
        self, key: str, caller: int, arguments: bytes, takeover: bool, over: str, short: bool, kept: bool, again: bool
    ) -> None:
        """A claim."""
        row = self._callers[key][0].told.late
        found = 1 if row is None else row.token
        self._send(
            key,
            caller,
            "claim",
            again=again,
            fingerprint=arguments,
            takeover=takeover,
            over=None if not over else found + (over == "another"),
            lease=self.short if short else LONG,
            keep=LONG if kept else None,
        )

    @rule(key=KEYS, caller=CALLERS, short=YES_NO, again=YES_NO)
    def renew(self, key: str, caller: int, short: bool, again: bool) -> None:
        """A renewal."""
        self._send(key, caller, "renew", again=again, lease=self.short if short else LONG)

    @rule(key=KEYS, caller=CALLERS, body=OUTCOMES, fails=YES_NO, short=YES_NO, past=YES_NO, again=YES_NO)
    def settle(self, key: str, caller: int, body: bytes, fails: bool, short: bool, past: bool, again: bool) -> None:
        """A result, or an error."""
        name = "fail" if fails else "complete"
        remember = {"remember": LONG} if past and not fails else {}
        self._send(key, caller, name, again=again, body=body, ttl=self.short if short else LONG, **remember)

    @rule(key=KEYS, caller=CALLERS, unknown=YES_NO, again=YES_NO)
    def release(self, key: str, caller: int, unknown: bool, again: bool) -> None:
        """A release."""
        self._send(key, caller, "release", again=again, unknown=unknown)

    @rule(key=KEYS, caller=CALLERS, again=YES_NO)
    def withdraw(self, key: str, caller: int, again: bool) -> None:
        """A claim that was never confirmed is taken back."""
        self._send(key, caller, "release", again=again, token=None)

    @rule(key=KEYS, force=YES_NO)
    def forget(self, key: str, force: bool) -> None:
        """The record is removed."""
        self._send(key, 0, "forget", again=False, force=force)

    @rule()
    def lapse(self) -> None:
        """What is short ends."""
        self._store.lapse()

    @rule(key=KEYS, caller=CALLERS, kept=YES_NO, short=YES_NO, body=OUTCOMES, other=OUTCOMES, steps=st.integers(2, 5))
    def live(self, key: str, caller: int, kept: bool, short: bool, body: bytes, other: bytes, steps: int) -> None:
        """What a caller does in its life, up to some step; the last one comes late, and says something else."""
        life: list[tuple[str, dict[str, Any]]] = [
            ("claim", {"keep": LONG if kept else None}),
            ("renew", {"lease": self.short if short else 2 * LONG}),
            ("complete", {"body": body}),
            ("complete", {"body": other, "codec": "other"}),
            ("fail", {"body": other}),
        ]
        for name, brings in life[:steps]:
            self._send(key, caller, name, again=False, **brings)

    @rule(key=KEYS, caller=CALLERS, successor=CALLERS, takeover=YES_NO, over=YES_NO)
    def die(self, key: str, caller: int, successor: int, takeover: bool, over: bool) -> None:
        """A caller claims and dies; when its lease is over, one claims after it."""
        self._send(key, caller, "claim", again=False, lease=self.short, takeover=takeover)
        self._store.lapse()
        row = self._callers[key][0].told.late
        found = row.token if over and row is not None else None
        self._send(key, successor, "claim", again=False, takeover=takeover, over=found)

    @rule(key=KEYS)
    def rescue(self, key: str) -> None:
        """Whatever was, a key that is forgotten can be claimed."""
        one = self._callers[key][0].by()

        async def claim() -> Any:
            await one.send("forget by force", "forget", force=True)
            reply = await one.send("a claim after it", "claim")
            await one.send("release by the same", "release")
            return reply

        promised(isinstance(self._store.run(claim()), Granted), "a key that was forgotten can be claimed")

    @invariant()
    def each_record_reads_as_the_table_says(self) -> None:
        """Also that of the key that nobody touched."""
        for one, *_ in self._callers.values():
            self._store.run(one.send("a read", "read"))
