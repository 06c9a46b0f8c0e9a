"""A backend that is none of ours: a directory with one text file per record, for all processes of one machine."""

import ast
import asyncio
import copy
import fcntl
import os
import time

from idempotent import Backend
from idempotent import _machine as machine
from idempotent._record import RecordId, Row, State, describe
from idempotent.backends.base import micros, poll


class FileBackend(Backend):
    name, in_threads = "files", False

    def __init__(self, directory):
        self.directory = directory

    def asynchronous(self):
        view = copy.copy(self)
        view.in_threads = True
        return view

    async def _apply(self, rid, decide):
        def apply():
            path = self.directory / rid.digest
            with (self.directory / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                reply, row = decide(self._load(path)[1] if path.exists() else None, time.time_ns() // 1000)
                if row is not None:
                    path.with_suffix(".new").write_text(ascii((rid.text, row.state.value, *row[1:])))
                    path.with_suffix(".new").replace(path)  # whole, or not at all
                return reply

        return await asyncio.to_thread(apply) if self.in_threads else apply()

    def _load(self, path):
        text, state, *fields = ast.literal_eval(path.read_text())
        return RecordId.parse(text), Row(State(state), *fields)

    async def claim(self, rid, *, lease, keep, **brings):
        ask = machine.Ask(lease=micros(lease), keep=None if keep is None else micros(keep), **brings)
        return await self._apply(rid, lambda row, now: machine.on_claim(row, ask, now))

    async def renew(self, rid, *, attempt, token, lease):
        return await self._apply(rid, lambda row, now: machine.on_renew(row, attempt, token, micros(lease), now))

    async def complete(self, rid, *, attempt, token, codec, body, ttl, remember=0.0, state=State.COMPLETED):
        def decide(row, now):
            past = micros(remember) if remember else 0
            settled = Row(state, token, attempt, b"", now, past, 0, now + micros(ttl), codec, body)
            return machine.on_settle(row, attempt, token, settled, now)

        return await self._apply(rid, decide)

    async def fail(self, rid, **brings):
        return await self.complete(rid, **brings, state=State.FAILED)

    async def release(self, rid, *, attempt, token, unknown=False):
        return await self._apply(rid, lambda row, now: machine.on_release(row, attempt, token, now, unknown=unknown))

    async def read(self, rid):
        return await self._apply(rid, lambda row, now: (row and describe(rid, row, now), None))

    async def forget(self, rid, *, force=False):
        def decide(row, now):
            found, changed = machine.on_forget(row, os.urandom(8), now, force=force)
            return found and describe(rid, found, now), changed

        return await self._apply(rid, decide)

    async def changed(self, rid, *, token, timeout):
        async def runs():
            record = await self.read(rid)
            return record is not None and (record.state, record.token) == ("running", token)

        async def sleep(seconds):
            await asyncio.sleep(seconds) if self.in_threads else time.sleep(seconds)

        await poll(runs, sleep, timeout)

    async def scan(self, *, state=None, namespace=None):
        for path in self.directory.glob("?" * 48):  # the names that digests have
            rid, _ = self._load(path)
            record = await self.read(rid)
            if record and rid.space == "c" and state in (None, record.state) and namespace in (None, rid.namespace):
                yield record

    async def purge(self, limit=1000):
        return 0  # files past their retention stay until their key comes back
