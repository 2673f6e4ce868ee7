"""The order of writes, syncs and renames, seen in the system calls: it is what makes changes survive a power cut.

A kill loses nothing that was written; a power cut loses what was not synced. So each write or rename must be synced
before the next one that relies on it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.scenarios import SCENARIOS
from tests.faults.tracer import DONE, run, unavailable

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.filterwarnings("ignore:.*have these files mapped:embedsurgery.errors.EmbedSurgeryWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def calls(name: str, folder: Path) -> list[str]:
    """The calls of a scenario, with paths relative to its directory."""
    scenario = SCENARIOS[name]
    folder.mkdir()
    scenario.prepare(folder)
    outcome = run(lambda: scenario.act(folder), ())
    assert outcome.code == DONE, outcome.error
    return [call.replace(f"{folder}/", "").replace(str(folder), ".") for call in outcome.calls]


def first(found: list[str], begin: str, after: int = 0) -> int:
    """Index of the first call from ``after`` on that starts with a text."""
    return next(place for place, call in enumerate(found) if place > after - 1 and call.startswith(begin))


def synced(found: list[str], path: str, begin: int, end: int) -> bool:
    """Whether a path is synced between two calls."""
    return f"fsync {path}" in found[begin:end]


@pytest.mark.parametrize("name", ["merge in place", "unmerge in place", "tokens on spare rows in place"])
def test_in_place(name: str, tmp_path: Path) -> None:
    found = calls(name, tmp_path / "x")
    journal, state = "base/.embedsurgery/journal", "base/.embedsurgery"
    shard = "base/model-00001-of-00003.safetensors"
    written = first(found, f"openat {journal}/0001.part")
    counts = first(found, "rename", written)
    touched = first(found, f"pwrite64 {shard}")
    commit = first(found, f"rename {state}/done")
    assert written < counts < touched < commit
    assert synced(found, f"{journal}/0001.part", written, counts)
    assert synced(found, journal, counts, touched)
    assert synced(found, state, 0, touched)
    assert synced(found, "base", 0, touched)
    last = max(place for place, call in enumerate(found) if call.startswith("pwrite64"))
    assert last < commit
    assert synced(found, shard, last, commit)
    changed = [place for place, call in enumerate(found[:commit]) if call.startswith(("rename base/", "unlink base/"))]
    for place in changed:  # if a name was added or removed, its directory is synced before the commit
        assert synced(found, found[place].split()[1].rpartition("/")[0], place, commit)
    removed = first(found, "unlink", commit)
    assert synced(found, state, commit, removed)
    if name != "unmerge in place":
        record = first(found, f"openat {state}/merges/0001.safetensors")
        assert synced(found, f"{state}/merges/0001.safetensors", record, commit)
        assert synced(found, f"{state}/merges", record, commit)
        assert synced(found, state, record, commit)  # its parent, which may be new
    for place, call in enumerate(found):  # a file is synced before it is renamed over another, and the directory after
        if call.startswith("rename base/") and ".embedsurgery" not in call:
            assert synced(found, "base", place, commit)


def test_growth_in_place(tmp_path: Path) -> None:
    """A file that replaces another is synced before, and the directory before the commit."""
    found = calls("growth in place", tmp_path / "x")
    commit = first(found, "rename base/.embedsurgery/done")
    renames = [place for place, call in enumerate(found) if call.startswith("rename base/") and "/." not in call]
    assert len(renames) == 5  # two shards, the index, the config, the tokenizer
    for place in renames:
        name = found[place].removeprefix("rename base/")
        made = first(found, f"openat base/.embedsurgery/journal/.{name}")
        assert synced(found, found[made].removeprefix("openat "), made, place)
        assert synced(found, "base", place, commit)
        kept = [spot for spot, call in enumerate(found[:place]) if call.startswith("link") and call.endswith(".kept")]
        counts = first(found, "rename", max(kept))
        assert synced(found, "base/.embedsurgery/journal", max(kept), counts + 2)
        assert counts < place


@pytest.mark.parametrize("name", ["merge into a new directory", "growth into a new directory"])
def test_new_directory(name: str, tmp_path: Path) -> None:
    found = calls(name, tmp_path / "x")
    rename = first(found, "rename out")
    made = [call.removeprefix("openat ") for call in found if call.startswith("openat") and "/tree/" in call]
    assert len(made) >= 8
    staging = made[0].partition("/tree/")[0] + "/tree"
    for path in made:
        opened = found.index(f"openat {path}")
        assert synced(found, path, opened, rename)
    for place, call in enumerate(found[:rename]):
        if call.startswith("pwrite64"):
            assert synced(found, call.removeprefix("pwrite64 "), place, rename)
    last = max(place for place, call in enumerate(found[:rename]) if call.startswith(("openat", "pwrite64", "rename")))
    folders = {path.rpartition("/")[0] for path in made}
    assert {f"{staging}/assets", f"{staging}/.embedsurgery/merges", staging} <= folders
    for folder in (*folders, f"{staging}/.embedsurgery"):
        assert synced(found, folder, last, rename)
    assert synced(found, ".", rename, len(found))
