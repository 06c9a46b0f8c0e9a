"""Assertions about functions of the user's own: what passes, what fails, and what a failure says."""

import asyncio
import itertools
import re
import sqlite3
import uuid
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from colours import COLOURS, Colour
from probes import Counter

from idempotent import Applied, LocalBackend, NotApplied, current_call, idempotent
from idempotent import _machine as machine
from idempotent._record import Row, State
from idempotent.testing import (
    NotIdempotent,
    Proof,
    Storm,
    assert_idempotent,
    assert_idempotent_async,
    assert_naturally_idempotent,
    assert_naturally_idempotent_async,
)


def charge_of(colour: Colour, effects: Counter, **options: Any) -> Any:
    """A charge in this colour; the async one really suspends."""

    def charge(order: str, cents: int = 5) -> list[Any]:
        return [order, cents, effects.hit()]

    async def charge_async(order: str, cents: int = 5) -> list[Any]:
        await asyncio.sleep(0)
        return charge(order, cents)

    charge_async.__name__ = "charge"
    return idempotent(**{"backend": "local://", "key": "{order}", **options})(
        charge_async if colour.is_async else charge
    )


def failure(function: Any, *args: Any, **options: Any) -> NotIdempotent:
    with pytest.raises(NotIdempotent) as failed:
        assert_idempotent(function, *args, **options)
    return failed.value


# ------------------------------------------------------------------------------------------------ decorated functions


def test_a_function_that_never_reruns_passes_every_storm(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects, on_crash="raise")
    proof = assert_idempotent(charge, [("o-1",), ("o-2", 7)], lambda: effects.count, reruns=False, seconds=60)
    assert proof.complete
    assert proof.storms > 1500
    assert proof.reran == 0
    assert str(proof).startswith(f"{proof.storms:,} storms, all there are, in ")


def test_a_function_that_reruns_by_its_own_option_passes_and_the_proof_says_so(
    colour: Colour, effects: Counter
) -> None:
    charge = charge_of(colour, effects)
    proof = assert_idempotent(charge, [("o",)], lambda: effects.count, callers=2, seconds=60)
    assert proof.complete
    assert proof.reran > 100
    assert str(proof).endswith("of them a dead or late run was run again, as its options ask")


def test_where_it_must_not_rerun_the_shortest_storm_is_shown(colour: Colour, effects: Counter) -> None:
    failed = failure(charge_of(colour, effects), [("o",)], lambda: effects.count, reruns=False)
    assert failed.storm in (Storm(2, "1 1 1:dies"), Storm(2, "1 1:dies-after"))
    assert "one call alone adds 1" in str(failed)
    assert 'Give on_crash="raise" or a probe' in str(failed)
    again = failed.storm.play(charge_of(colour, effects), ("o",))
    assert again.runs == (1, 2), "the storm that is shown shows it again"


def test_an_effect_that_refuses_a_second_time_is_proved_to_happen_once_in_spite_of_reruns(colour: Colour) -> None:
    provider: dict[str, str] = {}

    def charge(order: str) -> str:
        call = current_call()
        assert call is not None
        return provider.setdefault(call.downstream_key("provider"), f"receipt for {order}")

    charge = colour.define(charge, backend="local://", key="{order}")
    options: Any = {"reset": provider.clear, "reruns": False, "callers": 2}
    if colour.is_async:
        options["lost_replies"] = 0  # each run is a thread here
    proof = assert_idempotent(charge, [("o",)], lambda: len(provider), seconds=60, **options)
    assert proof.complete
    assert proof.reran > 20


def test_a_probe_that_looks_in_the_wrong_place_is_convicted(colour: Colour, effects: Counter) -> None:
    failed = failure(charge_of(colour, effects, on_crash=lambda _call: NotApplied()), [("o",)], lambda: effects.count)
    assert "the probe said NotApplied() although the effect had happened" in str(failed)
    assert failed.storm is not None
    assert "dies" in failed.storm.moves


