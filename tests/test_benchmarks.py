"""The benchmark itself: what it writes and draws, and that its column of correctness convicts a guard that is broken."""

import contextlib
import gc
import json
import logging
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import sqlalchemy as sa

from benchmarks import __main__ as program
from benchmarks import _calls, _costs, _growth, _report, _sections, _storms, _work, plot
from benchmarks._floors import FLOORS
from benchmarks._peers import guards_of
from benchmarks._server import Server
from idempotent import OpenTelemetryHook, PrometheusHook, _config


@pytest.fixture(autouse=True)
def _heard_again() -> Iterator[None]:
    """Measuring switches logging off for the whole process."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def bench(tmp_path: Path) -> _sections.Bench:
    """Without servers, which its sections start nothing on."""
    return _sections.Bench({}, tmp_path, quick=True)


def verdict_on(guard: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, colour: str = "sync") -> dict[str, Any]:
    """What a storm of 20 duplicates says of a guard."""
    monkeypatch.setattr(_storms, "guards_of", lambda store, colour: ({"peer": guard}, {}))
    monkeypatch.setattr(_storms, "_guarded", {})
    _storms.prepare("local", colour, "local://", "peer")
    return _storms.verdict([_storms.duplicate("local", colour, "peer", uuid.uuid4().hex, 20, time.monotonic())])


def test_a_storm_convicts_a_guard_that_guards_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdict_on(lambda url, function: function, monkeypatch)
    assert (found["runs"], found["answers"]) == (20, 20)


def test_a_storm_convicts_a_guard_that_answers_with_something_else_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def guard(url: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(order_id: str, amount: int) -> Any:
            asked.append(1)
            if len(asked) == 1:
                return function(order_id, amount)
            if len(asked) % 2:
                raise BlockingIOError
            return None

        return guarded

    found = verdict_on(guard, monkeypatch)
    assert (found["runs"], found["answers"]) == (1, 1)
    assert found["errors"] == {"another result": 10, "BlockingIOError": 9}


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_a_storm_acquits_ours(colour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdict_on(guards_of("local", colour)[0]["idempotent"], monkeypatch, colour)
    assert (found["runs"], found["answers"], found["errors"]) == (1, 20, {})
    assert found["last_ms"] > 0


def test_wrong_storms_show_in_table_and_targets() -> None:
    wrong = {"runs": 2, "answers": 199, "errors": {"LockError": 1}, "last_ms": 5.0}
    own = _sections._storm_summary([wrong, {"runs": 1, "answers": 200, "errors": {}, "last_ms": 7.0}])
    found = {"local, sync, 1 x 200": {"missing": {"DBOS": "not installed"}, "peers": {"idempotent": own}}}
    assert not own["correct"]
    text = _sections.storms_tables(found)
    assert "WRONG 1 LockError" in text
    assert "not installed" in text
    assert [target.met for target in _sections.storms_targets(found)] == [False]


def calls_of(*names: str) -> Any:
    """What calls found, where all of these took the same."""
    own = {name: {"micros": 9.0, "ratio": [1.0, 1.0, 1.0], "rounds": 1} for name in names}
    return {"floor": names[0], "floors": {}, "missing": {}, "kinds": {kind: dict(own) for kind in _calls.KINDS}}


def drawn_rows(picture: str) -> list[tuple[str, str | None, str]]:
    """The label of each row, its bar's colour (None: it has none) and the words beside it."""
    rows: list[tuple[str, str | None, str]] = []
    fill = label = None
    for element in ET.fromstring(picture):
        if element.get("text-anchor") == "end":
            label, fill = element.text, None
        elif element.tag.endswith("rect"):
            fill = element.get("fill")
        elif label is not None and element.tag.endswith("text"):
            rows.append((label, fill, element.text or ""))
            label = None
    return rows


