"""`current_call().step(...)`: what a rerun does not do again, on every backend and in both colours."""

import asyncio
import collections
import functools
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from colours import COLOURS, Colour
from faulty import Faulty
from probes import Gate

from idempotent import (
    BackendUnavailable,
    CallError,
    Encrypted,
    InProgress,
    LeaseLost,
    LocalBackend,
    NotApplied,
    OutcomeUnknown,
    PickleSerializer,
    ResultUnavailable,
    StepMismatch,
    UnprotectedWarning,
    UnstableKey,
    current_call,
    idempotent,
    open_backend,
)
from idempotent import _steps as steps
from idempotent._drive import drive

ROOT = Path(__file__).parent


@dataclass
class Charge:
    order: str
    amount: Decimal


class CrashError(BaseException):
    """As Ctrl-C: treated as a crash, and told at once."""


class Shop:
    """A function of three steps, whose effects are counted, and which goes wrong where it is told to."""

    def __init__(self, colour: Colour, **options: Any) -> None:
        self.colour = colour
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: dict[str, BaseException] = {}
        self.order = ["charge", "ship", "mail"]
        self.amount = Decimal("9.90")
        self.seen: list[Any] = []
        lock = threading.Lock()

        def note(name: str) -> None:
            with lock:
                self.done[name] += 1
            if error := self.wrong.get(name):
                raise error

        def charge(order: str, amount: Decimal) -> Charge:
            note("charge")
            return Charge(order, amount)

        def ship(order: str) -> tuple[str, int]:
            note("ship")
            return order, self.done["ship"]

        def mail(order: str, subject: str = "thanks") -> None:
            note("mail")

        async def charge_async(order: str, amount: Decimal) -> Charge:
            return charge(order, amount)

        async def ship_async(order: str) -> tuple[str, int]:
            return ship(order)

        async def mail_async(order: str, subject: str = "thanks") -> None:
            mail(order, subject)

        def step_of(order: str, name: str) -> Any:
            call = current_call()
            assert call is not None
            is_async = colour.is_async
            if name == "charge":
                return call.step("charge", charge_async if is_async else charge, order, self.amount)
            if name == "ship":
                return call.step("ship", ship_async if is_async else ship, order)
            return call.step("mail", mail_async if is_async else mail, order, subject="hello")

        def between(name: str) -> None:
            if error := self.wrong.get(f"after {name}"):
                raise error

        if colour.is_async:

            async def sell_async(order: str) -> int:
                self.seen = []
                for name in self.order:
                    self.seen.append(await step_of(order, name))
                    between(name)
                return len(self.seen)

            self.sell = idempotent(key="{order}", namespace="shop", **options)(sell_async)
        else:

            def sell(order: str) -> int:
                self.seen = []
                for name in self.order:
                    self.seen.append(step_of(order, name))
                    between(name)
                return len(self.seen)

            self.sell = idempotent(key="{order}", namespace="shop", **options)(sell)

    def call(self, order: str = "o") -> Any:
        return self.colour.call(self.sell, order)

    def fail(self, where: str, error: BaseException) -> None:
        """Call, and have it fail there with `error`."""
        self.wrong = {where: error}
        with pytest.raises(type(error)):
            self.call()
        self.wrong = {}


RESULTS = [Charge("o", Decimal("9.90")), ("o", 1), None]


# ---------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("error", [ValueError("mail server"), CrashError()], ids=["error", "crash"])
def test_a_rerun_goes_on_behind_the_last_recorded_step(backend_url: str, colour: Colour, error: BaseException) -> None:
    shop = Shop(colour, backend=backend_url)
    shop.fail("after ship", error)
    assert shop.done == {"charge": 1, "ship": 1}
    shop.fail("mail", error)
    shop.call()
    assert shop.seen == RESULTS
    assert [type(value) for value in shop.seen] == [Charge, tuple, type(None)]
    assert shop.done == {"charge": 1, "ship": 1, "mail": 2}
    shop.call()
    assert shop.done == {"charge": 1, "ship": 1, "mail": 2}
    assert shop.sell.stats()["completed"] == 1


def test_steps_belong_to_their_key(backend_url: str, colour: Colour) -> None:
    shop = Shop(colour, backend=backend_url)
    shop.fail("after ship", ValueError())
    shop.call("another")
    assert shop.done == {"charge": 2, "ship": 2, "mail": 1}


