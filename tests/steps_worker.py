"""A worker that is killed between two steps, or inside one after its effect; and the function that it runs.

python steps_worker.py '{"url": URL, "colour": "sync", "effects": FILE, "kill": "between" | "inside" | null}'
"""

import json
import os
import signal
import sys
from typing import Any

from colours import Colour

from idempotent import current_call, idempotent

LEASE = 1.0


def define(setup: dict[str, Any]) -> Any:
    def effect(name: str, order: str) -> str:
        with open(setup["effects"], "a") as file:
            file.write(f"{name}\n")
        if name == "ship" and setup["kill"] == "inside":
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{name} {order}"

    async def effect_async(name: str, order: str) -> str:
        return effect(name, order)

    def between(name: str) -> None:
        if name == "ship" and setup["kill"] == "between":
            os.kill(os.getpid(), signal.SIGKILL)

    names = ("charge", "ship", "mail")
    decorate = idempotent(key="{order}", namespace="killed", backend=setup["url"], lease=LEASE)
    if setup["colour"] == "async":

        async def sell_async(order: str) -> list[str]:
            call, found = current_call(), []
            for name in names:
                found.append(await call.step(name, effect_async, name, order))
                between(name)
            return found

        return decorate(sell_async)

    def sell(order: str) -> list[str]:
        call, found = current_call(), []
        for name in names:
            found.append(call.step(name, effect, name, order))
            between(name)
        return found

    return decorate(sell)


if __name__ == "__main__":
    setup = json.loads(sys.argv[1])
    Colour(setup["colour"]).call(define(setup), "o")
