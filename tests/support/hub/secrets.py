"""What no message may show."""

from __future__ import annotations

from tests.support.hub.loopback import READER, WRITER

SECRETS = (WRITER, READER, "signature=", "secretsecret", "Bearer")


def refused(error: BaseException, *words: str) -> None:
    """One line that says the words, and nothing secret, in the message or in what a traceback would show."""
    text = str(error)
    shown = text + repr(error) + repr(error.__cause__)
    assert "\n" not in text
    assert not any(secret in shown for secret in SECRETS), shown
    for word in words:
        assert word in text, text
