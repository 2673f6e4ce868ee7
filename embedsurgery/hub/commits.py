"""One commit to the Hub: made on the commit that was read before, never sent twice.

If the response is lost, the commit is looked for on the Hub instead. ``pushing.py`` and ``checkpoints/hub_merging.py``
say what goes into it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy
from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from embedsurgery.errors import ConfigError, HubError
from embedsurgery.hub.client import Client, Snapshot
from embedsurgery.hub.faults import status_of, translate_errors

Content = bytes | Path
"""A file's bytes, or the path of a local file."""

_LOOKUPS = 3
"""How often a commit whose response was lost is looked for."""

_PAUSE = 1.0
"""Between lookups, in seconds."""


class CopyRefusedError(HubError):
    """The Hub refused to copy large files from another repository; nothing was committed."""


@dataclass(frozen=True)
class PushReport:
    """What a push did.

    Attributes:
        repo: ``org/name``.
        url: The page of the commit, or of the pull request.
        sha: The commit that has the pushed files.
        changed: False if the files were there already and nothing was committed.
        created: Whether the repository was created.
        private: Whether the repository is private; None if the Hub does not say.
        pull_request: The page of the pull request, if one was opened.
        tag: The tag that was set, if any.
        recognised: Whether the commit's response was lost and the commit was found on the Hub.
        uploaded: Path -> bytes that were uploaded.
        copied: Paths of files that the Hub copied.
        left_out: Paths of the base's files that were not pushed.
    """

    repo: str
    url: str
    sha: str
    changed: bool
    created: bool
    private: bool | None
    pull_request: str | None = None
    tag: str | None = None
    recognised: bool = False
    uploaded: Mapping[str, int] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """Where a commit goes.

    Attributes:
        snapshot: Its parent commit.
        branch: The branch, None for the default branch.
        created: Whether the repository was created for it.
        private: Whether the repository is private, None if the Hub does not say.
    """

    snapshot: Snapshot
    branch: str | None
    created: bool
    private: bool | None

    def __str__(self) -> str:
        return f"{self.snapshot.repo}@{self.branch}" if self.branch else self.snapshot.repo


@dataclass(frozen=True)
class _Change:
    """What a commit changes: path -> content, files that the Hub copies, and whether it opens a pull request."""

    files: Mapping[str, Content]
    copies: Sequence[CommitOperationCopy]
    create_pr: bool

    def is_in(self, client: Client, snapshot: Snapshot) -> bool:
        """Whether a commit has every file with its content. Of copied files only the paths are compared."""
        remote = client.find_files(snapshot, [*self.files, *(copy.path_in_repo for copy in self.copies)])
        return all(copy.path_in_repo in remote for copy in self.copies) and all(
            path in remote and remote[path].size == _size_of(content) and remote[path].matches(content)
            for path, content in self.files.items()
        )


def prepare_target(client: Client, repo: str, *, private: bool, branch: str | None, create_branch: bool) -> Target:
    """Find the repository and the branch, and create them where they do not exist.

    Args:
        client: Sends the requests.
        repo: ``org/name``.
        private: Make a new repository private.
        branch: The branch, None for the default branch.
        create_branch: Create a missing branch; otherwise it is an error.

    Raises:
        HubError: They cannot be found or created.
    """
    created = False
    with translate_errors(repo, "push"):
        try:
            info = client.api.model_info(repo)
        except HfHubHTTPError as error:
            if not (isinstance(error, RepositoryNotFoundError) or status_of(error) in (401, 404)):
                raise
            info, created = None, True
    if info is None:
        with translate_errors(repo, "create the repository"):
            client.api.create_repo(repo, private=private, exist_ok=True)
            info = client.api.model_info(repo)
    if branch is not None:
        info = _prepare_branch(client, repo, branch, info, create_branch)
    if info.sha is None:
        raise HubError("the Hub returned no commit hash", where=repo)
    return Target(Snapshot(repo, info.sha), branch, created, info.private)


def _prepare_branch(client: Client, repo: str, branch: str, info: ModelInfo, create: bool) -> ModelInfo:
    with translate_errors(f"{repo}@{branch}", "push"):
        try:
            return client.api.model_info(repo, revision=branch)
        except RevisionNotFoundError:
            if not create:
                raise
        client.api.create_branch(repo, branch=branch, revision=info.sha, exist_ok=True)
        return client.api.model_info(repo, revision=branch)


