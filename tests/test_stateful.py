"""The stateful machine finds nothing in our backends, and convicts planted bugs with the shortest history."""

from typing import Any, ClassVar

import pytest
import test_contract as plants
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from test_contract import Clock, Planted

from idempotent import Backend, LocalBackend, open_backend
from idempotent.testing import BackendMachine, FaultyBackend

FIXED = settings(max_examples=60, stateful_step_count=30, database=None, derandomize=True, deadline=None)
SHORT = 0.25  # a lease that a busy machine keeps
GENERATE = settings(FIXED, max_examples=400, phases=[Phase.generate])


class LocalMachine(BackendMachine):
    made: ClassVar[Any] = None

    def open(self) -> Backend:
        return LocalBackend(clock=Clock()) if self.made is None else self.made()

    def pass_time(self, backend: Any, seconds: float) -> None:
        getattr(backend, "inner", backend)._store.clock.now += round(seconds * 1e6)


class AsyncMachine(LocalMachine):
    colour = "async"


class FaultlessMachine(LocalMachine):
    def open(self) -> Backend:
        return FaultyBackend(LocalBackend(clock=Clock()))


for machine in (LocalMachine, AsyncMachine, FaultlessMachine):
    machine.TestCase.settings = FIXED

TestLocal = LocalMachine.TestCase
TestAsync = AsyncMachine.TestCase
TestFaultless = FaultlessMachine.TestCase


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_no_history_of_ours_is_answered_otherwise_than_the_table_says(shared_backend_url: str, colour: Any) -> None:
    class Machine(BackendMachine):
        short = SHORT

        def open(self) -> Backend:
            return open_backend(shared_backend_url)

    Machine.colour = colour
    run_state_machine_as_test(Machine, settings=settings(GENERATE, max_examples=3, stateful_step_count=6))


CONVICTED = [
    plants.ClaimForgetsItsAttempt,
    plants.ClaimIsNotAtomic,
    plants.ClaimAlwaysTakesOver,
    plants.ClaimDoesNotTakeOverTheTokenAskedFor,
    plants.ClaimLeavesTheDeadRunRunning,
    plants.FingerprintIsComparedOfOutcomesAlone,
    plants.CompleteWithoutToken,
    plants.CompleteRefusesItsRepeat,
    plants.CompleteOverwrites,
    plants.CompleteDropsTheFingerprint,
    plants.RenewWithoutToken,
    plants.RenewLeavesTheRetention,
    plants.ReleaseWithoutToken,
    plants.ReleaseResetsTheToken,
    plants.WithdrawnClaimIsAppliedLate,
    plants.ForgetResetsTheToken,
    plants.ForgetNeedsNoForce,
    plants.ReadGivesUpTheDead,
]


@pytest.mark.parametrize("plant", CONVICTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_convicted(plant: type[Planted]) -> None:
    class Machine(LocalMachine):
        made = plant

    with pytest.raises(AssertionError, match="broken promise: (.* is answered: |tokens only grow)"):
        run_state_machine_as_test(Machine, settings=GENERATE)


def test_the_history_is_shrunk_to_the_shortest() -> None:
    class Machine(LocalMachine):
        made = plants.CompleteRefusesItsRepeat

    with pytest.raises(AssertionError) as convicted:
        run_state_machine_as_test(Machine, settings=settings(FIXED, report_multiple_bugs=False))
    notes = "\n".join(convicted.value.__notes__)
    steps = [line.strip() for line in notes.splitlines() if line.strip().startswith("state.")]
    assert steps[-1] == "state.teardown()"
    assert len([step for step in steps if "each_record" not in step]) <= 3
    assert "is answered: Answer.DONE, and not Answer.STALE" in str(convicted.value)


def test_a_machine_says_of_which_backend_it_is() -> None:
    with pytest.raises(NotImplementedError, match=r"says in open\(\) which backend it is about"):
        run_state_machine_as_test(BackendMachine, settings=FIXED)
