"""Imports point one way: a module imports only from those above it in this list."""

import ast
from pathlib import Path

import pytest

from idempotent import _HOME_OF

PACKAGE = Path(__file__).parent.parent / "idempotent"

LAYERS = [
    ["errors"],
    ["_record"],
    ["_machine"],
    ["canonical"],
    ["_failures", "_shape"],
    ["_typed"],
    ["keys", "serializers"],
    ["events", "_signals", "_options"],
    ["otel", "prometheus"],
    ["backends", "backends.base", "backends._loops", "backends._watchdog"],
    ["_near", "backends._coloured", "backends._listener"],
    ["backends._notify", "backends._redis_links"],
    ["backends._pubsub", "backends._redis_nodes"],
    ["backends._redis_sources"],
    ["backends._engines", "backends._statements"],
    ["backends.local", "backends.redis", "backends.sql"],
    ["backends._caller"],
    ["_config"],
    ["_run"],
    ["_flow", "_rooms"],
    ["_acquire", "_steps", "_observe"],
    ["_drive", "_aio"],
    ["_types"],
    ["lock"],
    ["_within"],
    ["decorator"],
    ["http._fields"],
    ["http._rules"],
    ["http._exchange"],
    ["http._tasks"],
    ["http._retry"],
    ["http.asgi", "http.wsgi", "http._httpx", "http._requests"],
    ["http.django", "http.client"],
    ["http"],
    ["sql"],
    ["_demo"],
    ["cli", "cli.exits", "cli.interrupts", "cli.schema"],
    ["cli.console", "cli.verdict"],
    ["cli.store"],
    ["cli.find"],
    ["cli.listing", "cli.show", "cli.forget", "cli.resolve", "cli.purge", "cli.migrate"],
    ["cli.doctor_redis", "cli.doctor_sql"],
    ["cli.doctor"],
    ["__init__"],
    ["cli.main"],
    ["__main__"],
    ["testing._world"],
    ["testing._callers"],
    ["testing.contract", "testing.explorer", "testing.faults", "testing.history", "testing.clock"],
    ["testing.soak", "testing.storms", "testing.stateful"],
    ["testing.strategies", "testing.proofs"],
    ["testing.pytest_plugin", "testing.hypothesis_plugin"],
    ["testing.__main__"],
    ["testing"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str) -> set[str]:
    """The modules of the package that a source imports, wherever in it; of what `__init__` offers, the home."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import, which this test cannot place"
            assert node.module is not None
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            inner = name.removeprefix("idempotent").removeprefix(".")
            inner = _HOME_OF.get(inner, inner)
            if name.split(".")[0] == "idempotent" and inner in LEVEL:
                found.add(inner)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_its_layer() -> None:
    assert sorted(map(name_of, FILES)) == sorted(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_only_from_above(path: Path) -> None:
    name = name_of(path)
    if name == "__init__":
        return  # names only: what it offers, it imports late
    wrong = {other for other in imports_of(path.read_text("utf-8")) - {name} if LEVEL[other] > LEVEL[name]}
    assert wrong == set()


def test_a_name_that_the_package_offers_is_an_import_of_its_home() -> None:
    assert imports_of("def late():\n    from idempotent import Lock, open_backend, _machine") == {
        *("lock", "_config", "_machine")
    }


@pytest.mark.parametrize("heavy", ["redis", "sqlalchemy", "pydantic", "hypothesis", "zstandard", "cryptography"])
def test_a_heavy_library_is_imported_at_the_top_only_where_it_is_the_subject(heavy: str) -> None:
    subjects = {
        "redis": {
            *("backends.redis", "backends._pubsub", "cli.doctor_redis"),
            *("backends._redis_links", "backends._redis_nodes", "backends._redis_sources"),
        },
        "hypothesis": {"testing.strategies", "testing.stateful"},
        "sqlalchemy": {
            *("backends.sql", "backends._engines", "backends._notify", "backends._statements", "backends._caller"),
            *("sql", "cli.schema", "cli.doctor_sql"),
        },
    }
    importers = set()
    for path in FILES:
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == heavy for name in names):
                importers.add(name_of(path))
    assert importers <= subjects.get(heavy, set())
