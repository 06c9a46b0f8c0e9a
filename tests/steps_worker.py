"""Workers that are killed in the midst of a function of three steps, one at each moment of it; and that function.

python steps_worker.py '{"url": URL, "colour": "sync", "directory": DIRECTORY}'
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from colours import Colour

from idempotent import current_call, idempotent

STEPS = ("charge", "ship", "mail")
MOMENTS = ["begun", *(f"{moment} {step}" for step in STEPS for moment in ("before", "inside", "behind"))]
"""Before the first step; of each step before its effect, between effect and record, and behind its record."""


def define(setup: dict[str, Any], *, kill: bool = False) -> Any:
    """`sell(moment)`: each moment is an order of its own, whose worker, with `kill`, dies at that moment."""

    def moment_is(moment: str, order: str) -> None:
        if kill and moment == order:
            os.kill(os.getpid(), signal.SIGKILL)

    def effect(step: str, order: str) -> str:
        moment_is(f"before {step}", order)
        with (Path(setup["directory"]) / order).open("a") as file:
            file.write(f"{step}\n")
        moment_is(f"inside {step}", order)
        return f"{step} {order}"

    async def effect_async(step: str, order: str) -> str:
        return effect(step, order)

    decorate = idempotent(key="{order}", namespace="killed", backend=setup["url"], lease=1.0 if kill else 30.0)
    if setup["colour"] == "async":

        async def sell_async(order: str) -> list[str]:
            call, found = current_call(), []
            moment_is("begun", order)
            for step in STEPS:
                found.append(await call.step(step, effect_async, step, order))
                moment_is(f"behind {step}", order)
            return found

        return decorate(sell_async)

    def sell(order: str) -> list[str]:
        call, found = current_call(), []
        moment_is("begun", order)
        for step in STEPS:
            found.append(call.step(step, effect, step, order))
            moment_is(f"behind {step}", order)
        return found

    return decorate(sell)


if __name__ == "__main__":
    setup = json.loads(sys.argv[1])
    Colour(setup["colour"]).call(define(setup).peek, "none")  # imports what all of them need
    for moment in MOMENTS:
        if not (worker := os.fork()):
            Colour(setup["colour"]).call(define(setup, kill=True), moment)
            os._exit(1)
        _, status = os.waitpid(worker, 0)
        assert os.WIFSIGNALED(status), f"{moment}: {status}"
