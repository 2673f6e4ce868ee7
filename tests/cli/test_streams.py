"""Standard output and error as a process has them: closed pipes, full disks, noisy libraries, signals, encodings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import embedsurgery as es
from embedsurgery.cli.render import json_option, print_json
from tests.cli.conftest import INDICES, StubTokenizer
from tests.support.models import tiny
from tests.support.noisy import NOISE, NOISE_LINES, plugin
from tests.support.processes import cli


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "BASE"],
        ["inspect", "BASE", "--json"],
        ["verify", "BASE"],
        ["verify", "BASE", "--json"],
        ["merge", "BASE", "ADAPTER", "--dry-run"],
        ["plugins"],
        ["--help"],
        ["inspect", "--help"],
    ],
    ids=" ".join,
)
def test_a_closed_pipe(arguments: list[str], base: Path, adapter: Path) -> None:
    """141, as for a process that SIGPIPE ends: 0 from ``verify`` would report a broken checkpoint as good."""
    places = {"BASE": str(base), "ADAPTER": str(adapter)}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "embedsurgery", *(places.get(a, a) for a in arguments)],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")


@pytest.mark.parametrize(("more", "first"), [("", "base"), ("--json", "{")])
def test_the_head_of_the_output(more: str, first: str, base: Path) -> None:
    command = f"{sys.executable} -m embedsurgery inspect {base} {more} | head -1"
    run = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert run.stderr == ""
    assert run.stdout.count("\n") == 1
    assert first in run.stdout


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_standard_output_on_a_full_disk(more: list[str], base: Path) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "embedsurgery", "inspect", str(base), *more],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert run.returncode == 1
    assert run.stderr.startswith("embedsurgery: No space left on device")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", [["plugins"], ["merge", "BASE", "ADAPTER", "--dry-run"]], ids=["plugins", "merge"])
def test_json_is_alone_on_standard_output_whatever_a_library_prints(
    verb: list[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    places = {"BASE": base, "ADAPTER": adapter}
    run = cli(*(places.get(a, a) for a in verb), "--json", env=plugin(tmp_path / "noisy", NOISE))
    assert run.returncode == 0
    assert len(json.loads(run.stdout)) > 1
    assert sorted(run.stderr.splitlines()) == NOISE_LINES


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 2>&-"])
def test_json_without_a_standard_error(closed: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m embedsurgery plugins --json {closed}"
    run = subprocess.run(
        ["/bin/sh", "-c", command], env=plugin(tmp_path, NOISE), capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0
    assert "noisy" in [one["name"] for one in json.loads(run.stdout)["plugins"]]


def test_json_without_a_standard_output(tmp_path: Path) -> None:
    command = f"{sys.executable} -m embedsurgery plugins --json >&-"
    run = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


_IN_A_PROCESS = """
import ctypes, os
import click
from embedsurgery.cli.main import VERBS
from embedsurgery.cli.render import json_option, print_json

@click.command()
@json_option
def verb(as_json):
    print("before")
    ctypes.CDLL(None).puts(b"in C")
    print_json([as_json])
    print("behind")

verb.main(["--json"], standalone_mode=False)
ctypes.CDLL(None).fflush(None)
os.write(1, b"descriptor\\n")
print("print")
"""


def test_a_process_that_continues_after_json_has_its_output_back() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _IN_A_PROCESS],
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout == "[\n  true\n]\ndescriptor\nprint\n"
    assert sorted(run.stderr.splitlines()) == ["before", "behind", "in C"]


def test_json_with_standard_output_in_memory() -> None:
    def verb(as_json: bool) -> None:
        print("chatter")
        print_json([as_json])

    result = CliRunner().invoke(click.command()(json_option(verb)), ["--json"])
    assert (json.loads(result.stdout), result.stderr) == ([True], "chatter\n")


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_a_signal_ends_it_with_one_line(more: list[str], tmp_path: Path) -> None:
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)"
    run = cli("plugins", *more, env=plugin(tmp_path, code))
    assert (run.returncode, run.stdout) == (128 + signal.SIGTERM, "")
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("embedsurgery: ")


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["encoding", "locale"],
)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_an_ascii_terminal(more: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    model = tiny("llama-tied")
    es.attach(model, es.TrainableTokensConfig(INDICES), tokenizer=StubTokenizer()).adapter().save(tmp_path / "a")
    run = cli("show", tmp_path / "a", *more, env={**os.environ, **environment})
    assert run.stderr == ""
    assert run.returncode == 0
    assert "29" in run.stdout
