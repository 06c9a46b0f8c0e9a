"""A process that makes one deposit per line, `ACCOUNT STEP`, in a fork that is killed at that step, and tells its exit.

The steps are before and after each statement, and before and after the commit, from 0 on.
"""

import asyncio
import json
import os
import signal
import sys
from typing import Any

import sqlalchemy as sa
from bank import Bank
from colours import Colour
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from test_within import WORKERS_PAY


def main() -> None:
    setup = json.loads(sys.argv[1])
    bank_of(setup)  # the forks are born with the driver imported
    print("ready", flush=True)
    while line := sys.stdin.readline():
        account, step = line.split()
        child = os.fork()
        if child == 0:
            work(setup, account, int(step))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def bank_of(setup: dict[str, Any]) -> Bank:
    return Bank(setup["kind"], Colour(setup["colour"]), setup["url"], setup["name"])


def work(setup: dict[str, Any], account: str, step: int) -> None:
    bank = bank_of(setup)
    left = step

    def reach(*_: Any) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    engine = bank.engine.sync_engine if bank.is_async else bank.engine
    with engine.connect() if not bank.is_async else open(os.devnull):
        pass  # what a new connection asks for itself is no step of ours
    sa.event.listen(engine, "before_cursor_execute", reach)
    sa.event.listen(engine, "after_cursor_execute", reach)
    commit = engine.dialect.do_commit

    def do_commit(connection: Any) -> None:
        reach()
        commit(connection)
        reach()

    engine.dialect.do_commit = do_commit
    pay = WORKERS_PAY(bank)
    if bank.is_async:

        async def main() -> None:
            async with AsyncSession(bank.engine) as session:
                await pay(session, account, 5)
                await session.commit()

        asyncio.run(main())
    else:
        with Session(bank.engine) as session:
            pay(session, account, 5)
            session.commit()


if __name__ == "__main__":
    main()
