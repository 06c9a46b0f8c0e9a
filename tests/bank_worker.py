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
    bank = Bank(setup["kind"], Colour(setup["colour"]), setup["url"], setup["name"])
    pay = WORKERS_PAY(bank)
    deposit(bank, pay, "the worker's own")  # the forks are born with all that is imported and compiled for it
    print("ready", flush=True)
    while line := sys.stdin.readline():
        account, step = line.split()
        child = os.fork()
        if child == 0:
            die_at(bank, int(step))
            deposit(bank, pay, account)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def die_at(bank: Bank, step: int) -> None:
    left = step

    def reach(*_: Any) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    engine = bank.engine.sync_engine if bank.is_async else bank.engine
    sa.event.listen(engine, "before_cursor_execute", reach)
    sa.event.listen(engine, "after_cursor_execute", reach)
    commit = engine.dialect.do_commit

    def do_commit(connection: Any) -> None:
        reach()
        commit(connection)
        reach()

    engine.dialect.do_commit = do_commit


def deposit(bank: Bank, pay: Any, account: str) -> None:
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
