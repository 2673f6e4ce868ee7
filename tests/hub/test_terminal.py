"""Progress on a terminal and none in a pipe; tokens and the stored login for every command."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import embedsurgery as es
from embedsurgery.adapters.adapter import WEIGHTS_NAME
from tests.support.comparing import contents
from tests.support.hub.loopback import READER, WRITER, Hub
from tests.support.hub.processes import run
from tests.support.hub.repositories import BASE, REPO

MERGED = "team/merged"
BAR = "%|"
"""In the progress bars of huggingface_hub and in nothing that embedsurgery prints."""


def on_a_terminal(env: dict[str, str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line with a terminal for standard error; returns exit code, standard output, terminal output."""
    outside, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 120))
    command = [sys.executable, "-m", "embedsurgery", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=inside, env={**env, "TERM": "xterm"}) as process:
        os.close(inside)
        shown = b""
        try:
            while data := os.read(outside, 65536):
                shown += data
        except OSError:  # on Linux: the other end was closed
            pass
        os.close(outside)
        assert process.stdout is not None
        return process.wait(timeout=120), process.stdout.read().decode(), shown.decode()


def test_bars_for_downloads_and_uploads(hub: Hub, base: Path, pushed: str, tmp_path: Path, env: dict[str, str]) -> None:
    code, out, shown = on_a_terminal(env, "merge", BASE, REPO, "-o", tmp_path / "out")
    assert code == 0, shown
    assert BAR in shown
    assert "copying" in shown
    assert shown.rindex(BAR) < shown.index("copying")  # one bar at a time
    assert str(tmp_path / "out") in out
    hub.copies = False
    code, _, shown = on_a_terminal(env, "merge", BASE, REPO, "--push", MERGED)
    assert code == 0, shown
    assert "model-00001-of" in shown
    assert BAR in shown
    code, _, shown = on_a_terminal(
        {**env, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}, "merge", BASE, REPO, "--push", "team/b"
    )
    assert code == 0, shown
    assert BAR not in shown


def test_no_bars_in_a_pipe(hub: Hub, base: Path, pushed: str, tmp_path: Path, env: dict[str, str]) -> None:
    hub.copies = False
    assert run(env, "merge", BASE, REPO, "-o", tmp_path / "out").stderr == ""
    assert run(env, "merge", BASE, REPO, "--push", MERGED).stderr == ""
    assert run(env, "pull", REPO, "-o", tmp_path / "rows").stderr == ""
    assert run(env, "push", tmp_path / "rows", "team/again").stderr == ""
    asked = run({**env, "HF_HUB_DISABLE_PROGRESS_BARS": "0"}, "merge", BASE, REPO, "--push", "team/asked")
    assert BAR in asked.stderr  # the variable turns bars on, too


@pytest.fixture
def everything(hub: Hub, base: Path, adapter: es.Adapter, pushed: str, tmp_path: Path) -> None:
    """A base, a merged model and an adapter on the Hub, all private."""
    es.merge_checkpoint(base, adapter, tmp_path / "merged")
    hub.add(MERGED, contents(tmp_path / "merged"))
    adapter.save(tmp_path / "rows")
    for repo in hub.repos.values():
        repo.private = True
    hub.log.clear()


VERBS: list[tuple[str, list[str]]] = [
    ("inspect", [BASE]),
    ("show", [REPO, "--model", BASE]),
    ("verify", [MERGED]),
    ("merge", [BASE, REPO, "-o", "out"]),
    ("unmerge", [MERGED, "-o", "out"]),
    ("extract", [BASE, MERGED, "-o", "out"]),
    ("tokens", ["add", BASE, "--token", "<x>", "-o", "out"]),
    ("pull", [REPO, "-o", "out"]),
    ("push", ["rows", "team/new"]),
    ("merge --push", [BASE, REPO, "--push", "team/new"]),
]

_ALWAYS = ("inspect", "merge", "push")
"""The others are part of the sweep."""


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [pytest.param(*one, id=one[0], marks=() if one[0] in _ALWAYS else pytest.mark.sweep) for one in VERBS],
)
def test_every_command_takes_ids_and_a_token(
    hub: Hub, everything: None, tmp_path: Path, env: dict[str, str], verb: str, arguments: list[str]
) -> None:
    without_token = {key: value for key, value in env.items() if key != "HF_TOKEN"}
    words = [verb.split()[0], *arguments]
    if verb == "inspect":  # all repositories are private
        refused = run(without_token, *words, code=1, cwd=tmp_path)
        assert refused.stderr.count("\n") == 1
        assert "HF_TOKEN" in refused.stderr
    option = "--hub-token" if verb == "tokens" else "--token"
    run(without_token, *words, option, WRITER if "team/new" in words else READER, cwd=tmp_path)
    agents = {r.headers["user-agent"].partition(";")[0] for r in hub.log if "signature" not in r.path}
    assert agents == {f"embedsurgery/{es.__version__}"}
    cache = tmp_path / "home" / "hub"
    assert verb == "push" or any(cache.rglob("*.json")) or any(cache.rglob(WEIGHTS_NAME))


def test_the_stored_login(hub: Hub, everything: None, tmp_path: Path, env: dict[str, str]) -> None:
    without_token = {key: value for key, value in env.items() if key != "HF_TOKEN"}
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(WRITER)
    run(without_token, "merge", BASE, REPO, "--push", "team/new", cwd=tmp_path)
    assert {r.token for r in hub.log if "signature" not in r.path} == {WRITER}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "token").write_text(READER)
    run({**without_token, "HF_HOME": str(tmp_path / "elsewhere")}, "push", "rows", "team/other", code=1, cwd=tmp_path)


def test_commands_that_refuse_an_id(hub: Hub, pushed: str, tmp_path: Path, env: dict[str, str]) -> None:
    for words, code, named in (
        (["push", REPO, "team/copy"], 2, (REPO, "ADAPTER")),
        (["pull", "./rows", "-o", "out"], 1, ("'./rows'", "org/name@revision")),
        (["pull", REPO], 2, ("-o",)),
        (["merge", "here", REPO, "--push", "team/new"], 1, ("'here'", "org/name@revision")),
        (["demo", "--model", BASE, "-o", "out"], 1, (BASE,)),
    ):
        done = run(env, *words, code=code, cwd=tmp_path)
        assert all(word in done.stderr for word in named), done.stderr
    assert not hub.seen("POST|PUT")
    assert not (tmp_path / "out").exists()
