"""`idempotent show`: all that is known of one record; its outcome only if asked for."""

import base64
import os
import re
from argparse import ArgumentParser, Namespace
from typing import Any

from idempotent._drive import drive
from idempotent._record import ATTEMPT_BYTES, Granted, Record, RecordId, Settled
from idempotent._typed import without_mark
from idempotent.backends.base import Backend
from idempotent.cli import find
from idempotent.cli.console import lines, print_json, print_line, span
from idempotent.cli.exits import DONE
from idempotent.cli.store import as_json, digest_of, open_store, url_of

__all__ = ["add_arguments", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    find.add_arguments(parser)
    parser.add_argument("--payload", action="store_true", help="print the recorded outcome too; it may be confidential")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(options: Namespace) -> int:
    """Print the record."""
    name = find.parse(options)
    with open_store(url_of(options)) as backend:
        record = find.find(backend, name, options.namespace)
        payload = _payload(backend, record) if options.payload else None
    if options.json:
        print_json(as_json(record) | (_payload_fields(payload) if options.payload else {}))
        return DONE
    lines(_described(record))
    if payload is not None:
        print_line(f"{'payload':<12} {_text_of(payload)}")
    elif options.payload:
        print_line(f"{'payload':<12} none: there is no outcome yet")
    advice = _advice(record, "" if options.url is None else "URL ")
    if advice:
        print(f"\n{advice}")
    return DONE


def _described(record: Record) -> list[tuple[str, str]]:
    pairs = [
        ("digest", digest_of(record)),
        ("namespace", record.namespace),
        ("key", record.key),
        ("state", f"{find.state_of(record)} (for {span(record.age)})"),
        ("kept", "until it is settled" if record.expires_in is None else f"another {span(record.expires_in)}"),
        ("token", str(record.token)),
        ("attempt", record.attempt),
        ("fingerprint", record.fingerprint or "none: arguments are not compared"),
    ]
    if record.state == "running" and (record.lease_left or 0.0) > 0:
        pairs.append(("lease", f"{span(record.lease_left or 0.0)} left"))
    if record.state in ("completed", "failed"):
        pairs += [("codec", record.codec), ("size", f"{record.size:,} bytes")]
    if record.owner:
        pairs.append(("owner", record.owner))
    return pairs


def _advice(record: Record, url: str) -> str:
    """What to do about a record in doubt; "" where there is nothing to do.

    `url` is what stands for the backend's URL: not the URL itself, which may hold a password.
    """
    if record.state != "unknown" and not (record.state == "running" and (record.lease_left or 0.0) <= 0):
        return ""
    again = "" if record.expires_in is None else " The next call takes over, unless it is settled before."
    return (
        f"Its runner died, and nobody knows whether its effect took place.{again} Find out where the effect would be seen,"
        " then settle it:\n"
        f"  idempotent resolve {url}{digest_of(record)[:12]} --not-applied\n"
    ) + (
        "It is of a request, whose answer cannot be recorded by hand: if it took effect, undo that first, or leave the"
        " record, and the key stays refused."
        if _of_a_request(record.key)
        else f"  idempotent resolve {url}{digest_of(record)[:12]} --function MODULE:NAME --result JSON"
    )


def _of_a_request(key: str) -> bool:
    """Whether `key` is as the HTTP middleware makes them: "-:KEY", or the scope behind its length, "5:alice:KEY"."""
    length, _, rest = key.partition(":")
    found = re.fullmatch("-|[0-9]{1,5}", length)
    return found is not None and (length == "-" or rest[int(length) : int(length) + 1] == ":")


def _payload(backend: Backend, record: Record) -> Settled | None:
    """The outcome as it is stored; None: there is none.

    Backends give outcomes to claims alone. A claim changes no settled record, and is taken back if the record has
    gone meanwhile.
    """
    if record.state not in ("completed", "failed"):
        return None
    rid, attempt = RecordId(record.namespace, record.key), os.urandom(ATTEMPT_BYTES)
    reply = drive(backend.claim(rid, attempt=attempt, fingerprint=b"", lease=10.0, keep=10.0, takeover=False))
    if isinstance(reply, Granted):
        drive(backend.release(rid, attempt=attempt, token=reply.token))
    return reply if isinstance(reply, Settled) else None


def _payload_fields(payload: Settled | None) -> dict[str, Any]:
    if payload is None:
        return {"payload": None}
    text = _readable(payload)
    if text is None:
        return {"payload_base64": base64.b64encode(payload.body).decode()}
    return {"payload": text}


def _text_of(payload: Settled) -> str:
    text = _readable(payload)
    return f"base64 {base64.b64encode(payload.body).decode()}" if text is None else text


def _readable(payload: Settled) -> str | None:
    """The body as text, without the mark of its form; None: it is none."""
    try:
        return without_mark(payload.body).decode()
    except UnicodeDecodeError:
        return None
