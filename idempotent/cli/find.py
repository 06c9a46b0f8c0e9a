"""One record by the name that an operator has: its key, or the digest that logs and errors show."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from idempotent._record import Record
from idempotent.backends.base import Backend
from idempotent.cli.console import Progress, plain, span
from idempotent.cli.exits import Refused, Unusable
from idempotent.cli.store import SCHEMES, digest_of, each
from idempotent.decorator import idempotent

__all__ = ["add_arguments", "find", "named", "on_behalf_of", "parse", "parse_digest", "state_of"]

_DIGEST = re.compile(r"[0-9a-f]{6,48}")
_SHOWN = 5


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments that name the backend and one record of it."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[URL] RECORD",
        help="the backend (default: IDEMPOTENT_URL); and the record: its key, or its digest as logs show it, or the"
        " digest's first 6 characters or more",
    )
    parser.add_argument(
        "--namespace",
        metavar="NAME",
        help="RECORD is a key in this namespace: found at once, and not by going through all records",
    )


def parse(options: Namespace) -> str:
    """What names the record; the URL goes into `options.url`. Raises Unusable for more or fewer words than it takes."""
    words: list[str] = options.words
    if len(words) > 2:
        raise Unusable(f"a backend and one record are named by two words, not {len(words)}; quote what holds spaces")
    if len(words) == 1 and words[0].partition("://")[0].partition("+")[0].lower() in SCHEMES and "://" in words[0]:
        raise Unusable("that is the URL of a backend; name the record, too")  # it may hold a password: not shown
    options.url = words[0] if len(words) == 2 else None
    return words[-1]


def find(backend: Backend, name: str, namespace: str | None) -> Record:
    """The one record that `name` names: by key if a namespace is given, else by key or digest among all.

    Raises Refused where there is none, or more than one.
    """
    if namespace is not None:
        record: Record | None = on_behalf_of(backend, namespace).with_key(name).peek()
        if record is None:
            raise Refused(f"there is no record of the key {plain(name)!r} in the namespace {plain(namespace)!r}")
        return record
    found = list(_matching(backend, name))
    if not found:
        raise Refused(
            f"no record has the key, or a digest that begins with, {plain(name)!r}; `idempotent list` shows what there is"
        )
    if len(found) > 1:
        some = "".join(f"\n  {digest_of(each)}  {named(each)}" for each in found[:_SHOWN])
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise Refused(f"{len(found)} records are called {plain(name)!r}; name one by more of its digest:{some}{more}")
    return found[0]


def parse_digest(name: str) -> str | None:
    """`name` as the digest, or the beginning of one, that it may be; None: it is none."""
    digest = name.lower()
    return digest if _DIGEST.fullmatch(digest) else None


def _matching(backend: Backend, name: str) -> Iterator[Record]:
    digest = parse_digest(name)
    with Progress("records searched") as progress:
        for number, record in enumerate(each(backend)):
            progress.tell(number)
            if record.key == name or (digest and digest_of(record).startswith(digest)):
                yield record
                if digest and len(digest) == 48:
                    return


def named(record: Record) -> str:
    """The record as messages name it."""
    return plain(f"{record.namespace} {record.key}")


def state_of(record: Record) -> str:
    """The state for people: a runner whose lease is over is said to be so."""
    if record.state != "running":
        return record.state
    left = record.lease_left or 0.0
    return f"running, lease over for {span(-left)}" if left <= 0 else "running"


def on_behalf_of(backend: Backend, namespace: str) -> Any:
    """A decorated function that stands for one that is not loaded here: for what needs neither its code nor its codec."""

    def operator() -> None:
        raise NotImplementedError

    return idempotent(backend=backend, namespace=namespace, key="-")(operator)
