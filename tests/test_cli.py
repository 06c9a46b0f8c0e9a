"""The command line: what an operator sees, names and settles, and how each command ends."""

import dataclasses
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from servers import Address, Server

from idempotent import (
    Compressed,
    OutcomeUnknown,
    ResultUnavailable,
    configure,
    current_call,
    idempotent,
    open_backend,
)
from idempotent._drive import drive
from idempotent._record import STEPS, Granted, RecordId
from idempotent.backends import _statements
from idempotent.cli import forget
from idempotent.cli.console import plain, span
from idempotent.cli.main import main
from idempotent.cli.store import censored, shown
from idempotent.http import GLOBAL
from idempotent.http._rules import record_key

ROOT = Path(__file__).parent.parent
ATTEMPT = b"attemptA"


class Done(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process, where there is no terminal."""
    monkeypatch.delenv("IDEMPOTENT_URL", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*words: str) -> Done:
        capsys.readouterr()
        try:
            code = main(list(words))
        except SystemExit as stopped:  # argparse
            assert isinstance(stopped.code, int)
            code = stopped.code
        return Done(code, *capsys.readouterr())

    return run


def digest(key: str, namespace: str = "shop.charge") -> str:
    return RecordId(namespace, key).digest


class DeclinedError(Exception):
    pass


class NoFundsError(DeclinedError):
    pass


@dataclasses.dataclass
class Receipt:
    order: str
    amount: Decimal
    note: str = ""


def shop(url: str, **options: Any) -> Any:
    """A function whose results and errors are secrets."""

    def charge(order: str, fails: bool = False) -> Receipt:
        if fails:
            raise DeclinedError("SECRET reason")
        return Receipt(order, Decimal("9.90"), "SECRET note")

    given = {"namespace": "shop.charge", "key": "{order}", "error_ttl": {DeclinedError: 60}} | options
    return idempotent(backend=url, **given)(charge)


def claim(url: str, key: str, lease: float = 30.0, namespace: str = "shop.charge") -> int:
    """Claim as a process would that may then die; the token."""
    backend = open_backend(url).blocking()
    rid = RecordId(namespace, key)
    reply = drive(backend.claim(rid, attempt=ATTEMPT, fingerprint=b"", lease=lease, keep=None, takeover=False))
    assert isinstance(reply, Granted)
    return reply.token


def die(url: str, key: str, namespace: str = "shop.charge") -> None:
    """Leave an unknown record."""
    token, backend = claim(url, key, namespace=namespace), open_backend(url).blocking()
    drive(backend.release(RecordId(namespace, key), attempt=ATTEMPT, token=token, unknown=True))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/idempotent.db"


# --------------------------------------------------------------------------------------------------- list and show


def test_records_are_listed_shown_and_forgotten_on_every_backend(shared_backend_url: str, cli: Cli) -> None:
    url = shared_backend_url
    charge = shop(url)
    charge("o-1")
    with pytest.raises(DeclinedError):
        charge("o-2", fails=True)
    die(url, "o-3")
    claim(url, "o-4")
    shop(url, namespace="other")("o-1")

    done = cli("list", url)
    assert (done.code, done.err) == (0, "")
    titles, *lines = done.out.splitlines()
    assert titles.split() == ["STATE", "AGE", "KEPT", "FOR", "DIGEST", "NAMESPACE", "KEY"]
    rows = sorted((line.split()[0], line.split()[-1], line.split()[-2], line.split()[-3]) for line in lines)
    assert rows == sorted(
        [
            ("completed", "o-1", "shop.charge", digest("o-1")[:12]),
            ("failed", "o-2", "shop.charge", digest("o-2")[:12]),
            ("unknown", "o-3", "shop.charge", digest("o-3")[:12]),
            ("running", "o-4", "shop.charge", digest("o-4")[:12]),
            ("completed", "o-1", "other", digest("o-1", "other")[:12]),
        ]
    )
    records = json.loads(cli("list", url, "--json").out)
    assert sorted(record["digest"] for record in records) == sorted(
        [*(digest(f"o-{number}") for number in (1, 2, 3, 4)), digest("o-1", "other")]
    )
    (unknown,) = json.loads(cli("list", url, "--json", "--state", "unknown").out)
    assert (unknown["key"], unknown["expires_in"]) == ("o-3", None)
    (other,) = json.loads(cli("list", url, "--json", "--namespace", "other").out)
    assert other["digest"] == digest("o-1", "other")

    for words in ([digest("o-2")], [digest("o-2")[:6].upper()], ["o-2"], ["o-2", "--namespace", "shop.charge"]):
        done = cli("show", url, *words)
        assert (done.code, done.err) == (0, ""), words
        assert f"digest       {digest('o-2')}" in done.out.splitlines()
        assert "state        failed (for" in done.out

    done = cli("forget", url, "o-2", "--yes")
    assert (done.code, done.err) == (0, "")
    assert done.out == "forgotten: shop.charge o-2; the next call runs\n"
    assert charge.with_key("o-2").peek() is None
    assert charge.with_key("o-1").peek() is not None

    done = cli("show", url, "o-1")
    assert (done.code, done.out) == (1, "")
    assert digest("o-1") in done.err
    assert digest("o-1", "other") in done.err
    done = cli("show", url, "o-2")
    assert (done.code, done.out) == (1, "")
    assert "`idempotent list` shows what there is" in done.err
    done = cli("show", url, "o-2", "--namespace", "shop.charge")
    assert (done.code, done.out) == (1, "")


def test_no_command_prints_a_payload_that_was_not_asked_for(shared_backend_url: str, cli: Cli) -> None:
    url = shared_backend_url
    charge = shop(url)
    charge("o-1")
    with pytest.raises(DeclinedError):
        charge("o-2", fails=True)
    for words in (["list"], ["list", "--json"]):
        assert "SECRET" not in "".join(map(str, cli(words[0], url, *words[1:])))
    for key in ("o-1", "o-2"):
        for words in ([], ["--json"]):
            assert "SECRET" not in "".join(map(str, cli("show", url, key, *words)))
    assert '"note":"SECRET note"' in cli("show", url, "o-1", "--payload").out
    assert "SECRET reason" in cli("show", url, "o-2", "--payload").out
    assert json.loads(json.loads(cli("show", url, "o-1", "--payload", "--json").out)["payload"])["order"] == "o-1"
    assert charge.outcome("o-1").replayed  # looking at it changed nothing
    claim(url, "o-3")
    done = cli("show", url, "o-3", "--payload")
    assert (done.code, "none: there is no outcome yet" in done.out) == (0, True)
    assert charge.with_key("o-3").peek().attempt == ATTEMPT.hex()
    assert json.loads(cli("show", url, "o-3", "--payload", "--json").out)["payload"] is None


def test_a_payload_that_is_no_text_is_printed_as_base64(sqlite_url: str, cli: Cli) -> None:
    class Bytes:
        def dumps(self, value: Any) -> bytes:
            return b"\xff\xfe"

        def loads(self, data: bytes) -> Any:
            return "x"

    @idempotent(backend=sqlite_url, namespace="n", key="k", serializer=Bytes())
    def work() -> Any:
        return "x"

    work()
    assert "payload      base64 //4=" in cli("show", sqlite_url, "k", "--payload").out
    assert json.loads(cli("show", sqlite_url, "k", "--payload", "--json").out)["payload_base64"] == "//4="


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Put the clock of SQLite's records on by so many seconds."""
    real, shift = time.time_ns, [0.0]

    class Shifted(ModuleType):
        time_ns = staticmethod(lambda: real() + int(shift[0] * 1e9))

    monkeypatch.setattr(_statements, "time", Shifted("time"))

    def put_on(seconds: float) -> None:
        shift[0] += seconds

    return put_on


@pytest.mark.parametrize(
    ("age", "listed"),
    [("0", ["o-1", "o-2"]), ("3500", ["o-1"]), ("59m", ["o-1"]), ("0.9h", ["o-1"]), ("1d", []), ("3700s", [])],
)
def test_older_than_leaves_out_what_is_younger(
    age: str, listed: list[str], sqlite_url: str, cli: Cli, clock: Callable[[float], None]
) -> None:
    charge = shop(sqlite_url)
    charge("o-1")
    clock(3600)
    charge("o-2")
    done = cli("list", sqlite_url, "--older-than", age, "--json")
    assert sorted(record["key"] for record in json.loads(done.out)) == listed


def test_an_empty_list_says_so(sqlite_url: str, cli: Cli) -> None:
    shop(sqlite_url)("o-1")
    assert cli("list", sqlite_url, "--state", "unknown") == Done(0, "no records\n", "")
    assert cli("list", sqlite_url, "--state", "unknown", "--json") == Done(0, "[\n]\n", "")


def test_a_runner_whose_lease_is_over_is_told_from_one_that_lives(
    sqlite_url: str, cli: Cli, clock: Callable[[float], None]
) -> None:
    claim(sqlite_url, "o-1", lease=30)
    shown = cli("show", sqlite_url, "o-1").out
    assert "state        running (for" in shown
    assert "resolve" not in shown
    clock(630)
    assert "running, lease over for 10 min" in cli("list", sqlite_url).out
    shown = cli("show", sqlite_url, "o-1").out
    assert "Its runner died" in shown
    assert f"idempotent resolve URL {digest('o-1')[:12]} --not-applied" in shown
    assert "--function MODULE:NAME --result JSON" in shown


@pytest.mark.parametrize("who", ["alice", "a:b", GLOBAL])
def test_what_show_advises_for_a_request_is_what_can_be_done(who: Any, sqlite_url: str, cli: Cli) -> None:
    key = record_key(who, "k-123")
    die(sqlite_url, key, namespace="http")
    named = digest(key, "http")[:12]  # "-:k-123" would be an option
    shown = cli("show", sqlite_url, named).out
    assert "--function" not in shown
    assert "undo that first" in shown
    assert cli("resolve", sqlite_url, named, "--not-applied", "--yes").code == 0


@pytest.mark.parametrize("words", [["--payload", "o-1"], ["--namespace", "shop.charge", "o-1", "--json"]], ids=str)
def test_options_may_stand_between_the_url_and_the_record(words: list[str], sqlite_url: str, cli: Cli) -> None:
    shop(sqlite_url)("o-1")
    done = cli("show", sqlite_url, *words)
    assert (done.code, done.err) == (0, "")
    assert digest("o-1") in done.out
    assert cli("show", sqlite_url, "--paylod", "o-1").code == cli("show", sqlite_url, "--json", "o-1", "o-2").code == 2


def test_a_record_that_a_scan_finds_twice_is_one(sqlite_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Redis' SCAN may while its table grows, or a slot moves."""
    shop(sqlite_url)("o-1")
    kind: Any = type(open_backend(sqlite_url))
    scan = kind.scan

    async def twice(self: Any, **options: Any) -> Any:
        for _ in range(2):
            async for record in scan(self, **options):
                yield record

    monkeypatch.setattr(kind, "scan", twice)
    assert cli("show", sqlite_url, "o-1").code == 0
    assert len(json.loads(cli("list", sqlite_url, "--json").out)) == 1


def test_a_key_cannot_steer_the_terminal() -> None:
    assert plain("a\x1b[31mb\u202ec") == "a\\x1b[31mb\\u202ec"
    assert plain("Kéy 42 ✓") == "Kéy 42 ✓"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172800, "2 d")],
)
def test_durations_are_said_in_the_unit_that_fits(seconds: float, said: str) -> None:
    assert span(seconds) == said


