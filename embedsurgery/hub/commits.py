"""One commit to the Hub: made on the commit that was looked at, never repeated, found where its answer was lost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy
from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from embedsurgery.errors import ConfigError, HubError
from embedsurgery.hub.client import Client, RemoteFile, Snapshot
from embedsurgery.hub.faults import faults, status_of

Content = bytes | Path
"""A file's bytes, or where they lie."""

_LOOKS = 3
"""How often the Hub is asked whether a commit landed whose answer was lost."""

_PAUSE = 1.0


class CopyRefused(HubError):
    """The Hub has not copied large files from one repository to another; nothing was committed."""


@dataclass(frozen=True)
class PushReport:
    """What a push did.

    Attributes:
        repo: ``org/name``.
        url: The commit's page, or the pull request's.
        sha: The commit that holds what was pushed.
        changed: False where it was there already, and nothing was committed.
        created: Whether the repository was made.
        private: Whether only those with access see it; None where the Hub does not say.
        pull_request: The pull request's page, if one was opened.
        tag: The tag that was set, if any.
        recognised: The commit's answer was lost, and it was found on the Hub.
        uploaded: Path -> bytes that were sent.
        copied: Paths that the Hub copied by itself.
        left_out: Paths of the base that were not taken over.
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
        at: The commit that it is made on.
        branch: The branch, None for the default one.
        created: Whether the repository was made.
        private: Whether it is private, None where the Hub does not say.
    """

    at: Snapshot
    branch: str | None
    created: bool
    private: bool | None


def prepare(client: Client, repo: str, *, private: bool, branch: str | None, create_branch: bool) -> Target:
    """The repository and the branch, made where they are not there yet.

    Raises:
        HubError: They cannot be seen or made.
    """
    created = False
    with faults(repo, "push"):
        try:
            info = client.api.model_info(repo)
        except HfHubHTTPError as error:
            if not (isinstance(error, RepositoryNotFoundError) or status_of(error) in (401, 404)):
                raise
            info, created = None, True
    if info is None:
        with faults(repo, "create the repository"):
            client.api.create_repo(repo, private=private, exist_ok=True)
            info = client.api.model_info(repo)
    if branch is not None:
        info = _branch(client, repo, branch, info, create_branch)
    if info.sha is None:
        raise HubError("the Hub names no commit", where=repo)
    return Target(Snapshot(repo, info.sha), branch, created, info.private)


def _branch(client: Client, repo: str, branch: str, info: ModelInfo, create: bool) -> ModelInfo:
    with faults(f"{repo}@{branch}", "push"):
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
    """Make the files so in one commit; where they are so already, nothing.

    Args:
        client: To whom.
        target: On what.
        files: Path -> content.
        copies: Files that the Hub is to copy from another repository.
        message: The commit's first line.
        description: The rest of it.
        create_pr: Open a pull request with it.
        tag: Set this tag on it.

    Raises:
        HubError: It was not made, and nothing on the Hub is half made; or somebody else pushed in between.
    """
    at = target.at
    where = f"{at.repo}@{target.branch}" if target.branch else at.repo
    if tag is not None and create_pr:
        raise ConfigError("a pull request cannot be tagged", found=tag, hint="tag it once it is merged")
    tagged = _tagged(client, at.repo, tag)
    same = not copies and _are(client, at, files)
    done, recognised = CommitInfo(_page(client, at), message, description, at.sha), False
    if not same:
        _refuse_moved(tagged, tag, at.repo)
        operations: list[CommitOperationAdd | CommitOperationCopy] = [
            *(_add(path, content) for path, content in files.items()),
            *copies,
        ]
        try:
            done = client.api.create_commit(
                at.repo,
                operations,
                commit_message=message,
                commit_description=description,
                revision=target.branch,
                parent_commit=at.sha,
                create_pr=create_pr,
            )
        except FileDuplicationError:
            raise CopyRefused(
                "the Hub did not copy the base's files, so they travel",
                where=where,
                hint="the two repositories may lie in different regions",
            ) from None
        except Exception as error:
            found = None if _was_refused(error) else _landed(client, target, files, copies, create_pr)
            if found is None:
                with faults(where, "push"):
                    raise
            done, recognised = found, True
    if tag is not None and tagged != done.oid:
        _refuse_moved(tagged, tag, at.repo)
        with faults(f"{at.repo}@{tag}", f"set the tag (the commit is there: {done.oid[:12]})"):
            client.api.create_tag(at.repo, tag=tag, revision=done.oid)
    sizes = {} if same else {path: _size(content) for path, content in files.items()}
    return PushReport(
        at.repo,
        done.pr_url or done.commit_url,
        done.oid,
        not same,
        target.created,
        target.private,
        done.pr_url,
        tag,
        recognised,
        sizes,
        tuple(c.path_in_repo for c in copies),
    )


def _page(client: Client, at: Snapshot) -> str:
    return f"{client.api.endpoint}/{at.repo}/commit/{at.sha}"


def _add(path: str, content: Content) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


def _size(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _are(client: Client, at: Snapshot, files: Mapping[str, Content]) -> bool:
    """Whether a commit holds all the files as they are."""
    remote = client.named(at, files)
    return all(path in remote and _is(remote[path], content) for path, content in files.items())


def _is(remote: RemoteFile, content: Content) -> bool:
    return remote.size == _size(content) and remote.holds(content)


def _was_refused(error: BaseException) -> bool:
    """Whether the Hub itself said no; anything else may have come after it had said yes."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = status_of(error)
    return status is not None and status < 500


def _landed(
    client: Client, target: Target, files: Mapping[str, Content], copies: Sequence[CommitOperationCopy], create_pr: bool
) -> CommitInfo | None:
    """The commit on the Hub that is the one whose answer was lost; None where there is none."""
    wanted = [*files, *(copy.path_in_repo for copy in copies)]
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE)
        try:
            for sha, page in _heads(client, target, create_pr):
                at = Snapshot(target.at.repo, sha)
                if _are(client, at, files) and client.named(at, wanted).keys() == set(wanted):
                    return CommitInfo(_page(client, at), "", "", sha, pr_url=page)
            return None
        except (HubError, OSError, ValueError, RuntimeError):  # still in trouble; what went wrong first is what counts
            continue
    return None


def _heads(client: Client, target: Target, create_pr: bool) -> list[tuple[str, str | None]]:
    """The commits that could be it, each with its pull request's page."""
    repo = target.at.repo
    if not create_pr:
        sha = client.api.model_info(repo, revision=target.branch).sha
        return [(sha, None)] if sha is not None and sha != target.at.sha else []
    requests = client.api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []
    newest = sorted(requests, key=lambda r: int(r.ref.rpartition("/")[2]), reverse=True)[:5]
    pages = f"{client.api.endpoint}/{repo}/discussions"
    return [(r.target_commit, f"{pages}/{r.ref.rpartition('/')[2]}") for r in newest]


def _tagged(client: Client, repo: str, tag: str | None) -> str | None:
    if tag is None:
        return None
    with faults(repo, "list the tags"):
        return next((t.target_commit for t in client.api.list_repo_refs(repo).tags if t.name == tag), None)


def _refuse_moved(tagged: str | None, tag: str | None, repo: str) -> None:
    if tagged is not None:
        raise HubError(
            "the tag is there already, on another commit",
            where=f"{repo}@{tag}",
            found=tagged[:12],
            hint="choose another tag, or delete it first; nothing was pushed",
        )
