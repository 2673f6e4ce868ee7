"""Merges adapters into a base on the Hub and pushes the result to another repository, without moving most of the base.

What `push_merged` downloads: headers, by range requests; small files that git stores; each shard with a changed table.
What it uploads: the small files, because the Hub copies only large ones, and the changed shards. The Hub copies all
other large files. It copies within one storage region only, and only files in its content store (xet); other files are
downloaded and uploaded, and the report lists them.

``merging.py`` plans the merge and ``partial_store.py`` fetches shards when they are needed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationCopy

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.checkpoints.jobs import Job, check_jobs, combine_plans
from embedsurgery.checkpoints.merging import AdapterLike, AdapterWithWeight, merge_jobs
from embedsurgery.checkpoints.partial_store import PartialStore
from embedsurgery.checkpoints.writing import apply_jobs
from embedsurgery.combining.several import Conflict
from embedsurgery.errors import ConfigError, HubError, warn
from embedsurgery.hub.as_directory import download_to, scratch_directory, select_files, write_sparse_model
from embedsurgery.hub.auth import Token
from embedsurgery.hub.card import merged_model_body, merged_model_front_matter
from embedsurgery.hub.client import Client, RemoteFile, Snapshot
from embedsurgery.hub.commits import Content, CopyRefusedError, PushReport, commit, prepare_target
from embedsurgery.hub.headers import read_remote_checkpoint
from embedsurgery.hub.ids import HubId, find_id
from embedsurgery.hub.pulling import pull
from embedsurgery.hub.readme import README, read_front_matter, update_readme
from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig

_NOT_COPIED = (".gitattributes", README)
"""Files of the base that are not copied: the Hub makes the first, the merge writes the second."""


def push_merged(
    base: str,
    adapters: Sequence[AdapterLike | AdapterWithWeight],
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
    """Merge adapters into a model on the Hub and push the result to another repository, in one commit.

    Only shards with a changed table are downloaded and uploaded; the Hub copies the rest. The undo goes into
    ``.embedsurgery/`` as on disk, so the merged repository alone is enough to restore the base.

    Args:
        base: ``org/name`` or ``org/name@revision``.
        adapters: Loaded, as directories or as Hub ids, each alone or in a pair with a weight.
        repo: The new repository, ``org/name``. One that holds a model already is refused.
        on_conflict: As for `embedsurgery.merge_checkpoint`.
        allow_nan: Merge rows with NaN or infinity.
        bake: How soft prompts become tokens: for all, or a sequence with one for each adapter.
        private: Make a new repository private.
        revision: The branch to push to; created if it does not exist.
        tag: Set this tag on the commit.
        create_pr: Open a pull request instead.
        message: The commit's first line.
        token: A token that may read the base and write to ``repo``; by default HF_TOKEN or the stored login.

    Raises:
        HubError: The push failed; nothing was committed.
        BaseMismatchError: An adapter was made from another base.
        ConfigError: ``repo`` is the base's repository, or not a repository id.
    """
    model, into = HubId.parse(base), HubId.parse(repo)
    if into.revision is not None or into.repo == model.repo:
        raise ConfigError(
            "a merged model needs its own repository",
            found=repo,
            expected="another org/name",
            hint="pass a branch as revision",
        )
    branch = HubId.parse(repo, revision).revision
    client = Client(token)
    snapshot = client.resolve(model)
    files = client.list_files(snapshot, everything=True)
    checkpoint = read_remote_checkpoint(client, snapshot, files)
    names = [name for name in select_files(files, checkpoint.headers) if name not in _NOT_COPIED]
    with scratch_directory(snapshot) as folder:
        write_sparse_model(client, snapshot, files, checkpoint, names, folder)
        store = PartialStore.begin(folder, partial(download_to, client, snapshot))
        pulled = [
            (_pull_adapter(a[0], token), a[1]) if isinstance(a, tuple) else _pull_adapter(a, token) for a in adapters
        ]
        jobs = merge_jobs(store, pulled, bake=bake, on_conflict=on_conflict, allow_nan=allow_nan)
        check_jobs(jobs, store)
        apply_jobs(jobs, store, folder.parent)
        content, copies = _plan_upload(client, snapshot, files, names, folder, store.present)
        content[README] = _render_merged_card(client, snapshot, files, into, jobs)
        # Only now: a merge that is refused must not leave an empty repository behind.
        target = prepare_target(client, into.repo, private=private, branch=branch, create_branch=not create_pr)
        _refuse_occupied(client, target.snapshot)
        text = message or f"Merge {', '.join(job.label for job in jobs)} into {model.repo} with embedsurgery"
        send = partial(commit, client, target, message=text[:200], create_pr=create_pr, tag=tag)
        try:
            report = send(content, copies=copies)
        except CopyRefusedError as error:
            warn(f"{error}")
            content.update(_download_copies(client, snapshot, copies, folder))
            report = send(content)
    return replace(report, left_out=tuple(sorted(set(files) - set(names) - set(_NOT_COPIED))))


def _pull_adapter(adapter: AdapterLike, token: Token) -> AdapterLike:
    if isinstance(adapter, Adapter) or find_id(adapter) is None:
        return adapter
    return pull(os.fspath(adapter), token=token)


def _plan_upload(
    client: Client,
    snapshot: Snapshot,
    files: Mapping[str, RemoteFile],
    names: Sequence[str],
    folder: Path,
    present: Collection[str],
) -> tuple[dict[str, Content], list[CommitOperationCopy]]:
    """Decide which files to upload and which ones the Hub copies.

    Args:
        client: Downloads files that the Hub cannot copy.
        snapshot: The base.
        files: Path -> file of the base.
        names: Files of the base that belong to the merged model.
        folder: The merged model, with sparse weight files.
        present: Weight files that are not sparse.
    """
    content: dict[str, Content] = {}
    copies = []
    for name in names:
        remote, path = files[name], folder / name
        # A sparse weight file exists but must not be uploaded. Safetensors files in subdirectories are merge records.
        here = path.exists() and (name in present or not name.endswith(".safetensors") or "/" in name)
        if remote.sha256 is None or (here and not remote.matches(path)):
            content[name] = path
        elif remote.xet is not None:
            copies.append(CommitOperationCopy(name, name, snapshot.sha, snapshot.repo, "model"))
        else:  # the Hub copies only what is in its content store
            if not here:
                path.parent.mkdir(parents=True, exist_ok=True)
                download_to(client, snapshot, name, path)
            content[name] = path
    new = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    content.update({name: folder / name for name in new if name not in files})
    return content, copies


def _download_copies(
    client: Client, snapshot: Snapshot, copies: Sequence[CommitOperationCopy], folder: Path
) -> dict[str, Content]:
    """Download the files that the Hub refused to copy; return path -> file to upload."""
    for path in (folder / copy.path_in_repo for copy in copies):
        path.parent.mkdir(parents=True, exist_ok=True)
        download_to(client, snapshot, path.relative_to(folder).as_posix(), path)
    return {copy.path_in_repo: folder / copy.path_in_repo for copy in copies}


def _render_merged_card(
    client: Client, snapshot: Snapshot, files: Mapping[str, RemoteFile], into: HubId, jobs: list[Job]
) -> bytes:
    """The README of the merged model, with the base's license, task and language."""
    base_front = {}
    if README in files:
        base_front = read_front_matter(client.fetch(snapshot, README).read_text("utf-8", "replace"))
    edits = combine_plans(jobs).describe()
    body = merged_model_body(f"{snapshot.repo}@{snapshot.sha}", [job.label for job in jobs], edits, into.repo)
    front = merged_model_front_matter([snapshot.repo], base_front)
    return update_readme(None, front, into.repo.partition("/")[2], body).encode()


def _refuse_occupied(client: Client, snapshot: Snapshot) -> None:
    """Refuse a repository that holds more than the files that the Hub itself makes."""
    others = [name for name in client.list_files(snapshot) if name not in _NOT_COPIED]
    if others:
        raise HubError(
            "the repository is not empty",
            where=snapshot.repo,
            found=", ".join(sorted(others))[:120],
            expected="a new or empty repository",
            hint="use another repository, or a new branch",
        )
