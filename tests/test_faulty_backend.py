"""FaultyBackend: the command that a test names fails, loses its reply or hangs, as often as it says, in both colours."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from colours import COLOURS, Colour
from differential import Commands
from probes import Counter

from idempotent import BackendUnavailable, LocalBackend, idempotent
from idempotent._record import Answer, Granted, RecordId
from idempotent.testing import FaultyBackend

RID = RecordId("n", "k")
CLAIM: dict[str, Any] = {"attempt": b"attemptA", "fingerprint": b"", "lease": 30.0, "keep": None, "takeover": True}


@pytest.fixture
def faulty() -> FaultyBackend:
    return FaultyBackend(LocalBackend())


@pytest.fixture
def charge(faulty: FaultyBackend, colour: Colour, effects: Counter) -> Callable[[], Any]:
    function = colour.define(effects.hit, backend=faulty, namespace="n", lease=5)
    return lambda: colour.call(function)


def test_without_faults_it_is_the_backend_inside(faulty: FaultyBackend, charge: Callable[[], Any]) -> None:
    assert charge() == charge() == 1
    assert faulty.calls == ["claim", "complete", "claim"]
    assert faulty.name == "local"


def test_what_is_refused_is_not_applied(faulty: FaultyBackend, colour: Colour) -> None:
    faulty.refuse("claim")
    with Commands(faulty, colour) as commands:
        with pytest.raises(BackendUnavailable, match="injected fault: claim was refused"):
            commands.claim(RID, **CLAIM)
        assert commands.read(RID) is None
        assert isinstance(commands.claim(RID, **CLAIM), Granted)


def test_what_loses_its_reply_is_applied(faulty: FaultyBackend, colour: Colour) -> None:
    faulty.lose_reply("claim", times=2)
    with Commands(faulty, colour) as commands:
        for _ in range(2):
            with pytest.raises(BackendUnavailable, match="injected fault: claim lost its reply"):
                commands.claim(RID, **CLAIM)
        token = commands.read(RID).token
        assert commands.claim(RID, **CLAIM) == Granted(token)


def test_a_completion_whose_reply_is_lost_is_sent_again_and_the_function_runs_once(
    faulty: FaultyBackend, charge: Callable[[], Any], effects: Counter
) -> None:
    faulty.lose_reply("complete", times=2)
    assert charge() == charge() == 1
    assert effects.count == 1
    assert faulty.calls == ["claim", "complete", "complete", "complete", "claim"]


def test_a_fault_strikes_at_the_nth_of_its_commands_and_so_often_in_a_row(
    faulty: FaultyBackend, colour: Colour
) -> None:
    faulty.refuse("read", nth=2, times=2)
    told = []
    with Commands(faulty, colour) as commands:
        for _ in range(5):
            try:
                told.append(commands.read(RID))
            except BackendUnavailable:
                told.append("refused")
    assert told == [None, "refused", "refused", None, None]


def test_a_command_meets_one_fault_and_the_first_planted_first(faulty: FaultyBackend, colour: Colour) -> None:
    faulty.refuse("claim")
    faulty.lose_reply("claim")
    with Commands(faulty, colour) as commands:
        for words in ("claim was refused", "claim lost its reply"):
            with pytest.raises(BackendUnavailable, match=words):
                commands.claim(RID, **CLAIM)
        assert faulty.calls == ["claim", "claim"]
        assert commands.read(RID).state == "running"


def test_a_backend_that_is_out_refuses_every_command_until_it_is_healed(
    faulty: FaultyBackend, charge: Callable[[], Any], effects: Counter
) -> None:
    faulty.refuse(times=None)
    for _ in range(3):
        with pytest.raises(BackendUnavailable):
            charge()
    assert effects.count == 0
    faulty.heal()
    assert charge() == 1


def test_the_error_may_be_another(faulty: FaultyBackend, colour: Colour) -> None:
    faulty.refuse("claim", "changed", times=2, error=MemoryError("full"))
    with Commands(faulty, colour) as commands:
        with pytest.raises(MemoryError, match="full"):
            commands.claim(RID, **CLAIM)
        with pytest.raises(MemoryError, match="full"):
            commands.changed(RID, token=1, timeout=0.1)


def test_a_wait_never_tells_of_an_outage(faulty: FaultyBackend, colour: Colour) -> None:
    faulty.refuse("changed")
    faulty.hang("changed", applied=True)
    with Commands(faulty, colour) as commands:
        granted = commands.claim(RID, **CLAIM)
        assert commands.changed(RID, token=granted.token, timeout=5) is None
        assert commands.changed(RID, token=granted.token, timeout=0.01) is None
    assert faulty.calls == ["claim", "changed", "changed"]


def test_what_hangs_goes_on_when_it_is_released(faulty: FaultyBackend, colour: Colour, effects: Counter) -> None:
    function = colour.define(effects.hit, backend=faulty)
    with faulty.hang("claim") as hang:
        answer = colour.start(function)
        assert hang.wait()
        assert not answer.done()
        assert effects.count == 0
    assert answer.result(timeout=5) == 1
    assert colour.call(function) == 1


def test_what_hangs_fails_after_its_own_timeout(faulty: FaultyBackend, colour: Colour) -> None:
    hang = faulty.hang("claim", "read", "release", times=3)
    with Commands(faulty.within(0.05), colour) as commands, pytest.raises(BackendUnavailable, match="read hung"):
        commands.read(RID)
    with Commands(faulty, colour) as commands:
        with pytest.raises(BackendUnavailable, match="claim hung"):
            commands.claim(RID, **{**CLAIM, "lease": 0.05})
        hang.release()
        assert commands.read(RID) is None
        assert commands.release(RID, attempt=b"attemptA", token=1) is Answer.GONE
    assert hang.wait(0)


def test_what_was_applied_may_hang_too(faulty: FaultyBackend, colour: Colour) -> None:
    faulty.hang("claim", applied=True)
    with Commands(faulty, colour) as commands:
        with pytest.raises(BackendUnavailable):
            commands.claim(RID, **{**CLAIM, "lease": 0.05})
        assert commands.read(RID).attempt == b"attemptA".hex()


def test_healing_releases_what_hangs(faulty: FaultyBackend, colour: Colour, effects: Counter) -> None:
    hang = faulty.hang("complete")
    answer = colour.start(colour.define(effects.hit, backend=faulty))
    assert hang.wait()
    faulty.heal()
    assert answer.result(timeout=5) == 1


def test_nobody_waits_for_what_does_not_hang(faulty: FaultyBackend) -> None:
    assert faulty.hang("claim").wait(timeout=0.01) is False


def test_a_renewal_that_hangs_does_not_hold_up_the_call(
    faulty: FaultyBackend, colour: Colour, effects: Counter
) -> None:
    hang = faulty.hang("renew", times=None)

    def slow() -> int:
        assert hang.wait()
        return effects.hit()

    assert colour.call(colour.define(slow, backend=faulty, lease=0.3)) == 1
    assert faulty.calls[-1] == "complete"


def test_a_hanging_command_leaves_the_loop_alone_and_may_be_cancelled(faulty: FaultyBackend) -> None:
    @idempotent(backend=faulty)
    async def work() -> int:
        return 1

    async def main() -> None:
        faulty.hang("claim")
        task = asyncio.create_task(work())
        while "claim" not in faulty.calls:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await work() == 1

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 4


def test_both_colours_share_faults_and_calls(faulty: FaultyBackend) -> None:
    sync, other = COLOURS
    faulty.refuse("read", times=2)
    for colour in (sync, other):
        with Commands(faulty, colour) as commands, pytest.raises(BackendUnavailable):
            commands.read(RID)
    with Commands(faulty, other) as commands:
        commands.claim(RID, **CLAIM)
    with Commands(faulty, sync) as commands:
        assert commands.read(RID).state == "running"
    assert faulty.calls == ["read", "read", "claim", "read"]
    assert faulty.blocking() is faulty.blocking()


def test_what_operators_use_may_fail_too(faulty: FaultyBackend, colour: Colour) -> None:
    faulty.refuse("scan", "purge", times=2)
    with Commands(faulty, colour) as commands:
        commands.claim(RID, **CLAIM)
        with pytest.raises(BackendUnavailable, match="scan was refused"):
            commands.scanned()
        with pytest.raises(BackendUnavailable, match="purge was refused"):
            commands.purge()
        assert [record.key for record in commands.scanned(namespace="n")] == ["k"]
        assert commands.purge(10) == 0


@pytest.mark.parametrize("wrong", [{"nth": 0}, {"times": 0}])
def test_a_fault_that_would_never_strike_is_refused(faulty: FaultyBackend, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        faulty.refuse("claim", **wrong)


def test_a_command_that_no_backend_has_is_refused(faulty: FaultyBackend) -> None:
    with pytest.raises(ValueError, match="no command 'clame'; there are claim, renew"):
        faulty.refuse("clame")


def test_an_ordinary_test_needs_no_pytest_for_it() -> None:
    code = (
        "import sys\nfrom idempotent.testing import FaultyBackend\nassert not {'pytest', 'hypothesis'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_imports_the_kit_but_who_asks_for_it() -> None:
    code = "import sys\nfrom idempotent import *\nassert 'idempotent.testing' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_kit_names_what_it_has() -> None:
    import idempotent.testing as kit

    assert {"BackendContract", "FaultyBackend", "Hang"} <= {*dir(kit), *kit.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        kit.nothing  # noqa: B018
