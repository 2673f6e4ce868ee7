"""This repository's plugins, the template and the guide's code use only the names that the guide lists as public."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

from embedsurgery.plugins.template import write_plugin
from tests.support.environment import ROOT

GUIDE = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
START, END = "<!-- public -->\n", "<!-- end of public -->\n"


def public() -> dict[str, set[str]]:
    """Return module -> its public names, as the guide lists them."""
    (part,) = re.findall(re.escape(START) + "(.*?)" + re.escape(END), GUIDE, re.DOTALL)
    rows = [line.strip("| ").split(" | ") for line in part.splitlines()[2:]]
    return {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows}


def sources() -> dict[str, str]:
    """Return name -> code of what a plugin's author reads or writes."""
    files = [
        *(ROOT / "plugins").glob("embedsurgery-*/embedsurgery_*/*.py"),
        ROOT / "tests" / "support" / "npy_store.py",
    ]
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(files)}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    return found | {f"guide-{number}": code for number, code in enumerate(blocks)}


def sources_of_tests() -> dict[str, str]:
    """Return name -> code of the tests of this repository's plugins."""
    files = sorted((ROOT / "plugins").glob("embedsurgery-*/tests/*.py"))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import from embedsurgery; name is None where a module is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "embedsurgery")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "embedsurgery":
            assert node.module is not None
            yield from ((node.module, alias.name) for alias in node.names)


def is_private(name: str) -> bool:
    """Whether a name starts with an underscore."""
    return name.startswith("_") and not name.endswith("__")


def find_private(tree: ast.AST) -> list[str]:
    """Find uses of private names of other objects, and imports without an import statement."""
    found = [
        f"{module}.{name}" for module, name in imports_of(tree) if any(map(is_private, f"{module}.{name}".split(".")))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.append(ast.unparse(node))
    return found


def find_unlisted(code: str) -> list[str]:
    """Find imports from embedsurgery that the guide does not list."""
    known = public()
    imports = list(imports_of(ast.parse(code)))
    return [
        f"{module}.{name}"
        for module, name in imports
        if name not in (*known.get(module, ()), None) or (name is None and module not in known)
    ]


def test_listed_names_exist() -> None:
    known = public()
    assert known.keys() >= {"embedsurgery", "embedsurgery.testing", "embedsurgery.plugins.hookspecs"}
    for module, names in known.items():
        imported = import_module(module)
        assert imported.__doc__
        assert [name for name in names if not hasattr(imported, name) or is_private(name)] == []
    assert known["embedsurgery"] == set(import_module("embedsurgery").__all__)


@pytest.mark.parametrize("name", sources())
def test_a_source_uses_only_listed_names(name: str) -> None:
    code = sources()[name]
    assert find_private(ast.parse(code)) == []
    assert find_unlisted(code) == []


@pytest.mark.parametrize("name", sources_of_tests())
def test_a_test_uses_nothing_private(name: str) -> None:
    assert find_private(ast.parse(sources_of_tests()[name])) == []


def test_the_template_uses_only_listed_names(tmp_path: Path) -> None:
    folder, files = write_plugin("row-scaling", tmp_path)
    for file in [file for file in files if file.endswith(".py")]:
        code = (folder / file).read_text(encoding="utf-8")
        assert find_private(ast.parse(code)) == []
        assert find_unlisted(code) == []


@pytest.mark.parametrize(
    "code",
    [
        "from embedsurgery.adapters.adapter import _replace",
        "from embedsurgery._version import x",
        "import embedsurgery._version",
        "import embedsurgery as es\nes._PUBLIC",
        "x._member",
        "getattr(x, '_member')",
        "from importlib import import_module\nimport_module('embedsurgery.graph.from_modules')",
    ],
)
def test_private_names_are_found(code: str) -> None:
    assert len(find_private(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "from embedsurgery.graph.from_modules import walk_module",
        "import embedsurgery.graph.from_modules",
        "from embedsurgery.plan import spans",
    ],
)
def test_unlisted_names_are_found(code: str) -> None:
    assert len(find_unlisted(code)) == 1


def test_arguments_and_results_of_plugins_are_frozen_dataclasses() -> None:
    from embedsurgery.plugins.checks import KINDS

    classes = {
        "embedsurgery.plugins.hookspecs": ("UnknownModule", "EmbeddingModule", "CardSection"),
        "embedsurgery.initializers": ("NewToken", "TableView", "Ask"),
        "embedsurgery.surgeries.surgery": ("Base", "BakeContext", "RowOverride"),
        "embedsurgery.adapters.adapter": ("Adapter", "PeftFiles"),
        "embedsurgery.adapters.manifest": ("Manifest", "TableRecord", "Fingerprint"),
        "embedsurgery.plan": ("Plan", "SetRows", "SetBlocks", "SetEntries", "Grow"),
        "embedsurgery.graph": ("EmbeddingGraph", "Table", "Site", "Vocabulary"),
    }
    kinds = [getattr(import_module(module), name) for module, names in classes.items() for name in names]
    for kind in (*kinds, *(hook.record for hook in KINDS)):
        assert is_dataclass(kind)
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]
