"""A worker process for crash tests: takes orders on standard input, tells on standard output what happens.

python worker.py '{"colour": "sync", "options": {"backend": URL, "key": "{order}", ...}, "effects": FILE}'

call ORDER        call the function; it says "enter TOKEN" from inside and waits for the next line:
                  "return TEXT" or "raise"; then comes "result JSON" or "error CLASS NOTES..."
storm ORDER N     N calls at once of a function that does not wait; "answers JSON"
fail ORDER N      the same of one that raises
"""

import json
import os
import sys
import threading
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from colours import Colour

from idempotent import current_call


def say(*words: object) -> None:
    print(*words, flush=True)


class CardDeclinedError(Exception):
    pass


def main() -> None:
    setup = json.loads(sys.argv[1])
    colour = Colour(setup["colour"])
    effects = setup["effects"]
    storming = threading.Event()
    failing = threading.Event()

    def work(order: str) -> str:
        call = current_call()
        assert call is not None
        if not storming.is_set():
            say("enter", call.token)
            verb, _, text = sys.stdin.readline().strip().partition(" ")
            if verb == "raise":
                raise CardDeclinedError(order)
        elif failing.is_set():
            with open(effects, "a") as file:
                file.write(f"{order} {call.token}\n")
            raise CardDeclinedError(order)
        else:
            time.sleep(0.05)
            text = order
        with open(effects, "a") as file:
            file.write(f"{order} {call.token}\n")
        return text

    function = colour.define(work, namespace="worker", **setup["options"])
    say("ready")
    while line := sys.stdin.readline():
        verb, order, *times = line.split()
        try:
            if verb in ("storm", "fail"):
                storming.set()
                if verb == "fail":
                    failing.set()
                answers: list[Any] = colour.storm(function, int(times[0]), order)
                say("answers", json.dumps([a if isinstance(a, str) else repr(a) for a in answers]))
            else:
                say("result", json.dumps(colour.call(function, order)))
        except BaseException as error:
            say("error", type(error).__name__, *getattr(error, "__notes__", ()))


if __name__ == "__main__":
    main()
