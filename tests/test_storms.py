"""Storms of duplicate calls: values that are played in virtual time on decorated functions, and what Hypothesis makes."""

import asyncio
import subprocess
import sys
import time
from typing import Any

import pytest
from colours import COLOURS, Colour
from hypothesis import find, given, settings
from hypothesis import strategies as st
from probes import Counter

from idempotent import (
    Applied,
    BackendUnavailable,
    InProgress,
    LeaseLost,
    LocalBackend,
    NotApplied,
    OutcomeUnknown,
    UnprotectedWarning,
    configure,
    current_call,
    idempotent,
)
from idempotent.testing import Aftermath, Ending, NotIdempotent, Storm, duplicates

FIXED = settings(max_examples=150, database=None, derandomize=True, deadline=None)


def charge_of(colour: Colour, effects: Counter, **options: Any) -> Any:
    def charge(order: str, cents: int = 5) -> list[Any]:
        return [order, cents, effects.hit()]

    return colour.define(charge, **{"backend": "local://", "key": "{order}", **options})


def endings(aftermath: Aftermath) -> list[str]:
    return [ending.how if ending.error is None else type(ending.error).__name__ for ending in aftermath.endings]


# ---------------------------------------------------------------------------------------------------------- the value


def test_a_storm_is_a_value_whose_text_makes_it_again() -> None:
    storm = Storm(callers=3, moves="1 2:lost 3:dies lease 1:dies-after 2:refused")
    assert eval(repr(storm)) == storm
    assert hash(storm) == hash(Storm(3, storm.moves))
    assert repr(storm) == "Storm(callers=3, moves='1 2:lost 3:dies lease 1:dies-after 2:refused')"


@pytest.mark.parametrize("moves", ["x", "0", "1:sings", "1 :dies", "lease:1", "1.5", "-1"])
def test_what_is_no_move_is_refused(moves: str) -> None:
    with pytest.raises(ValueError, match="is no move; there are N, N:dies"):
        Storm(2, moves)


def test_a_caller_who_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="names a caller that there is not; there are 2"):
        Storm(2, "1 3")
    for callers in (0, 100):
        with pytest.raises(ValueError, match="1 to 99 callers"):
            Storm(callers)


# ------------------------------------------------------------------------------------------------------------ playing


def test_the_moves_decide_who_goes_on(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects)
    aftermath = Storm(3, "2 1 2 3 2").play(charge, ("o", 7))
    assert aftermath.runs == (2,)
    assert [ending.value for ending in aftermath.endings] == [["o", 7, 1]] * 3
    assert [ending.replayed for ending in aftermath.endings] == [True, False, True]
    assert aftermath.moves[:5] == ("2", "1", "2", "3", "2")
    assert [line[:2] for line in aftermath.lines][:3] == [
        ("caller 2", "claim"),
        ("caller 1", "claim"),
        ("caller 2", f"RUNS {charge.__name__}"),
    ]
    assert (aftermath.faults, aftermath.reruns, effects.count) == (0, 0, 1)


def test_a_storm_played_again_is_the_same(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects, keep_result=False)
    storm = Storm(3, "1 2 1 1:lost 3 lease 2 2:dies 3 1")
    assert len({(one.moves, one.runs, one.lines[:5]) for one in [storm.play(charge, ("o",)) for _ in range(5)]}) == 1


def test_who_dies_leaves_its_lease_and_the_next_takes_over(colour: Colour, effects: Counter) -> None:
    aftermath = Storm(2, "1 1 1:dies").play(charge_of(colour, effects), ("o",))
    assert aftermath.runs == (1, 2)
    assert endings(aftermath) == ["died", "returned"]
    assert (aftermath.faults, aftermath.reruns) == (1, 1)
    assert ("time", "the lease runs out", "") in aftermath.lines


def test_who_dies_before_its_step_has_not_taken_it_and_who_dies_after_has(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects)
    assert Storm(2, "1 1:dies 2").play(charge, ("o",)).runs == (2,)
    assert Storm(2, "1 1:dies-after 2").play(charge, ("o",)).runs == (1, 2)
    assert Storm(2, "1:dies").play(charge, ("o",)).runs == (2,)
    settled = Storm(2, "1 1 1:dies-after 2").play(charge, ("o",))
    assert (settled.runs, endings(settled)) == ((1,), ["died", "returned"])
    assert settled.endings[1].replayed


