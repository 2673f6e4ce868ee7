"""Pushes adapters to the Hub: config, weights and card in one commit, which ``commits.py`` makes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from embedsurgery.errors import ConfigError, HubError, warn
from embedsurgery.hub.auth import Token
from embedsurgery.hub.card import adapter_body, adapter_front_matter, base_id
from embedsurgery.hub.client import Client, Snapshot
from embedsurgery.hub.commits import Content, PushReport, commit, prepare_target
from embedsurgery.hub.headers import fetch_small_file
from embedsurgery.hub.ids import HubId, find_id
from embedsurgery.hub.readme import README, update_readme
from embedsurgery.plugins.current import registry


def push(
    adapter: Adapter | str | os.PathLike[str],
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: Token = None,
) -> PushReport:
    """Push an adapter to the Hub: config, weights and model card in one commit.

    A missing repository is created. The commit's parent is the commit that was read before, so that two pushes at the
    same time do not overwrite each other. Files that the repository has already are not pushed again. A README keeps
    everything that its author wrote: only the part between embedsurgery's comments is rewritten. The Hub's README
    takes precedence over one in the adapter's directory.

    Args:
        adapter: An adapter, or its directory, whose files are pushed unchanged.
        repo: ``org/name``.
        private: Make a new repository private. An existing one stays as it is; the report says which.
        revision: The branch to push to, created if it does not exist.
        tag: Set this tag on the commit.
        create_pr: Open a pull request instead of pushing to the branch.
        message: The commit's first line.
        token: A token with write access; by default HF_TOKEN or the stored login.

    Returns:
        The commit's page and hash, and what was done.

    Raises:
        HubError: The push failed; nothing was committed.
        AdapterError: The directory is not an adapter.
        ConfigError: ``repo`` has a revision, or ``adapter`` is the id of one on the Hub.
    """
    _check_arguments(adapter, repo)
    revision = HubId.parse(repo, revision).revision
    with tempfile.TemporaryDirectory(prefix="embedsurgery-push-") as scratch:
        folder = adapter.save(scratch) if isinstance(adapter, Adapter) else Path(adapter)
        loaded = adapter if isinstance(adapter, Adapter) else registry().read_adapter(folder)
        if loaded.manifest.base_model is not None and base_id(loaded.manifest) is None:
            warn(f"the adapter names its base by a path, which is useless to others: {loaded.manifest.base_model}")
        files: dict[str, Content] = {name: (folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
        local = (folder / README).read_bytes() if (folder / README).is_file() else None
        files[README] = _render_card(loaded, repo, files, local)  # before anything is created: it can fail
        client = Client(token)
        target = prepare_target(client, repo, private=private, branch=revision, create_branch=not create_pr)
        existing = fetch_readme(client, target.snapshot)
        if existing is not None:
            files[README] = _render_card(loaded, repo, files, existing)
        text = message or f"Push {loaded.manifest.surgery} adapter with embedsurgery"
        return commit(client, target, files, message=text, create_pr=create_pr, tag=tag)


def _check_arguments(adapter: Adapter | str | os.PathLike[str], repo: str) -> None:
    if HubId.parse(repo).revision is not None:
        raise ConfigError("a push takes no revision in repo", found=repo, expected="org/name", hint="give revision=")
    if not isinstance(adapter, Adapter) and find_id(adapter) is not None:
        raise ConfigError(
            "not an adapter's directory",
            expected="an Adapter or a directory",
            found=str(adapter),
            hint="no such directory exists; pull() gets an adapter from the Hub",
        )


def fetch_readme(client: Client, snapshot: Snapshot) -> bytes | None:
    """Download the README of a commit; None if there is none."""
    files = client.find_files(snapshot, (README,))
    return fetch_small_file(client, snapshot, files, README).read_bytes() if README in files else None


def _render_card(adapter: Adapter, repo: str, files: dict[str, Content], readme: bytes | None) -> bytes:
    size = sum(len(data) for name, data in files.items() if name != README and isinstance(data, bytes))
    name = repo.partition("/")[2]
    body = adapter_body(adapter, repo, size, _find_local_base(adapter))
    return update_readme(decode_readme(readme), adapter_front_matter(adapter), name, body).encode()


def _find_local_base(adapter: Adapter) -> Path | None:
    """Find an adapter's base without a download: the directory that it names, or a copy in the Hub cache."""
    name, hub_id = adapter.manifest.base_model, base_id(adapter.manifest)
    if hub_id is None:
        return Path(name) if name is not None and Path(name).is_dir() else None
    config = try_to_load_from_cache(hub_id.repo, "config.json", revision=hub_id.revision)
    return Path(config).parent if isinstance(config, str) else None


def decode_readme(readme: bytes | None) -> str | None:
    """Decode a README.

    Raises:
        HubError: It is not UTF-8.
    """
    try:
        return None if readme is None else readme.decode()
    except UnicodeDecodeError as error:
        raise HubError("the README is not UTF-8", where=README, found=str(error), hint="save it as UTF-8") from error