def test_a_peer_that_failed_a_storm_is_marked_beside_its_calls_and_in_the_picture() -> None:
    right = _sections._storm_summary([{"runs": 1, "answers": 200, "errors": {}, "last_ms": 5.0}])
    wrong = _sections._storm_summary([{"runs": 3, "answers": 190, "errors": {"LockError": 10}, "last_ms": 5.0}])
    sections = {
        "calls": {"redis, sync, one CPU": calls_of("floor", "idempotent", "a peer")},
        "storms": {
            "redis, sync, 1 x 200": {"missing": {}, "peers": {"idempotent": right, "a peer": right}},
            "redis, sync, 8 x 25": {"missing": {}, "peers": {"idempotent": right, "a peer": wrong}},
            "redis, async, 8 x 25": {"missing": {}, "peers": {"idempotent": wrong}},
        },
    }
    _report.judge(sections)
    lines = {line.split("  ")[1]: line.split() for line in _sections.calls_tables(sections["calls"]).splitlines()[2:]}
    assert lines["floor"][-2:] == ["not", "asked"]
    assert lines["idempotent"][-3:] == ["1", "0", "right"]
    assert lines["a peer"][-3:] == ["1-3", "0-10", "WRONG"]
    picture = plot.drawn({"machine": {}, "quick": True, "sections": sections})
    assert "logarithmic scale" in picture
    convicted = ["a peer, first", "a peer, replay", "idempotent", "a peer"]  # ours in one storm, the peer in another
    assert sorted(label for label, _, words in drawn_rows(picture) if "WRONG" in words) == sorted(convicted)
    assert [label for label, fill, _ in drawn_rows(picture) if fill == "url(#wrong)"] == [
        label for label, _, words in drawn_rows(picture) if "WRONG" in words
    ]


def test_a_peer_whose_function_never_ran_has_no_bar_and_is_wrong() -> None:
    ran = _sections._storm_summary([{"runs": 1, "answers": 200, "errors": {}, "last_ms": 5.0, "commands": 9}])
    never = {"runs": 0, "answers": 0, "errors": {"LockError": 200}, "last_ms": None, "commands": 3}
    peers = {"a peer": _sections._storm_summary([never]), "idempotent": ran}
    sections = {"storms": {"redis, sync, 1 x 200": {"missing": {}, "peers": peers}}}
    picture = plot.drawn({"machine": {}, "quick": True, "sections": sections})
    assert drawn_rows(picture) == [
        ("idempotent", "#0b5", "5.0 ms, 9 commands"),
        ("a peer", None, "-, 3 commands WRONG: ran 0 x, 0 answers"),
    ]


def test_calls_without_storms_say_that_nobody_was_asked() -> None:
    sections = {"calls": {"redis, sync, one CPU": calls_of("floor", "idempotent")}}
    _report.judge(sections)
    assert _sections.calls_tables(sections["calls"]).count("not asked") == 2


def test_the_last_answer_is_compared_with_peers_that_are_right_and_with_those_that_poll() -> None:
    def storm(name: str, last_ms: float, *, runs: int = 1) -> tuple[str, Any]:
        one = {"runs": runs, "answers": 200, "errors": {}, "last_ms": last_ms, "commands": 30}
        return name, _sections._storm_summary([one])

    peers = dict([storm("idempotent", 9.0), storm("aiocache stampede", 1.0, runs=200), storm("cashews + lock", 6.0)])
    peers |= dict([storm("one that listens", 5.0)])

    def judged() -> list[tuple[float | None, bool | None]]:
        found = {"redis, async, 8 x 25": {"missing": {}, "peers": peers}}
        return [(one.measured, one.met) for one in _sections.storms_targets(found)][2:]

    assert judged() == [(1.8, True), (1.5, False)]
    del peers["cashews + lock"]
    assert judged() == [(1.8, True), (None, None)]
    del peers["one that listens"]
    assert judged() == [(None, None), (None, None)]


def test_a_target_with_nobody_to_compare_with_is_neither_met_nor_missed() -> None:
    target = _report.Target("ratio", None, "<=", 2)
    assert json.loads(json.dumps(target.as_dict())) == {
        "what": "ratio",
        "measured": None,
        "sign": "<=",
        "bound": 2,
        "met": None,
    }
    assert _report.met_or_missed([target]).split()[-5:] == ["-", "<=", "2", "not", "asked"]


