"""Each of our backends keeps the contract, and so do others; those with a planted bug are convicted, in words."""

import functools
import inspect
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import Address, Server
from third_party import FileBackend

from idempotent import Backend, BackendError, LocalBackend, RedisBackend, open_backend
from idempotent._record import Answer, Busy, Expired, Granted, RecordId, Settled, State, Unknown
from idempotent._signals import Signals
from idempotent.testing import BackendContract, FaultyBackend
from idempotent.testing.contract import Store


class TestOurs(BackendContract):
    short = 0.25  # the tests' machine is busy

    @pytest.fixture
    def backend(self, backend_url: str) -> Backend:
        return open_backend(backend_url)


class TestThirdParty(BackendContract):
    short = 0.25  # the tests' machine is busy

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return FileBackend(tmp_path)


class TestSyncAlone(BackendContract):
    colours = ("sync",)
    short = 0.25

    @pytest.fixture
    def backend(self, redis_server: Server | Address) -> Iterator[Backend]:
        with redis.Redis.from_url(redis_server.url) as client:
            yield RedisBackend(client, prefix=f"t{secrets.token_hex(6)}")


class AsyncLocal(LocalBackend):
    def blocking(self) -> Backend:
        raise BackendError("it serves async callers alone")


class TestAsyncAlone(BackendContract):
    colours = ("async",)

    @pytest.fixture
    def backend(self) -> Backend:
        return AsyncLocal()