# ---------------------------------------------------------------------------------------------------------- forget


def test_a_record_is_forgotten_with_its_steps(sqlite_url: str, cli: Cli) -> None:
    done: list[str] = []

    @idempotent(backend=sqlite_url, namespace="n", key="{order}")
    def sell(order: str) -> str:
        return current_call().step("charge", lambda: done.append("charge") or "receipt")  # type: ignore[union-attr,func-returns-value]

    sell("o-1")
    journal = RecordId(RecordId("n", "o-1").text, "", STEPS)
    backend = open_backend(sqlite_url).blocking()
    assert drive(backend.read(journal)) is not None
    assert cli("forget", sqlite_url, "o-1", "--yes").code == 0
    assert drive(backend.read(journal)) is None
    sell("o-1")
    assert done == ["charge", "charge"]


def test_nothing_is_destroyed_without_a_yes(sqlite_url: str, cli: Cli) -> None:
    charge = shop(sqlite_url)
    charge("o-1")
    die(sqlite_url, "o-2")
    for words in (["forget", "o-1"], ["resolve", "o-2", "--not-applied"]):
        done = cli(words[0], sqlite_url, *words[1:])
        assert (done.code, done.out) == (1, "")
        assert "--yes" in done.err
    assert charge.with_key("o-1").peek().state == "completed"
    assert charge.with_key("o-2").peek().state == "unknown"


