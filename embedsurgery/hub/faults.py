"""Turns what fails on the way to the Hub into a `HubError` that says the way out.

The client's messages are not passed on: they contain URLs, and a download's URL is signed, so it is as good as a token.
The Hub's own messages are passed on with URLs and tokens removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileDuplicationError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)

from embedsurgery.errors import EmbedSurgeryError, HubError
from embedsurgery.hub.auth import resolve_token

_LOGIN = "log in with `hf auth login`, set HF_TOKEN or give a token"
_RETRY = "nothing partial was kept: try again"


@contextmanager
def translate_errors(where: str, action: str) -> Iterator[None]:
    """Inside the block, turn every error of the client into a `HubError`.

    Args:
        where: The repository, revision and file.
        action: What the block does, a verb phrase: the message is "cannot {action}".
    """
    try:
        yield
    except EmbedSurgeryError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,  # a response lacks a key that the client reads
        RuntimeError,
        httpx2.HTTPError,
        httpx2.InvalidURL,
        EntryNotFoundError,
        RevisionResolutionError,
        FileDuplicationError,
        XetDownloadError,
    ) as error:
        raise to_hub_error(error, where, action) from None  # the client's traceback shows signed URLs


def to_hub_error(error: BaseException, where: str, action: str) -> HubError:
    """Return the `HubError` for an error of the client."""
    what = f"cannot {action}"
    cause = error.__cause__
    # huggingface_hub raises these from the error that says what happened
    if isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError, RuntimeError)) and cause is not None:
        return to_hub_error(cause, where, action)
    if isinstance(error, HfHubHTTPError):
        return _response_error(error, where, what)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError)):
        hint = "check the name (no local directory has it either), or unset HF_HUB_OFFLINE"
        return HubError(what, where=where, found="offline, and not in the Hub cache", hint=hint)
    if isinstance(error, (httpx2.HTTPError, ConnectionError)):
        return _connection_error(error, where, what)
    if isinstance(error, LocalTokenNotFoundError):
        return HubError(what, where=where, found="no token", hint=_LOGIN)
    if isinstance(error, HFValidationError):
        return HubError(what, where=where, expected="org/name", found="a name that the Hub does not accept")
    if isinstance(error, (FileMetadataError, KeyError)):
        found = f"an unexpected response ({type(error).__name__})"
        return HubError(what, where=where, found=found, hint="check HF_ENDPOINT and proxies")
    if isinstance(error, FileDuplicationError):
        return HubError(what, where=where, found="the Hub did not copy a file to the new repository")
    if isinstance(error, OSError):
        sizes = re.search(r"Consistency check failed: .*size (\d+) but has size (\d+)", str(error))
        if sizes is not None:
            return HubError(what, where=where, expected=f"{sizes[1]} bytes", found=f"{sizes[2]} bytes", hint=_RETRY)
        if error.errno is not None:
            hint = "check the free disk space, and that HF_HOME is writable"
            return HubError(what, where=error.filename or where, found=error.strerror, hint=hint)
    return HubError(what, where=where, found=f"{type(error).__name__}: {redact(str(error))}")


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error of the client, None if it has none."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _connection_error(error: BaseException, where: str, what: str) -> HubError:
    name = type(error).__name__
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
        hint = "check the connection, the name server and HF_ENDPOINT; no local directory has this name"
        return HubError(what, where=where, found=f"the Hub cannot be reached ({name})", hint=hint)
    return HubError(what, where=where, found=f"the connection was lost ({name})", hint=_RETRY)


def _response_error(error: HfHubHTTPError, where: str, what: str) -> HubError:
    status = error.response.status_code
    message = f"{status} {redact(error.server_message or '')}".strip()
    expected = hint = None
    if isinstance(error, GatedRepoError):
        message = f"{status}, gated repository"
        hint = f"ask for access on its page, then {_LOGIN}"
    elif isinstance(error, RevisionNotFoundError):
        message, expected = f"{status}, no such revision", "a branch, a tag or a commit"
    elif isinstance(error, EntryNotFoundError):
        message, hint = f"{status}, no such file at this revision", "check the repository and the revision"
    elif isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        message = f"{status}, no such repository, or no access to it"
        hint = f"check the name (no local directory has it either); for a private repository {_LOGIN}"
    elif status == 403:
        hint = "use a token that allows it: a push needs write access"
    elif status == 412:
        message, hint = f"{status}, another commit was pushed at the same time", "nothing was overwritten: push again"
    elif status == 409:
        hint = "it exists already, or is being created"
    elif status == 429:
        after = error.response.headers.get("Retry-After", "")
        wait = f"{after} seconds" if after.isdigit() else "a few minutes"
        message, hint = "429, too many requests", f"wait {wait} and try again"
    elif status >= 500:
        message, hint = f"{status}, the Hub failed", "try again later"
    return HubError(what, where=where, expected=expected, found=message, hint=hint)


def redact(text: str) -> str:
    """Put a message of the server or the client on one short line, with tokens and URLs removed."""
    for token in (get_token(), resolve_token(None)):
        if isinstance(token, str) and len(token) > 3:
            text = text.replace(token, "***")
    text = re.sub(r"\b(hf|api_org)_\w+|Bearer\s+\S+", "***", text)
    text = re.sub(r"\w+://[^\s'\")]+|\w+=\S+", "(address)", text)
    return " ".join(text.split())[:200]