def commit(
    client: Client,
    target: Target,
    files: Mapping[str, Content],
    *,
    copies: Sequence[CommitOperationCopy] = (),
    message: str,
    description: str = "",
    create_pr: bool = False,
    tag: str | None = None,
) -> PushReport:
    """Write files in one commit; do nothing if the target has them already.

    Args:
        client: Sends the requests.
        target: Where the commit goes.
        files: Path -> content.
        copies: Files that the Hub is to copy from another repository.
        message: The commit's first line.
        description: The rest of its message.
        create_pr: Open a pull request with it.
        tag: Set this tag on it.

    Raises:
        CopyRefusedError: The Hub refused to copy the files of ``copies``; nothing was committed.
        HubError: The commit failed, and nothing was committed; or another commit was pushed in between.
        ConfigError: ``tag`` and ``create_pr`` are both given.
    """
    repo = target.snapshot.repo
    if tag is not None and create_pr:
        raise ConfigError("a pull request cannot be tagged", found=tag, hint="tag it once it is merged")
    tagged = _find_tag(client, repo, tag)
    change = _Change(files, copies, create_pr)
    changed = bool(copies) or not change.is_in(client, target.snapshot)
    if changed:
        _refuse_existing_tag(tagged, tag, repo)
        info, recognised = _send(client, target, change, message, description)
    else:
        url = _commit_url(client, target.snapshot)
        info, recognised = CommitInfo(url, message, description, target.snapshot.sha), False
    if tag is not None and tagged != info.oid:
        _refuse_existing_tag(tagged, tag, repo)
        with translate_errors(f"{repo}@{tag}", f"set the tag (commit {info.oid[:12]} was made)"):
            client.api.create_tag(repo, tag=tag, revision=info.oid)
    return PushReport(
        repo=repo,
        url=info.pr_url or info.commit_url,
        sha=info.oid,
        changed=changed,
        created=target.created,
        private=target.private,
        pull_request=info.pr_url,
        tag=tag,
        recognised=recognised,
        uploaded={path: _size_of(content) for path, content in files.items()} if changed else {},
        copied=tuple(copy.path_in_repo for copy in copies),
    )


def _send(client: Client, target: Target, change: _Change, message: str, description: str) -> tuple[CommitInfo, bool]:
    """Make the commit. Returns it, and whether it was found on the Hub after its response was lost."""
    additions = [CommitOperationAdd(path, content) for path, content in change.files.items()]
    try:
        info = client.api.create_commit(
            target.snapshot.repo,
            [*additions, *change.copies],
            commit_message=message,
            commit_description=description,
            revision=target.branch,
            parent_commit=target.snapshot.sha,
            create_pr=change.create_pr,
        )
    except FileDuplicationError:
        raise CopyRefusedError(
            "the Hub did not copy the base's files, they are downloaded and uploaded instead",
            where=str(target),
            hint="the two repositories may be in different regions",
        ) from None
    except Exception as error:
        # A dropped connection or a 5xx can follow a commit that was made. Sent again it would be refused, since its
        # parent has moved, or open a second pull request: look for it instead.
        found = None if _is_refusal(error) else _find_commit(client, target, change)
        if found is None:
            with translate_errors(str(target), "push"):
                raise
        return found, True
    return info, False


def _commit_url(client: Client, snapshot: Snapshot) -> str:
    return f"{client.api.endpoint}/{snapshot.repo}/commit/{snapshot.sha}"


def _size_of(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _is_refusal(error: BaseException) -> bool:
    """Whether the Hub itself refused the request; after any other error the commit may have been made."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = status_of(error)
    return status is not None and status < 500


def _find_commit(client: Client, target: Target, change: _Change) -> CommitInfo | None:
    """Find the commit whose response was lost; None if the Hub does not have it."""
    for lookup in range(_LOOKUPS):
        if lookup:
            time.sleep(_PAUSE)
        try:
            for sha, page in _possible_commits(client, target, change.create_pr):
                snapshot = Snapshot(target.snapshot.repo, sha)
                if change.is_in(client, snapshot):
                    return CommitInfo(_commit_url(client, snapshot), "", "", sha, pr_url=page)
            return None
        except (HubError, OSError, ValueError, RuntimeError):  # the Hub still fails; the first error is raised
            continue
    return None


def _possible_commits(client: Client, target: Target, create_pr: bool) -> list[tuple[str, str | None]]:
    """List the commits that it could be, each with the page of its pull request."""
    repo = target.snapshot.repo
    if not create_pr:
        sha = client.api.model_info(repo, revision=target.branch).sha
        return [(sha, None)] if sha is not None and sha != target.snapshot.sha else []
    requests = client.api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []
    newest = sorted(requests, key=lambda r: int(r.ref.rpartition("/")[2]), reverse=True)[:5]
    pages = f"{client.api.endpoint}/{repo}/discussions"
    return [(r.target_commit, f"{pages}/{r.ref.rpartition('/')[2]}") for r in newest]


def _find_tag(client: Client, repo: str, tag: str | None) -> str | None:
    """Return the commit that has a tag; None if there is no such tag."""
    if tag is None:
        return None
    with translate_errors(repo, "list the tags"):
        return next((t.target_commit for t in client.api.list_repo_refs(repo).tags if t.name == tag), None)


def _refuse_existing_tag(tagged: str | None, tag: str | None, repo: str) -> None:
    if tagged is not None:
        raise HubError(
            "the tag exists already, on another commit",
            where=f"{repo}@{tag}",
            found=tagged[:12],
            hint="choose another tag, or delete it first; nothing was pushed",
        )
