"""The Hub token of the current context, such as the one that ``--token`` gives. Imports nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Token = str | bool | None
"""As huggingface_hub takes it: a token, False for none, None for HF_TOKEN or the stored login."""

_current: ContextVar[Token] = ContextVar("_current", default=None)


@contextmanager
def using_token(token: Token) -> Iterator[None]:
    """Use this token inside the block for every request that is given no token of its own."""
    before = _current.set(token)
    try:
        yield
    finally:
        _current.reset(before)


def resolve_token(token: Token) -> Token:
    """Return a call's own token, or else that of `using_token`."""
    return _current.get() if token is None else token