@pytest.mark.parametrize(
    ("answer", "code", "left"), [("y", 0, False), ("yes", 0, False), ("n", 1, True), ("", 1, True)]
)
def test_at_a_terminal_it_asks(answer: str, code: int, left: bool, sqlite_url: str) -> None:
    charge = shop(sqlite_url)
    charge("o-1")
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    command = [sys.executable, "-m", "idempotent", "forget", sqlite_url, "o-1"]
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, cwd=ROOT, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("Forget the completed record of shop.charge o-1")
    assert ("nothing was changed" in done.stderr) == left
    assert (charge.with_key("o-1").peek() is not None) == left


@pytest.mark.parametrize("options", [[], ["--force"]], ids=str)
def test_an_outcome_that_comes_while_it_asks_is_not_forgotten(
    options: list[str], sqlite_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    charge = shop(sqlite_url)
    die(sqlite_url, "o-1")
    monkeypatch.setattr(forget, "confirm", lambda *_, **__: charge.resolve("o-1", result=RECEIPT))
    done = cli("forget", sqlite_url, "o-1", *options)
    assert (done.code, done.out) == (1, "")
    assert "was unknown and is completed" in done.err
    assert charge.outcome("o-1").replayed


def test_a_running_record_is_forgotten_by_force_alone(sqlite_url: str, cli: Cli) -> None:
    claim(sqlite_url, "o-1")
    done = cli("forget", sqlite_url, "o-1", "--yes")
    assert (done.code, done.out) == (1, "")
    assert "--force" in done.err
    assert shop(sqlite_url).with_key("o-1").peek() is not None
    done = cli("forget", sqlite_url, "o-1", "--yes", "--force", "--json")
    assert (done.code, json.loads(done.out)["digest"]) == (0, digest("o-1"))
    assert shop(sqlite_url).with_key("o-1").peek() is None


# --------------------------------------------------------------------------------------------------------- resolve


@pytest.fixture
def functions(shared_backend_url: str, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, str]:
    """A module of decorated functions that name no backend, and the URL of one."""
    return _module(monkeypatch), shared_backend_url


def _module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("shop_functions")
    options: dict[str, Any] = {"key": "{order}", "on_crash": "raise"}

    @idempotent(namespace="typed", error_ttl={DeclinedError: 60}, **options)
    def typed(order: str) -> Receipt:
        return Receipt(order, Decimal(1))

    @idempotent(namespace="untyped", **options)
    def untyped(order: str):  # type: ignore[no-untyped-def]
        return order

    @idempotent(namespace="packed", serializer=Compressed(), **options)
    def packed(order: str) -> Receipt:
        return Receipt(order, Decimal(1))

    @idempotent(namespace="done", keep_result=False, **options)
    def done(order: str) -> Receipt:
        return Receipt(order, Decimal(1))

    @idempotent(namespace="awaited", **options)
    async def awaited(order: str) -> Receipt:
        return Receipt(order, Decimal(1))

    @idempotent(key="{order}", within="session", namespace="inside")
    def inside(session: Any, order: str) -> str:
        return order

    for function in (typed, untyped, packed, done, awaited, inside):
        setattr(module, function.__name__, function)
    module.plain = lambda order: order  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop_functions", module)
    return module


RESULT = '{"order": "o-1", "amount": "9.90"}'
RECEIPT = Receipt("o-1", Decimal("9.90"))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("typed", RESULT, RECEIPT),
        ("untyped", '{"a": [1, null]}', {"a": [1, None]}),
        ("packed", RESULT, RECEIPT),
        ("done", "null", None),
    ],
)
def test_a_result_by_hand_is_what_the_functions_own_replays_read(
    name: str, text: str, value: Any, functions: tuple[ModuleType, str], cli: Cli
) -> None:
    module, url = functions
    configure(backend=url)
    die(url, "o-1", namespace=name)
    function = getattr(module, name)
    with pytest.raises(OutcomeUnknown):
        function("o-1")
    done = cli("resolve", url, "o-1", "--function", f"shop_functions:{name}", "--result", text, "--yes")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"resolved: {name} o-1; duplicates get this result\n"
    outcome = function.outcome("o-1")
    assert (outcome.value, outcome.replayed) == (value, True)
    assert type(outcome.value) is type(value)
    done = cli("resolve", url, "o-1", "--function", f"shop_functions:{name}", "--result", text, "--yes")
    assert (done.code, done.out) == (1, "")
    assert "it is completed" in done.err