def test_forget_forgets_the_steps_too(backend_url: str, colour: Colour) -> None:
    shop = Shop(colour, backend=backend_url)
    shop.fail("after ship", ValueError())
    assert shop.colour.call(shop.sell.forget, "o") is False  # the key was released
    shop.call()
    assert shop.done == {"charge": 2, "ship": 2, "mail": 1}
    assert shop.colour.call(shop.sell.forget, "o") is True
    shop.call()
    assert shop.done == {"charge": 3, "ship": 3, "mail": 2}
    assert shop.colour.call(shop.sell.forget, "o", force=True) is True


def test_steps_are_no_calls_to_those_who_list_them(backend_url: str, colour: Colour) -> None:
    shop = Shop(COLOURS[0], backend=backend_url)
    shop.call()
    backend = open_backend(backend_url).blocking()

    async def names() -> list[str]:
        return [record.key async for record in backend.scan()]

    assert drive(names()) == ["o"]


def test_a_run_after_not_applied_and_after_resolve_goes_on_behind_the_steps(backend_url: str, colour: Colour) -> None:
    shop = Shop(colour, backend=backend_url, on_crash=lambda call: NotApplied())
    shop.fail("after charge", CrashError())
    shop.call()
    assert shop.done == {"charge": 1, "ship": 1, "mail": 1}
    other = Shop(colour, backend=backend_url, on_crash="raise")
    other.wrong = {"after charge": CrashError()}
    with pytest.raises(CrashError):
        other.call("p")
    other.wrong = {}
    with pytest.raises(OutcomeUnknown):
        other.call("p")
    assert colour.call(other.sell.resolve, "p", not_applied=True)
    other.call("p")
    assert other.done == {"charge": 1, "ship": 1, "mail": 1}


@pytest.mark.parametrize(
    "serializer", [PickleSerializer(b"s" * 16), Encrypted(None, {"k": b"k" * 32})], ids=["pickle", "encrypted"]
)
def test_steps_are_kept_by_the_functions_serializer(backend_url: str, colour: Colour, serializer: Any) -> None:
    shop = Shop(colour, backend=backend_url, serializer=serializer, keep_result=False)
    shop.fail("after ship", ValueError())
    shop.call()
    assert shop.seen == RESULTS
    assert shop.done == {"charge": 1, "ship": 1, "mail": 1}


# ------------------------------------------------------------------------------------------------------------ mismatches


def test_another_order_or_other_arguments_are_refused_before_anything_is_done(backend_url: str, colour: Colour) -> None:
    shop = Shop(colour, backend=backend_url)
    shop.fail("after ship", ValueError())
    done = dict(shop.done)

    shop.order = ["mail", "charge", "ship"]
    with pytest.raises(StepMismatch, match="'mail' at place 0, where an earlier run of it began another step") as other:
        shop.call()
    assert (other.value.step, other.value.place) == ("mail", 0)

    shop.order = ["charge", "mail", "ship"]
    with pytest.raises(StepMismatch, match="'mail' at place 1"):
        shop.call()

    shop.order, shop.amount = ["charge", "ship", "mail"], Decimal(1)
    with pytest.raises(
        StepMismatch, match="'charge' at place 0, where an earlier run of it began this step with other"
    ):
        shop.call()
    assert shop.done == done

    shop.amount = Decimal("9.90")
    shop.call()
    assert shop.done == {"charge": 1, "ship": 1, "mail": 1}


def test_a_step_that_raised_is_tried_again_in_its_place(backend_url: str, colour: Colour) -> None:
    tries = [ConnectionError(), ConnectionError(), None]
    done: list[str] = []
    crash = [True]

    def charge() -> str:
        error = tries.pop(0)
        if error is not None:
            raise error
        done.append("charge")
        return "charged"

    def last() -> None:
        done.append("last")

    charge_step, last_step = both(colour, charge), both(colour, last)

    def steps() -> Iterator[Any]:
        while True:
            try:
                yield lambda call: call.step("charge", charge_step)
                break
            except ConnectionError:
                continue
        yield lambda call: call.step("last", last_step)
        if crash:
            crash.clear()
            raise CrashError

    sell = of_steps(colour, steps, backend=backend_url, namespace="retry")
    with pytest.raises(CrashError):
        colour.call(sell)
    tries.append(AssertionError("it is recorded"))
    colour.call(sell)
    assert done == ["charge", "last"]


