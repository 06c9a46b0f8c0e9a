"""Real servers over real sockets: uvicorn and gunicorn, keep-alive, chunks, clients that leave, workers that race."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from idempotent.http.client import IdempotencyAdapter

TESTS = Path(__file__).parent
HERE = ("127.0.0.1",)


class Running:
    """A server of ours; `http` of it is one keep-alive connection."""

    def __init__(self, command: list[str], port: int, directory: Path, backend: str, **environment: str) -> None:
        self.port = port
        self.ledger = directory / "ledger.db"
        self._log = directory / f"{port}.log"
        env = {
            **os.environ,
            "IDEMPOTENT_TEST_BACKEND": backend,
            "IDEMPOTENT_TEST_LEDGER": str(self.ledger),
            "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command], env=env, stdout=log, stderr=log, cwd=directory, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((*HERE, port), timeout=1):
                return
            time.sleep(0.02)
        raise RuntimeError(f"{command} does not answer:\n{self._log.read_text()}")

    def effects(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.ledger, timeout=30)) as ledger:
            with contextlib.suppress(sqlite3.OperationalError):
                return [text for (text,) in ledger.execute("SELECT text FROM effects ORDER BY number")]
        return []

    def await_effects(self, *texts: str) -> None:
        deadline = time.monotonic() + 30
        while self.effects() != list(texts) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.effects() == list(texts), self._log.read_text()

    def kill_worker(self) -> None:
        """SIGKILL for the process that serves: gunicorn's only worker, which is replaced, or uvicorn itself."""
        master = self._process.pid
        workers = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        os.kill(int(workers[0]) if workers else master, signal.SIGKILL)
        if not workers:
            self._process.wait()

    def connect(self) -> "Connection":
        return Connection(self.port)

    def connections(self, times: int, workers: int) -> list["Connection"]:
        """So many, all open, with each of the workers at the end of one at least."""
        found: dict[str, Connection] = {}
        deadline = time.monotonic() + 60
        while len(found) < workers and time.monotonic() < deadline:
            connection = self.connect()
            worker = connection.ask("/nowhere", b"", None)[1]["x-worker"]
            if found.setdefault(worker, connection) is not connection:
                connection.close()
                time.sleep(0.01)
        assert len(found) == workers, self._log.read_text()
        return [*found.values(), *(self.connect() for _ in range(times - workers))]

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