def test_after_a_crash_the_functions_own_policy_decides(colour: Colour, effects: Counter) -> None:
    storm = Storm(2, "1 1 1:dies")
    charge = charge_of(colour, effects, on_crash="raise")
    assert endings(storm.play(charge, ("o",))) == ["died", "OutcomeUnknown"]

    def probe(call: Any) -> Any:
        return Applied([call.key, 5, effects.count]) if effects.count > 1 else NotApplied()

    charge = charge_of(colour, effects, on_crash=probe)
    aftermath = storm.play(charge, ("o",))
    assert (aftermath.runs, aftermath.endings[1].value) == ((1,), ["o", 5, 2])


def test_a_lease_that_ends_early_makes_the_late_runner_lose(colour: Colour, effects: Counter) -> None:
    seen: list[bool] = []

    def charge(order: str) -> int:
        call = current_call()
        assert call is not None
        seen.append(call.lease_lost)
        return effects.hit()

    aftermath = Storm(2, "1 lease 2 2 2 1").play(colour.define(charge, backend="local://"), ("o",))
    assert aftermath.runs == (2, 1)
    assert endings(aftermath) == ["LeaseLost", "returned"]
    assert seen == [False, True], "the function sees the storm's time"


@pytest.mark.parametrize("how", ["lost", "refused"])
def test_a_command_whose_reply_is_lost_was_applied_and_one_refused_was_not(
    colour: Colour, effects: Counter, how: str
) -> None:
    charge = charge_of(colour, effects)
    claim = Storm(2, f"1:{how} 2").play(charge, ("o",))
    assert endings(claim) == ["BackendUnavailable", "returned"]
    assert ("release" in {what for _, what, _ in claim.lines}) and claim.runs == (2,)
    complete = Storm(2, f"1 1 1:{how} 2").play(charge, ("o",))
    assert (complete.runs, endings(complete)) == ((1,), ["returned", "returned"])
    text = "complete (applied, reply lost)" if how == "lost" else "complete (lost on its way)"
    assert ("caller 1", text, "no answer") in complete.lines
    assert complete.endings[1].replayed is True
    assert ("busy" in {came for _, _, came in complete.lines}) is (how == "refused")


def test_a_move_that_cannot_be_made_is_passed_over(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects)
    aftermath = Storm(2, "lease 1 1 1 1 1:dies 1:lost 2:dies 2").play(charge, ("o",))
    assert aftermath.moves == ("1", "1", "1", "2:dies")
    assert endings(aftermath) == ["returned", "died"]


def test_waiting_takes_no_time_and_ends_as_the_function_says(colour: Colour, effects: Counter) -> None:
    began = time.monotonic()
    impatient = charge_of(colour, effects, wait=0)
    assert endings(Storm(2, "1 2").play(impatient, ("o",))) == ["returned", "InProgress"]
    short = charge_of(colour, effects, wait=10, lease=3000)
    aftermath = Storm(2, "1 1 1:dies 2").play(short, ("o",))
    assert endings(aftermath) == ["died", "InProgress"]
    assert ("time", "time passes", "") in aftermath.lines
    long = charge_of(colour, effects, wait=None, lease=3000)
    assert endings(Storm(2, "1 1 1:dies 2").play(long, ("o",))) == ["died", "returned"]
    assert time.monotonic() - began < 10


def test_a_storm_is_played_on_the_functions_own_options_and_leaves_its_backend_alone(
    colour: Colour, effects: Counter
) -> None:
    backend = LocalBackend()
    charge = charge_of(colour, effects, backend=backend)
    given = charge.with_key("mine")
    aftermath = Storm(2, "1 2").play(given, ("o",))
    assert endings(aftermath) == ["returned", "returned"]
    assert colour.call(charge.peek, "o") is colour.call(given.peek) is None
    assert charge.stats() == {}
    assert colour.call(charge, "o") == ["o", 5, 2]


def test_neither_hooks_nor_a_missing_backend_trouble_a_storm(colour: Colour, effects: Counter) -> None:
    told: list[Any] = []
    configure(hooks=[told.append])

    def charge(order: str) -> int:
        return effects.hit()

    # No backend is configured: outside of a storm that is a ProcessLocalWarning, here an error.
    assert Storm(2).play(colour.define(charge), ("o",)).runs == (1,)
    assert told == []


def test_decorated_functions_that_it_calls_have_their_records_in_the_storm_too(
    colour: Colour, effects: Counter
) -> None:
    inner_runs = Counter()

    @idempotent(backend="local://", key="{order}")
    def pay(order: str) -> int:
        return inner_runs.hit()

    def checkout(order: str) -> list[int]:
        return [effects.hit(), pay(order)]

    checkout = colour.define(checkout, backend="local://", key="{order}")
    aftermath = Storm(2, "1 1 1:dies").play(checkout, ("o",))
    assert aftermath.runs == (1, 2)
    assert (effects.count, inner_runs.count) == (2, 1)
    assert aftermath.endings[1].value == [2, 1]
    assert pay("o") == 2, "afterwards they are where they were"