def test_a_step_that_is_cancelled_while_its_place_is_given_back_gives_it_back_once() -> None:
    backend = LocalBackend()
    view: Any = backend.asynchronous()
    release, sent, let_go = view.release, asyncio.Event(), asyncio.Event()

    async def late(*args: Any, **kwargs: Any) -> Any:
        sent.set()
        await let_go.wait()
        return await release(*args, **kwargs)

    async def failing() -> str:
        raise ConnectionError

    async def mail() -> str:
        return "mailed"

    @idempotent(key="k", backend=backend)
    async def sell() -> str:
        call = current_call()
        assert call is not None
        view.release = late
        card = asyncio.create_task(call.step("card", failing))
        await sent.wait()
        card.cancel()
        await asyncio.sleep(0)
        first = await call.step("mail", mail)  # meanwhile: the place is not free yet
        let_go.set()
        with pytest.raises((asyncio.CancelledError, ConnectionError)):
            await card
        view.release = release
        return first + await call.step("mail", mail)

    assert asyncio.run(sell()) == "mailedmailed"


def test_steps_at_the_same_time_that_raised_are_each_tried_again_in_their_own_place() -> None:
    done: list[str] = []
    broken = [True]

    async def sell() -> None:
        call = current_call()
        assert call is not None
        mail_asked = asyncio.Event()

        async def card() -> None:
            await mail_asked.wait()
            if broken:
                raise ConnectionError
            done.append("card")

        async def mail() -> None:
            mail_asked.set()
            if broken:
                raise ConnectionError
            done.append("mail")

        first = await asyncio.gather(call.step("card", card), call.step("mail", mail), return_exceptions=True)
        if broken:
            assert [type(error) for error in first] == [ConnectionError] * 2
            broken.clear()
            await call.step("mail", mail)  # the second is tried again before the first
            await call.step("card", card)
            raise CrashError
        assert first == [None, None]

    work = idempotent(key="k", backend=LocalBackend())(sell)
    with pytest.raises(CrashError):
        asyncio.run(work())
    asyncio.run(work())
    assert done == ["mail", "card"]


def test_the_place_of_a_step_that_raised_is_free_once_its_claim_is_released() -> None:
    backend = LocalBackend()
    view = backend.asynchronous()
    release, done = view.release, []

    async def sell() -> None:
        call = current_call()
        assert call is not None
        released, other = asyncio.Event(), asyncio.Event()

        async def late(*args: Any, **options: Any) -> Any:
            released.set()
            await other.wait()
            return await release(*args, **options)

        async def card() -> None:
            raise ConnectionError

        async def mail() -> None:
            done.append("mail")

        view.release = late  # type: ignore[method-assign]
        card_step = asyncio.create_task(call.step("card", card))
        await released.wait()
        try:
            await call.step("mail", mail)
        finally:
            other.set()
        with pytest.raises(ConnectionError):
            await card_step
        view.release = release  # type: ignore[method-assign]

    asyncio.run(idempotent(key="k", backend=backend)(sell)())
    assert done == ["mail"]


