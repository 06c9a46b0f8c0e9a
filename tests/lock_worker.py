"""A worker process for lock tests: takes orders on standard input, tells on standard output what happens.

python lock_worker.py '{"colour": "sync", "options": {"backend": URL, "lease": 2, ...}}'

hold NAME              take the lock and say "held TOKEN", or "busy"; then comes "leave" and "left", or "error CLASS"
grab NAME FILE         take the lock, add one to the number in FILE, and again, until there is FILE.end, and once more; then
                       comes "grabbed"; Ctrl-C ends no more than a try
count NAME FILE N M    M threads (tasks) add one to the number in FILE, N times each, under the lock; "counted"
"""

import asyncio
import contextlib
import importlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

from idempotent import AsyncLock, Lock, LockTimeout


def say(*words: object) -> None:
    print(*words, flush=True)


def add_one(path: Path, token: int) -> None:
    """Read, change, write: what only one may do at a time. Each line is a number and the token it was written under."""
    number = int(path.read_text().split()[-2]) + 1
    with path.open("a") as file:
        file.write(f"{number} {token}\n")


def hold(name: str, options: dict[str, Any]) -> None:
    with Lock(name, **options) as held:
        say("held", held.token)
        assert sys.stdin.readline() == "leave\n"


async def hold_async(name: str, options: dict[str, Any]) -> None:
    async with AsyncLock(name, **options) as held:
        say("held", held.token)
        assert await asyncio.to_thread(sys.stdin.readline) == "leave\n"


def count(name: str, path: Path, times: int, threads: int, options: dict[str, Any]) -> None:
    lock = Lock(name, **options)

    def work() -> None:
        for _ in range(times):
            with lock as held:
                add_one(path, held.token)

    started = [threading.Thread(target=work) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def is_over(path: Path) -> bool:
    return path.with_suffix(".end").exists()


def grab(name: str, path: Path, options: dict[str, Any]) -> None:
    while not is_over(path):
        with Lock(name, **options) as held:
            add_one(path, held.token)
    with Lock(name, **options) as held:
        add_one(path, held.token)


def grab_async(name: str, path: Path, options: dict[str, Any]) -> None:
    async def once() -> None:
        async with AsyncLock(name, **options) as held:
            await asyncio.sleep(0)
            add_one(path, held.token)

    async def main() -> None:
        while not is_over(path):
            await once()

    asyncio.run(main())
    asyncio.run(once())


async def count_async(name: str, path: Path, times: int, tasks: int, options: dict[str, Any]) -> None:
    lock = AsyncLock(name, **options)

    async def work() -> None:
        for _ in range(times):
            async with lock as held:
                await asyncio.sleep(0)
                add_one(path, held.token)

    await asyncio.gather(*(work() for _ in range(tasks)))


def main() -> None:
    setup = json.loads(sys.argv[1])
    options, is_async = setup["options"], setup["colour"] == "async"
    if "redis" not in options["backend"]:
        # Python leaves half of a module behind that a signal's exception meets while it is imported.
        importlib.import_module("sqlalchemy.ext.asyncio")
    say("ready")
    while line := sys.stdin.readline():
        verb, name, *rest = line.split()
        try:
            if verb == "hold":
                asyncio.run(hold_async(name, options)) if is_async else hold(name, options)
                say("left")
            elif verb == "grab":
                done = False
                while not done:
                    with contextlib.suppress(KeyboardInterrupt):
                        (grab_async if is_async else grab)(name, Path(rest[0]), options)
                        done = True
                say("grabbed")
            else:
                path, times, threads = Path(rest[0]), int(rest[1]), int(rest[2])
                if is_async:
                    asyncio.run(count_async(name, path, times, threads, options))
                else:
                    count(name, path, times, threads, options)
                say("counted")
        except LockTimeout:
            say("busy")
        except BaseException as error:
            say("error", type(error).__name__)


if __name__ == "__main__":
    main()
