"""The token that a piece of work uses throughout, such as the one that ``--token`` gives. Loads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Token = str | bool | None
"""As huggingface_hub takes it: a token, False for none, None for HF_TOKEN or the stored login."""

_given: ContextVar[Token] = ContextVar("_given", default=None)


@contextmanager
def using_token(token: Token) -> Iterator[None]:
    """Inside, the Hub is asked with this token wherever a call is given none."""
    before = _given.set(token)
    try:
        yield
    finally:
        _given.reset(before)


def chosen(token: Token) -> Token:
    """The token of a call, or of the work that it is part of."""
    return _given.get() if token is None else token