def both(colour: Colour, function: Callable[..., Any]) -> Any:
    """`function` as a step of this colour."""
    if not colour.is_async:
        return function

    @functools.wraps(function)
    async def twin(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return twin


def of_steps(colour: Colour, steps: Callable[[], Iterator[Any]], **options: Any) -> Any:
    """A decorated function of this colour that does what the generator yields, and gives it what comes of it."""

    def work() -> None:
        running, send = steps(), None
        call = current_call()
        try:
            todo = next(running)
            while True:
                try:
                    send = todo(call)
                except Exception as error:
                    todo = running.throw(error)
                else:
                    todo = running.send(send)
        except StopIteration:
            return

    async def work_async() -> None:
        running = steps()
        call = current_call()
        try:
            todo = next(running)
            while True:
                try:
                    send = await todo(call)
                except Exception as error:
                    todo = running.throw(error)
                else:
                    todo = running.send(send)
        except StopIteration:
            return

    return idempotent(**options)(work_async if colour.is_async else work)


def test_steps_at_the_same_time_have_the_places_they_were_asked_for_in() -> None:
    done: list[str] = []
    fails = [True]

    async def part(name: str) -> str:
        await asyncio.sleep(0.02 if name == "a" else 0)
        done.append(name)
        return name

    @idempotent(backend="local://", namespace="gather")
    async def work() -> list[str]:
        call = current_call()
        assert call is not None
        found = await asyncio.gather(*[call.step(f"part {name}", part, name) for name in "abc"])
        if fails:
            fails.clear()
            raise ValueError
        return found

    async def main() -> None:
        with pytest.raises(ValueError):
            await work()
        assert await work() == ["a", "b", "c"]

    asyncio.run(main())
    assert sorted(done) == ["a", "b", "c"]


class Slow(Faulty):
    """Every command lets the others go first, before it is applied and after."""

    def _view(self, colour: str, inner: Any) -> Any:
        slow = Slow(inner)
        slow.calls = [colour]
        return slow

    async def _pause(self) -> None:
        if self.calls[0] == "blocking":
            time.sleep(random.random() / 1000)
        for _ in range(random.randrange(4) if self.calls[0] != "blocking" else 0):
            await asyncio.sleep(0)

    async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        await self._pause()
        found = await super()._do(operation, *args, **kwargs)
        await self._pause()
        return found


def test_the_first_steps_may_be_asked_for_at_the_same_time() -> None:
    """They make the journal that all of them are found by: one of them makes it, and the others wait for that."""
    done: list[int] = []

    async def part(number: int) -> int:
        done.append(number)
        return number

    @idempotent(backend=Slow(open_backend("local://")), key="{order}")
    async def work(order: int, fails: list[bool]) -> list[int]:
        call = current_call()
        assert call is not None
        found = await asyncio.gather(*[call.step("part", part, number) for number in range(4)])
        if fails.pop():
            raise ValueError
        return found

    async def main() -> None:
        for order in range(20):
            done.clear()
            fails = [False, True]
            with pytest.raises(ValueError):
                await work.with_key(str(order))(0, fails)
            assert await work.with_key(str(order))(0, fails) == [0, 1, 2, 3]
            assert sorted(done) == [0, 1, 2, 3]

    asyncio.run(main())


def test_steps_of_several_threads_have_a_place_each() -> None:
    places: list[int] = []
    lock = threading.Lock()

    def part() -> None:
        with lock:
            places.append(0)

    @idempotent(backend=Slow(open_backend("local://")), key="{order}")
    def work(order: int, fails: list[bool]) -> None:
        call, barrier = current_call(), threading.Barrier(4)
        assert call is not None

        def go(_: int) -> None:
            barrier.wait()
            call.step("part", part)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(go, range(4)))
        if fails.pop():
            raise ValueError

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for order in range(30):
            places.clear()
            fails = [False, True]
            with pytest.raises(ValueError):
                work.with_key(str(order))(0, fails)
            work.with_key(str(order))(0, fails)
            assert len(places) == 4
    finally:
        sys.setswitchinterval(before)


def test_a_step_inside_a_step_is_refused_as_its_place_would_be_anothers_in_the_next_run(colour: Colour) -> None:
    done: list[str] = []
    if colour.is_async:

        async def inner() -> None:
            done.append("inner")

        async def outer() -> None:
            await current_call().step("inner", inner)

    else:

        def inner() -> None:
            done.append("inner")

        def outer() -> None:
            current_call().step("inner", inner)

    after = both(colour, lambda: done.append("next"))

    def steps() -> Iterator[Any]:
        with pytest.raises(CallError, match="'inner' is asked for inside the step 'outer'"):
            yield lambda call: call.step("outer", outer)
        yield lambda call: call.step("next", after)

    colour.call(of_steps(colour, steps, backend="local://", namespace="nested"))
    assert done == ["next"]


def test_a_decorated_function_inside_a_step_has_steps_of_its_own(colour: Colour) -> None:
    done: list[str] = []
    part = both(colour, lambda: done.append("part"))

    def inner_steps() -> Iterator[Any]:
        yield lambda call: call.step("part", part)

    inner = of_steps(colour, inner_steps, backend="local://", namespace="inner of a step")

    def steps() -> Iterator[Any]:
        yield lambda call: call.step("outer", inner)
        yield lambda call: call.step("part", part)

    colour.call(of_steps(colour, steps, backend="local://", namespace="outer of a step"))
    assert done == ["part", "part"]


# ---------------------------------------------------------------------------------------------------- crashes and outages


