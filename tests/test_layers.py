"""The layers of the package: who may import whom, how many files lie at the top, who looks at stack frames."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT

PACKAGE = ROOT / "embedsurgery"

LAYERS = (
    ("errors", "_version"),
    ("tensors", "plugin_calls"),
    ("files", "graph"),
    ("plan",),
    ("tokenizer",),
    ("stores",),
    ("initializers",),
    ("adapters",),
    ("surgeries",),
    ("combining", "plugins", "runtime"),
    ("hub",),
    ("loading",),
    ("checkpoints", "models", "integrations"),
    ("__init__", "demo"),
    ("testing", "cli"),
    ("__main__",),
)
"""Ground up. A package imports from layers before its own, and from no other package of its own layer."""

LOADER = ("embedsurgery/plugins/builtin.py", "embedsurgery.cli.")
"""The one import upwards: the loader of built-in verbs, by a name that it makes."""


def level_of(module: str) -> tuple[int, str]:
    """Number of a module's layer, and the package or top-level file that it is in."""
    _, _, rest = module.partition(".")
    part = rest.partition(".")[0] or "__init__"
    return next(number for number, names in enumerate(LAYERS) if part in names), part


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of embedsurgery's own, wherever it stands, ``import_module`` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "embedsurgery")
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module.split(".")[0] == "embedsurgery":
                assert node.level == 0, "imports are absolute"
                for alias in node.names:
                    whole = f"{module}.{alias.name}"
                    yield node.lineno, whole if whole in modules else module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0]
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}"
                for part in (name.values if isinstance(name, ast.JoinedStr) else [name])
            )
            if text.startswith("embedsurgery"):
                yield node.lineno, text.partition("{}")[0].rstrip(".") if "{}" in text else text


def faults(path: Path, source: str, modules: set[str]) -> list[str]:
    """What a file imports from its own layer or one above, with file, line and both layers."""
    module, found = module_of(path), []
    own, part = level_of(module)
    for line, target in imports(ast.parse(source), modules):
        other, whose = level_of(target)
        loader = str(path.relative_to(ROOT)) == LOADER[0] and f"{target}.".startswith(LOADER[1])
        if whose != part and other >= own and not loader:
            found.append(f"{path.relative_to(ROOT)}:{line}: layer {own} ({part}) imports {target}, layer {other}")
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_a_file_imports_only_from_lower_layers() -> None:
    modules = {module_of(path) for path in files()}
    found = [fault for path in files() for fault in faults(path, path.read_text(), modules)]
    assert found == []


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("graph/x.py", "from embedsurgery.stores.store import Store"),
        ("graph/x.py", "from embedsurgery.files.atomic import sync_path"),
        ("plan/x.py", "def f():\n    from embedsurgery.hub import ids"),
        ("plan/x.py", "if TYPE_CHECKING:\n    import embedsurgery.adapters.adapter"),
        ("hub/x.py", "from embedsurgery import loading"),
        ("hub/x.py", "import_module('embedsurgery.checkpoints.log')"),
        ("hub/x.py", "importlib.import_module(f'embedsurgery.cli.{verb}')"),
        ("checkpoints/x.py", "from embedsurgery.models.walking import walk"),
        ("runtime/x.py", "from embedsurgery.plugins.current import registry"),
        ("demo/x.py", "import embedsurgery.testing"),
        ("tensors/x.py", "import embedsurgery as es"),
    ],
)
def test_an_import_upwards_is_seen(where: str, code: str) -> None:
    modules = {module_of(path) for path in files()}
    (fault,) = faults(PACKAGE / where, code, modules)
    assert fault.startswith(f"embedsurgery/{where}:{code.count(chr(10)) + 1}: layer ")


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("stores/x.py", "from embedsurgery.graph import Table"),
        ("stores/x.py", "from embedsurgery.stores.store import Store"),
        ("demo/x.py", "from embedsurgery.checkpoints.merging import merge_checkpoint"),
        ("cli/x.py", "import embedsurgery as es"),
    ],
)
def test_an_import_downwards_is_fine(where: str, code: str) -> None:
    assert faults(PACKAGE / where, code, {module_of(path) for path in files()}) == []


def test_no_file_is_part_of_a_circle() -> None:
    modules = {module_of(path): path for path in files()}
    edges = {
        name: {other for _, other in imports(ast.parse(path.read_text()), set(modules)) if other != name}
        for name, path in modules.items()
    }
    left = dict(edges)
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {', '.join(sorted(left))}"
        for name in free:
            del left[name]


def test_six_files_lie_at_the_top() -> None:
    top = {path.name for path in PACKAGE.glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "_version.py", "errors.py", "loading.py", "plugin_calls.py"}


def test_every_package_says_what_it_is_for() -> None:
    for folder in {path.parent for path in files()} - {PACKAGE}:
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert len((doc or "").splitlines()) > 1, folder


def test_one_file_looks_at_stack_frames() -> None:
    names = ("_getframe", "f_back", "f_locals", "currentframe")
    found = [path.relative_to(PACKAGE).as_posix() for path in files() if any(n in path.read_text() for n in names)]
    assert found in ([], ["runtime/calls.py"])
