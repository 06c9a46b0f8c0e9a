"""The backend that a command works on: opened without making anything, and called by a name that holds no password."""

import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from idempotent import _config as config
from idempotent._drive import drive
from idempotent._record import Record, RecordId, StateName
from idempotent.backends.base import Backend
from idempotent.cli.exits import Unusable

if TYPE_CHECKING:
    from idempotent.backends.sql import SQLBackend

__all__ = [
    "SCHEMES",
    "SQL",
    "as_json",
    "censored",
    "digest_of",
    "each",
    "missing_file",
    "open_database",
    "open_store",
    "shown",
    "url_of",
]

SQL = ("sqlite", "postgresql", "postgres", "mysql", "mariadb")
"""The schemes of backends that keep a table."""
SCHEMES = ("local", "redis", "rediss", "unix", *SQL)
"""The schemes of all backends, without their drivers."""


def url_of(options: Namespace) -> str:
    """The URL that the command line or the environment names. Raises Unusable where neither does."""
    url: str | None = options.url or os.environ.get("IDEMPOTENT_URL")
    if not url:
        raise Unusable("no backend is named: give its URL, or set IDEMPOTENT_URL")
    return url


def open_store(url: str) -> Backend:
    """The blocking view of the backend that `url` names; no table or file is made.

    Raises Unusable: no backend serves the URL, its driver is not installed, or there is nothing to look into.
    """
    try:
        scheme = config.check_url(url)
        if scheme == "local":
            raise Unusable("local:// is the memory of one process, which no other can look into")
        if scheme not in SQL:
            return config.open_backend(url).blocking()
        if path := missing_file(url):
            raise Unusable(f"there is no file {path}; `idempotent migrate` makes it, and so does the first call")
        return open_database(url).blocking()
    except (ValueError, ImportError) as error:
        raise Unusable(" ".join(str(error).split())) from error


def open_database(url: str) -> "SQLBackend":
    """The backend of a database, which makes no table. Raises ValueError or ImportError, as `open_backend`."""
    from idempotent.backends.sql import SQLBackend

    return SQLBackend(url, create=False)


def missing_file(url: str) -> str:
    """The file that `url` names and that is not there, which opening it would make; "": there is none such."""
    if config.check_url(url) != "sqlite":
        return ""
    path = unquote(urlsplit(url).path[1:])
    return "" if path.startswith("file:") or Path(path).exists() else path


def shown(url: str) -> str:
    """`url` without its password and options, for people."""
    scheme = config.check_url(url)
    parts = urlsplit(url)
    if "@" in parts.path + parts.query + parts.fragment:  # of a password that was not escaped
        return f"{scheme}://..."
    user, at, host = parts.netloc.rpartition("@")
    name = user.partition(":")[0]
    return f"{parts.scheme}://{name + at if name else ''}{host}{parts.path}"


def censored(text: str, url: str | None) -> str:
    """`text` without the password in `url`, which a driver may have quoted."""
    try:
        password = urlsplit(url or "").password
    except ValueError:
        password = None
    if password and len(password) > 2:
        for form in (password, unquote(password)):
            text = text.replace(form, "***")
    return text


def each(backend: Backend, state: StateName | None = None, namespace: str | None = None) -> Iterator[Record]:
    """The records that `backend.scan` finds, each once, where Redis' SCAN may give a key twice."""
    found = backend.scan(state=state, namespace=namespace)
    seen: set[bytes] = set()

    async def step() -> Record | None:
        return await anext(found, None)

    while (record := drive(step())) is not None:
        digest = bytes.fromhex(digest_of(record))
        if digest not in seen:
            seen.add(digest)
            yield record


def digest_of(record: Record) -> str:
    """The digest that logs, errors and events show for this record."""
    return RecordId(record.namespace, record.key).digest


def as_json(record: Record) -> dict[str, Any]:
    """`record` for programs: durations in seconds, and its digest."""
    fields = record._asdict()
    for name in ("age", "lease_left", "expires_in"):
        if fields[name] is not None:
            fields[name] = round(fields[name], 3)
    return {"digest": digest_of(record), **fields}
