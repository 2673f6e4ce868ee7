"""The guide's code runs as it is printed, and its list of hooks is that of the contract.

``python -m tests.plugins.test_guide`` rewrites the list.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from embedsurgery.plugins.checks import KINDS
from embedsurgery.plugins.hookspecs import Hooks
from tests.support.environment import ROOT, Environment

GUIDE = ROOT / "plugins" / "README.md"
START, END = "<!-- hooks -->\n", "<!-- end of hooks -->\n"


def hooks() -> str:
    """Return the table of hooks, one line each."""
    lines = ["| hook | what it does | record |", "| --- | --- | --- |"]
    for kind in KINDS:
        summary = inspect.getdoc(getattr(Hooks, kind.name))
        lines.append(f"| `{kind.name}` | {summary} | `{kind.record.__module__}.{kind.record.__name__}` |")
    return "\n".join(lines) + "\n"


def with_current_hooks(text: str) -> str:
    """Return the guide with its table of hooks rewritten."""
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    assert len(pattern.findall(text)) == 1
    return pattern.sub(lambda _: START + hooks() + END, text)


def test_the_list_of_hooks_is_the_contracts() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert with_current_hooks(text) == text


def test_every_plugin_of_this_repository_is_named() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for path in (ROOT / "plugins").glob("embedsurgery-*"):
        assert f"[`{path.name}`]({path.name})" in text
        assert (path / "README.md").exists()


def test_the_guides_code_runs(tmp_path: Path) -> None:
    """Every block, in order: commands are run, and Python is written to the file that its first line names."""
    pytest.importorskip("hatchling")
    environment = Environment(tmp_path / "env", root=True)
    folder, ran = tmp_path / "work", []
    folder.mkdir()
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL):
        if language == "python":
            name, _, below = code.partition("\n")[0].removeprefix("# ").partition(", ")
            assert (folder / name).exists(), "the guide replaces files of the template"
            (folder / name).write_text((folder / name).read_text() + code if below else code)
            continue
        for line in code.splitlines():
            command, _, rest = line.partition(" ")
            if command == "cd":
                folder = folder / rest
            elif command == "pip":
                assert rest == 'install -e ".[test]"'
                environment.install("-e", folder)
            elif command == "pytest":
                run = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder)
                assert " passed" in run.stdout
            else:
                run = environment.run("-m", command, *rest.split(), cwd=folder)
                ran.append(run.stdout)
    assert len(ran) == 3
    assert "first" in ran[1]
    assert "List the tables of a model." in ran[2]
    assert "mean-tokens" in ran[1]
    assert "MeanTokensConfig" in ran[1]


if __name__ == "__main__":
    GUIDE.write_text(with_current_hooks(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
