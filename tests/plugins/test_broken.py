"""Broken plugins of every kind as installed distributions: each is reported in full, and is harmless."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from embedsurgery.plugins.checks import KINDS
from embedsurgery.plugins.registry import DISABLE
from tests.support.comparing import contents
from tests.support.processes import cli

HEAD = """
import embedsurgery as es
from embedsurgery.plugins import hookspecs as h
from embedsurgery.initializers import Initializer, InitializerRecord
from embedsurgery.graph.architectures import Layout
from embedsurgery.surgeries.surgery import Surgery, SurgeryRecord

@es.hookimpl
"""
BROKEN: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "import": ("raise ImportError('no such library')", "no such library"),
    "surgery": (HEAD + "def embedsurgery_surgeries(): return [SurgeryRecord('x', int, None, 'X')]", "SurgeryRecord"),
    "initialiser": (
        HEAD + "def embedsurgery_initializers(): return [InitializerRecord('x', Initializer)]",
        "InitializerRecord",
    ),
    "classifier": (
        HEAD + "def embedsurgery_classifiers(): return [h.ClassifierRecord('x', lambda: None)]",
        ("classify(unknown)", "classify()"),
    ),
    "layout": (HEAD + "def embedsurgery_layouts(): return [h.LayoutRecord('t5', Layout())]", "'t5'"),
    "store": (HEAD + "def embedsurgery_stores(): return [h.StoreRecord('x', lambda d: True, None)]", "StoreRecord"),
    "command": (HEAD + "def embedsurgery_commands(): return [h.CommandRecord('merge', 'Mine.', dict)]", "'merge'"),
    "card": (HEAD + "def embedsurgery_card_sections(): return 3", "CardSectionRecord"),
    "signature": (
        HEAD + "def embedsurgery_stores(path): return []",
        ("embedsurgery_stores()", "embedsurgery_stores(path)"),
    ),
    "hook": (HEAD + "def embedsurgery_tables(): return []", "embedsurgery_tables"),
    "contract": ("embedsurgery_contract = 99" + HEAD + "def embedsurgery_stores(): return []", "99"),
}
SURGERY = (
    """
from dataclasses import dataclass
import embedsurgery as es
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens
@dataclass(frozen=True)
class Config: pass
class Mine(TrainableTokens):
    name = 'NAME'
    def plan(self, adapter, located): return None
"""
    + HEAD
    + "def embedsurgery_surgeries(): return [SurgeryRecord('NAME', Config, Mine(), 'PEFT_NAME')]"
)
STARTS = (
    """
from embedsurgery.initializers import Initializer
class Mine(Initializer):
    def rows(self, view, tokens, argument, streams): return None
