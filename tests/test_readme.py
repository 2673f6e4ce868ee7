"""The README's code runs in its order, and its generated part is the command line's help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.reference import README

TEXT = README.read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def section(title: str) -> list[tuple[str, str]]:
    """Return the code blocks of a second-level section: (language, code)."""
    (body,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return BLOCK.findall(body)


def run(blocks: list[tuple[str, str]], folder: Path) -> None:
    """Run code blocks. Consecutive Python blocks run in one interpreter, with the code of those before them."""
    bin_directory = Path(sys.executable).parent
    done: list[str] = []
    for number, (language, code) in enumerate(blocks):
        if language == "python":
            done.append(code)
            if [following for following, _ in blocks[number + 1 : number + 2]] == ["python"]:
                continue
            command = [sys.executable, "-c", "\n".join(done)]
        else:
            command = ["bash", "-euo", "pipefail", "-c", f'export PATH="{bin_directory}:$PATH"\n{code}']
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, f"{code}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the demo's output."""
    folder = tmp_path_factory.mktemp("readme")
    subprocess.run(
        [sys.executable, "-m", "embedsurgery", "demo"], cwd=folder, check=True, capture_output=True, timeout=300
    )
    return folder


@pytest.mark.sweep
def test_what_people_come_for(demo: Path) -> None:
    blocks = section("What people come for")
    assert [language for language, _ in blocks] == [
        "python",
        "python",
        "bash",
        "bash",
        "bash",
        "python",
        "bash",
        "python",
        "bash",
        "python",
        "bash",
        "python",
    ]
    run(blocks, demo)


@pytest.mark.sweep
def test_train_with_the_trainer(demo: Path) -> None:
    run(section("Train with the Trainer, TRL or Accelerate"), demo)
    for rows in ("out/checkpoint-6/embedsurgery/default", "state/embedsurgery/default", "my-zorbl"):
        assert (demo / rows / "adapter_model.safetensors").exists()


@pytest.mark.sweep
def test_teach_a_real_encoder(tmp_path: Path) -> None:
    run(section("Teach a real encoder a new word"), tmp_path)


def test_the_command_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.support.reference", "--check"], cwd=README.parent, check=False)
    assert done.returncode == 0, "run python -m tests.support.reference"


def test_the_first_screen_has_the_two_commands() -> None:
    start = TEXT.index("```bash\n")
    (first, second) = TEXT[start:].split("```")[1].removeprefix("bash\n").strip().splitlines()
    assert first.endswith('-e ".[demo]" && .venv/bin/embedsurgery demo')
    assert second.endswith('-e ".[test]" && .venv/bin/pytest')
    assert TEXT[:start].count("\n") < 40


def test_every_promise_names_a_test_that_exists() -> None:
    (body,) = re.findall(r"^## What it promises\n(.*?)(?=^## )", TEXT, re.MULTILINE | re.DOTALL)
    promises = re.split(r"^- ", body, flags=re.MULTILINE)[1:]
    assert len(promises) > 10
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", promise)
        assert named, promise
        for path, name in named:
            text = (README.parent / path).read_text(encoding="utf-8")
            assert f"def {name or 'test_'}" in text, (path, name)
