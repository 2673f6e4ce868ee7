"""Each plugin as users get it: a wheel, installed beside embedsurgery's wheel in a fresh environment, and tested there.

Two minutes on one core, so it is part of the sweep.
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
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """embedsurgery's wheel."""
    return wheel(_copy_source(ROOT, tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel"))


def _copy_source(source: Path, folder: Path) -> Path:
    """Copy a package's source, so that a build leaves nothing beside the original."""
    kept = ("embedsurgery", "embedsurgery_*", "tests", "*.toml", "*.md", "LICENSE", "constraints.txt")
    for path in {path for pattern in kept for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(path, folder / path.name)
    return folder


def _check(package: Path, library: Path, tmp_path: Path, entry: str) -> None:
    """Build a package, install it, find its entry point, and run its tests, all away from its source."""
    built = wheel(package, tmp_path / "wheel")
    environment = Environment(tmp_path / "env", root=False)
    environment.install(library, built)
    away = tmp_path / "away"
    shutil.copytree(package / "tests", away, ignore=shutil.ignore_patterns("__pycache__"))
    (away / "pytest.ini").write_text(STRICT)
    found = environment.run("-c", "import embedsurgery; print(embedsurgery.__file__)", cwd=away).stdout
    assert str(environment.site) in found
    listed = json.loads(environment.run("-m", "embedsurgery", "plugins", "--json", cwd=away).stdout)
    (plugin,) = (plugin for plugin in listed["plugins"] if plugin["name"] == entry)
    assert plugin["error"] is None
    assert (plugin["distribution"], plugin["version"]) == (package.name, "0.1.0")
    assert plugin["hooks"]
    run = environment.run("-m", "pytest", "-q", "-x", ".", cwd=away)
    assert " passed" in run.stdout


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_of_this_repository(name: str, library: Path, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    _check(
        _copy_source(ROOT / "plugins" / name, tmp_path / name), library, tmp_path, name.removeprefix("embedsurgery-")
    )


def test_the_template(library: Path, tmp_path: Path) -> None:
    """The package that the installed command writes."""
    writer = Environment(tmp_path / "writer", root=False)
    writer.install(library)
    writer.run("-m", "embedsurgery", "plugins", "new", "row-scaling", "-o", tmp_path, cwd=tmp_path)
    _check(tmp_path / "embedsurgery-row-scaling", library, tmp_path, "row-scaling")