"""
    + HEAD
    + "def embedsurgery_initializers(): return [InitializerRecord('NAME', Mine())]"
)
OTHERS = {
    "classifiers": "h.ClassifierRecord('NAME', lambda unknown: None)",
    "layouts": "h.LayoutRecord('NAME', Layout())",
    "stores": "h.StoreRecord('NAME', lambda directory: False, lambda directory, architectures: None)",
    "commands": "h.CommandRecord('NAME', 'Does.', dict)",
    "card_sections": "h.CardSectionRecord('NAME', lambda manifest: None)",
}


def _each(name: str) -> dict[str, str]:
    """Return a working plugin for each hook, with a record of this name."""
    others = {kind: f"{HEAD}def embedsurgery_{kind}(): return [{record}]" for kind, record in OTHERS.items()}
    codes = {"surgeries": SURGERY, "initializers": STARTS, **others}
    return {kind: code.replace("NAME", name) for kind, code in codes.items()}


GOOD = {
    "good": HEAD + "def embedsurgery_commands(): return [h.CommandRecord('hello', 'Says hello.', dict)]",
    **{f"first-{kind}": code for kind, code in _each("first").items()},
}
TAKEN = {
    "surgeries": "trainable_tokens",
    "initializers": "mean",
    "layouts": "t5",
    "stores": "safetensors",
    "commands": "unmerge",
    "classifiers": "first",
    "card_sections": "first",
}
SIGNATURES = {
    "surgeries": ("plan(self, adapter, located)", "plan(self, adapter)", "adapter, located):", "adapter):"),
    "initializers": (
        "rows(self, view, tokens, argument, streams)",
        "rows(self, view, tokens, argument)",
        "argument, streams):",
        "argument):",
    ),
    "classifiers": ("classify(unknown)", "classify()", "lambda unknown:", "lambda:"),
    "stores": ("open(directory, architectures)", "open(directory)", "directory, architectures:", "directory:"),
    "commands": ("load()", "load(name)", "dict", "lambda name: 1"),
    "card_sections": ("section(manifest)", "section()", "lambda manifest:", "lambda:"),
}
"""Hook whose records hold functions -> expected signature, found signature, and the edit that makes it so."""


def _faults_of(kind: str, code: str) -> dict[str, tuple[str, str | tuple[str, ...]]]:
    """Return the faults that a plugin of one hook can have: code, and what its error names."""
    hook = f"embedsurgery_{kind}"
    faults: dict[str, tuple[str, str | tuple[str, ...]]] = {
        f"import-{kind}": ("import a_library_of_nobody\n" + code, "a_library_of_nobody"),
        f"contract-{kind}": ("embedsurgery_contract = 99\n" + code, ("embedsurgery_contract", "1 to 1", "99")),
        f"signature-{kind}": (code.replace(f"{hook}()", f"{hook}(path)"), (f"{hook}()", f"{hook}(path)")),
        f"answer-{kind}": (f"{HEAD}def {hook}(): return [3]", (hook, "int")),
        f"raises-{kind}": (f"{HEAD}def {hook}(): return 1 / 0", "ZeroDivisionError"),
        f"taken-{kind}": (_each(TAKEN[kind])[kind], repr(TAKEN[kind])),
    }
    if kind in SIGNATURES:
        right, wrong, old, new = SIGNATURES[kind]
        faults[f"function-{kind}"] = (code.replace(old, new), (right, wrong))
    return faults


for _kind, _code in _each("x").items():
    BROKEN |= _faults_of(_kind, _code)


def test_every_hook_is_tested() -> None:
    assert {f"embedsurgery_{kind}" for kind in _each("x")} == {kind.name for kind in KINDS}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which all broken plugins are installed, and working ones."""
    folder = tmp_path / "installed"
    folder.mkdir()
    for name, code in {**{name: code for name, (code, _) in BROKEN.items()}, **GOOD}.items():
        module = f"embedsurgery_a_{name.replace('-', '_')}"
        (folder / f"{module}.py").write_text(code)
        about = folder / f"{module}-1.{len(name)}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: a-{name}\nVersion: 1.{len(name)}\n")
        (about / "entry_points.txt").write_text(f"[embedsurgery]\n{name} = {module}\n")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def list_plugins(environment: dict[str, str]) -> dict[str, Any]:
    run = cli("plugins", "--json", env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    body: dict[str, Any] = json.loads(run.stdout)
    return body


def test_each_is_reported(environment: dict[str, str]) -> None:
    body = list_plugins(environment)
    found = {plugin["name"]: plugin for plugin in body["plugins"]}
    assert found.keys() == {"builtin", *GOOD, *BROKEN}
    for name, (_, named) in BROKEN.items():
        plugin = found[name]
        assert (plugin["distribution"], plugin["version"], plugin["hooks"]) == (f"a-{name}", f"1.{len(name)}", [])
        assert all(text in plugin["error"] for text in ([named] if isinstance(named, str) else named)), name
    assert [name for name in GOOD if found[name]["error"] is not None] == []
    assert found["good"]["hooks"] == ["embedsurgery_commands"]
    assert body["commands"] == ["first", "hello"]
    for kind in ("stores", "layouts", "classifiers", "card_sections"):
        assert body[kind] == [*(["safetensors"] if kind == "stores" else []), "first"]
    table = cli("plugins", env=environment)
    assert table.returncode == 0
    assert all(name in table.stdout for name in BROKEN)


def test_each_is_harmless(environment: dict[str, str], base: Path, tmp_path: Path) -> None:
    """The built-in commands give the same output, byte for byte."""
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
    """By its name, and then it is not imported; or all of them."""
    body = list_plugins({**environment, DISABLE: "import,good,first-commands"})
    found = {plugin["name"]: plugin["error"] for plugin in body["plugins"]}
    assert DISABLE in found["import"]
    assert DISABLE in found["good"]
    assert body["commands"] == []
    body = list_plugins({**environment, DISABLE: "1"})
    assert all(DISABLE in plugin["error"] for plugin in body["plugins"] if plugin["name"] != "builtin")
