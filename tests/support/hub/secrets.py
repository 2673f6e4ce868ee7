"""What no message may show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from embedsurgery.errors import EmbedSurgeryError, HubError
from tests.support.errors import raises
from tests.support.hub.loopback import READER, WRITER

SECRETS = (WRITER, READER, "signature=", "secretsecret", "Bearer")


@contextmanager
def raises_safely(kind: type[EmbedSurgeryError] = HubError, /, **fields: object) -> Iterator[Any]:
    """As `raises`; also no secret is in the error, or in what a traceback would show."""
    with raises(kind, **fields) as caught:
        yield caught
    error = caught.value
    shown = str(error) + repr(error) + repr(error.__cause__)
    assert not any(secret in shown for secret in SECRETS), shown