def test_methods_are_played_bound(colour: Colour) -> None:
    class Account:
        def __init__(self) -> None:
            self.charged: list[str] = []

        def charge(self, order: str) -> str:
            self.charged.append(order)
            return order

    Account.charge = colour.define(Account.charge, backend="local://", key="{order}")  # type: ignore[method-assign]
    account = Account()
    Storm(3, "1 2 3").run(account.charge, ("o",), effects=lambda: len(account.charged))
    assert account.charged == ["o"]


def test_errors_of_the_function_are_endings(colour: Colour, effects: Counter) -> None:
    def charge(order: str) -> int:
        if effects.hit() == 1:
            raise KeyError("declined")
        return effects.count

    aftermath = Storm(2, "1 2").play(colour.define(charge, backend="local://"), ("o",))
    assert endings(aftermath) == ["KeyError", "returned"]
    assert "KeyError: 'declined'" in str(aftermath.endings[0])
    assert "got 2" in str(aftermath.endings[1])


def test_a_call_without_a_usable_key_is_an_ending(colour: Colour, effects: Counter) -> None:
    aftermath = Storm(2, "1:lost 2").play(charge_of(colour, effects), (None,))
    assert endings(aftermath) == ["KeyRequired", "KeyRequired"]


def test_what_goes_on_without_a_claim_is_no_warning_here(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects, on_outage="run")
    aftermath = Storm(2, "1:refused").play(charge, ("o",))
    assert (aftermath.runs, aftermath.reruns) == ((1, 2), 1)
    assert endings(aftermath) == ["returned", "returned"]
    assert not aftermath.endings[0].stored
    assert "(not stored)" in str(aftermath.endings[0])
    assert UnprotectedWarning  # would have been an error, as all warnings of these tests are


def test_keyboard_interrupts_get_through(colour: Colour) -> None:
    def charge(order: str) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Storm(2).play(colour.define(charge, backend="local://"), ("o",))


@pytest.mark.parametrize("call", ["o", 5, ["o"], None])
def test_a_call_that_is_no_call_is_refused(colour: Colour, effects: Counter, call: Any) -> None:
    with pytest.raises(TypeError, match="a call is a tuple of arguments"):
        Storm().play(charge_of(colour, effects), call)


def test_a_call_may_name_its_arguments(colour: Colour, effects: Counter) -> None:
    from unittest.mock import call

    charge = charge_of(colour, effects)
    for arguments in (("o", 9), {"order": "o", "cents": 9}, call("o", cents=9)):
        assert Storm().play(charge, arguments).endings[0].value[:2] == ["o", 9]


@pytest.mark.parametrize("what", [len, lambda order: order])
def test_what_is_not_decorated_is_refused(what: Any) -> None:
    with pytest.raises(TypeError, match="is not decorated with @idempotent; assert_naturally_idempotent"):
        Storm().play(what, ("o",))


def test_another_decorators_wrapper_is_refused(colour: Colour, effects: Counter) -> None:
    import functools

    charge = charge_of(colour, effects)

    @functools.wraps(charge)
    def audited(*args: Any) -> Any:
        return charge(*args)

    with pytest.raises(TypeError, match=r"another decorator's wrapper; give the function .* charge.__idempotent__"):
        Storm().play(audited, ("o",))
    assert Storm().play(audited.__idempotent__, ("o",)).runs == (1,)


# -------------------------------------------------------------------------------------------------------- async alone


def test_an_async_function_awaits_its_own_event_loop_while_the_others_stand_still() -> None:
    order: list[str] = []

    @idempotent(backend="local://")
    async def work(name: str) -> str:
        order.append("begins")
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await asyncio.gather(asyncio.sleep(0.001), asyncio.to_thread(time.sleep, 0.001))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.sleep(5)
        order.append("ends")
        return name

    assert endings(Storm(3, "1 2 1 3").play(work, ("x",))) == ["returned"] * 3
    assert order == ["begins", "ends"]


def test_what_an_async_function_awaits_raises_in_it() -> None:
    @idempotent(backend="local://")
    async def work() -> str:
        future = asyncio.get_running_loop().create_future()
        future.set_exception(KeyError("inside"))
        try:
            await future
        except KeyError:
            return "caught"
        return "missed"

    assert Storm().play(work).endings[0].value == "caught"