class Connection:
    """HTTP/1.1 by hand, so that nothing is tidied up on the way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((*HERE, port), timeout=60)
        self.file = self.socket.makefile("rb")

    def send(self, path: str, body: bytes = b"{}", key: str | None = "k", *lines: str, chunked: bool = False) -> None:
        head = [f"POST {path} HTTP/1.1", "Host: shop", "Content-Type: application/json", *lines]
        if key is not None:
            head.append(f"Idempotency-Key: {key}")
        if chunked:
            head.append("Transfer-Encoding: chunked")
            halves = (body[: len(body) // 2], body[len(body) // 2 :])
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in halves if part) + b"0\r\n\r\n"
        else:
            head.append(f"Content-Length: {len(body)}")
        self.socket.sendall("\r\n".join((*head, "", "")).encode("latin-1") + body)

    def read(self) -> tuple[int, dict[str, str], bytes]:
        status = int(self.file.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self.file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if status == 204:
            return status, headers, b""
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.file.readline(), 16):
                body += self.file.read(size)
                self.file.readline()
            self.file.readline()
            return status, headers, body
        return status, headers, self.file.read(int(headers["content-length"]))

    def ask(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, str], bytes]:
        self.send(*args, **kwargs)
        return self.read()

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((*HERE, 0))
        return int(probe.getsockname()[1])


def uvicorn(app: str, port: int, workers: int = 1) -> list[str]:
    options = ["--workers", str(workers)] if workers > 1 else []
    options += ["--timeout-keep-alive", "60"]  # for the connection that waits while other workers start
    return ["uvicorn", f"http_service:{app}", "--port", str(port), "--log-level", "warning", *options]


def gunicorn(app: str, port: int, workers: int = 1) -> list[str]:
    bind = ["--bind", f"{HERE[0]}:{port}", "--workers", str(workers), "--keep-alive", "60"]
    return ["gunicorn", f"http_service:{app}", *bind, "--threads", "4", "--worker-class", "gthread"]


@pytest.fixture(scope="module", params=["uvicorn", "gunicorn"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp(request.param)
    port = free_port()
    command = uvicorn("asgi_app", port) if request.param == "uvicorn" else gunicorn("flask_app", port)
    running = Running(command, port, directory, f"sqlite:///{directory}/records.db")
    yield running
    running.stop()


@pytest.fixture
def connection(server: Running) -> Iterator[Connection]:
    with contextlib.closing(sqlite3.connect(server.ledger, timeout=30)) as ledger, ledger:
        with contextlib.suppress(sqlite3.OperationalError):  # there has been none
            ledger.execute("DELETE FROM effects")
    found = server.connect()
    yield found
    found.close()


def test_a_connection_serves_first_and_replay_and_what_comes_after(server: Running, connection: Connection) -> None:
    first = connection.ask("/echo", b"12345", "keep")
    again = connection.ask("/echo", b"12345", '"keep"')
    assert first[0] == again[0] == 200
    assert first[2] == again[2]
    assert "idempotency-replayed" not in first[1]
    assert again[1]["idempotency-replayed"] == "true"
    assert "date" in again[1]  # the server's own
    refused = connection.ask("/echo", b"other", "keep")
    assert (refused[0], refused[1]["content-type"]) == (422, "application/problem+json")
    assert connection.ask("/echo", b"12345", None)[0] == 200
    assert server.effects() == ["echo", "echo"]


def test_the_header_in_two_lines_is_refused(server: Running, connection: Connection) -> None:
    status, _, body = connection.ask("/echo", b"", "twice", "Idempotency-Key: twice")
    assert (status, b"key-invalid" in body) == (400, True)
    status, _, body = connection.ask("/echo", b"", '"twice"', 'Idempotency-Key: "twice"')
    assert (status, b"key-invalid" in body) == (400, True)
    assert server.effects() == []


@pytest.mark.parametrize("key", ["a b", "\xe4", "a,b", '"a";b=1', "x" * 300])
def test_a_malformed_key_is_refused(server: Running, connection: Connection, key: str) -> None:
    assert connection.ask("/echo", b"", key)[0] == 400
    assert server.effects() == []


def test_a_chunked_body_is_served_like_any_other(server: Running, connection: Connection) -> None:
    first = connection.ask("/echo", b"x" * 10_000, "chunked", chunked=True)
    again = connection.ask("/echo", b"x" * 10_000, "chunked", chunked=True)
    assert first[2] == again[2]
    assert first[2].endswith(b" 10000")
    plain = connection.ask("/echo", b"x" * 10_000, "chunked")  # how it was cut is no part of the request
    assert plain[1]["idempotency-replayed"] == "true"
    assert server.effects() == ["echo"]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_over_the_cap_is_refused(server: Running, chunked: bool) -> None:
    before = server.effects()
    connection = server.connect()
    # The answer may come before all of the body was taken, and the server may then hang up.
    with contextlib.suppress(ConnectionError):
        connection.send("/echo", b"x" * 100_001, "large", chunked=chunked)
    status, _, body = connection.read()
    assert (status, b"body-too-large" in body) == (413, True)
    connection.close()
    assert server.effects() == before
    connection = server.connect()
    assert connection.ask("/echo", b"x" * 100_000, "large", chunked=chunked)[0] == 200
    connection.close()


def test_a_stream_and_an_empty_answer_leave_the_connection_in_order(server: Running, connection: Connection) -> None:
    status, headers, body = connection.ask("/stream", b"", "stream")
    assert (status, body, headers["idempotency-stored"]) == (200, b"part 0 part 1 part 2 ", "false")
    status, _, body = connection.ask("/stream", b"", "stream")
    assert (status, b"result-unavailable" in body) == (409, True)
    for replayed in (False, True):
        status, headers, _ = connection.ask("/empty", b"", "empty")
        assert (status, "idempotency-replayed" in headers) == (204, replayed)
    assert server.effects() == ["stream", "empty"]


def test_what_comes_after_the_answer_comes_once(server: Running, connection: Connection) -> None:
    answers = [connection.ask("/background", b"", "background")[2] for _ in range(2)]
    assert answers[0] == answers[1]
    server.await_effects("background", "afterwards")


def test_an_application_that_fails_frees_the_key(server: Running, connection: Connection) -> None:
    assert connection.ask("/fail", b"", "fail")[0] == 500
    connection.close()
    again = server.connect()
    assert again.ask("/fail", b"", "fail")[0] == 500
    again.close()
    assert server.effects() == ["fail", "fail"]


def test_a_client_that_leaves_finds_the_answer_when_it_comes_back(server: Running, connection: Connection) -> None:
    connection.send("/slow", b"", "slow")
    server.await_effects("slow begins")
    connection.close()
    again = server.connect()
    status, headers, _ = again.ask("/slow", b"", "slow")
    assert (status, int(headers["retry-after"]) >= 1) == (409, True)
    server.await_effects("slow begins", "slow ends")
    deadline = time.monotonic() + 30
    while (found := again.ask("/slow", b"", "slow"))[0] == 409 and time.monotonic() < deadline:
        time.sleep(0.02)
    again.close()
    assert (found[0], found[1]["idempotency-replayed"]) == (200, "true")
    assert server.effects() == ["slow begins", "slow ends"]


def storm(running: Running, times: int, path: str, body: bytes, *lines: str, workers: int = 1) -> list[Any]:
    """So many duplicates, each on a connection of its own, all open before the first is sent, to so many workers."""
    connections = running.connections(times, workers) if workers > 1 else [running.connect() for _ in range(times)]
    with ThreadPoolExecutor(times) as pool:
        answers = list(pool.map(lambda connection: connection.ask(path, body, "storm", *lines), connections))
    for connection in connections:
        connection.close()
    return answers


PAYMENT = b'{"order": "o-1", "cents": 500}'


@pytest.fixture
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kind: str = request.param
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/records.db"
    url: str = request.getfixturevalue("redis_server").url
    return f"{url}?prefix={tmp_path.name}"


@pytest.mark.parametrize("shared_url", ["redis"], indirect=True)
def test_200_duplicates_on_4_workers_have_one_effect_and_one_answer(shared_url: str, tmp_path: Path) -> None:
    port = free_port()
    running = Running(uvicorn("payments", port, workers=4), port, tmp_path, shared_url)
    try:
        answers = storm(running, 200, "/payments", PAYMENT, "Authorization: token-alice", workers=4)
    finally:
        running.stop()
    assert {(status, body) for status, _, body in answers} == {(201, answers[0][2])}
    assert sum("idempotency-replayed" in headers for _, headers, _ in answers) == 199
    assert len({headers["x-worker"] for _, headers, _ in answers}) == 4
    assert running.effects() == ["alice o-1"]


@pytest.mark.parametrize("shared_url", ["sqlite"], indirect=True)
def test_50_duplicates_of_a_payment_charge_once(shared_url: str, tmp_path: Path) -> None:
    port = free_port()
    running = Running(uvicorn("payments", port), port, tmp_path, shared_url)
    try:
        answers = storm(running, 50, "/payments", PAYMENT, "Authorization: token-alice")
        others = storm(running, 5, "/payments", PAYMENT, "Authorization: token-bob")
        strangers = storm(running, 5, "/payments", PAYMENT, "Authorization: stolen")
    finally:
        running.stop()
    assert {(status, body) for status, _, body in answers} == {(201, answers[0][2])}
    assert {status for status, _, _ in others} == {201}
    assert others[0][2] != answers[0][2]
    assert {status for status, _, _ in strangers} == {401}
    assert running.effects() == ["alice o-1", "bob o-1"]


@pytest.mark.parametrize("shared_url", ["sqlite"], indirect=True)
def test_the_payment_service_keeps_to_its_openapi(shared_url: str, tmp_path: Path) -> None:
    """Schemathesis sends what the schema allows and what it does not; its keys come twice, with other bodies too."""
    port = free_port()
    running = Running(uvicorn("payments", port), port, tmp_path, shared_url)
    command = ["-m", "schemathesis.cli", "run", f"http://{HERE[0]}:{port}/openapi.json", "--seed", "1"]
    command += ["--header", "Authorization: token-alice", "--max-examples", "10", "--no-color"]
    # That a key which comes with another body is refused is what the header is for.
    command += ["--exclude-checks", "positive_data_acceptance"]
    try:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout
        assert "Tested: 1" in done.stdout
    finally:
        running.stop()
    assert len(running.effects()) >= 1


@pytest.mark.parametrize("shared_url", ["sqlite"], indirect=True)
def test_40_duplicates_on_2_gunicorn_workers_have_one_effect(shared_url: str, tmp_path: Path) -> None:
    port = free_port()
    running = Running(gunicorn("flask_app", port, workers=2), port, tmp_path, shared_url)
    try:
        answers = storm(running, 40, "/echo", PAYMENT, workers=2)
        answers += storm(running, 1, "/echo", PAYMENT)
    finally:
        running.stop()
    assert len({headers["x-worker"] for _, headers, _ in answers}) == 2
    told = {status for status, _, _ in answers}
    assert told <= {200, 409}
    assert len({body for status, _, body in answers if status == 200}) == 1
    assert answers[-1][1]["idempotency-replayed"] == "true"
    assert running.effects() == ["echo"]


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_a_request_whose_worker_is_killed_is_in_progress_for_its_lease_and_then_runs_again(
    kind: str, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        first, second = killables(kind, "asgi_app", tmp_path, stack, lease=3)
        connection = stack.enter_context(contextlib.closing(first.connect()))
        connection.send("/slow")
        first.await_effects("slow begins")
        first.kill_worker()
        with requests.Session() as session:
            session.mount("http://", IdempotencyAdapter(retries=0))
            headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
            told = session.post(f"http://{HERE[0]}:{second.port}/slow", b"{}", headers=headers)
            assert (told.status_code, told.headers["content-type"]) == (409, "application/problem+json")
            assert told.json()["type"] == "urn:idempotent:in-progress"
            assert 1 <= int(told.headers["retry-after"]) <= 3
            session.mount("http://", IdempotencyAdapter())  # which comes back when it was told to
            answers = [session.post(f"http://{HERE[0]}:{second.port}/slow", b"{}", headers=headers) for _ in range(2)]
        assert [(answer.status_code, answer.text) for answer in answers] == [(200, "2")] * 2
        assert answers[1].headers["idempotency-replayed"] == "true"
        second.await_effects("slow begins", "slow begins", "slow ends")


@pytest.mark.parametrize("shared_url", ["sqlite", "redis"], indirect=True)
def test_a_payment_whose_worker_is_killed_after_the_charge_is_charged_once(shared_url: str, tmp_path: Path) -> None:
    payment, token = b'{"order": "crash", "cents": 500}', "Authorization: token-alice"
    with contextlib.ExitStack() as stack:
        first, second = killables("uvicorn", "payments", tmp_path, stack, lease=2, backend=shared_url)
        connection = stack.enter_context(contextlib.closing(first.connect()))
        connection.send("/payments", payment, "storm", token)
        first.await_effects("alice crash")
        first.kill_worker()
        answers = storm(second, 50, "/payments", payment, token)
        assert {(status, body) for status, _, body in answers} == {(201, answers[0][2])}
        assert json.loads(answers[0][2])["number"] == 1
        assert sum("idempotency-replayed" in headers for _, headers, _ in answers) == 49
        assert second.effects() == ["alice crash"]


def killables(
    kind: str, app: str, directory: Path, stack: contextlib.ExitStack, *, lease: int, backend: str | None = None
) -> list[Running]:
    """Two servers of one application, started at the same time."""
    backend = backend or f"sqlite:///{directory}/records.db"

    def start(port: int) -> Running:
        command = uvicorn(app, port) if kind == "uvicorn" else gunicorn("flask_app", port)
        running = Running(command, port, directory, backend, IDEMPOTENT_TEST_LEASE=str(lease))
        stack.callback(running.stop)
        return running

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(start, [free_port(), free_port()]))
