"""The pytest plugin, in test runs of its own: what it gives, what it keeps apart, and that it costs next to nothing."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]


@pytest.fixture
def pytester(tmp_path: Path) -> "Pytester":
    return Pytester(tmp_path)


class Pytester:
    """Runs of pytest in an environment where the package is installed, with its entry points."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        information = folder / "site" / "idempotent_py-0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: idempotent-py\nVersion: 0\n", "utf-8")
        points = [
            f"[{group}]\n" + "".join(f"{name} = {where}\n" for name, where in named.items())
            for group, named in POINTS.items()
        ]
        (information / "entry_points.txt").write_text("\n".join(points), "utf-8")
        left_out = ("PYTEST_ADDOPTS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_PLUGINS", "IDEMPOTENT_URL")
        self.environment = {name: value for name, value in os.environ.items() if name not in left_out}
        self.environment["PYTHONPATH"] = f"{information.parent}{os.pathsep}{ROOT}"

    def run(self, code: str, *options: str, settings: str = "", alone: bool = True) -> tuple[dict[str, int], str]:
        """Run the tests in `code`; how many ended how, and what was printed. `alone`: without other plugins."""
        (self.folder / "test_it.py").write_text(code, "utf-8")
        (self.folder / "pytest.ini").write_text(f"[pytest]\n{settings}\n", "utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:valkey", "-W", "error"]
        command += ["--strict-markers", "--strict-config", *(("-p", "idempotent") if alone else ()), *options]
        environment = self.environment | ({"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} if alone else {})
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=100)
        counts = {how: int(count) for count, how in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout)}
        return counts, done.stdout + done.stderr


def test_every_entry_point_leads_somewhere() -> None:
    assert POINTS.keys() == {"pytest11", "hypothesis"}
    for group in POINTS.values():
        for where in group.values():
            module, _, name = where.partition(":")
            loaded = importlib.import_module(module)
            assert not name or callable(getattr(loaded, name))


FIXTURES = """
import asyncio
import threading

import pytest
from idempotent import (
    AsyncLock, LeaseLost, Lock, LocalBackend, OutcomeUnknown, RedisBackend, configure, current_call, idempotent,
)

runs = []
own = LocalBackend()

@idempotent(key="{order}")
def charge(order):
    runs.append(order)
    return len(runs)

@idempotent(key="{order}", backend="redis://nowhere.invalid/0", namespace="test_it.charge")
async def charge_async(order):
    runs.append(order)
    return len(runs)

@idempotent(backend=own)
def keeps_its_own():
    return 1

@pytest.fixture(autouse=True)
def fresh():
    runs.clear()

def test_sync_and_async_share_it_whatever_url_they_name(idempotent_backend):
    assert charge("o") == charge("o") == 1
    assert asyncio.run(charge_async("o")) == 1
    assert runs == ["o"]
    with Lock("job", backend="postgresql://nowhere.invalid/x"):
        assert Lock("job", backend=idempotent_backend).locked()

    async def lock():
        async with AsyncLock("job") as hold:
            return hold.token

    assert asyncio.run(lock()) > 0

def test_each_test_has_an_empty_one(idempotent_backend):
    assert charge.peek("o") is None
    assert charge("o") == 1

def test_waiters_are_woken(idempotent_backend):
    begun, go = threading.Event(), threading.Event()

    @idempotent(backend=idempotent_backend, namespace="slow")
    def slow():
        runs.append("slow")
        begun.set()
        assert go.wait(10)
        return 7

    async def wait():
        @idempotent(backend=idempotent_backend, namespace="slow")
        async def same():
            runs.append("again")
            return 8

        task = asyncio.create_task(same())
        await asyncio.sleep(0.01)
        go.set()
        return await task

    first = threading.Thread(target=slow)
    first.start()
    assert begun.wait(10)
    assert asyncio.run(wait()) == 7
    first.join()
    assert runs == ["slow"]

def test_who_was_given_a_backend_keeps_it(idempotent_backend):
    assert keeps_its_own() == 1
    assert keeps_its_own.peek() is not None
    other = LocalBackend()
    configure(backend=other)
    charge("o")
    assert asyncio.run(count(other)) == 1
    assert asyncio.run(count(idempotent_backend)) == 0

async def count(backend):
    return len([record async for record in backend.asynchronous().scan()])

def test_kind(idempotent_backend, request):
    assert type(idempotent_backend).__name__ == request.config.getini("expected")
"""
CONFTEST = """
def pytest_addoption(parser):
    parser.addini("expected", "the class of the backend", default="LocalBackend")
"""


