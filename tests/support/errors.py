"""Errors pinned by their type and fields, never by their prose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from embedsurgery.errors import EmbedSurgeryError

FIELDS = ("what", "where", "expected", "found", "hint")


def check_error(error: BaseException, **fields: object) -> None:
    """Check an error's fields.

    Args:
        error: One of embedsurgery's.
        fields: Field -> a text that it contains, several in a tuple, or None for a field that is not set. Numbers are
            compared as text.
    """
    assert isinstance(error, EmbedSurgeryError)
    assert "\n" not in str(error)
    for name, wanted in fields.items():
        assert name in FIELDS
        value = getattr(error, name)
        if wanted is None:
            assert value is None, f"{name} of {error!r}"
            continue
        assert value is not None, f"{name} of {error!r}"
        for part in wanted if isinstance(wanted, tuple) else (wanted,):
            assert str(part) in str(value), f"{name}: {part!r} is not in {str(value)!r}"


@contextmanager
def raises(kind: type[EmbedSurgeryError], /, **fields: object) -> Iterator[Any]:
    """As ``pytest.raises``, for an error of exactly this type with fields that `check_error` accepts."""
    with pytest.raises(kind) as caught:
        yield caught
    assert type(caught.value) is kind
    check_error(caught.value, **fields)
