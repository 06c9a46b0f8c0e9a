"""`idempotent resolve`: settle by hand what a dead run left in doubt.

A result must be recorded in a form that the function's own replays read, and a record in doubt does not say which: the
codec depends on the function's return annotation and serializer. So a result, and an error, are given together with the
function itself, and are what *it* would have recorded; without it only `--not-applied` is served. A wrong guess would
not be seen here, but by whoever is answered from the record.
"""

import copy
import importlib
import sys
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import orjson

from idempotent import _config as config
from idempotent._failures import why
from idempotent._record import Record
from idempotent._typed import TypedJSON
from idempotent.backends.base import Backend
from idempotent.cli import find
from idempotent.cli.console import confirm, print_json, print_line, span
from idempotent.cli.exits import DONE, Refused, Unusable
from idempotent.cli.store import digest_of, open_store, url_of
from idempotent.decorator import _build, _find, _Spec
from idempotent.errors import CallError, InProgress, ResultTypeWarning, SerializationError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    find.add_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--result", metavar="JSON", help="it took place, and this is its result; needs --function")
    what.add_argument(
        "--error", metavar="CLASS", help="it failed with this error, one that error_ttl names; needs --function"
    )
    what.add_argument("--not-applied", action="store_true", help="it did not take place; the next call runs")
    parser.add_argument(
        "--error-args", metavar="JSON", default="[]", help="the arguments of the error, such as '[\"no funds\"]'"
    )
    parser.add_argument(
        "--function",
        metavar="MODULE:NAME",
        help="the decorated function: it is imported, and says how results are kept, for how long, and which errors are;"
        " RECORD may then be a key of it",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(options: Namespace) -> int:
    """Settle the record, if that is allowed and confirmed."""
    name = find.parse(options)
    url = url_of(options)
    spec = None if options.function is None else _spec_of(options.function)
    if spec is None and not options.not_applied:
        raise Unusable(
            "a result or an error is recorded as the function itself would, so --function MODULE:NAME is needed;"
            " a form that its replays cannot read would be found out by its callers"
        )
    settle = _what(options, spec)
    with open_store(url) as backend:
        record = _by_key(backend, name, spec) if options.namespace is None else None
        if record is None:
            record = find.find(backend, name, options.namespace)
        if spec is not None and record.namespace != spec.namespace:
            raise Refused(
                f"the record is of {record.namespace}, and {options.function} keeps its own under {spec.namespace}:"
                " another function's codec could write what nobody can read"
            )
        function = find.on_behalf_of(backend, record.namespace) if spec is None else _on(backend, spec)
        if record.state not in ("unknown", "running"):
            raise Refused(f"it is {record.state}, and only records in doubt are resolved")
        if record.state == "running" and (record.lease_left or 0.0) > 0:
            raise Refused(f"its runner is alive: its lease has {span(record.lease_left or 0.0)} left")
        confirm(
            f"Settle {find.named(record)} ({digest_of(record)[:12]}), which is {find.state_of(record)}, as"
            f" {'not applied: the next call runs' if options.not_applied else 'done: duplicates are answered from now on'}?",
            yes=options.yes,
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ResultTypeWarning)  # the result would not come back as what it is
                settled = function.resolve(record.key, **settle)
        except InProgress as error:
            raise Refused(f"its runner is alive: {error}") from None
        except (CallError, ValueError, SerializationError) as error:
            raise Refused(str(error)) from None
    if not settled:
        raise Refused("another settled it in the same moment; `idempotent show` tells how")
    how = "released" if options.not_applied else "completed" if options.error is None else "failed"
    if options.json:
        print_json({"digest": digest_of(record), "namespace": record.namespace, "key": record.key, "state": how})
        return DONE
    told = {
        "released": "the next call runs",
        "completed": "duplicates get this result",
        "failed": "duplicates get this error",
    }
    print_line(f"resolved: {find.named(record)}; {told[how]}")
    return DONE


def _by_key(backend: Backend, name: str, spec: _Spec | None) -> Record | None:
    """The function's record under the key `name`; None: there is none, or no function."""
    if spec is None:
        return None
    found: Record | None = find.on_behalf_of(backend, spec.namespace).with_key(name).peek()
    return found


def _spec_of(reference: str) -> _Spec:
    """The decorated function that `module:name` names. Raises Unusable."""
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise Unusable(f"--function must be MODULE:NAME, such as shop.payments:charge, not {reference!r}")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the script's own folder is that of the installation
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # of a script without its `if __name__`, which would end this one, too
        raise Unusable(f"{reference} cannot be imported ({type(error).__name__}: {error})") from error
    try:
        spec: _Spec = _find(found).__idempotent_spec__[0]
    except TypeError as error:
        raise Unusable(str(error)) from None
    if spec.within is not None:
        raise Unusable(f"{reference} records within its caller's transaction, where nothing is ever left in doubt")
    return spec


def _on(backend: Backend, spec: _Spec) -> Any:
    """The function on `backend`, whatever backend it names itself; its methods are plain ones."""
    twin = copy.copy(spec)
    twin.options = {**spec.options, "backend": backend}
    twin.is_async = False
    twin._made = None
    return _build(twin, None)


def _what(options: Namespace, spec: _Spec | None) -> dict[str, Any]:
    """The argument of `resolve`. Raises Refused for a result or an error that the function could not have had."""
    if options.not_applied:
        return {"not_applied": True}
    assert spec is not None
    return {"result": _result(options.result, spec)} if options.error is None else {"error": _error(options, spec)}


def _result(text: str, spec: _Spec) -> Any:
    """The value that `text` stands for, of the type that the function returns."""
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Unusable(f"--result is no JSON: {error}") from None
    if not spec.keep_result:
        if text.strip() != "null":
            raise Refused(
                "this function keeps no result (keep_result=False), so its duplicates get None: --result null"
            )
        return None
    try:
        typed = TypedJSON(spec.function)
        typed.ready()
        return typed.value_of(text.encode())
    except SerializationError as error:
        raise Refused(
            f"the result does not fit what {spec.function.__qualname__} returns: {error}. Where JSON cannot say it, settle it"
            " in Python: function.resolve(key, result=...)"
        ) from None


def _error(options: Namespace, spec: _Spec) -> Exception:
    named = spec.options.get("error_ttl", config.settings.error_ttl) or {}
    classes: dict[str, type[Exception]] = {}
    left = list(named)
    while left:
        cls = left.pop()
        classes.setdefault(cls.__qualname__, cls)
        classes[f"{cls.__module__}.{cls.__qualname__}"] = cls
        left += type.__subclasses__(cls)
    kind = classes.get(options.error)
    if kind is None:
        there = ", ".join(sorted(cls.__qualname__ for cls in named)) or "no class"
        raise Refused(
            f"{options.error!r} is not among the errors that {spec.function.__qualname__} records: its error_ttl"
            f" names {there}"
        )
    try:
        arguments = orjson.loads(options.error_args)
    except orjson.JSONDecodeError as error:
        raise Unusable(f"--error-args is no JSON: {error}") from None
    if not isinstance(arguments, list):
        raise Unusable("--error-args must be a JSON array: the arguments, in their order")
    try:
        return kind(*arguments)
    except Exception as error:
        raise Refused(f"{kind.__qualname__} cannot be made from these arguments ({why(error)})") from None