class Clock:
    """Microseconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000_000_000

    def __call__(self) -> int:
        return self.now


class TestClockThatStands(BackendContract):
    histories = 20

    @pytest.fixture
    def backend(self) -> Backend:
        return LocalBackend(clock=Clock())

    def pass_time(self, backend: Any, seconds: float) -> None:
        backend._store.clock.now += round(seconds * 1e6)


class TestFaultless(TestClockThatStands):
    @pytest.fixture
    def backend(self) -> Backend:
        return FaultyBackend(LocalBackend(clock=Clock()))

    def pass_time(self, backend: Any, seconds: float) -> None:
        super().pass_time(backend.inner, seconds)


# ----------------------------------------------------------------------------------------------------------- plants


class Planted(LocalBackend):
    def __init__(self) -> None:
        super().__init__(clock=Clock())

    def drop(self, rid: RecordId) -> None:
        self._store.open.pop(rid.text, None)
        self._store.settled.pop(rid.text, None)
        self._store.last_token = 0

    def change(self, rid: RecordId, **fields: Any) -> None:
        row = self._store.find(rid.text)
        if row is not None:
            self._store.put(rid.text, row._replace(**fields))

    async def as_owner(self, rid: RecordId, brings: dict[str, Any]) -> None:
        record = await self.read(rid)
        if record is not None and brings["token"] is not None:
            brings.update(token=record.token, attempt=bytes.fromhex(record.attempt))


class ClaimForgetsItsAttempt(Planted):
    async def claim(self, rid, **brings):
        before, reply = await self.read(rid), await super().claim(rid, **brings)
        again = before is not None and before.attempt == brings["attempt"].hex() and isinstance(reply, Granted)
        return Busy(reply.token, 1.0) if again else reply


class ClaimIsNotAtomic(Planted):
    async def claim(self, rid, **brings):
        if await self.read(rid) is None:
            time.sleep(0.001)
            self.drop(rid)
        return await super().claim(rid, **brings)


class ClaimAlwaysTakesOver(Planted):
    async def claim(self, rid, **brings):
        return await super().claim(rid, **{**brings, "takeover": True})


class ClaimDoesNotTakeOverTheTokenAskedFor(Planted):
    async def claim(self, rid, **brings):
        return await super().claim(rid, **{**brings, "over": None})


class ClaimLeavesTheDeadRunRunning(Planted):
    async def claim(self, rid, **brings):
        row, reply = self._store.find(rid.text), await super().claim(rid, **brings)
        if isinstance(reply, Unknown) and row is not None:
            self._store.put(rid.text, row)
        return reply


class FingerprintIsComparedOfOutcomesAlone(Planted):
    async def claim(self, rid, **brings):
        record = await self.read(rid)
        settled = record is None or record.state in ("completed", "failed")
        return await super().claim(rid, **{**brings, "fingerprint": brings["fingerprint"] if settled else b""})


class LeaseEndsEarly(Planted):
    async def claim(self, rid, **brings):
        return await super().claim(rid, **{**brings, "lease": 0.9 * brings["lease"]})


class BusyTellsMilliseconds(Planted):
    async def claim(self, rid, **brings):
        reply = await super().claim(rid, **brings)
        return Busy(reply.token, reply.lease_left * 1000) if isinstance(reply, Busy) else reply


class CompleteWithoutToken(Planted):
    async def complete(self, rid, **brings):
        await self.as_owner(rid, brings)
        return await super().complete(rid, **brings)


class CompleteRefusesItsRepeat(Planted):
    async def complete(self, rid, **brings):
        record = await self.read(rid)
        settled = record is not None and record.state == "completed"
        return Answer.STALE if settled else await super().complete(rid, **brings)


class CompleteOverwrites(Planted):
    async def complete(self, rid, **brings):
        answer = await super().complete(rid, **brings)
        if answer is Answer.DONE:
            self.change(rid, state=State.COMPLETED, codec=brings["codec"], body=brings["body"])
        return answer


class CompleteDropsTheFingerprint(Planted):
    async def complete(self, rid, **brings):
        answer = await super().complete(rid, **brings)
        self.change(rid, fingerprint=b"")
        return answer


class BodyIsCut(Planted):
    async def complete(self, rid, **brings):
        return await super().complete(rid, **{**brings, "body": brings["body"][:65_535]})


class RenewWithoutToken(Planted):
    async def renew(self, rid, **brings):
        await self.as_owner(rid, brings)
        return await super().renew(rid, **brings)


class RenewLeavesTheRetention(Planted):
    async def renew(self, rid, **brings):
        row, answer = self._store.find(rid.text), await super().renew(rid, **brings)
        self.change(rid, expires=row and row.expires)
        return answer


class ReleaseWithoutToken(Planted):
    async def release(self, rid, **brings):
        await self.as_owner(rid, brings)
        return await super().release(rid, **brings)


class ReleaseResetsTheToken(Planted):
    async def release(self, rid, **brings):
        answer = await super().release(rid, **brings)
        if answer is Answer.DONE and not brings.get("unknown"):
            self.drop(rid)
        return answer


class ReleaseWakesNobody(Planted):
    async def release(self, rid, **brings):
        signals, self._store.signals = self._store.signals, Signals()
        try:
            return await super().release(rid, **brings)
        finally:
            self._store.signals = signals


class WithdrawnClaimIsAppliedLate(Planted):
    async def release(self, rid, **brings):
        answer = await super().release(rid, **brings)
        if brings["token"] is None and answer is Answer.DONE:
            self.drop(rid)
        return answer


class ForgetResetsTheToken(Planted):
    async def forget(self, rid, *, force=False):
        found = await super().forget(rid, force=force)
        if found is not None and (force or found.state != "running"):
            self.drop(rid)
        return found


class ForgetNeedsNoForce(Planted):
    async def forget(self, rid, *, force=False):
        return await super().forget(rid, force=True)


class ReadGivesUpTheDead(Planted):
    async def read(self, rid):
        record = await super().read(rid)
        if record is not None and record.lease_left is not None and record.lease_left <= 0:
            self.change(rid, state=State.UNKNOWN, lease=0, lease_until=0, expires=None)
        return record


class ChangedLooksBeforeItSubscribes(Planted):
    async def changed(self, rid, *, token, timeout):
        record = await self.read(rid)
        if record is not None and record.state == "running" and record.token == token:
            time.sleep(0.001)
            waiter = self._waiter()
            self._store.signals.add(rid.text, waiter)
            await waiter.wait(timeout)


class ScanShowsLocks(Planted):
    async def scan(self, *, state=None, namespace=None):
        for text in [*self._store.open, *self._store.settled]:
            rid = RecordId.parse(text)
            record = await self.read(rid)
            if record is not None and state in (None, record.state) and namespace in (None, rid.namespace):
                yield record


class PurgeDropsTheDead(Planted):
    async def purge(self, limit=1000):
        for text, row in list(self._store.open.items()):
            if row.state is State.RUNNING and row.lease_until <= self._store.clock():
                self._store.open.pop(text)
        return await super().purge(limit)


class RemembersNothing(Planted):
    async def complete(self, rid, **brings):
        return await super().complete(rid, **{**brings, "remember": 0.0})


class RemembersTheResultToo(Planted):
    async def claim(self, rid, **brings):
        row, reply = self._store.find(rid.text), await super().claim(rid, **brings)
        return Settled(False, row.token, 0.0, row.codec, row.body) if isinstance(reply, Expired) else reply


class RemembersErrors(Planted):
    async def fail(self, rid, **brings):
        answer = await super().fail(rid, **brings)
        row = self._store.find(rid.text)
        self.change(rid, expires=row and row.expires and row.expires + 60_000_000)
        return answer


class PurgeDropsWhatIsRemembered(Planted):
    async def purge(self, limit=1000):
        for text, row in [*self._store.settled.items()]:
            if row.lease and row.expires <= self._store.clock():
                self._store.settled.pop(text)
        return await super().purge(limit)


class KeysAreFolded(Planted):
    async def claim(self, rid, **brings):
        return await super().claim(RecordId(rid.namespace, rid.key.casefold(), rid.space), **brings)


class KeysAreCut(Planted):
    async def claim(self, rid, **brings):
        return await super().claim(RecordId(rid.namespace, rid.key[:255], rid.space), **brings)


CONVICTED = {
    ClaimForgetsItsAttempt: "the owner's claim, sent late, sent again, where the record is running, is answered: Granted",
    ClaimIsNotAtomic: "of many claims at once, where the record is absent, one is granted",
    ClaimAlwaysTakesOver: "a claim after a purge, where the record is running with its lease over, is answered: Unknown",
    ClaimDoesNotTakeOverTheTokenAskedFor: "a claim over a dead run, where the record is unknown, is answered: Granted",
    ClaimLeavesTheDeadRunRunning: "a read after another's claim, where the record is unknown, is answered: Record with state",
    FingerprintIsComparedOfOutcomesAlone: "a random claim, where the record is running, is answered: Mismatched",
    LeaseEndsEarly: "a record is not lapsed before its time is over",
    BusyTellsMilliseconds: "a claim after some time, where the record is running, is answered: Busy with lease_left 49.96",
    CompleteWithoutToken: "a completion by another attempt, where the record is running, is answered: Answer.STALE, and",
    CompleteRefusesItsRepeat: "a completion by the owner, sent again, where the record is completed, is answered: Answer.D",
    CompleteOverwrites: "a read after two outcomes, where the record is completed, is answered: Record with codec 'json1'",
    CompleteDropsTheFingerprint: "a read after two outcomes, where the record is completed, is answered: Record with fing",
    BodyIsCut: "a read after two outcomes, where the record is completed, is answered: Record with size 1048576, and not 65",
    RenewWithoutToken: "a renewal by another attempt, where the record is running, is answered: Answer.STALE, and not Answ",
    RenewLeavesTheRetention: "a read at once after renew, where the record is running, is answered: Record with expires_in",
    ReleaseWithoutToken: "a release by another attempt, where the record is running, is answered: Answer.STALE, and not An",
    ReleaseResetsTheToken: "a release by the owner, sent again, where the record is released or forgotten, is answered: Ans",
    ReleaseWakesNobody: "changed() hears of release",
    WithdrawnClaimIsAppliedLate: "its sender's claim after the withdrawal of the owner's claim, where the record is releas",
    ForgetResetsTheToken: "tokens only grow",
    ForgetNeedsNoForce: "a forget, sent again, where the record is running, is answered: Record(state='running', namespace",
    ReadGivesUpTheDead: "its sender's claim after the owner's claim, sent late, where the record is running with its lease",
    ChangedLooksBeforeItSubscribes: "changed() hears of complete",
    ScanShowsLocks: "a scan of a namespace shows its calls, each once, no others",
    PurgeDropsTheDead: "a read after a purge, where the record is running with its lease over, is answered: Record(state=",
    RemembersNothing: "the owner's claim, sent late, where the record is expired, is answered: Expired",
    RemembersTheResultToo: "the owner's claim, sent late, where the record is expired, is answered: Expired",
    RemembersErrors: "a read after two outcomes, where the record is failed, is answered: Record with expires_in",
    PurgeDropsWhatIsRemembered: "a read after a purge, where the record is expired, is answered: Record(state='expired'",
    KeysAreFolded: "a first claim, where the record is absent, is answered: Granted",
    KeysAreCut: "a first claim, where the record is absent, is answered: Granted",
}
"""The beginning of one of the sentences that the contract says about each."""


class Quick(TestClockThatStands):
    __test__ = False
    patience = 0.3


def broken_promises(backend_class: type[Planted]) -> Iterator[str]:
    contract = Quick()
    for name in dir(contract):
        if name.startswith("test_"):
            backend = backend_class()
            with Store(backend, "sync", pass_time=functools.partial(contract.pass_time, backend)) as store:
                try:
                    getattr(contract, name)(store)
                except AssertionError as error:
                    yield str(error)


@pytest.mark.parametrize("plant", CONVICTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_convicted_in_words(plant: type[Planted]) -> None:
    found = []
    for words in broken_promises(plant):
        if words.startswith(f"broken promise: {CONVICTED[plant]}"):
            return
        found.append(words)
    pytest.fail("\n".join(["not said; but:", *found]))


def test_what_has_no_planted_bug_is_not_convicted() -> None:
    assert list(broken_promises(Planted)) == []


# --------------------------------------------------------------------------------------------------------- its price


def lines_of(code: str) -> int:
    return sum(bool(line.strip()) for line in code.splitlines())


@pytest.mark.parametrize("adopts", [TestOurs, TestThirdParty, TestSyncAlone, TestAsyncAlone, TestClockThatStands])
def test_a_backend_adopts_the_contract_in_under_twenty_lines(adopts: type[BackendContract]) -> None:
    assert lines_of(inspect.getsource(adopts)) < 20


def test_a_backend_of_a_third_party_is_some_sixty_lines() -> None:
    assert lines_of(inspect.getsource(FileBackend)) <= 60