@pytest.mark.parametrize("store", ["local", "sqlite", "redis", "postgresql"])
def test_calls_are_measured_in_rounds_of_everybody_beside_the_floor(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    urls = {"local": "local://", "sqlite": f"sqlite:///{tmp_path}/records.db"}
    url = urls.get(store) or request.getfixturevalue(f"own_{store.removesuffix('ql')}").url
    timings = _calls.time_calls(store, "sync", url, 0.0, only=("nobody",))
    for _ in range(2):  # the floor's connections go, while warnings are switched off; a held one to its pool first
        gc.collect()
    assert timings.floor in timings.took["first"]
    assert {len(own) for kind in timings.took.values() for own in kind.values()} == {1}
    found = _calls.summary(timings)
    assert found["kinds"]["replay"][timings.floor]["ratio"] == [1.0, 1.0, 1.0]
    assert found["kinds"]["replay"]["idempotent"]["micros"] > 0


def test_the_floor_of_sql_takes_connections_from_the_pool_and_the_held_one_does_not(tmp_path: Path) -> None:
    contenders = FLOORS["sqlite", "sync"](f"sqlite:///{tmp_path}/records.db")
    taken: list[object] = []
    sa.event.listen(sa.Pool, "checkout", note := lambda *_: taken.append(None))
    try:
        for name, checkouts in (("the same statements, Core", 3), ("the same statements, held connection", 0)):
            first: Any = contenders[name].first
            taken.clear()
            first("one")
            contenders[name].replay("one")
            assert len(taken) == checkouts
    finally:
        sa.event.remove(sa.Pool, "checkout", note)


@pytest.mark.parametrize("store", ["sqlite", "redis", "postgresql"])
def test_a_store_is_filled_with_records_that_our_function_replays(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/records.db"
    if store != "sqlite":
        url = request.getfixturevalue(f"own_{store.removesuffix('ql')}").url
    _growth.fill(url, 3)
    guarded: Any = guards_of(store, "sync")[0]["idempotent"](url, _work.charge)
    for number, replayed in enumerate([True, True, True, False]):
        order = _work.filled(number)
        found = guarded.outcome(order, _work.AMOUNT)
        assert (found.replayed, found.value) == (replayed, _work.receipt(order, _work.AMOUNT))


def test_replays_are_of_the_records_that_a_contender_names() -> None:
    replayed: list[str] = []
    named = [str(number) for number in range(500)]
    contender = _work.Contender(lambda order: None, replayed.append, iter(named).__next__)
    _calls.sync_rounds("local", {"one": contender}, 0.0)
    assert len(replayed) > 10
    assert replayed == named[: len(replayed)]


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_replays_of_keys_of_another_process_have_a_row_a_floor_and_a_target_of_their_own(
    colour: str, own_redis: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def charge(order_id: str, amount: int) -> dict[str, Any]:
        ran.append(order_id)
        return _work.receipt(order_id, amount)

    async def charge_async(order_id: str, amount: int) -> dict[str, Any]:
        return charge(order_id, amount)

    monkeypatch.setattr(_calls, "charge", charge)
    monkeypatch.setattr(_calls, "charge_async", charge_async)
    _growth.fill_unseen(own_redis.url, 200)
    found = _calls.summary(_calls.time_calls("redis", colour, own_redis.url, 0.0, ("nobody",), unseen=200))
    assert ran
    assert not {_work.filled(number) for number in range(200)}.intersection(ran)
    ((name, floor),) = found["floors"].items()
    assert found["kinds"]["replay"][floor]["micros"] > 0
    assert name not in found["kinds"]["first"]
    targets = [target.what for target in _sections.calls_targets({f"redis, {colour}, one CPU": found})]
    assert targets[-1] == f"redis, {colour}, one CPU: replay / {floor}"
    assert len(targets) == 3


def test_each_hook_is_told_of_every_event_and_logging_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[str]] = {}

    def hook(name: str) -> Any:
        return lambda: lambda event: told.setdefault(name, []).append(event.name)

    written: list[str] = []

    class Handler(logging.StreamHandler):  # type: ignore[type-arg]
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    monkeypatch.setattr(_costs, "_otel_hook", hook("otel"))
    monkeypatch.setattr(_costs, "_prometheus_hook", hook("prometheus"))
    monkeypatch.setattr(logging, "StreamHandler", Handler)
    logger = logging.getLogger("idempotent")
    state = [
        lambda: logger.level,
        lambda: logger.propagate,
        lambda: list(logger.handlers),
        lambda: _config.settings.hooks,
    ]
    before = [one() for one in state]
    logging.disable(logging.ERROR)
    found = _costs.time_events(0.0)
    assert logging.root.manager.disable == logging.ERROR
    assert [one() for one in state] == before
    assert set(found.took["first"]) == {"no hook", "logging", _costs._DEBUG, "OpenTelemetry metrics", "Prometheus"}
    events = {"claimed", "completed", "replayed"}
    assert set(told["otel"]) == set(told["prometheus"]) == events
    assert events == {line.split()[4] for line in written}


def test_the_metrics_hooks_are_those_of_the_libraries() -> None:
    assert isinstance(_costs._otel_hook(), OpenTelemetryHook)
    assert isinstance(_costs._prometheus_hook(), PrometheusHook)


def test_throughput_is_of_all_processes_together_and_its_ratios_are_within_a_round(
    bench: _sections.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    class Crew(contextlib.nullcontext[None]):
        def __init__(self, size: int) -> None:
            super().__init__()

        def __enter__(self) -> Any:
            return self

        def run(self, function: Any, orders: Any, seconds: float) -> list[float]:
            (turn,) = {order[2:4] for order in orders}
            machine = 1 + len(asked) // 6  # a round of six, and in each the machine is quicker than before
            asked.append(turn)
            return [machine * {"floor": 200.0, "idempotent": 100.0, "idempotency": 50.0}[turn[0]]] * len(orders)

    monkeypatch.setattr(_sections, "Crew", Crew)
    monkeypatch.setattr(_sections, "guards_of", lambda store, colour: ({"idempotent": None, "idempotency": None}, {}))
    monkeypatch.setattr(_sections.Bench, "url", lambda self, store: "")
    found = _sections._throughput(bench, "redis", 4)
    rounds = [asked[at : at + 6] for at in range(0, len(asked), 6)]
    assert len(rounds) == 3  # the first makes connections
    assert all(set(each) == set(rounds[0]) for each in rounds)
    assert set(found) == {"redis, first, 4 processes", "redis, replay, 4 processes"}
    for one in found.values():
        assert one["idempotent"] == {"per_second": 4 * 2.5 * 100.0, "ratio": [0.5, 0.5, 0.5]}
        assert one["idempotency"]["ratio"] == [0.25, 0.25, 0.25]


def test_a_run_writes_json_prints_tables_and_can_be_drawn(
    tmp_path: Path, bench: _sections.Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def prepared(*_: object, **__: object) -> Iterator[_sections.Bench]:
        yield bench

    def calls(bench: _sections.Bench) -> Any:
        return {"local, sync, one CPU": _calls.summary(_calls.time_calls("local", "sync", "local://", 0.0))}

    section = (calls, *_sections.SECTIONS["calls"][1:])
    monkeypatch.setattr(program, "prepared", prepared)
    monkeypatch.setattr(program, "versions", lambda *_: {})
    monkeypatch.setattr(program, "commit", lambda: "c0ffee-dirty")
    monkeypatch.setattr(_sections.Bench, "url", lambda self, store: "")
    monkeypatch.setitem(program.SECTIONS, "calls", section)
    assert program.main(["--quick", "--only", "calls", "--json", str(tmp_path / "run.json")]) == 0
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["machine"]["python"]
    assert found["commit"] == "c0ffee-dirty"
    assert [target["what"] for target in found["targets"]] == ["local, sync, one CPU: replay / cachetools, our key"]
    told = capsys.readouterr().out
    assert told.startswith("--quick: ")
    assert "Targets" in told
    assert plot.main([str(tmp_path / "run.json")]) == 0
    drawn = ET.fromstring((tmp_path / "run.svg").read_text())
    words = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "idempotent, replay" in words
    assert any("commit c0ffee-dirty, " in (each or "") for each in words)


def test_a_run_names_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        names = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", *names, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert _report.commit(tmp_path) is None
    git("init", "-q")
    assert _report.commit(tmp_path) is None  # of no commit yet
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("one")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert _report.commit(tmp_path) == head
    assert _report.commit(tmp_path / "inner") is None  # unpacked in a checkout of something else
    (tmp_path / "inner" / "file").write_text("two")
    assert _report.commit(tmp_path) == f"{head}-dirty"


def test_a_server_of_somebody_else_is_not_pinned() -> None:
    Server("redis://elsewhere", None).pin({0})


def test_readme_tells_of_the_targets_that_the_drawn_run_missed() -> None:
    folder = Path(program.__file__).parent
    found = json.loads((folder / "results.json").read_text())
    assert (folder / "results.svg").read_text() == plot.drawn(found)
    missed = [f"{target['measured']:.2f}" for target in found["targets"] if target["met"] is False]
    told = (folder.parent / "README.md").read_text().partition("(benchmarks/results.svg)")[2].partition("\n## ")[0]
    assert missed == re.findall(r"\d+\.\d\d", told)
