"""Durations and URL options, checked: errors name the option."""

from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl

__all__ = ["Duration", "seconds", "split_url"]

Duration = float | timedelta


def seconds(name: str, value: Any, *, zero: bool = False) -> float:
    """The duration `value`, seconds or timedelta, as seconds; an error that names the option for anything else."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be seconds or a timedelta, not {value!r}")
    if not (0 <= value < 1e10 if zero else 0 < value < 1e10):
        raise ValueError(f"{name} must be {'0 or more' if zero else 'more than 0'} seconds, and finite, not {value!r}")
    return float(value)


def split_url(url: str, ours: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The URL without the query options named in `ours`, and these."""
    bare, _, query = url.partition("?")
    found: dict[str, str] = {}
    rest = []
    for part in query.split("&"):
        pair = parse_qsl(part, keep_blank_values=True)
        if pair and pair[0][0] in ours:
            found.update(pair)
        elif part:
            rest.append(part)
    return (f"{bare}?{'&'.join(rest)}" if rest else bare), found


def timeout_of(given: Any, options: dict[str, str]) -> float:
    """Seconds of `timeout=`, from the argument or else from the URL's options; 5 by default."""
    if given is None and "timeout" in options:
        try:
            given = float(options["timeout"])
        except ValueError:
            raise ValueError(f"timeout= in the URL must be seconds, not {options['timeout']!r}") from None
    return 5.0 if given is None else seconds("timeout", given)
