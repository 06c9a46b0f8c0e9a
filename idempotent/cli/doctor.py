"""`idempotent doctor`: whether a backend is set up so that money can rely on it. Reads only: no record is written."""

from argparse import ArgumentParser, Namespace

from idempotent import _config as config
from idempotent._drive import drive
from idempotent.cli.console import Table, print_json, print_line
from idempotent.cli.exits import Unusable
from idempotent.cli.store import SQL, censored, missing_file, open_database, shown, url_of
from idempotent.cli.verdict import CODES, Finding, verdict_of

__all__ = ["add_arguments", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("url", nargs="?", metavar="URL", help="the backend (default: IDEMPOTENT_URL)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(options: Namespace) -> int:
    """Examine the backend, print each finding with its reason and remedy, and the verdict."""
    url = url_of(options)
    try:
        findings = [_without_password(finding, url) for finding in _examine(url)]
    except (ValueError, ImportError) as error:
        raise Unusable(" ".join(str(error).split())) from error
    verdict = verdict_of(findings)
    if options.json:
        print_json({"backend": shown(url), "verdict": verdict, "findings": [each._asdict() for each in findings]})
        return CODES[verdict]
    print_line(shown(url))
    table = Table(("", "CHECK", "FOUND"), (7, 11))
    for finding in findings:
        table.add(finding.level, finding.check, finding.found)
        if finding.why:
            table.add("", "", f"  why: {finding.why}")
        if finding.remedy:
            table.add("", "", f"  do:  {finding.remedy}")
    reasons = [each.check for each in findings if each.level == ("unsafe" if verdict == "not safe" else "warning")]
    print()
    print_line(f"verdict: {verdict}" + (f", because of: {', '.join(dict.fromkeys(reasons))}" if reasons else ""))
    return CODES[verdict]


def _without_password(finding: Finding, url: str) -> Finding:
    return finding._replace(found=censored(" ".join(finding.found.split()), url))


def _examine(url: str) -> list[Finding]:
    scheme = config.check_url(url)
    if scheme == "local":
        return [
            Finding(
                "reachable",
                "unsafe",
                "by this process alone: it is its memory",
                "other processes, and this one after a restart, run the same call again",
                "name a backend that processes share: redis://, postgresql://, mysql://, or sqlite:/// on one machine",
            )
        ]
    if scheme in SQL:
        if path := missing_file(url):
            why, remedy = (
                "nothing can be said of it; the first call would make it",
                "idempotent migrate URL, then ask again",
            )
            return [Finding("table", "unsafe", f"there is no file {path}", why, remedy)]
        with open_database(url) as database:  # first of all: it says which extra is missing
            from idempotent.cli import doctor_sql

            return drive(doctor_sql.examine(database))
    from idempotent.backends.redis import RedisBackend
    from idempotent.cli import doctor_redis

    with RedisBackend(url) as backend:
        return drive(doctor_redis.examine(backend))