def test_a_probe_that_knows_passes(colour: Colour) -> None:
    ledger: dict[str, int] = {}

    def probe(call: Any) -> Any:
        return Applied(ledger[call.key]) if call.key in ledger else NotApplied()

    def charge(order: str) -> int:
        ledger[order] = ledger.get(order, 0) + 1
        return 5

    charge = colour.define(charge, backend="local://", key="{order}", on_crash=probe)
    options: Any = {"callers": 2, "expiries": 0}
    assert_idempotent(charge, [("o",)], lambda: sum(ledger.values()), reset=ledger.clear, **options)


def test_a_key_that_is_another_each_time_is_convicted(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects, key=lambda *_args, **_kwargs: str(uuid.uuid4()))
    failed = failure(charge, [("o",)], lambda: effects.count)
    assert "had its effect again when it was called again, one call after the other" in str(failed)
    assert "key= gives the same text for the same call every time" in str(failed)


def test_a_key_that_differs_between_racing_callers_is_convicted(colour: Colour, effects: Counter) -> None:
    turns = itertools.count()
    charge = charge_of(colour, effects, key=lambda *_args, **_kwargs: f"k{next(turns) // 12}")
    failed = failure(charge, [("o",)], lambda: effects.count)
    assert "What to do:" in str(failed)


def test_an_effect_outside_of_the_body_is_convicted(colour: Colour, effects: Counter) -> None:
    def key(order: str) -> str:
        effects.hit()
        return order

    failed = failure(charge_of(colour, Counter(), key=key), [("o",)], lambda: effects.count)
    assert "move the effect into the function's body" in str(failed)


@pytest.mark.parametrize("fingerprint", [True, False])
def test_calls_that_share_a_key_are_told(colour: Colour, effects: Counter, fingerprint: bool) -> None:
    charge = charge_of(colour, effects, key="{order[0]}", fingerprint=fingerprint)
    failed = failure(charge, [("o-1",), ("o-2",)], lambda: effects.count)
    consequence = "refused, and never have an effect" if fingerprint else "answered by that call's result"
    assert str(failed).startswith(f"charge('o-2') has the key of charge('o-1'), 'o': it would be {consequence}.")


def test_an_error_after_the_effect_is_convicted(colour: Colour, effects: Counter) -> None:
    def charge(order: str) -> int:
        if effects.hit() % 2:
            raise OSError("the mail server is away")
        return 1

    failed = failure(colour.define(charge, backend="local://"), [("o",)], lambda: effects.count)
    assert "raised OSError when it was called once, without any fault: the mail server is away" in str(failed)
    assert isinstance(failed.__cause__, OSError)


def test_an_error_that_comes_with_the_second_runner_alone_is_judged_by_its_effects(
    colour: Colour, effects: Counter
) -> None:
    class Refused(Exception):
        pass

    charged: set[str] = set()

    def charge(order: str) -> int:
        if order in charged:
            raise Refused
        charged.add(order)
        return effects.hit()

    charge = colour.define(charge, backend="local://")
    options: Any = {"reruns": False, "callers": 2, "lost_replies": 0}
    assert_idempotent(charge, [("o",)], lambda: effects.count, reset=charged.clear, **options)
    failed = failure(charge, [("p",)], lambda: effects.count)
    assert "what the call before it left is in its way" in str(failed) and "reset=" in str(failed)


def test_a_recorded_error_is_an_outcome_like_any_other(colour: Colour, effects: Counter) -> None:
    class Declined(Exception):
        pass

    def charge(order: str) -> int:
        raise Declined(effects.hit())

    charge = colour.define(charge, backend="local://", error_ttl={Declined: 60}, on_crash="raise")
    assert assert_idempotent(charge, [("o",)], lambda: effects.count, callers=2, crashes=0, seconds=60).complete


def test_a_function_without_any_claim_is_convicted(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects, on_outage="run", on_crash="raise")
    assert_idempotent(charge, [("o",)], lambda: effects.count, callers=2)  # as it asks for
    failed = failure(charge, [("o",)], lambda: effects.count, reruns=False)
    assert 'on_outage="run" runs it without a claim when the store is out' in str(failed)


