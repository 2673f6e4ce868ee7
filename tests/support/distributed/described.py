"""Errors of a worker as plain values, which it can write to a file, and a check of them."""

from __future__ import annotations

import re

from embedsurgery import errors
from tests.support.errors import FIELDS, check_error

Described = dict[str, str | None]


def describe(error: errors.EmbedSurgeryError) -> Described:
    """Return the name of an error's type and its fields."""
    fields = {name: getattr(error, name) for name in FIELDS}
    return {"type": type(error).__name__, **{name: None if v is None else str(v) for name, v in fields.items()}}


def check_described(described: Described, kind: type[errors.EmbedSurgeryError], **fields: object) -> None:
    """Check a described error as `check_error` does. A compiled pattern is searched for in a field."""
    assert described["type"] == kind.__name__, described
    patterns = {name: value for name, value in fields.items() if isinstance(value, re.Pattern)}
    for name, pattern in patterns.items():
        assert pattern.search(described[name] or ""), described
    values = {name: described[name] for name in FIELDS}
    error = kind(values.pop("what") or "", **values)  # type: ignore[arg-type]
    check_error(error, **{name: value for name, value in fields.items() if name not in patterns})