def test_a_result_of_an_async_function_is_recorded_too(
    sqlite_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    module = _module(monkeypatch)
    die(sqlite_url, "o-1", namespace="awaited")
    words = [
        "resolve",
        sqlite_url,
        "o-1",
        "--function",
        "shop_functions:awaited",
        "--result",
        RESULT,
        "--yes",
        "--json",
    ]
    done = cli(*words)
    assert (done.code, json.loads(done.out)["state"]) == (0, "completed")
    configure(backend=sqlite_url)

    async def replay() -> Any:
        async with open_backend(sqlite_url):
            return await module.awaited("o-1")

    assert asyncio.run(replay()) == RECEIPT


def test_a_recorded_error_by_hand_is_replayed(sqlite_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module(monkeypatch)
    configure(backend=sqlite_url)
    for number, name in enumerate(("DeclinedError", "NoFundsError", f"{__name__}.NoFundsError")):
        die(sqlite_url, f"o-{number}", namespace="typed")
        words = ["--error", name, "--error-args", '["no funds", 51]']
        done = cli("resolve", sqlite_url, f"o-{number}", "--function", "shop_functions:typed", *words, "--yes")
        assert (done.code, done.err) == (0, "")
        with pytest.raises(DeclinedError) as raised:
            module.typed(f"o-{number}")
        assert (type(raised.value).__name__, raised.value.args) == (name.rpartition(".")[2], ("no funds", 51))


def test_what_did_not_take_place_runs_again_and_needs_no_function(shared_backend_url: str, cli: Cli) -> None:
    url = shared_backend_url
    charge = shop(url, on_crash="raise")
    die(url, "o-1")
    done = cli("resolve", url, digest("o-1")[:8], "--not-applied", "--yes")
    assert (done.code, done.out, done.err) == (0, "resolved: shop.charge o-1; the next call runs\n", "")
    assert not charge.outcome("o-1").replayed


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--result", RESULT], 2, "--function MODULE:NAME is needed"),
        (["--error", "DeclinedError"], 2, "--function MODULE:NAME is needed"),
        (["--result", "{", "--function", "shop_functions:typed"], 2, "--result is no JSON"),
        (["--result", '{"order": 1}', "--function", "shop_functions:typed"], 1, "does not fit what"),
        (
            ["--result", '{"order": "o", "amount": "1", "nota": ""}', "--function", "shop_functions:typed"],
            1,
            "has no place for nota",
        ),
        (["--result", RESULT, "--function", "shop_functions:untyped"], 1, "another function's codec"),
        (["--result", RESULT, "--function", "shop_functions:done"], 1, "keeps no result"),
        (["--result", RESULT, "--function", "shop_functions:inside"], 2, "nothing is ever left in doubt"),
        (["--result", RESULT, "--function", "shop_functions:plain"], 2, "no function decorated with @idempotent"),
        (["--result", RESULT, "--function", "shop_functions:missing"], 2, "cannot be imported"),
        (["--result", RESULT, "--function", "no_such_module:f"], 2, "cannot be imported (ModuleNotFoundError"),
        (["--result", RESULT, "--function", "shop_functions"], 2, "must be MODULE:NAME"),
        (["--error", "KeyError", "--function", "shop_functions:typed"], 1, "error_ttl names DeclinedError"),
        (["--error", "KeyError", "--function", "shop_functions:untyped"], 1, "error_ttl names no class"),
        (
            ["--error", "DeclinedError", "--error-args", "7", "--function", "shop_functions:typed"],
            2,
            "must be a JSON array",
        ),
        (["--error", "DeclinedError", "--error-args", "[", "--function", "shop_functions:typed"], 2, "is no JSON"),
        (["--result", RESULT, "--not-applied"], 2, "not allowed with"),
        ([], 2, "is required"),
    ],
)
def test_a_resolution_that_could_poison_a_replay_is_refused_and_changes_nothing(
    words: list[str], code: int, said: str, sqlite_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _module(monkeypatch)
    configure(backend=sqlite_url)
    die(sqlite_url, "o-1", namespace="typed")
    done = cli("resolve", sqlite_url, digest("o-1", "typed"), "--yes", *words)
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    with pytest.raises(OutcomeUnknown):
        module.typed("o-1")


def test_a_module_that_exits_when_it_is_imported_settles_nothing_and_says_so(
    sqlite_url: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_that_exits.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    die(sqlite_url, "o-1")
    done = cli("resolve", sqlite_url, "o-1", "--function", "module_that_exits:f", "--result", "{}", "--yes")
    assert (done.code, done.out) == (2, "")
    assert "cannot be imported (SystemExit: 0)" in done.err


def test_a_live_runner_is_not_resolved_away_and_a_dead_one_need_not_be_met_by_a_call(
    sqlite_url: str, cli: Cli, clock: Callable[[float], None]
) -> None:
    claim(sqlite_url, "o-1")
    done = cli("resolve", sqlite_url, "o-1", "--not-applied")  # nobody is asked about it
    assert (done.code, done.out) == (1, "")
    assert "its runner is alive" in done.err
    clock(31)
    assert cli("resolve", sqlite_url, "o-1", "--not-applied", "--yes").code == 0
    assert shop(sqlite_url).with_key("o-1").peek() is None


def test_a_result_of_another_codec_would_have_been_found_out_by_callers(
    sqlite_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a plain guess is not served: what one codec writes is ResultUnavailable to another."""
    module = _module(monkeypatch)
    configure(backend=sqlite_url)
    die(sqlite_url, "o-1", namespace="packed")
    idempotent(backend=sqlite_url, namespace="packed")(lambda: None).resolve("o-1", result={"order": "o-1"})
    with pytest.raises(ResultUnavailable):
        module.packed("o-1")


# ----------------------------------------------------------------------------------------------- purge and migrate


def test_purge_drops_what_is_past_its_retention_in_batches(
    sqlite_url: str, cli: Cli, clock: Callable[[float], None]
) -> None:
    charge = shop(sqlite_url, ttl=60)
    for number in range(30):
        charge(f"o-{number}")
    clock(61)
    charge("late")
    backend: Any = open_backend(sqlite_url)
    counts: list[int] = []
    purge = type(backend).purge

    async def counted(self: Any, limit: int) -> int:
        counts.append(await purge(self, limit))
        return counts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("idempotent.cli.purge._BATCH", 7)
        patch.setattr(type(backend), "purge", counted)
        done = cli("purge", sqlite_url)
    assert done == Done(0, "30 rows past their time dropped, or emptied where their keys are remembered\n", "")
    assert counts == [7, 7, 7, 7, 2]  # and no more, or it never ends where rows expire faster than it asks
    assert cli("purge", sqlite_url, "--json").out == '{\n  "dropped": 0\n}\n'
    assert [record["key"] for record in json.loads(cli("list", sqlite_url, "--json").out)] == ["late"]


def test_redis_needs_neither_purge_nor_table(redis_server: Server | Address, cli: Cli) -> None:
    done = cli("purge", redis_server.url)
    assert (done.code, done.out) == (0, "nothing to do: Redis drops records past their retention by itself\n")
    done = cli("migrate", redis_server.url)
    assert (done.code, done.out) == (2, "")
    assert "keeps no table" in done.err


@pytest.mark.parametrize("shared_backend_url", ["sqlite", "postgres", "mariadb"], indirect=True)
def test_migrate_makes_the_table_once_and_alembic_sees_no_drift(shared_backend_url: str, cli: Cli) -> None:
    import sqlalchemy as sa
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from idempotent.backends.sql import SQLBackend

    url = shared_backend_url
    if not url.startswith("sqlite"):
        done = cli("list", url)
        assert (done.code, done.out) == (2, "")
        assert "idempotent migrate" in done.err
    backend = SQLBackend(url, create=False)
    name = backend.table.name
    assert cli("migrate", url) == Done(0, f"the table {name} was made\n", "")
    assert cli("migrate", url) == Done(0, f"the table {name} is there, as it should be\n", "")
    assert json.loads(cli("migrate", url, "--json").out) == {"table": name, "made": False}
    engine: sa.Engine = backend._links["sync"].engine  # type: ignore[union-attr]
    with engine.connect() as connection:
        options = {"include_name": lambda found, kind, _: kind != "table" or found == name}
        context = MigrationContext.configure(connection, opts={"compare_type": True, **options})
        assert compare_metadata(context, backend.metadata) == []
    backend.close()
    shop(url)("o-1")
    assert cli("list", url, "--json").code == 0


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DROP INDEX ix_idempotent_records_expires", "no index on expires"),
        ("ALTER TABLE idempotent_records DROP COLUMN body", "the column body is missing"),
        ("ALTER TABLE idempotent_records ADD COLUMN tenant TEXT NOT NULL", None),
    ],
)
def test_a_table_that_is_another_is_not_touched(statement: str, said: str | None, tmp_path: Path, cli: Cli) -> None:
    import sqlite3

    url = f"sqlite:///{tmp_path}/own.db"
    assert cli("migrate", url).code == 0
    db = sqlite3.connect(tmp_path / "own.db")
    if said is None:  # which SQLite adds to no table that is there
        made = db.execute("SELECT sql FROM sqlite_master WHERE name = 'idempotent_records'").fetchone()[0]
        db.execute("DROP TABLE idempotent_records")
        db.execute(made.replace("body BLOB NOT NULL", "body BLOB NOT NULL, tenant TEXT NOT NULL"))
        db.execute("CREATE INDEX own ON idempotent_records (expires)")
        said = "the column tenant, which is not ours"
    else:
        db.execute(statement)
    before = list(db.execute("SELECT sql FROM sqlite_master"))
    done = cli("migrate", url)
    assert (done.code, done.out) == (1, "")
    assert said in done.err
    assert list(db.execute("SELECT sql FROM sqlite_master")) == before
    db.close()


# ------------------------------------------------------------------------------------------------- how commands end


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("local://", "the memory of one process"),
        ("hunter2", "no backend serves this URL"),
        ("mongodb://root:hunter2@host/db", "no backend serves the URL scheme 'mongodb'"),
        ("redis://:hunter2@127.0.0.1:1/0", "Redis refuses connections"),
        ("postgresql://ann:hunter2@127.0.0.1:1/db", "the database cannot be reached"),
        ("mysql://ann:hunter2@127.0.0.1:1/db", "the database cannot be reached"),
        ("sqlite:////nowhere/at/all.db", "there is no file"),
        ("sqlite://", "sqlite:// needs a file"),
        ("postgresql://ann:hunter2/x@127.0.0.1/db", "written %2F"),
        ("redis://127.0.0.1/0?timeout=soon", "timeout= in the URL must be seconds"),
    ],
)
@pytest.mark.parametrize("words", [["list"], ["show", "k"], ["forget", "k", "--yes"]], ids=lambda w: w[0])
def test_a_backend_that_cannot_be_used_is_told_in_one_line_without_its_password(
    words: list[str], url: str, said: str, cli: Cli
) -> None:
    done = cli(words[0], url, *words[1:])
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.startswith(f"idempotent {words[0]}: ")
    assert done.err.count("\n") == 1
    assert "hunter2" not in done.err


@pytest.mark.parametrize("kind", ["redis", "postgres", "mariadb"])
def test_a_wrong_password_is_not_shown(kind: str, request: pytest.FixtureRequest, cli: Cli) -> None:
    scheme, _, rest = request.getfixturevalue(f"{kind}_server").url.partition("://")
    done = cli("list", f"{scheme}://nobody_of_this_name:hunter2@{rest.rpartition('@')[2]}")
    assert (done.code, done.out) == (2, "")
    assert "hunter2" not in done.err


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("redis://ann:hunter2@host:6379/0?prefix=p", "redis://ann@host:6379/0"),
        ("redis://:hunter2@host:6379/0", "redis://host:6379/0"),
        ("redis://host/0?password=hunter2", "redis://host/0"),
        ("redis://:12/hunter2@host/0", "redis://..."),
        ("sqlite:///file.db?table=t", "sqlite:///file.db"),
    ],
)
def test_a_url_is_shown_without_its_password_and_options(url: str, seen: str) -> None:
    assert shown(url) == seen


@pytest.mark.parametrize(
    "words",
    [
        ["show", "redis://:hunter2@127.0.0.1:1/0"],
        ["forget", "redis+cluster://:hunter2@127.0.0.1:1/0"],
        ["show", "rediss://:12/hunter2@127.0.0.1/0"],
        ["list", "sqlite:///x", "redis://:hunter2@127.0.0.1:1/0"],
        ["redis://:hunter2@127.0.0.1:1/0"],
    ],
    ids=str,
)
def test_a_url_in_the_wrong_place_is_not_shown_with_its_password(
    words: list[str], sqlite_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop(sqlite_url)("o-1")
    for given in ("", sqlite_url):
        monkeypatch.setenv("IDEMPOTENT_URL", given)
        done = cli(*words)
        assert (done.code, done.out) == (2, "")
        assert "hunter2" not in done.err
        assert "no backend is named" not in done.err


@pytest.mark.parametrize("command", ["list", "migrate", "doctor"])
def test_without_sqlalchemy_the_extra_is_named(
    command: str, sqlite_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop(sqlite_url)("o-1")
    for name in ("idempotent.backends.sql", "idempotent.cli.doctor_sql"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("idempotent.cli.doctor_sql", raising=False)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    done = cli(command, sqlite_url)
    assert (done.code, done.out) == (2, "")
    assert "[sql]" in done.err


def test_a_password_that_a_driver_quotes_is_blotted_out() -> None:
    assert censored("bad p@ss or p%40ss", "redis://:p%40ss@host") == "bad *** or ***"
    assert censored("nothing", None) == "nothing"
    assert censored("a cat", "redis://:a@host") == "a cat"


def test_without_a_url_the_environments_is_taken(sqlite_url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    shop(sqlite_url)("o-1")
    for words in (["list"], ["show", "o-1"], ["purge"]):
        done = cli(*words)
        assert (done.code, done.out) == (2, "")
        assert "IDEMPOTENT_URL" in done.err
    monkeypatch.setenv("IDEMPOTENT_URL", sqlite_url)
    for words in (["list"], ["show", "o-1"], ["purge"]):
        assert cli(*words).code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["show"],
        ["show", "sqlite:///x", "a", "b"],
        ["list", "sqlite:///x", "--older-than", "soon"],
        ["list", "sqlite:///x", "--state", "dead"],
        ["steal"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_words_end_with_2(words: list[str], cli: Cli) -> None:
    done = cli(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err


def test_help_names_every_command_and_exit_code(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    for word in ("list", "show", "forget", "resolve", "purge", "migrate", "demo", "130", "141"):
        assert word in done.out


def test_it_is_installed_as_a_script() -> None:
    import tomllib

    from idempotent.cli.main import script

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"idempotent": f"{script.__module__}:{script.__name__}"}


def test_ctrl_c_ends_it_quietly_with_130(own_redis: Server) -> None:
    own_redis.freeze()
    process = subprocess.Popen(
        [sys.executable, "-m", "idempotent", "list", f"{own_redis.url}?timeout=60"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        deadline = time.monotonic() + 30
        while f":{own_redis.port:04X} 01" not in _sockets(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "\ninterrupted\n")


def _sockets(pid: int) -> str:
    """The process's TCP table, "remote port, state" as the kernel writes them."""
    return Path(f"/proc/{pid}/net/tcp").read_text()


def test_a_reader_that_goes_away_ends_it_quietly_with_141(sqlite_url: str) -> None:
    charge = shop(sqlite_url, keep_result=False)
    for number in range(150):  # more than a pipe holds
        charge(f"{'x' * 900}-{number}")
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "idempotent", "list", sqlite_url],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


# -------------------------------------------------------------------------------------------------- at a terminal


def _at_a_terminal(*words: str, hidden: str = "", folder: Path) -> str:
    """What a command prints where its output is a terminal; `hidden`: a module that cannot be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{hidden!r}] = None\n")
    ours, theirs = pty.openpty()
    path = os.pathsep.join((str(folder), str(ROOT)))
    process = subprocess.Popen(
        [sys.executable, "-m", "idempotent", *words],
        env={**os.environ, "PYTHONPATH": path, "TERM": "xterm-256color", "NO_COLOR": ""},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += part
    _, err = process.communicate(timeout=60)
    os.close(ours)
    assert (process.returncode, err) == (0, "")
    return shown.decode().replace("\r\n", "\n")


def test_rich_makes_it_prettier_and_is_not_needed(sqlite_url: str, tmp_path: Path) -> None:
    import re

    shop(sqlite_url)("o-[bold]1")
    bare = _at_a_terminal("list", sqlite_url, hidden="rich", folder=tmp_path)
    assert "\x1b" not in bare
    rich = _at_a_terminal("list", sqlite_url, folder=tmp_path)
    assert "\x1b[32mcompleted" in rich
    rich, bare = (re.sub(r"\x1b\[[0-9;]*m|\d+ s\b", "", text) for text in (rich, bare))
    assert rich.split() == bare.split()
    assert "o-[bold]1" in bare
