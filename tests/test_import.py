"""Imports stay light, and every public name resolves."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import embedsurgery as es
from tests.faults.scenarios import adapter, make
from tests.support.processes import ROOT, python

HEAVY = (
    "torch",
    "numpy",
    "pluggy",
    "click",
    "rich",
    "safetensors",
    "transformers",
    "peft",
    "tokenizers",
    "huggingface_hub",
    "embedsurgery.plugins.registry",
    "embedsurgery.plugins.builtin",
)


def loaded(code: str) -> set[str]:
    run = python(f"import sys\n{code}\nprint('\\n'.join(sys.modules))")
    assert (run.returncode, run.stderr) == (0, "")
    return set(run.stdout.split())


def test_importing_loads_nothing_heavy() -> None:
    names = loaded("import embedsurgery; embedsurgery.__version__; dir(embedsurgery); embedsurgery.errors")
    assert not names.intersection(HEAVY)


@pytest.mark.parametrize("verb", ["", "inspect", "show", "merge", "unmerge", "verify", "plugins", "demo"])
def test_help_loads_only_click(verb: str) -> None:
    quiet = "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit)"
    names = loaded(
        f"import io, contextlib\nfrom embedsurgery.cli.main import main\n{quiet}: main({[*verb.split(), '--help']})"
    )
    assert names.intersection(HEAVY) == {"click"}


@pytest.mark.parametrize(
    "code",
    [
        "import embedsurgery as es; es.merge_checkpoint; es.unmerge_checkpoint; es.verify_checkpoint; es.walk; es.load",
        "import embedsurgery as es; es.TrainableTokensConfig([1]); es.Adapter; es.Table; es.EmbeddingGraph",
    ],
)
def test_surgery_on_disk_needs_no_torch(code: str) -> None:
    assert not loaded(code).intersection({"torch", "transformers", "peft", "safetensors", "click", "rich"})


UNUSED_ON_DISK = {
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "importlib.metadata",
    "embedsurgery.plugins.discovery",
    "embedsurgery.initializers",
    "embedsurgery.adapters.new_tokens",
    "embedsurgery.tokenizer.patching",
    "embedsurgery.surgeries.soft_prompt.baking",
    "embedsurgery.stores.resized_files",
    "embedsurgery.checkpoints.adding",
    "embedsurgery.models.merging",
}
"""Modules that commands on disk do not use, and that take longer to import than the commands run."""


def test_verbs_on_disk_start_lean(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    adapter(base, [3], 1.0).save(tmp_path / "adapter")
    run = "import sys\nfrom embedsurgery.cli.main import main\n"
    run += "try: main({})\nexcept SystemExit as left: assert not left.code\n"
    verbs = (
        ["merge", base, tmp_path / "adapter", "--in-place"],
        ["unmerge", base, "--in-place"],
        ["inspect", base],
        ["inspect", base, "--json"],
        ["log", base],
        ["recover", base],
    )
    for verb in verbs:
        done = python(run.format([str(part) for part in verb]) + "print('\\n'.join(sys.modules))")
        assert done.returncode == 0, done.stderr
        names = set(done.stdout.split())
        assert "embedsurgery.plugins.registry" in names or verb[0] in ("log", "recover")
        assert not names & UNUSED_ON_DISK, verb
        assert ("numpy" in names) is (verb[0] == "merge"), verb
        assert ("rich" in names) is (verb[-1] == base and verb[0] == "inspect"), verb


def test_torch_side_needs_no_transformers() -> None:
    names = loaded(
        "import embedsurgery as es, torch\n"
        "m = torch.nn.Sequential(torch.nn.Embedding(9, 3))\n"
        "es.attach(m, es.TrainableTokensConfig([1], target_modules=['0'])).merge()"
    )
    assert not names.intersection({"transformers", "peft", "tokenizers", "huggingface_hub", "click", "rich"})


def test_every_public_name_resolves() -> None:
    assert set(es.__all__) == {*es._PUBLIC, "__version__"}
    assert es.__all__ == sorted(es.__all__)
    assert dir(es) == sorted(es.__all__)
    for name in es.__all__:
        assert getattr(es, name) is not None
        assert getattr(es, name) is getattr(es, name)
    with pytest.raises(AttributeError, match="nothing_here"):
        es.nothing_here  # noqa: B018


@pytest.mark.parametrize("order", ["first", pytest.param("last", marks=pytest.mark.sweep)])
def test_public_names_are_not_hidden_by_modules_of_the_same_name(order: str) -> None:
    """An imported submodule becomes an attribute of its package, and would shadow a function of the same name."""
    modules = [
        info.name
        for info in pkgutil.walk_packages(es.__path__, "embedsurgery.")
        if info.name not in ("embedsurgery.__main__",)
    ]
    imports = "\n".join(f"import {name}" for name in modules)
    names = "import embedsurgery as es\nfound = {n: getattr(es, n) for n in es.__all__}"
    code = f"{names}\n{imports}" if order == "first" else f"{imports}\n{names}"
    run = python(
        f"{code}\nimport types\nprint(sorted(n for n in es.__all__ if isinstance(getattr(es, n), types.ModuleType)))"
    )
    assert run.stderr == ""
    assert run.stdout.strip() == "['errors']"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "embedsurgery/__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(es._PUBLIC)
    assert all(importlib.util.find_spec(f"embedsurgery.{module}") for module in es._PUBLIC.values())


@pytest.mark.parametrize("name", sorted(es._PUBLIC))
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(es, name)
    if name != "hookimpl":
        assert inspect.getdoc(value)