def test_states_are_compared_where_the_world_can_be_put_back(colour: Colour) -> None:
    accounts = {"ada": 10}

    def work(name: str, cents: int) -> int:
        accounts[name] += cents
        return accounts[name]

    pay = colour.define(work, backend="local://", key="{name}", on_crash="raise")

    def reset() -> None:
        accounts["ada"] = 10

    options: Any = {"callers": 2, "expiries": 0, "seconds": 60}
    assert assert_idempotent(pay, [("ada", 5)], lambda: accounts, reset=reset, **options).complete
    rerun = colour.define(work, backend="local://", key="{name}")
    failed = failure(rerun, [("ada", 5)], lambda: accounts, reset=reset, reruns=False, callers=2)
    assert "the storm left something else than one call alone" in str(failed)
    assert "one call alone leaves {'ada': 15}" in str(failed)
    assert "{'ada': 10} before and {'ada': 20} after" in str(failed)


def test_a_probe_that_sees_nothing_proves_nothing(colour: Colour, effects: Counter) -> None:
    failed = failure(charge_of(colour, effects), [("o",)], lambda: 3)
    assert "effects() was 3 before and after charge('o'): it does not see what the function does" in str(failed)
    with pytest.raises(TypeError, match="effects\\(\\) must give a number that grows with each effect, not \\[\\]"):
        assert_idempotent(charge_of(colour, effects), [("o",)], list)
    with pytest.raises(TypeError, match="cannot be copied"):
        assert_idempotent(charge_of(colour, effects), [("o",)], lambda: (one for one in ()), reset=list)


class Table:
    """A state as pandas has it: its `==` is a table again, which is neither true nor false."""

    def __init__(self, cells: int) -> None:
        self.cells = cells

    def __eq__(self, other: object) -> Any:
        return Table(self.cells)

    def __bool__(self) -> bool:
        raise ValueError("the truth of a table is ambiguous")

    __hash__ = None  # type: ignore[assignment]


def test_states_that_do_not_compare_are_told(colour: Colour, effects: Counter) -> None:
    with pytest.raises(TypeError, match=r"effects\(\) gives .* neither true nor false.*plain values"):
        assert_idempotent(charge_of(colour, effects), [("o",)], lambda: Table(effects.count), reset=lambda: None)
    with pytest.raises(TypeError, match=r"state\(\) gives .* neither true nor false.*plain values"):
        assert_naturally_idempotent(effects.hit, [()], lambda: Table(effects.count))


@pytest.mark.parametrize("kind", [Decimal, Fraction, float])
def test_any_kind_of_number_counts_effects(colour: Colour, effects: Counter, kind: Any) -> None:
    charge = charge_of(colour, effects, on_crash="raise")
    assert assert_idempotent(charge, [("o",)], lambda: kind(effects.count), callers=2, seconds=60).complete
    rerun = charge_of(colour, effects)
    assert "grew by 2, from" in str(failure(rerun, [("o",)], lambda: kind(effects.count), reruns=False))


def test_replays_that_keep_no_result_are_no_disagreement(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects, keep_result=False, on_crash="raise")
    assert assert_idempotent(charge, [("o",)], lambda: effects.count, callers=2, seconds=60).complete


def test_a_rerun_whose_parts_are_idempotent_repeats_only_the_rest(colour: Colour, effects: Counter) -> None:
    note = idempotent(key="{order}", backend="local://")(lambda order: effects.hit())

    def charge(order: str) -> None:
        effects.hit()
        note(order)

    async def charge_async(order: str) -> None:
        charge(order)

    outer = idempotent(key="{order}", backend="local://")(charge_async if colour.is_async else charge)
    proof = assert_idempotent(outer, [("o",)], lambda: effects.count, callers=2, seconds=60)
    assert proof.complete
    assert proof.reran


