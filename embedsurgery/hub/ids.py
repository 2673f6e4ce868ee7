"""Hub ids: ``org/name`` or ``org/name@revision``, wherever no path of that name exists.

Imports no Hub client, so that work on local directories does not load one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from embedsurgery.errors import ConfigError

SOURCE = ".embedsurgery/source.json"
"""In the directory of a pulled adapter: the file that says where it came from."""

_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./+-]*", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """A repository on the Hub, and a revision of it.

    Attributes:
        repo: ``org/name``.
        revision: A branch, a tag, a commit or ``refs/pr/N``; None for the default branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> HubId:
        """Parse an id.

        Args:
            text: ``org/name`` or ``org/name@revision``.
            revision: The revision, if the text does not give it.

        Raises:
            ConfigError: The text is not an id, or two different revisions are given. A revision becomes a file name
                in the Hub cache, so one that leads out of its directory is refused.
        """
        repo, at, inner = text.partition("@")
        if not _is_repo(repo) or (at and not _is_revision(inner)):
            raise ConfigError("not a Hub id", found=repr(text)[:120], expected="org/name or org/name@revision")
        if revision is not None and not _is_revision(revision):
            raise ConfigError("not a revision", found=repr(revision)[:120], expected="a branch, a tag or a commit")
        if at and revision not in (None, inner):
            raise ConfigError("two revisions", expected="one", found=f"{inner} and {revision}")
        return cls(repo, inner if at else revision)


def find_id(value: object) -> HubId | None:
    """Return the Hub id that a model or adapter argument means; None for a path, and for every path that exists.

    Raises:
        ConfigError: It looks like an id, but its revision is not a revision.
    """
    if not isinstance(value, (str, os.PathLike)):
        return None
    text = os.fspath(value)
    if not isinstance(text, str) or os.path.lexists(text) or not _is_repo(text.partition("@")[0]):
        return None
    return HubId.parse(text)


def _is_repo(text: str) -> bool:
    return _REPO.fullmatch(text) is not None and len(text) <= 96 and "--" not in text and ".." not in text


def _is_revision(text: str) -> bool:
    parts = text.split("/")
    return _REVISION.fullmatch(text) is not None and ".." not in text and "" not in parts and len(text) <= 200


def read_source(directory: Path) -> str | None:
    """Read where the adapter in a directory was pulled from, as in `Adapter.source`; None if no valid file says so."""
    if not os.path.lexists(directory / SOURCE):
        return None
    from embedsurgery.files.json_reading import NOTE, read_json

    try:
        body = read_json(directory / SOURCE, NOTE)
        return str(HubId.parse(f"{body['repo']}@{body['sha']}"))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # only information: a broken file must not fail a load
        return None