def test_inside_a_running_loop_there_is_a_twin_to_await() -> None:
    runs: list[int] = []

    @idempotent(backend="local://")
    async def work() -> int:
        await asyncio.sleep(0)
        runs.append(1)
        return 1

    async def effects() -> int:
        await asyncio.sleep(0)
        return len(runs)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="await the twin of this whose name ends in _async"):
            Storm().play(work)
        assert (await Storm(2, "1 2").play_async(work)).runs == (1,)
        await Storm(2, "1 2").run_async(work, (), effects)
        with pytest.raises(NotIdempotent):
            await Storm(2, "1 1 1:dies").run_async(work, (), effects, reruns=False)

    asyncio.run(main())
    Storm(2, "1 2").run(work, (), effects)


def test_a_storm_that_is_cancelled_ends() -> None:
    @idempotent(backend="local://")
    async def work() -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(Storm(2, "1 2").play_async(work))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), 10)

    asyncio.run(main())


def test_an_async_probe_of_a_sync_function_is_refused(effects: Counter) -> None:
    async def count() -> int:
        return 0

    with pytest.raises(TypeError, match="is async, and charge is not"):
        Storm().run(charge_of(COLOURS[0], effects), ("o",), count)


# ---------------------------------------------------------------------------------------------------------- judging


def test_a_storm_that_is_run_is_judged(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects)
    storm = Storm(2, "1 1 1:dies")
    aftermath = storm.run(charge, ("o",), lambda: effects.count)
    assert aftermath.runs == (1, 2), "on_crash='rerun' asks for it"
    with pytest.raises(NotIdempotent) as failed:
        storm.run(charge, ("o",), lambda: effects.count, reruns=False)
    assert failed.value.storm == storm
    assert failed.value.violation is not None
    assert failed.value.violation.mermaid().startswith("sequenceDiagram")
    told = str(failed.value).splitlines()
    assert told[:5] == [
        "charge('o'): the effect happened 2 times, and should have happened once.",
        "",
        "  callers   2 duplicates of this call, each in a process of its own; key 'o'",
        "  effects   grew by 2, from 2 to 4",
        "  answers   caller 1 died; caller 2 got ['o', 5, 4]",
    ]
    assert told[6:-6] == [f"  {row}" for row in failed.value.violation.diagram().splitlines()]
    assert [line for line in failed.value.violation.lines if line[0] != "caller 2"] == [
        ("caller 1", "claim", "granted"),
        ("caller 1", "RUNS charge", "run 1"),
        ("caller 1", "dies", ""),
        ("time", "the lease runs out", ""),
    ]
    assert told[-5].startswith("What to do: the first runner was gone, or late, between its effect and its record, and")
    assert told[-1] == "Once more:  Storm(callers=2, moves='1 1 1:dies').play(charge, ('o',))"


def test_effects_may_count_by_more_than_one(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects)
    Storm().run(charge, ("o",), lambda: 500 * effects.count, each=500)
    with pytest.raises(NotIdempotent, match=r"happened 0\.5 times"):
        Storm().run(charge, ("o",), lambda: effects.count, each=2)
    with pytest.raises(NotIdempotent, match="the effect did not happen"):
        Storm().run(charge, ("o",), lambda: 0)


def told_of(storm: Storm, *args: Any, **options: Any) -> str:
    with pytest.raises(NotIdempotent) as failed:
        storm.run(*args, **options)
    return str(failed.value)


