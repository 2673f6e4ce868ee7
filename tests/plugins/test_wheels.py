"""Each plugin as users get it: a wheel, installed into a fresh environment beside embedsurgery's own, its tests run.

Under two minutes of one core, and so part of the sweep.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.environment import ROOT, Environment, wheel

pytest.importorskip("hatchling")
pytestmark = pytest.mark.sweep

PLUGINS = sorted(path.name for path in (ROOT / "plugins").glob("embedsurgery-*"))
STRICT = (
    "[pytest]\naddopts = -p no:cacheprovider\nfilterwarnings =\n    error\n    ignore:.*SwigPy.*:DeprecationWarning\n"
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """embedsurgery's wheel."""
    return wheel(_copied(ROOT, tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel"))


def _copied(source: Path, folder: Path) -> Path:
    """A package's source, so that building it leaves nothing beside it."""
    kept = ("embedsurgery", "embedsurgery_*", "tests", "*.toml", "*.md", "LICENSE", "constraints.txt")
    for path in {path for pattern in kept for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(path, folder / path.name)
    return folder


def _check(package: Path, ours: Path, tmp_path: Path, entry: str) -> None:
    """Build, install, find by its entry point, and run its tests, all away from the source."""
    built = wheel(package, tmp_path / "wheel")
    environment = Environment(tmp_path / "env", root=False)
    environment.install(ours, built)
    away = tmp_path / "away"
    shutil.copytree(package / "tests", away, ignore=shutil.ignore_patterns("__pycache__"))
    (away / "pytest.ini").write_text(STRICT)
    found = environment.run("-c", "import embedsurgery; print(embedsurgery.__file__)", cwd=away).stdout
    assert str(environment.site) in found
    said = json.loads(environment.run("-m", "embedsurgery", "plugins", "--json", cwd=away).stdout)
    (plugin,) = (plugin for plugin in said["plugins"] if plugin["name"] == entry)
    assert plugin["error"] is None
    assert (plugin["distribution"], plugin["version"]) == (package.name, "0.1.0")
    assert plugin["hooks"]
    run = environment.run("-m", "pytest", "-q", "-x", ".", cwd=away)
    assert " passed" in run.stdout


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_of_our_own(name: str, ours: Path, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    _check(_copied(ROOT / "plugins" / name, tmp_path / name), ours, tmp_path, name.removeprefix("embedsurgery-"))


def test_the_template(ours: Path, tmp_path: Path) -> None:
    """What the installed command writes."""
    writer = Environment(tmp_path / "writer", root=False)
    writer.install(ours)
    writer.run("-m", "embedsurgery", "plugins", "new", "row-scaling", "-o", tmp_path, cwd=tmp_path)
    _check(tmp_path / "embedsurgery-row-scaling", ours, tmp_path, "row-scaling")
