"""Functions whose annotations are strings, for test_serializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from decimal import Context


@dataclass
class Early:
    id: UUID
    tags: tuple[str, ...]


def early(n: UUID) -> Early:
    return Early(n, ("a", "b"))


async def early_async(n: UUID) -> Early:
    return Early(n, ("a", "b"))


def with_context(n: int, context: Context | None = None) -> tuple[int, str]:
    """Its parameter's annotation cannot be resolved at run time, and need not be."""
    return n, "done"


def never(n: int) -> Nowhere:  # type: ignore[name-defined]  # noqa: F821
    raise AssertionError("ran")


def late(n: int) -> list[Late]:  # type: ignore[name-defined]  # noqa: F821
    return [Late(n)]  # type: ignore[name-defined]  # noqa: F821


def local(n: int) -> Any:
    """A function that returns an instance of a class defined in the same scope."""

    @dataclass
    class Inner:
        id: int

    def inner(n: int) -> Inner:
        return Inner(n)

    return inner


def define_late() -> None:
    """Define what `late` is annotated with."""

    @dataclass
    class Late:
        id: int

    globals()["Late"] = Late