def test_what_to_do_depends_on_what_happened(colour: Colour, effects: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        return effects.count

    def raises_first(order: str) -> int:
        if effects.hit() % 2:
            raise KeyError(order)
        return 1

    told = told_of(Storm(2, "1 2"), colour.define(raises_first, backend="local://"), ("o",), count)
    assert "the effect happened 2 times" in told
    assert "the function raised after its effect" in told

    def raises(order: str) -> int:
        raise KeyError(order)

    told = told_of(Storm(2), colour.define(raises, backend="local://"), ("o",), count)
    assert "nothing went wrong around it, and caller 1 got KeyError" in told
    assert "call with arguments for which it succeeds" in told

    def key(order: str) -> str:
        effects.hit()
        return order

    told = told_of(Storm(2), charge_of(colour, Counter(), key=key), ("o",), count)
    assert "the effect is outside of it" in told
    keys = iter("abcdefghijkl")
    told = told_of(Storm(2), charge_of(colour, effects, key=lambda *_: next(keys)), ("o",), count)
    assert "two calls ran under different keys" in told
    monkeypatch.setattr("idempotent.testing.storms._LONGEST", 1)
    assert "a caller goes on for ever" in told_of(Storm(2), charge_of(colour, effects), ("o",), count)


def test_many_callers_are_no_endless_storm(effects: Counter) -> None:
    Storm(60, " ".join(map(str, range(60, 0, -1)))).run(charge_of(COLOURS[0], effects), ("o",), lambda: effects.count)


def test_an_async_function_behind_a_sync_one_is_refused_as_ever() -> None:
    async def work() -> int:
        return 1

    sync = idempotent(backend="local://")(lambda: work())
    aftermath = Storm(1).play(sync)
    assert "is an async function behind a wrapper that is none" in str(aftermath.endings[0].error)


# ---------------------------------------------------------------------------------------------------------- Hypothesis


@FIXED
@given(storm=duplicates())
def test_a_function_that_does_not_rerun_has_its_effect_once_in_every_storm(storm: Storm) -> None:
    effects = Counter()
    for colour in COLOURS[:1]:
        storm.run(charge_of(colour, effects, on_crash="raise"), ("o",), lambda: effects.count, reruns=False)


@settings(FIXED, max_examples=40)
@given(storm=duplicates())
def test_an_async_one_too(storm: Storm) -> None:
    effects = Counter()
    storm.run(charge_of(COLOURS[1], effects, on_crash="raise"), ("o",), lambda: effects.count, reruns=False)


def test_storms_shrink_to_the_shortest(effects: Counter) -> None:
    charge = charge_of(COLOURS[0], effects)

    def charges_twice(storm: Storm) -> bool:
        return len(storm.play(charge, ("o",)).runs) > 1

    crash = find(duplicates(expiries=0, lost_replies=0), charges_twice, settings=FIXED)
    assert crash in (Storm(2, "1 1:dies-after"), Storm(2, "1 1 1:dies"))
    shortest = find(duplicates(crashes=0), charges_twice, settings=FIXED)
    assert shortest.callers == 2
    assert len(shortest.moves.split()) <= 3


def test_storms_keep_within_their_budgets() -> None:
    kinds = {"dies": "crash", "dies-after": "crash", "lost": "loss", "refused": "loss", "lease": "expiry"}
    met: set[str] = set()

    @FIXED
    @given(storm=duplicates(callers=4, moves=30, crashes=2, expiries=1, lost_replies=0))
    def check(storm: Storm) -> None:
        assert 2 <= storm.callers <= 4
        words = storm.moves.split()
        found = [kinds[kind] for word in words if (kind := word.partition(":")[2] or word) in kinds]
        assert found.count("crash") <= 2
        assert found.count("expiry") <= 1
        assert "loss" not in found
        assert len(words) <= 30
        met.update(found, [f"{storm.callers} callers"])

    check()
    assert met == {"crash", "expiry", "2 callers", "3 callers", "4 callers"}


@pytest.mark.parametrize("wrong", [{"callers": 1}, {"moves": -1}, {"crashes": -1}])
def test_storms_that_could_not_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least two callers"):
        duplicates(**wrong)


@FIXED
@given(storm=st.from_type(Storm))
def test_hypothesis_knows_the_type(storm: Storm) -> None:
    assert isinstance(storm, Storm)
    assert 2 <= storm.callers <= 3


HOOK = "from idempotent.testing.hypothesis_plugin import register\n"


@pytest.mark.parametrize(
    "code",
    [
        # What Hypothesis does when it is imported costs nothing where there are no storms.
        (
            f"import sys, hypothesis\n{HOOK}register()\n"
            "assert not {'idempotent.testing.storms', 'idempotent._flow', 'msgspec', 'redis'} & {*sys.modules}"
        ),
        # Whichever comes first, the type is known.
        (
            f"from idempotent.testing import Storm\nimport hypothesis\n{HOOK}register()\n"
            "assert hypothesis.find(hypothesis.strategies.from_type(Storm), bool) == Storm(2, '')"
        ),
        (
            f"import hypothesis\n{HOOK}register()\nfrom idempotent.testing import Storm\n"
            "assert hypothesis.find(hypothesis.strategies.from_type(Storm), bool) == Storm(2, '')"
        ),
        # And who plays storms by hand needs no Hypothesis.
        (
            "import sys\nfrom idempotent.testing import Storm, assert_idempotent\n"
            "assert not {'hypothesis', 'pytest', 'redis'} & {*sys.modules}"
        ),
        # The function of that name is no module, whatever was imported before.
        "import idempotent.testing.strategies\nfrom idempotent.testing import duplicates\nassert callable(duplicates)",
    ],
)
def test_hypothesis_and_storms_meet_at_no_cost(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_the_errors_named_here_are_those_of_the_package() -> None:
    assert {BackendUnavailable, InProgress, LeaseLost, OutcomeUnknown} and Ending(1, "died").error is None