def test_a_worker_that_is_killed_at_any_moment_is_resumed_by_another(
    shared_backend_url: str, colour: Colour, tmp_path: Path
) -> None:
    from steps_worker import MOMENTS, STEPS, define

    (tmp_path / "effects").mkdir()
    setup = {"url": shared_backend_url, "colour": colour.name, "directory": str(tmp_path / "effects")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "steps_worker.py"), json.dumps(setup)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    sell = define(setup)
    answers = [colour.start(sell, moment) for moment in MOMENTS]
    for moment, answer in zip(MOMENTS, answers, strict=True):
        assert answer.result(60) == [f"{step} {moment}" for step in STEPS]
        effects = (tmp_path / "effects" / moment).read_text().split()
        # What was recorded was done once; the step that the worker died in, before its record, is done again.
        twice = [step for step in STEPS if moment == f"inside {step}"]
        assert effects == sorted([*STEPS, *twice], key=STEPS.index), moment
    assert sell.stats()["taken_over"] == len(MOMENTS)


def test_a_run_that_was_overtaken_records_no_step_over_its_successors(
    backend_url: str, colour: Colour, gate: Gate
) -> None:
    Shop(colour, backend=backend_url).call()  # makes the table: that may take as long as the short lease
    late = Faulty(open_backend(backend_url))
    late.plant("renew", "before", times=10_000)  # its heartbeat reaches nobody
    successor = Gate()
    behind: list[str] = []

    def define(backend: Any, who: str, its: Gate) -> Any:
        def step() -> str:
            its.pass_through()
            return who

        if colour.is_async:

            async def step_async() -> str:
                return await asyncio.to_thread(step)

            @idempotent(backend=backend, namespace="overtaken", lease=0.5)
            async def work_async() -> str:
                found = await current_call().step("only", step_async)
                behind.append(who)
                return found

            return work_async

        @idempotent(backend=backend, namespace="overtaken", lease=0.5)
        def work() -> str:
            found = current_call().step("only", step)
            behind.append(who)
            return found

        return work

    first = colour.start(define(late, "late", gate))
    assert gate.entered.wait(30)
    second = colour.start(define(Faulty(open_backend(backend_url)), "successor", successor))
    assert successor.entered.wait(30)
    late.faults.clear()
    gate.opened.set()
    with pytest.raises(LeaseLost):
        first.result(30)
    successor.opened.set()
    assert second.result(30) == "successor"
    assert behind == ["successor"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_reply_that_is_lost_changes_nothing(backend_url: str, colour: Colour, when: Any) -> None:
    backend = Faulty(open_backend(backend_url))
    shop = Shop(colour, backend=backend)
    backend.plant("complete", when, times=3)
    shop.fail("after ship", ValueError())
    shop.call()
    assert shop.done == {"charge": 1, "ship": 1, "mail": 1}


def test_a_step_that_cannot_be_recorded_is_done_all_the_same_and_said_so(backend_url: str, colour: Colour) -> None:
    backend = Faulty(open_backend(backend_url))
    shop = Shop(colour, backend=backend, lease=1)
    shop.order = ["charge"]
    shop.fail("after charge", ValueError())  # makes the journal and the first step
    shop.order = ["charge", "ship"]
    backend.plant("complete", "before", times=10_000)
    backend.plant("renew", "before", times=10_000)
    with pytest.raises((LeaseLost, ValueError)):
        shop.wrong = {"after ship": ValueError()}
        shop.call()
    assert shop.sell.stats()["not_stored"] == 1
    assert shop.done == {"charge": 1, "ship": 1}


def test_a_step_that_cannot_be_claimed_is_not_done(backend_url: str, colour: Colour) -> None:
    backend = Faulty(open_backend(backend_url))
    shop = Shop(colour, backend=backend)
    shop.fail("after charge", ValueError())

    original = Faulty._do

    async def claim_fails(self: Faulty, operation: str, *args: Any, **kwargs: Any) -> Any:
        if operation == "claim" and args[0].space == "s" and args[0].key.endswith(":1"):
            raise BackendUnavailable("out")
        return await original(self, operation, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Faulty, "_do", claim_fails)
        with pytest.raises(BackendUnavailable):
            shop.call()
        assert shop.done == {"charge": 1}
        open_shop = Shop(colour, backend=backend, on_outage="run")
        with pytest.warns(UnprotectedWarning, match="the step 'ship'"):
            open_shop.call()
        assert open_shop.seen == RESULTS
        assert open_shop.done == {"ship": 1, "mail": 1}


def test_a_result_that_cannot_be_kept_is_not_made_twice(backend_url: str, colour: Colour) -> None:
    done: list[int] = []

    def make() -> Any:
        done.append(1)
        return threading.Lock()

    make_step = both(colour, make)

    def steps() -> Iterator[Any]:
        yield lambda call: call.step("make", make_step)

    work = of_steps(colour, steps, backend=backend_url, namespace="unkept")
    for _ in range(2):
        with pytest.raises(ResultUnavailable):
            colour.call(work)
    assert len(done) == 1


# ----------------------------------------------------------------------------------------------------------- wrong usage


def test_a_step_has_the_colour_of_its_function(colour: Colour) -> None:
    wrong = both(COLOURS[0] if colour.is_async else COLOURS[1], lambda: None)

    def steps() -> Iterator[Any]:
        yield lambda call: call.step("wrong", wrong)

    with pytest.raises(TypeError, match="async function"):
        colour.call(of_steps(colour, steps, backend="local://", namespace="wrong"))


def test_an_async_function_behind_a_sync_step_is_refused_and_nothing_is_recorded() -> None:
    async def charge() -> str:
        return "charged"

    parts: list[Callable[[], Any]] = [lambda: charge(), lambda: "charged"]

    @idempotent(backend="local://", namespace="behind")
    def work() -> Any:
        return current_call().step("charge", parts.pop(0))

    with pytest.raises(TypeError, match="the step 'charge' .*has not run, and nothing was recorded"):
        work()
    assert work() == "charged"


def test_wrong_steps_are_refused() -> None:
    kept: list[Any] = []
    errors: list[Exception] = []

    def attempt(*args: Any) -> None:
        try:
            current_call().step(*args)
        except (TypeError, CallError) as error:
            errors.append(error)

    @idempotent(backend="local://", namespace="refused")
    def work() -> None:
        kept.append(current_call())
        attempt("", print)
        attempt(5, print)
        attempt("open", print, object())

    work()
    assert [type(error) for error in errors] == [TypeError, TypeError, UnstableKey]
    assert "an argument of the step 'open'" in str(errors[2])
    with pytest.raises(CallError, match="too late"):
        kept[0].step("late", print)


def test_in_virtual_time_there_are_no_steps_and_it_says_so() -> None:
    from idempotent.testing import NotIdempotent, assert_idempotent

    @idempotent(backend="local://", namespace="virtual")
    def work() -> None:
        current_call().step("print", print)

    with pytest.raises(NotIdempotent, match="cannot be played in virtual time"):
        assert_idempotent(work, [()], lambda: 0)


def test_a_probe_has_no_steps() -> None:
    def probe(call: Any) -> Any:
        call.step("look", print)

    @idempotent(backend="local://", namespace="probe", on_crash=probe)
    def work() -> None:
        raise CrashError

    with pytest.raises(CrashError):
        work()
    with pytest.raises(CallError, match="a probe has no steps"):
        work()


def test_a_record_within_a_transaction_has_no_steps(tmp_path: Path) -> None:
    import sqlalchemy as sa

    @idempotent(within="session")
    def work(session: Any) -> None:
        current_call().step("charge", print)

    with sa.create_engine(f"sqlite:///{tmp_path}/x.db").connect() as connection:
        with pytest.raises(CallError, match="within a transaction has no steps"):
            work(connection)
    connection.engine.dispose()


def test_what_has_no_stable_form_comes_by_a_partial() -> None:
    client = object()
    done: list[Any] = []

    def charge(client: object, order: str) -> str:
        done.append(client)
        return order

    @idempotent(backend="local://", namespace="partial")
    def work(fails: bool) -> str:
        found = current_call().step("charge", functools.partial(charge, client), "o")
        if len(done) == 1 and not again:
            again.append(1)
            raise ValueError
        return found

    again: list[int] = []
    with pytest.raises(ValueError):
        work(True)
    assert work(True) == "o"
    assert done == [client]


def test_tasks_that_start_the_next_one_from_a_step_for_ever_keep_few_steps_alive() -> None:
    started = 0
    finished: list[asyncio.Event] = []

    @idempotent(key="{number}", namespace="chain", backend="local://")
    async def work(number: int) -> None:
        call = current_call()
        assert call is not None
        await call.step("next", start, number)

    async def start(number: int) -> None:
        nonlocal started
        started += 1
        if number < 60:  # a task inherits the context that it is made in, and with it the step
            tasks.add(task := asyncio.ensure_future(after(number)))
            task.add_done_callback(tasks.discard)
        else:
            finished[0].set()

    async def after(number: int) -> None:
        await ended[number].wait()
        await work(number + 1)
        ended[number + 1].set()

    tasks: set[Any] = set()
    ended: dict[int, asyncio.Event] = collections.defaultdict(asyncio.Event)

    async def main() -> int:
        finished.append(asyncio.Event())
        await work(0)
        ended[0].set()
        await finished[0].wait()
        gc.collect()
        found = [each for each in gc.get_objects() if type(each) is steps.Step]
        return sum(each.parent.rid.namespace == "chain" for each in found)

    assert asyncio.run(main()) <= 5
    assert started == 61


def test_past_the_ttl_of_the_function_a_step_runs_again(backend_url: str, colour: Colour) -> None:
    shop = Shop(colour, backend=backend_url, ttl=0.001)
    deadline = time.monotonic() + 30
    while shop.done["charge"] < 3 and time.monotonic() < deadline:
        shop.fail("after charge", ConnectionError())
    assert shop.done == {"charge": 3}


def test_a_call_that_raises_keeps_its_key_until_its_last_step_has_ended(backend_url: str) -> None:
    """`asyncio.gather` leaves the others running when one raises: a rerun beside them would do their work twice."""
    done: list[str] = []
    fails = [True]

    async def main() -> None:
        entered, opened, raised = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def mail() -> None:
            await entered.wait()
            if fails:
                raised.set()
                raise ConnectionError

        async def charge() -> str:
            entered.set()
            await opened.wait()
            done.append("charge")
            return "charged"

        @idempotent(backend=backend_url, namespace="gathered", wait=0)
        async def work() -> str:
            call = current_call()
            assert call is not None
            _, found = await asyncio.gather(call.step("mail", mail), call.step("charge", charge))
            return found

        first = asyncio.create_task(work())
        await entered.wait()
        with pytest.raises(InProgress):
            await work()
        await raised.wait()
        await asyncio.wait([first], timeout=0.1)  # so much time it would have to let others in
        assert not first.done()
        with pytest.raises(InProgress):
            await work()
        opened.set()
        with pytest.raises(ConnectionError):
            await first
        fails.clear()
        assert await work() == "charged"

    asyncio.run(main())
    assert done == ["charge"]


def test_a_call_that_raises_waits_for_the_steps_of_its_threads(backend_url: str) -> None:
    done: list[str] = []
    gate = Gate()
    others: list[threading.Thread] = []
    raised = threading.Event()

    def charge() -> str:
        if not done:
            gate.pass_through()
        done.append("charge")
        return "charged"

    @idempotent(backend=backend_url, namespace="threads", wait=0)
    def work() -> str:
        call = current_call()
        assert call is not None
        if others:
            return call.step("charge", charge)
        others.append(threading.Thread(target=lambda: call.step("charge", charge)))
        others[0].start()
        assert gate.entered.wait(30)
        raised.set()
        raise ConnectionError

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(work)
        assert raised.wait(30)
        wait([first], timeout=0.1)  # so much time it would have to let others in
        assert not first.done()
        with pytest.raises(InProgress):
            work()
        gate.opened.set()
        with pytest.raises(ConnectionError):
            first.result(30)
    others[0].join(30)
    assert work() == "charged"
    assert done == ["charge"]


@pytest.mark.parametrize(("on_crash", "refused"), [("rerun", InProgress), ("raise", OutcomeUnknown)])
def test_a_call_that_is_cancelled_while_it_waits_for_a_step_leaves_its_key_as_a_crash_does(
    on_crash: Any, refused: type[Exception]
) -> None:
    async def main() -> None:
        entered, opened, raised = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def charge() -> None:
            entered.set()
            await opened.wait()

        @idempotent(backend="local://", namespace=f"left {on_crash}", wait=0, on_crash=on_crash)
        async def work() -> None:
            call = current_call()
            assert call is not None
            others.append(asyncio.create_task(call.step("charge", charge)))
            await entered.wait()
            raised.set()
            raise ConnectionError

        others: list[asyncio.Task[None]] = []
        first = asyncio.create_task(work())
        await raised.wait()
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not others[0].done()
        with pytest.raises(refused):
            await work()
        opened.set()
        await others[0]

    asyncio.run(main())


def test_a_step_that_had_not_begun_when_its_call_ended_is_refused() -> None:
    done: list[str] = []

    async def charge() -> None:
        done.append("charge")

    kept: list[Any] = []

    @idempotent(backend="local://", namespace="not begun")
    async def work() -> None:
        call = current_call()
        assert call is not None
        kept.append(call.step("charge", charge))

    async def main() -> None:
        await work()
        with pytest.raises(CallError, match="too late"):
            await kept[0]

    asyncio.run(main())
    assert not done


def test_a_step_whose_call_ends_while_it_is_claimed_is_not_done() -> None:
    done: list[str] = []

    async def charge() -> None:
        done.append("charge")

    class Held(Slow):
        """Holds the claim of a step, once it is applied."""

        async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
            found = await super()._do(operation, *args, **kwargs)
            if operation == "claim" and args[0].space == "s" and args[0].key:
                claimed.set()
                await opened.wait()
            return found

        def _view(self, colour: str, inner: Any) -> Any:
            held = Held(inner)
            held.calls = [colour]
            return held

    claimed, opened = asyncio.Event(), asyncio.Event()
    late: list[Any] = []

    @idempotent(backend=Held(open_backend("local://")), namespace="claimed")
    async def work() -> None:
        call = current_call()
        assert call is not None
        late.append(asyncio.ensure_future(call.step("charge", charge)))
        await claimed.wait()

    async def main() -> None:
        await work()
        opened.set()
        with pytest.raises(CallError, match="too late"):
            await late[0]

    asyncio.run(main())
    assert not done


@pytest.mark.parametrize("crash", [False, True], ids=["error", "crash"])
def test_sync_code_in_a_thread_of_an_async_call_has_sync_steps(backend_url: str, crash: bool) -> None:
    """As an endpoint of FastAPI that is no async function, and what `asyncio.to_thread` runs."""
    done: list[str] = []
    wrong: list[BaseException] = [CrashError() if crash else ValueError("mail server")]

    def charge(order: str) -> Charge:
        done.append("charge")
        return Charge(order, Decimal(5))

    def note(name: str) -> None:
        done.append(name)
        if name == "mail" and wrong:
            raise wrong.pop()

    async def never(name: str) -> None: ...

    def sell(order: str) -> Charge:
        call = current_call()
        assert call is not None
        receipt = call.step("charge", charge, order)
        if wrong:  # it gives its place back
            with pytest.raises(TypeError, match="has not run, and nothing was recorded"):
                call.step("ship", lambda name: never(name), "ship")
        call.step("ship", note, "ship")
        call.step("mail", note, "mail")
        return receipt

    @idempotent(key="{order}", namespace="thread", backend=backend_url)
    async def work(order: str) -> Charge:
        return await asyncio.to_thread(sell, order)

    async def main() -> None:
        with pytest.raises((CrashError, ValueError)):
            await work("o")
        assert await work("o") == Charge("o", Decimal(5))

    asyncio.run(main())
    assert done == ["charge", "ship", "mail", "mail"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_step_of_a_thread_whose_loop_is_closed_meanwhile_says_so_and_hides_no_error(
    fails: bool, gate: Gate
) -> None:
    told: list[Exception] = []

    def charge() -> None:
        gate.pass_through()
        if fails:
            raise ConnectionError

    def go(call: Any) -> None:
        try:
            call.step("charge", charge)
        except Exception as error:
            told.append(error)

    @idempotent(namespace=f"closed {fails}", backend="local://")
    async def work() -> None:
        threads.append(threading.Thread(target=go, args=(current_call(),)))
        threads[0].start()
        while not gate.entered.is_set():
            await asyncio.sleep(0)
        raise CrashError

    threads: list[threading.Thread] = []
    with pytest.raises(CrashError):
        asyncio.run(work())
    gate.opened.set()
    threads[0].join(30)
    (error,) = told
    assert isinstance(error, ConnectionError if fails else CallError)
    assert fails or "the loop of its call is closed" in str(error)


def test_the_step_of_a_thread_without_a_backend_runs_where_that_was_asked_for() -> None:
    backend = Faulty(open_backend("local://"))
    backend.plant("claim", "before", times=10_000)

    @idempotent(namespace="out", backend=backend, on_outage="run")
    async def work() -> str:
        call = current_call()
        assert call is not None
        return await asyncio.to_thread(call.step, "charge", str, 5)

    with pytest.warns(UnprotectedWarning):
        assert asyncio.run(work()) == "5"
