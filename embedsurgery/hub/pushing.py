"""Adapters to the Hub: config, weights and card in one commit."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from embedsurgery.errors import ConfigError, EmbedSurgeryWarning, HubError
from embedsurgery.hub.auth import Token
from embedsurgery.hub.card import README, adapter_body, adapter_front, base_id, renewed
from embedsurgery.hub.client import Client, Snapshot
from embedsurgery.hub.commits import Content, PushReport, commit, prepare
from embedsurgery.hub.headers import small
from embedsurgery.hub.ids import HubId, find_id
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

    The repository is made where it is not there. The commit is made on the commit that was looked at, so two who push
    at once do not write over each other. What is there already is not pushed again. A README keeps all that its author
    wrote; only our marked part is renewed. The Hub's README wins over one in the adapter's directory.

    Args:
        adapter: An adapter, or its directory, whose files are pushed as they are.
        repo: ``org/name``.
        private: Make a new repository private. One that is there stays as it is; the report says which.
        revision: The branch to push to, made where it is not there.
        tag: Set this tag on the commit.
        create_pr: Open a pull request instead of pushing to the branch.
        message: The commit's first line.
        token: A token with write access; by default HF_TOKEN or the stored login.

    Returns:
        The commit's page and sha, and what was done.

    Raises:
        HubError: It was not pushed, and why; nothing is half pushed.
        AdapterError: The directory holds no adapter.
    """
    of = HubId.parse(repo)
    if of.revision is not None:
        raise ConfigError("a push goes to a branch", found=repo, expected="org/name", hint="give it as revision")
    revision = HubId.parse(repo, revision).revision
    if not isinstance(adapter, Adapter) and find_id(adapter) is not None:
        raise ConfigError(
            "what is pushed is an adapter or its directory",
            found=str(adapter),
            hint="there is no such directory; pull() gets an adapter from the Hub",
        )
    with tempfile.TemporaryDirectory(prefix="embedsurgery-push-") as scratch:
        folder = adapter.save(scratch) if isinstance(adapter, Adapter) else Path(adapter)
        loaded = adapter if isinstance(adapter, Adapter) else registry().read_adapter(folder)
        if loaded.manifest.base_model is not None and base_id(loaded.manifest) is None:
            warnings.warn(
                "the adapter names its base by a path, which tells others nothing, and it is pushed so",
                EmbedSurgeryWarning,
                stacklevel=2,
            )
        files: dict[str, Content] = {name: (folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
        local = (folder / README).read_bytes() if (folder / README).is_file() else None
        files[README] = _card(loaded, of.repo, files, local)  # one that cannot be is found before anything is made
        client = Client(token)
        target = prepare(client, of.repo, private=private, branch=revision, create_branch=not create_pr)
        there = readme_of(client, target.at)
        if there is not None:
            files[README] = _card(loaded, of.repo, files, there)
        text = message or f"Push {loaded.manifest.surgery} adapter with embedsurgery"
        return commit(client, target, files, message=text, create_pr=create_pr, tag=tag)


def readme_of(client: Client, at: Snapshot) -> bytes | None:
    """The README of a commit, None where there is none."""
    files = client.named(at, (README,))
    return small(client, at, files, README).read_bytes() if README in files else None


def _card(adapter: Adapter, repo: str, files: dict[str, Content], readme: bytes | None) -> bytes:
    size = sum(len(data) for name, data in files.items() if name != README and isinstance(data, bytes))
    name = repo.partition("/")[2]
    body = adapter_body(adapter, repo, size, _at_hand(adapter))
    return renewed(decoded(readme), adapter_front(adapter), name, body).encode()


def _at_hand(adapter: Adapter) -> Path | None:
    """The directory of an adapter's base: one that is named, or a copy in the Hub cache; nothing is downloaded."""
    named, of = adapter.manifest.base_model, base_id(adapter.manifest)
    if of is None:
        return Path(named) if named is not None and Path(named).is_dir() else None
    found = try_to_load_from_cache(of.repo, "config.json", revision=of.revision)
    return Path(found).parent if isinstance(found, str) else None


def decoded(readme: bytes | None) -> str | None:
    """A README's text.

    Raises:
        HubError: It is no UTF-8.
    """
    try:
        return None if readme is None else readme.decode()
    except UnicodeDecodeError as error:
        raise HubError("the README is no UTF-8", where=README, hint="save it as UTF-8") from error
