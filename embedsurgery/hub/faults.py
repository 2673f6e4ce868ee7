"""What goes wrong on the way to the Hub, as one error of ours that says the way out.

No message is taken over from the client: its messages hold addresses, and the address of a download is signed, which
is as good as a token. The Hub's own words are passed on with addresses and tokens taken out.
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
from embedsurgery.hub.auth import chosen

_LOGIN = "log in with `hf auth login`, set HF_TOKEN or give a token"
_AGAIN = "nothing was left behind: try again"


@contextmanager
def faults(where: str, doing: str) -> Iterator[None]:
    """Inside, whatever the client raises becomes a `HubError`.

    Args:
        where: The repository, revision and file.
        doing: What is being done, as in "cannot {doing}".
    """
    try:
        yield
    except EmbedSurgeryError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,  # an answer without what the client looks for
        RuntimeError,
        httpx2.HTTPError,
        httpx2.InvalidURL,
        EntryNotFoundError,
        RevisionResolutionError,
        FileDuplicationError,
        XetDownloadError,
    ) as error:
        raise explained(error, where, doing) from None  # the client's traceback shows signed addresses


def explained(error: BaseException, where: str, doing: str) -> HubError:
    """The error that says what a client's error means."""
    what = f"cannot {doing}"
    cause = error.__cause__
    if isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError, RuntimeError)) and cause is not None:
        return explained(cause, where, doing)
    if isinstance(error, HfHubHTTPError):
        return _answered(error, where, what)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError)):
        return HubError(
            what,
            where=where,
            found="offline, and not in the Hub cache",
            hint="check the name (nor is it a directory here), or unset HF_HUB_OFFLINE",
        )
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
        return HubError(
            what,
            where=where,
            found="the Hub cannot be reached",
            hint="if a directory is meant, there is none of this name; else check the connection, the name "
            "server and HF_ENDPOINT",
        )
    if isinstance(error, (httpx2.HTTPError, ConnectionError)):
        return HubError(what, where=where, found=f"the connection broke ({type(error).__name__})", hint=_AGAIN)
    if isinstance(error, LocalTokenNotFoundError):
        return HubError(what, where=where, found="no token", hint=_LOGIN)
    if isinstance(error, HFValidationError):
        return HubError(what, where=where, found="a name that the Hub does not take", expected="org/name")
    if isinstance(error, FileMetadataError):
        return HubError(what, where=where, found="an answer that is no Hub's", hint="check HF_ENDPOINT and proxies")
    if isinstance(error, FileDuplicationError):
        return HubError(what, where=where, found="the Hub did not copy a file to the new repository")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return HubError(what, where=where, found="a file that was cut short", hint=_AGAIN)
    if isinstance(error, OSError) and error.errno is not None:
        return HubError(
            what,
            where=error.filename or where,
            found=error.strerror,
            hint="is there room, and may you write to HF_HOME?",
        )
    if isinstance(error, KeyError):
        return HubError(what, where=where, found="an answer that is no Hub's", hint="check HF_ENDPOINT and proxies")
    return HubError(what, where=where, found=f"{type(error).__name__}: {scrubbed(str(error))}")


def status_of(error: BaseException) -> int | None:
    """The status of the answer that an error of the client stands for."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _answered(error: HfHubHTTPError, where: str, what: str) -> HubError:
    status = error.response.status_code
    said = f"{status} {scrubbed(error.server_message or '')}".strip()
    if isinstance(error, GatedRepoError):
        return HubError(
            what, where=where, found=f"{status}, a gated repository", hint=f"ask for access on its page, then {_LOGIN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(what, where=where, found=f"{status}, no such revision", expected="a branch, a tag or a commit")
    if isinstance(error, EntryNotFoundError):
        return HubError(
            what,
            where=where,
            found=f"{status}, no such file at this revision",
            hint="is it the right repository and revision?",
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return HubError(
            what,
            where=where,
            found=f"{status}, no such repository, or none that you may see",
            hint=f"check the name (nor is it a directory here); where it is private, {_LOGIN}",
        )
    if status == 403:
        return HubError(what, where=where, found=said, hint="use a token that may do this: write access to push")
    if status == 412:
        return HubError(
            what,
            where=where,
            found=f"{status}, somebody pushed at the same time",
            hint="nothing was written over: push again",
        )
    if status == 409:
        return HubError(what, where=where, found=said, hint="something of that name is there already, or in the making")
    if status == 429:
        after = error.response.headers.get("Retry-After", "")
        wait = f"{after} seconds" if after.isdigit() else "a few minutes"
        return HubError(what, where=where, found="429, too many requests", hint=f"wait {wait} and try again")
    if status >= 500:
        return HubError(what, where=where, found=f"{status}, the Hub is in trouble", hint="try again later")
    return HubError(what, where=where, found=said)


def scrubbed(text: str) -> str:
    """A server's or client's words on one short line, without tokens and addresses."""
    for token in (get_token(), chosen(None)):
        if isinstance(token, str) and len(token) > 3:
            text = text.replace(token, "***")
    text = re.sub(r"\b(hf|api_org)_\w+|Bearer\s+\S+", "***", text)
    text = re.sub(r"\w+://[^\s'\")]+|\w+=\S+", "(address)", text)
    return " ".join(text.split())[:200]