@pytest.mark.parametrize("kind", ["local", "fakeredis"])
@pytest.mark.parametrize("how", ["option", "setting"])
def test_the_backend_is_empty_and_serves_all_that_name_a_url_or_nothing(
    pytester: Pytester, kind: str, how: str
) -> None:
    (pytester.folder / "conftest.py").write_text(CONFTEST, "utf-8")
    expected = "LocalBackend" if kind == "local" else "RedisBackend"
    setting = f"idempotent_backend = {kind}" if how == "setting" else ""
    options = [f"--idempotent-backend={kind}"] if how == "option" else []
    counts, told = pytester.run(FIXTURES, *options, settings=f"expected = {expected}\n{setting}")
    assert counts == {"passed": 5}, told


CLOCK = """
import asyncio
import threading
from datetime import timedelta

import pytest
from idempotent import LeaseLost, Lock, LockLost, OutcomeUnknown, current_call, idempotent

runs = []

def charge_of(**options):
    @idempotent(key="{order}", **options)
    def charge(order):
        runs.append(order)
        return len(runs)

    return charge

@pytest.fixture(autouse=True)
def fresh():
    runs.clear()

def test_a_ttl_passes(idempotent_clock):
    charge = charge_of(ttl=86_400)
    assert charge("o") == charge("o") == 1
    idempotent_clock.advance(86_300)
    assert charge("o") == 1
    assert 86_300 <= charge.outcome("o").age < 86_400
    idempotent_clock.advance(timedelta(seconds=101))
    assert charge("o") == 2

def test_a_lease_passes_and_the_frozen_runner_is_told(idempotent_clock):
    calls = []

    @idempotent(key="{order}", lease=30, namespace="frozen")
    def charge(order):
        calls.append(order)
        if len(calls) == 1:
            assert not current_call().lease_lost
            idempotent_clock.advance(61)  # duplicates of one process wait for each other for a lease more
            assert current_call().lease_lost
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        return len(calls)

    others = []

    @idempotent(key="{order}", lease=30, namespace="frozen")
    async def charge_async(order):
        calls.append(order)
        return len(calls)

    def second():
        others.append(asyncio.run(charge_async.with_key("o")("o")))

    with pytest.raises(LeaseLost):
        charge("o")
    assert (calls, others) == (["o", "o"], [2])
    assert charge("o") == 2

def test_a_waiter_is_told_that_time_has_passed(idempotent_clock, idempotent_backend):
    from idempotent._record import RecordId
    from idempotent._drive import drive

    ask = dict(attempt=b"deadbeef", fingerprint=b"", lease=3000.0, keep=None, takeover=False)
    drive(idempotent_backend.claim(RecordId("dead", "o"), **ask))

    @idempotent(key="o", namespace="dead", wait=None, fingerprint=False)
    def charge():
        return 1

    waited = []
    thread = threading.Thread(target=lambda: waited.append(charge()))
    thread.start()
    while charge.stats().get("waited", 0) == 0:
        pass
    while not waited:
        idempotent_clock.advance(1000)
        thread.join(0.01)
    assert waited == [1]

def test_a_lock_is_lost(idempotent_clock):
    with pytest.raises(LockLost):
        with Lock("job", lease=30) as hold:
            assert not hold.lost
            idempotent_clock.advance(31)
            assert hold.lost

def test_time_does_not_go_back(idempotent_clock):
    before = idempotent_clock()
    with pytest.raises(ValueError):
        idempotent_clock.advance(-1)
    idempotent_clock.advance(0)
    assert before <= idempotent_clock() < before + 60_000_000

def test_afterwards_time_is_as_it_was():
    import time
    from idempotent._aio import ASYNC
    from idempotent._drive import SYNC

    for driver in (SYNC, ASYNC):
        assert abs(driver.now() - time.monotonic()) < 5

@pytest.mark.idempotent(backend="fakeredis")
def test_fakeredis_has_no_such_time(request):
    with pytest.raises(TypeError, match="moves the time of the local backend, and fakeredis keeps its own"):
        request.getfixturevalue("idempotent_clock")
"""


def test_the_clock_lets_leases_and_ttls_pass_without_sleeping(pytester: Pytester) -> None:
    counts, told = pytester.run(CLOCK)
    assert counts == {"passed": 7}, told


