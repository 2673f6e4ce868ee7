"""Deliberately broken plugins, one of each kind, as installed distributions: reported in full, and harmless."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from embedsurgery.registry import DISABLE
from tests.conftest import cli, contents

HEAD = """
import embedsurgery as es
from embedsurgery import hookspecs as h
from embedsurgery.initializers import Initializer, InitializerRecord
from embedsurgery.architectures import Layout
from embedsurgery.surgeries.base import Surgery, SurgeryRecord

@es.hookimpl
"""
BROKEN = {
    "import": ("raise ImportError('no such library')", "no such library"),
    "surgery": (HEAD + "def embedsurgery_surgeries(): return [SurgeryRecord('x', int, None, 'X')]", "SurgeryRecord"),
    "initialiser": (HEAD + "def embedsurgery_initializers(): return [InitializerRecord('x', Initializer)]",
                    "InitializerRecord"),
    "classifier": (HEAD + "def embedsurgery_classifiers(): return [h.ClassifierRecord('x', lambda: None)]",
                   "expected classify(unknown), found classify()"),
    "layout": (HEAD + "def embedsurgery_layouts(): return [h.LayoutRecord('t5', Layout())]", "'t5'"),
    "store": (HEAD + "def embedsurgery_stores(): return [h.StoreRecord('x', lambda d: True, None)]", "StoreRecord"),
    "command": (HEAD + "def embedsurgery_commands(): return [h.CommandRecord('merge', 'Mine.', dict)]", "'merge'"),
    "card": (HEAD + "def embedsurgery_card_sections(): return 3", "CardSectionRecord"),
    "signature": (HEAD + "def embedsurgery_stores(path): return []",
                  "expected embedsurgery_stores(), found embedsurgery_stores(path)"),
    "hook": (HEAD + "def embedsurgery_tables(): return []", "embedsurgery_tables"),
    "contract": ("embedsurgery_contract = 99" + HEAD + "def embedsurgery_stores(): return []", "99"),
}  # fmt: skip
GOOD = HEAD + "def embedsurgery_commands(): return [h.CommandRecord('hello', 'Says hello.', dict)]"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a process with all of them installed, and one that works."""
    folder = tmp_path / "installed"
    folder.mkdir()
    for name, code in {**{name: code for name, (code, _) in BROKEN.items()}, "good": GOOD}.items():
        module = f"embedsurgery_a_{name}"
        (folder / f"{module}.py").write_text(code)
        about = folder / f"{module}-1.{len(name)}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: a-{name}\nVersion: 1.{len(name)}\n")
        (about / "entry_points.txt").write_text(f"[embedsurgery]\n{name} = {module}\n")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def listed(environment: dict[str, str]) -> dict[str, Any]:
    run = cli("plugins", "--json", env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    body: dict[str, Any] = json.loads(run.stdout)
    return body


def test_each_is_reported(environment: dict[str, str]) -> None:
    body = listed(environment)
    found = {plugin["name"]: plugin for plugin in body["plugins"]}
    assert found.keys() == {"builtin", "good", *BROKEN}
    for name, (_, said) in BROKEN.items():
        plugin = found[name]
        assert (plugin["distribution"], plugin["version"], plugin["hooks"]) == (f"a-{name}", f"1.{len(name)}", [])
        assert said in plugin["error"]
    assert found["good"]["error"] is None
    assert found["good"]["hooks"] == ["embedsurgery_commands"]
    assert body["commands"] == ["hello"]
    table = cli("plugins", env=environment)
    assert table.returncode == 0
    assert all(name in table.stdout for name in BROKEN)


def test_each_is_harmless(environment: dict[str, str], base: Path, tmp_path: Path) -> None:
    """What is built in gives the same, word for word and byte for byte."""
    for arguments in (["inspect", base, "--json"], ["verify", base, "--json"], ["--help"]):
        with_them, without = cli(*arguments, env=environment), cli(*arguments)
        assert with_them.returncode == without.returncode == 0
        if arguments != ["--help"]:
            assert (with_them.stdout, with_them.stderr) == (without.stdout, without.stderr)
    for name, env in (("with", environment), ("without", dict(os.environ))):
        run = cli("tokens", "add", base, "--token", "<new>", "--init", "zeros", "-o", tmp_path / name, env=env)
        assert run.returncode == 0, run.stderr
    hidden = ".embedsurgery/merges/0001.safetensors"
    one, other = contents(tmp_path / "with"), contents(tmp_path / "without")
    assert one.pop(hidden)
    assert other.pop(hidden)
    assert one == other


def test_each_can_be_blocked(environment: dict[str, str]) -> None:
    """By its name, and then it is not even imported; or all of them."""
    body = listed({**environment, DISABLE: "import,good"})
    found = {plugin["name"]: plugin["error"] for plugin in body["plugins"]}
    assert DISABLE in found["import"]
    assert DISABLE in found["good"]
    assert body["commands"] == []
    body = listed({**environment, DISABLE: "1"})
    assert all(DISABLE in plugin["error"] for plugin in body["plugins"] if plugin["name"] != "builtin")
