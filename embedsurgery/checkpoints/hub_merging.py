"""Merging a base on the Hub into another repository there: most of it never travels.

What travels for `push_merged`: headers by range requests; every small file that git itself holds, down and up, since
the Hub copies only large files; each shard with a touched table, down and up. All other large files are copied by the
Hub. It copies between repositories of one storage region, and only files that lie in its content store (xet): others
travel, and the report says which.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationCopy

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.checkpoints.jobs import check_jobs, whole_plan
from embedsurgery.checkpoints.merging import merge_jobs
from embedsurgery.checkpoints.partial_store import PartialStore
from embedsurgery.checkpoints.writing import do_jobs
from embedsurgery.combining.several import Conflict
from embedsurgery.errors import ConfigError, EmbedSurgeryWarning, HubError
from embedsurgery.hub.as_directory import fill, put, scratch, wanted
from embedsurgery.hub.auth import Token
from embedsurgery.hub.card import README, front_matter, merged_body, merged_front, renewed
from embedsurgery.hub.client import Client, RemoteFile, Snapshot
from embedsurgery.hub.commits import Content, CopyRefused, PushReport, commit, prepare
from embedsurgery.hub.headers import remote_checkpoint
from embedsurgery.hub.ids import HubId, find_id
from embedsurgery.hub.pulling import pull
from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig

AdapterLike = Adapter | str | os.PathLike[str]

_NOT_THEIRS = (".gitattributes", README)


def push_merged(
    base: str,
    adapters: Sequence[AdapterLike | tuple[AdapterLike, float]],
    repo: str,
    *,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
    bake: BakeConfig | Sequence[BakeConfig | None] | None = None,
    private: bool = True,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: Token = None,
) -> PushReport:
    """Bake adapters into a model of the Hub and push the result to another repository, in one commit.

    Only shards with a touched table come down and go up; the Hub copies the rest. The undo goes into
    ``.embedsurgery/``, as on disk, so that the base can be had back from the merged repository alone.

    Args:
        base: ``org/name`` or ``org/name@revision``.
        adapters: Loaded, as directories, or as ids, each alone or in a pair with a weight.
        repo: The new repository, ``org/name``; one that holds a model already is refused.
        on_conflict: As for `embedsurgery.merge_checkpoint`.
        allow_nan: Merge rows with NaN or infinity.
        bake: How soft prompts become tokens: for all, or for each adapter.
        private: Make a new repository private.
        revision: The branch to push to, made where it is not there.
        tag: Set this tag on the commit.
        create_pr: Open a pull request instead.
        message: The commit's first line.
        token: A token that may read the base and write to ``repo``; by default HF_TOKEN or the stored login.

    Raises:
        HubError: It was not pushed, and why; nothing is half pushed.
        BaseMismatchError: An adapter was made from another base.
        ConfigError: ``repo`` is the base's, or none.
    """
    of, into = HubId.parse(base), HubId.parse(repo)
    if into.revision is not None or into.repo == of.repo:
        raise ConfigError(
            "a merged model goes to a repository of its own",
            found=repo,
            expected="another org/name",
            hint="give a branch as revision",
        )
    branch = HubId.parse(repo, revision).revision
    client = Client(token)
    at = client.resolve(of)
    files = client.files(at, everything=True)
    checkpoint = remote_checkpoint(client, at, files)
    names = [name for name in wanted(files, checkpoint.headers) if name not in _NOT_THEIRS]
    with scratch(at) as folder:
        fill(client, at, files, checkpoint, names, folder)
        store = PartialStore.begin(folder, partial(put, client, at))
        pulled = [(_pulled(a[0], token), a[1]) if isinstance(a, tuple) else _pulled(a, token) for a in adapters]
        jobs = merge_jobs(store, pulled, bake=bake, on_conflict=on_conflict, allow_nan=allow_nan)
        check_jobs(jobs, store)
        do_jobs(jobs, store, folder.parent)
        merged, edits = [job.label for job in jobs], whole_plan(jobs).describe()
        content, copies = _changes(client, at, files, names, folder, store.present)
        kept = front_matter(client.fetch(at, README).read_text("utf-8", "replace")) if README in files else {}
        body = merged_body(f"{at.repo}@{at.sha}", merged, edits, into.repo)
        front = merged_front([at.repo], kept)
        content[README] = renewed(None, front, into.repo.partition("/")[2], body).encode()
        target = prepare(client, into.repo, private=private, branch=branch, create_branch=not create_pr)
        _refuse_other_model(client, target.at)
        text = message or f"Merge {', '.join(merged)} into {of.repo} with embedsurgery"
        send = partial(commit, client, target, message=text[:200], create_pr=create_pr, tag=tag)
        try:
            report = send(content, copies=copies)
        except CopyRefused as error:
            warnings.warn(f"{error}", EmbedSurgeryWarning, stacklevel=2)
            for copy in copies:
                (folder / copy.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
                put(client, at, copy.path_in_repo, folder / copy.path_in_repo)
                content[copy.path_in_repo] = folder / copy.path_in_repo
            report = send(content)
    return replace(report, left_out=tuple(sorted(set(files) - set(names) - set(_NOT_THEIRS))))


def _pulled(adapter: AdapterLike, token: Token) -> AdapterLike:
    if isinstance(adapter, Adapter) or find_id(adapter) is None:
        return adapter
    return pull(os.fspath(adapter), token=token)


def _changes(
    client: Client,
    at: Snapshot,
    files: Mapping[str, RemoteFile],
    names: Sequence[str],
    folder: Path,
    present: Collection[str],
) -> tuple[dict[str, Content], list[CommitOperationCopy]]:
    """What is sent, and what the Hub copies."""
    content: dict[str, Content] = {}
    copies = []
    for name in names:
        remote, path = files[name], folder / name
        here = path.exists() and (name in present or not name.endswith(".safetensors") or "/" in name)
        if remote.sha256 is None or (here and not remote.holds(path)):
            content[name] = path
        elif remote.xet is not None:
            copies.append(CommitOperationCopy(name, name, at.sha, at.repo, "model"))
        else:  # the Hub copies only what lies in its content store
            if not here:
                path.parent.mkdir(parents=True, exist_ok=True)
                put(client, at, name, path)
            content[name] = path
    new = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    content.update({name: folder / name for name in new if name not in files})
    return content, copies


def _refuse_other_model(client: Client, at: Snapshot) -> None:
    others = [name for name in client.files(at) if name not in _NOT_THEIRS]
    if others:
        raise HubError(
            "the repository holds something already",
            where=at.repo,
            found=", ".join(sorted(others))[:120],
            expected="a new or empty repository",
            hint="name another one, or a new branch's",
        )