def test_the_marker_says_which_backend_and_wins_over_option_and_setting(pytester: Pytester) -> None:
    code = """
import pytest
from idempotent import LocalBackend, RedisBackend

@pytest.mark.idempotent(backend="fakeredis")
def test_marked(idempotent_backend):
    assert isinstance(idempotent_backend, RedisBackend)

@pytest.mark.idempotent
def test_marked_without_a_word(idempotent_backend):
    assert isinstance(idempotent_backend, LocalBackend)

@pytest.mark.idempotent(backend="fakeredis")
def test_not_installed(request, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fakeredis", None)
    with pytest.raises(ImportError, match="fakeredis is not installed: pip install"):
        request.getfixturevalue("idempotent_backend")

@pytest.mark.idempotent(backend="memcached")
def test_unknown(request):
    with pytest.raises(ValueError, match="idempotent_backend is one of local, fakeredis, not 'memcached'"):
        request.getfixturevalue("idempotent_backend")

@pytest.mark.idempotent("fakeredis")
def test_marked_without_the_name(idempotent_backend):
    assert isinstance(idempotent_backend, RedisBackend)

@pytest.mark.idempotent(backand="fakeredis")
def test_mistyped(request):
    with pytest.raises(TypeError, match="backand"):
        request.getfixturevalue("idempotent_backend")
"""
    settings = "idempotent_backend = fakeredis"
    counts, told = pytester.run(code, "--idempotent-backend=local", settings=settings)
    assert counts == {"passed": 6}, told
    counts, told = pytester.run("", "--markers")
    assert "@pytest.mark.idempotent(backend=" in told
    counts, told = pytester.run("", "--idempotent-backend=memcached")
    assert "invalid choice: 'memcached'" in told


ISOLATION = """
import pytest
from idempotent import LocalBackend, configure, idempotent, open_backend
from idempotent import _config

configure(ttl=7, backend="local://")
before = _config.settings
runs = []

@idempotent
def charge():
    runs.append(1)
    return len(runs)

@pytest.fixture(scope="module")
def shared():
    configure(lease=9)
    yield
    configure(lease=30)

def test_what_a_test_configures_ends_with_it():
    assert charge() == charge() == 1
    configure(ttl=99, backend=LocalBackend(), hooks=[])
    assert charge() == 2

def test_what_was_configured_before_it_stands():
    assert _config.settings == before

def test_and_its_records_are_gone():
    assert charge() == len(runs)
    assert charge.peek() is not None

def test_again():
    assert charge.peek() is None
    assert open_backend("local://") is open_backend("local://")

def test_what_a_wider_fixture_configures_stands(shared):
    assert _config.settings.lease == 9
    configure(lease=1)

def test_for_each_of_its_tests(shared):
    assert _config.settings.lease == 9
"""


@pytest.mark.parametrize("options", [[], ["-p", "xdist", "-n", "2"]], ids=["one process", "xdist"])
def test_configuration_and_records_end_with_their_test(pytester: Pytester, options: list[str]) -> None:
    counts, told = pytester.run(ISOLATION, *options)
    assert counts == {"passed": 6}, told


def test_it_is_found_by_its_entry_point_and_gets_on_with_the_other_plugins_here(pytester: Pytester) -> None:
    counts, told = pytester.run(ISOLATION, alone=False)
    assert counts == {"passed": 6}, told


def test_who_wants_none_of_it_says_so(pytester: Pytester) -> None:
    code = """
from idempotent import _config, configure

def test_one():
    configure(ttl=99, backend="local://")

def test_two():
    assert _config.settings.ttl == 99
"""
    counts, told = pytester.run(code, settings="idempotent_isolation = false")
    assert counts == {"passed": 2}, told
    counts, told = pytester.run(code)
    assert counts == {"passed": 1, "failed": 1}, told


def test_it_imports_next_to_nothing_where_no_test_asks_for_it(pytester: Pytester) -> None:
    code = """
import sys

def test_nothing(request):
    assert request.config.pluginmanager.get_plugin("idempotent").__name__ == "idempotent.testing.pytest_plugin"
    ours = sorted(name for name in sys.modules if name.split(".")[0] == "idempotent")
    assert ours == ["idempotent", "idempotent.testing", "idempotent.testing.pytest_plugin"]
    assert not {"redis", "sqlalchemy", "hypothesis", "msgspec", "orjson", "cachetools", "fakeredis"} & {*sys.modules}
"""
    counts, told = pytester.run(code)
    assert counts == {"passed": 1}, told