def test_arguments_that_the_function_does_not_take_are_named(colour: Colour, effects: Counter) -> None:
    with pytest.raises(TypeError, match=r"charge\('o', 5, 'eur'\) cannot be called: too many positional arguments"):
        assert_idempotent(charge_of(colour, effects), [("o", 5, "eur")], lambda: effects.count)

    class Shop:
        @idempotent(key="{order}", backend="local://")
        def charge(self, order: str) -> None:
            effects.hit()

    with pytest.raises(TypeError, match="missing a required argument: 'order'"):
        assert_idempotent(Shop.charge, [("o",)], lambda: effects.count)
    assert effects.count == 0


def test_a_function_that_fails_at_times_is_told_so(effects: Counter) -> None:
    @idempotent(key="{order}", backend="local://")
    def charge(order: str) -> None:
        if effects.hit() % 2 == 0:
            raise OSError("no route")

    failed = failure(charge, [("o",)], lambda: effects.count)
    assert "raised OSError (no route) when it was called anew" in str(failed)
    assert "or it fails at times" in str(failed)


def test_limits_and_calls_are_checked(colour: Colour, effects: Counter) -> None:
    charge = charge_of(colour, effects)
    with pytest.raises(TypeError, match="at least one call"):
        assert_idempotent(charge, [], lambda: 0)
    with pytest.raises(TypeError, match=r"one argument is \('o',\)"):
        assert_idempotent(charge, ["o"], lambda: 0)  # type: ignore[list-item]
    for limits in ({"callers": 1}, {"crashes": -1}):
        with pytest.raises(ValueError, match="at least two callers"):
            assert_idempotent(charge, [("o",)], lambda: 0, **limits)
    with pytest.raises(TypeError, match="is not decorated"):
        assert_idempotent(charge.__wrapped__, [("o",)], lambda: 0)
    assert effects.count == 0


def test_a_function_within_a_callers_transaction_is_refused(colour: Colour, effects: Counter) -> None:
    work = colour.define(lambda session, order: effects.hit(), key="{order}", within="session")
    with pytest.raises(TypeError, match="in the transaction of its 'session'"):
        assert_idempotent(work, [(None, "o")], lambda: effects.count)
    assert effects.count == 0


def test_when_the_time_is_over_the_proof_is_not_complete(colour: Colour, effects: Counter) -> None:
    proof = assert_idempotent(charge_of(colour, effects), [("o",)], lambda: effects.count, seconds=0)
    assert not proof.complete
    assert "as many as there was time for" in str(proof)


