"""What a guarded call costs: ours, the floor of each store and the libraries that people use, turn by turn in one run.

python -m benchmarks [--quick] [--json FILE] [--only SECTION ...] [--redis URL] [--postgres URL]

How to read it. Everybody takes turns in short rounds, so that what the machine does meanwhile hits all of them; ratios
are taken within a round, and their median and quartiles are shown. Ratios carry from one machine to another, times do
not. The floor of a store is the commands that nobody can do without, on its usual client (see `_floors.py`).

- Storms: 200 duplicates of one call that takes 50 ms, in one process and in eight: how often it ran, how many got its
  answer, the commands that Redis got, and the milliseconds from its end to the last answer. A storm before them, which
  does not count, opens connections and loads scripts; what opens a connection or asks whether it is alive (HELLO, CLIENT,
  AUTH, SELECT, PING) is not among the commands. A peer that is WRONG ran it more often than once, or left callers without
  the answer; its speed is worth nothing then.
- Calls: the first call with a key, and a replay, and beside them what the storms say of the same peer on that store: runs
  for 200 duplicates, and callers without the answer. Replays are of one key, again and again; in the rows "keys of another
  process" each is of another key, which this process never saw, and the floor's are, too. "one CPU" has server and caller
  on the same one, which leaves out what waking another CPU costs; the targets are about it where it can be had.
- Growth: our calls beside stores of a thousand, a hundred thousand and a million records, as ratios to the smallest.
- Costs: bytes in Redis and in the process, imports, hooks for events, and several processes at once.
- `--quick` measures all this for shorter, and leaves out stores of more than 20,000 records, storms in eight processes but
  those of sync code on Redis, the storm in front that opens connections, the throughput of PostgreSQL, and calls on
  "all CPUs" where "one CPU" can be had.

The servers are started for the run, from PATH or from wheels; those that are given by URL must serve nobody else.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks._peers import PACKAGES
from benchmarks._report import commit, judge, machine, met_or_missed, say
from benchmarks._sections import SECTIONS, Bench, Result
from benchmarks._server import postgres_server, redis_server, versions

_QUICK = (
    "--quick: shorter and noisier, without large stores, storms in eight processes but one, PostgreSQL's throughput"
    " and calls on all CPUs"
)


@contextmanager
def prepared(redis_url: str | None, postgres_url: str | None, *, quick: bool) -> Iterator[Bench]:
    """The servers and files, which are gone with the block."""
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks-") as directory,
        redis_server(redis_url) as redis,
        postgres_server(postgres_url) as postgres,
    ):
        yield Bench({"redis": redis, "postgresql": postgres}, Path(directory), quick)


def measured(bench: Bench, sections: Sequence[str]) -> Iterator[tuple[str, Result]]:
    """What each section found, one after the other."""
    for name, (measure, _, _) in SECTIONS.items():
        if name in sections:
            yield name, measure(bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. The exit code is 0 whether targets are met or not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes, and noisier")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured there, too")
    parser.add_argument("--only", metavar="SECTION", choices=SECTIONS, nargs="+", help=f"of: {', '.join(SECTIONS)}")
    parser.add_argument("--redis", metavar="URL", help="a server that serves nobody else; default: one is started")
    parser.add_argument("--postgres", metavar="URL", help="the same; postgresql://user@host:port/database")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.quick:
        print(_QUICK, flush=True)
    found: Result = {"commit": commit(), "machine": machine(*PACKAGES), "quick": options.quick, "sections": {}}
    try:
        with prepared(options.redis, options.postgres, quick=options.quick) as bench:
            found["machine"] |= versions(bench.url("redis"), bench.url("postgresql"))
            about = {"commit": found["commit"] or "unknown"} | found["machine"]
            print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
            for name, section in measured(bench, options.only or list(SECTIONS)):
                found["sections"][name] = section
                judge(found["sections"])
                print(f"\n{SECTIONS[name][1](section)}", flush=True)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    goals = [target for name, section in found["sections"].items() for target in SECTIONS[name][2](section)]
    found["targets"] = [target.as_dict() for target in goals]
    print(f"\n{met_or_missed(goals)}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