def test_the_library_itself_is_on_trial(colour: Colour, effects: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs of the protocol, planted where the storm's store finds them."""
    charge = charge_of(colour, effects, on_crash="raise")
    assert_idempotent(charge, [("o",)], lambda: effects.count, callers=2)

    def takes_over_early(row: Row | None, ask: machine.Ask, now: int) -> Any:
        if row is not None and row.state is State.RUNNING and row.attempt != ask.attempt:
            row = row._replace(lease_until=now)
        return on_claim(row, ask._replace(takeover=True), now)

    def forgets_outcomes(row: Row | None, ask: machine.Ask, now: int) -> Any:
        return on_claim(None if row is not None and row.state is State.COMPLETED else row, ask, now)

    on_claim = machine.on_claim
    for planted in (takes_over_early, forgets_outcomes):
        monkeypatch.setattr(machine, "on_claim", planted)
        assert (
            "the effect happened" in (told := str(failure(charge, [("o",)], lambda: effects.count, callers=2)))
            or "had its effect again" in told
        )


def test_nothing_of_it_reaches_the_functions_own_backend(colour: Colour, effects: Counter) -> None:
    backend = LocalBackend()
    charge = charge_of(colour, effects, backend=backend)
    assert_idempotent(charge, [("o",)], lambda: effects.count, callers=2, crashes=0, expiries=0)
    assert colour.call(charge.peek, "o") is None


def test_the_body_runs_on_the_thread_of_the_test() -> None:
    db = sqlite3.connect(":memory:")  # which refuses other threads
    db.execute("CREATE TABLE charge (order_id TEXT)")

    @idempotent(backend="local://", on_crash="raise")
    def charge(order: str) -> int:
        return db.execute("INSERT INTO charge VALUES (?)", (order,)).rowcount

    def count() -> int:
        return int(db.execute("SELECT count(*) FROM charge").fetchone()[0])

    assert assert_idempotent(charge, [("o",)], count, reruns=False, seconds=60).complete
    db.close()


def test_async_probes_and_a_twin_for_async_tests(effects: Counter) -> None:
    charge = charge_of(COLOURS[1], effects)

    async def count() -> int:
        await asyncio.sleep(0)
        return effects.count

    async def main() -> None:
        with pytest.raises(RuntimeError, match="_async"):
            assert_idempotent(charge, [("o",)], count)
        assert (await assert_idempotent_async(charge, [("o",)], count, callers=2, reset=count)).storms > 100
        with pytest.raises(NotIdempotent):
            await assert_idempotent_async(charge, [("o",)], count, reruns=False)

    asyncio.run(main())
    assert isinstance(assert_idempotent(charge, [("o",)], count, callers=2, crashes=0), Proof)


def test_a_result_that_cannot_be_kept_is_told(colour: Colour, effects: Counter) -> None:
    def work() -> Any:
        effects.hit()
        return open

    failed = failure(colour.define(work, backend="local://"), [()], lambda: effects.count)
    assert "raised ResultUnavailable when it was called once" in str(failed)
    assert "give serializer= or keep_result=False" in str(failed)


def test_a_function_that_answers_each_caller_otherwise_is_convicted(colour: Colour, effects: Counter) -> None:
    class Mine:
        """A serializer that gives something else each time."""

        name = "mine"

        def dumps(self, value: Any) -> bytes:
            return b"-"

        def loads(self, data: bytes) -> Any:
            return effects.hit()

    charged: list[str] = []

    def work(order: str) -> None:
        charged.append(order)

    charge = colour.define(work, backend="local://", key="{order}", serializer=Mine())
    failed = failure(charge, [("o",)], lambda: len(charged))
    assert re.search(r"two callers got different answers: \d+ and \d+\.", str(failed))
    assert failed.storm == Storm(2)


# --------------------------------------------------------------------------------------------- undecorated functions


class World:
    """A dict, a list and a table, to be changed in every way."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def set(self, key: str, value: int) -> None:
        self.values[key] = value

    def increment(self, key: str, by: int = 1) -> None:
        self.values[key] = self.values.get(key, 0) + by

    def upsert(self, key: str, value: int) -> None:
        self.values.update({key: value})

    def add(self, key: str, value: int) -> bool:
        if key in self.values:
            return False
        self.values[key] = value
        return True

    def append(self, key: str, value: int) -> None:
        self.values.setdefault(key, []).append(value)

    def insert(self, key: str, value: int) -> None:
        if key in self.values:
            raise LookupError(f"{key} is there")
        self.values[key] = value

    def newer(self, key: str, version: int) -> None:
        self.values[key] = max(version, self.values.get(key, 0))

    def nothing(self, key: str) -> None:
        pass


@pytest.fixture
def world() -> World:
    return World()


def in_colour(colour: Colour, function: Callable[..., Any]) -> Callable[..., Any]:
    if not colour.is_async:
        return function

    async def twin(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return function(*args, **kwargs)

    twin.__name__ = function.__name__
    return twin


@pytest.mark.parametrize("with_reset", [True, False])
@pytest.mark.parametrize("name", ["set", "upsert", "add", "newer"])
def test_what_is_naturally_idempotent_passes(colour: Colour, world: World, name: str, with_reset: bool) -> None:
    reset = world.values.clear if with_reset else None
    calls: list[Any] = [("a", 1), {"key": "b", **({"version": 2} if name == "newer" else {"value": 2})}]
    assert_naturally_idempotent(in_colour(colour, getattr(world, name)), calls, state=lambda: world.values, reset=reset)


@pytest.mark.parametrize("name", ["increment", "append"])
def test_what_is_not_fails_with_the_counterexample(colour: Colour, world: World, name: str) -> None:
    with pytest.raises(NotIdempotent) as failed:
        assert_naturally_idempotent(in_colour(colour, getattr(world, name)), [("a", 5)], state=lambda: world.values)
    once, twice = ("5", "10") if name == "increment" else ("[5]", "[5, 5]")
    assert str(failed.value) == (
        f"{name} is not idempotent by itself: {name}('a', 5), called twice, leaves something else than called once.\n\n"
        f"  state(){' ' * (len(name) + 1)}     {{}}\n"
        f"  {name}('a', 5)  -> None\n"
        f"  state(){' ' * (len(name) + 1)}     {{'a': {once}}}\n"
        f"  {name}('a', 5)  -> None\n"
        f"  state(){' ' * (len(name) + 1)}     {{'a': {twice}}}\n\n"
        "What to do: set a value instead of adding to it; add only what is not there yet (a unique key, an UPSERT); or"
        " decorate it with @idempotent(key=...)."
    )


def test_a_late_duplicate_is_tried_where_it_is_asked_for(colour: Colour, world: World) -> None:
    calls: list[Any] = [("a", 1), ("a", 2)]
    state = lambda: world.values  # noqa: E731
    for name in ("add", "newer"):
        function = in_colour(colour, getattr(world, name))
        assert_naturally_idempotent(function, calls, state, reset=world.values.clear, late=True)
    function = in_colour(colour, world.set)
    assert_naturally_idempotent(function, calls, state, reset=world.values.clear)
    with pytest.raises(NotIdempotent, match="called once more, after set\\('a', 2\\), leaves something else") as failed:
        assert_naturally_idempotent(function, calls, state, reset=world.values.clear, late=True)
    assert "let a late duplicate lose" in str(failed.value)


def test_a_repeat_that_raises_fails_unless_that_error_may_refuse_it(colour: Colour, world: World) -> None:
    function = in_colour(colour, world.insert)
    options: Any = {"state": lambda: world.values, "reset": world.values.clear}
    with pytest.raises(NotIdempotent) as failed:
        assert_naturally_idempotent(function, [("a", 1)], **options)
    assert "insert('a', 1) cannot be called twice: the second call raised LookupError: a is there" in str(failed.value)
    assert "refuses=LookupError lets it pass" in str(failed.value)
    assert_naturally_idempotent(function, [("a", 1)], refuses=LookupError, **options)
    with pytest.raises(NotIdempotent):
        assert_naturally_idempotent(function, [("a", 1)], refuses=(OSError,), **options)


def test_an_error_of_the_first_call_is_the_tests_own(colour: Colour) -> None:
    def broken() -> None:
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        assert_naturally_idempotent(in_colour(colour, broken), [()], state=dict)


def test_calls_that_change_nothing_prove_nothing(colour: Colour, world: World) -> None:
    with pytest.raises(NotIdempotent, match=r"nothing was proved: none of the calls of nothing changed state\(\)"):
        assert_naturally_idempotent(in_colour(colour, world.nothing), [("a",)], state=lambda: world.values)
    world.values["a"] = 1
    with pytest.raises(NotIdempotent, match="nothing was proved"):
        assert_naturally_idempotent(in_colour(colour, world.set), [("a", 1)], state=lambda: world.values)


def test_long_states_are_cut_and_what_differs_is_named(colour: Colour, world: World) -> None:
    world.values.update({f"account {number}": number for number in range(100)})
    with pytest.raises(NotIdempotent) as failed:
        assert_naturally_idempotent(in_colour(colour, world.increment), [("account 77",)], lambda: world.values)
    assert "  different:\n  'account 77': 78, then 79\n" in str(failed.value)
    assert max(map(len, str(failed.value).splitlines())) < 260

    def touch(key: str) -> None:
        world.values[f"{key} {len(world.values)}"] = 1

    with pytest.raises(NotIdempotent, match="'b 101': absent, then 1"):
        assert_naturally_idempotent(in_colour(colour, touch), [("b",)], lambda: world.values)


def test_sql_statements_of_every_kind() -> None:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE account (id TEXT PRIMARY KEY, balance INTEGER)")

    def rows() -> list[Any]:
        return db.execute("SELECT * FROM account ORDER BY id").fetchall()

    def statement(sql: str) -> Callable[[str, int], None]:
        def execute(account: str, cents: int) -> None:
            db.execute(sql, {"id": account, "cents": cents})

        return execute

    upsert = "INSERT INTO account VALUES (:id, :cents) ON CONFLICT (id) DO UPDATE SET balance = :cents"
    for sql in (upsert, "INSERT OR IGNORE INTO account VALUES (:id, :cents)", "DELETE FROM account WHERE id = :id"):

        def reset(sql: str = sql) -> None:
            db.execute("DELETE FROM account")
            if sql.startswith("DELETE"):
                db.execute("INSERT INTO account VALUES ('ada', 1)")

        assert_naturally_idempotent(statement(sql), [("ada", 5)], rows, reset=reset)
    adding = f"{upsert.partition('SET')[0]} SET balance = balance + :cents"
    with pytest.raises(NotIdempotent, match="leaves something else than called once"):
        assert_naturally_idempotent(statement(adding), [("ada", 5)], rows)
    insert = statement("INSERT INTO account VALUES (:id, :cents)")
    db.execute("DELETE FROM account")
    assert_naturally_idempotent(insert, [("bob", 5)], rows, refuses=sqlite3.IntegrityError)
    db.close()


def test_of_long_lists_what_differs_is_named(colour: Colour) -> None:
    names = [f"name {number}" for number in range(100)]
    with pytest.raises(NotIdempotent, match="  different:\n  101: absent, then 'ada'\n"):
        assert_naturally_idempotent(in_colour(colour, names.append), [("ada",)], lambda: names)


def test_a_generator_function_runs_nothing_and_is_refused() -> None:
    def one() -> Any:
        yield 1

    async def two() -> Any:
        yield 2

    for function in (one, two):
        with pytest.raises(TypeError, match="is a generator function, and calling it runs nothing"):
            assert_naturally_idempotent(function, [()], dict)


def test_a_decorated_function_is_not_tested_so(colour: Colour, effects: Counter) -> None:
    with pytest.raises(TypeError, match="charge is decorated with @idempotent.* assert_idempotent tests it"):
        assert_naturally_idempotent(charge_of(colour, effects), [("o",)], dict)


def test_without_calls_or_with_a_state_that_cannot_be_copied_there_is_no_proof(colour: Colour, world: World) -> None:
    function = in_colour(colour, world.set)
    with pytest.raises(TypeError, match="at least one call"):
        assert_naturally_idempotent(function, [], dict)
    with pytest.raises(TypeError, match=r"state\(\) gives .* cannot be copied"):
        assert_naturally_idempotent(function, [("a", 1)], lambda: (one for one in world.values))


def test_async_states_and_the_twin_for_async_tests(world: World) -> None:
    async def state() -> dict[str, Any]:
        await asyncio.sleep(0)
        return world.values

    async def reset() -> None:
        await asyncio.sleep(0)
        world.values.clear()

    async def main() -> None:
        await assert_naturally_idempotent_async(in_colour(COLOURS[1], world.set), [("a", 1)], state, reset=reset)
        with pytest.raises(NotIdempotent):
            await assert_naturally_idempotent_async(in_colour(COLOURS[1], world.increment), [("a",)], state)
        with pytest.raises(RuntimeError, match="_async"):
            assert_naturally_idempotent(in_colour(COLOURS[1], world.set), [("a", 1)], state)

    asyncio.run(main())
    assert_naturally_idempotent(in_colour(COLOURS[1], world.set), [("b", 1)], state, reset=reset)
    with pytest.raises(TypeError, match="is async, and set is not"):
        assert_naturally_idempotent(world.set, [("a", 1)], state)
