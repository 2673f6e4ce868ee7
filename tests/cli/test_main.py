"""Every verb as a process: exit codes, one line for an error, JSON, and nothing written that was not asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import embedsurgery as es
from embedsurgery.cli.render import json_option, print_json
from tests.support.comparing import contents, listing, tree
from tests.support.models import INPUT, save, tiny, trained
from tests.support.noisy import NOISE, SAID, plugin
from tests.support.processes import cli

INDICES = [11, 3, 29]
NAME = INPUT["llama-tied"]


class Tokenizer:
    """Gives texts to ids."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"t\u00f6k{i}\n\x1b[31m" for i in ids]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return trained(tiny("llama-tied"), INDICES).save(tmp_path / "adapter")


def good(*arguments: object) -> str:
    run = cli(*arguments)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def refused(*arguments: object, says: str = "", code: int = 1) -> str:
    run = cli(*arguments)
    assert run.returncode == code, run.stderr
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    if code == 1:
        assert run.stderr.startswith("embedsurgery: ")
        assert run.stderr.count("\n") == 1
    assert says in run.stderr
    return run.stderr


def test_merge_verify_unmerge(base: Path, adapter: Path, tmp_path: Path) -> None:
    said = good("merge", base, adapter, "-o", tmp_path / "merged")
    assert "3 rows" in said
    assert NAME in said
    assert str(tmp_path / "merged") in said
    assert "merge 1" in good("verify", tmp_path / "merged")
    assert "3 rows" in good("unmerge", tmp_path / "merged", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_several_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    trained(tiny("llama-tied"), [1, 2]).save(tmp_path / "other")
    report = json.loads(good("merge", base, adapter, tmp_path / "other", "-o", tmp_path / "merged", "--json"))
    assert report["rows"] == {NAME: 5}
    assert sorted(os.listdir(tmp_path / "merged/.embedsurgery/merges")) == ["0001.safetensors", "0002.safetensors"]


def test_a_dry_run_writes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    said = good("merge", base, adapter, "-o", tmp_path / "merged", "--dry-run")
    assert "would be" in said
    report = json.loads(good("merge", base, adapter, "-o", tmp_path / "merged", "--dry-run", "--json"))
    assert (report["done"], report["rows"]) == (False, {NAME: 3})
    assert tree(tmp_path) == before
    good("merge", base, adapter, "-o", tmp_path / "merged")
    before = tree(tmp_path)
    assert not json.loads(good("unmerge", tmp_path / "merged", "-o", tmp_path / "back", "--dry-run", "--json"))["done"]
    assert tree(tmp_path) == before


def test_a_dry_run_needs_no_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    good("merge", base, adapter, "-o", tmp_path / "merged")
    before = tree(tmp_path)
    for verb in (("merge", base, adapter), ("unmerge", tmp_path / "merged")):
        named, unnamed = (
            json.loads(good(*verb, *more, "--dry-run", "--json")) for more in (("-o", tmp_path / "out"), ())
        )
        assert (named["output"], unnamed["output"], unnamed["done"]) == (str(tmp_path / "out"), None, False)
        assert {**named, "output": None} == unnamed
        said = good(*verb, "--dry-run")
        assert "would be written: no output was named (" in said
        assert os.devnull not in said
        refused(*verb, says="'-o' / '--output' or '--in-place', which only --dry-run does without", code=2)
    refused("merge", base, adapter, adapter, "--dry-run", says="several adapters set the same rows")
    assert tree(tmp_path) == before


def test_inspect(base: Path) -> None:
    facts = json.loads(good("inspect", base, "--json"))
    assert facts["input"] == NAME
    (table,) = (t for t in facts["tables"] if t["name"] == NAME)
    assert (table["shape"], table["dtype"], table["roles"]) == ([40, 16], "F32", ["input", "output"])
    assert table["files"] == {NAME: "model.safetensors"}
    assert table["bytes"] == 40 * 16 * 4
    said = good("inspect", base)
    assert NAME in said
    assert "lm_head.weight" in said


@pytest.mark.parametrize("kind", ["llama-untied", "gpt2", "t5", "bert"])
def test_inspect_says_what_walk_says(kind: str, tmp_path: Path) -> None:
    base = save(tiny(kind), tmp_path / "base", shards=True)
    facts = json.loads(good("inspect", base, "--json"))
    graph = es.walk(base)
    assert facts["input"] == graph.input == INPUT[kind]
    assert [(t["name"], tuple(t["aliases"]), tuple(t["shape"])) for t in facts["tables"]] == [
        (t.name, t.aliases, t.shape) for t in graph.tables
    ]


def test_show(base: Path, adapter: Path) -> None:
    facts = json.loads(good("show", adapter, "--json"))
    (table,) = facts["tables"]
    assert [row["row"] for row in table["rows"]] == INDICES
    rows = es.load(adapter).tensors[NAME].double()
    assert [row["norm"] for row in table["rows"]] == pytest.approx(rows.norm(dim=1).tolist())
    facts = json.loads(good("show", adapter, "--model", base, "--json"))
    old = tiny("llama-tied").model.embed_tokens.weight[INDICES].double()
    cosine = torch.nn.functional.cosine_similarity(rows, old)
    assert [row["cosine"] for row in facts["tables"][0]["rows"]] == pytest.approx(cosine.tolist())
    assert facts["tables"][0]["located"] == NAME
    assert all(str(index) in good("show", adapter, "--model", base) for index in INDICES)


def test_show_draws_tokens_without_obeying_them(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    es.attach(model, es.TrainableTokensConfig(INDICES), tokenizer=Tokenizer()).adapter().save(tmp_path / "a")
    said = good("show", tmp_path / "a")
    assert "t\u00f6k11" in said
    assert "\x1b" not in said
    facts = json.loads(good("show", tmp_path / "a", "--json"))
    assert [row["token"] for row in facts["tables"][0]["rows"]] == [f"t\u00f6k{i}\n\x1b[31m" for i in INDICES]


@pytest.mark.parametrize("text", ["\ud800", "\u0000", "\U0001f600"], ids=ascii)
def test_odd_token_texts_are_drawn(text: str, tmp_path: Path) -> None:
    class Odd:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [text for _ in ids]

    es.attach(tiny("llama-tied"), es.TrainableTokensConfig([3]), tokenizer=Odd()).adapter().save(tmp_path / "a")
    assert "3" in good("show", tmp_path / "a")
    assert json.loads(good("show", tmp_path / "a", "--json"))["tables"][0]["rows"][0]["row"] == 3


def test_verify_names_what_disagrees(base: Path) -> None:
    assert json.loads(good("verify", base, "--json"))["ok"] is True
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 77}))
    run = cli("verify", base)
    assert run.returncode == 1
    assert run.stderr.startswith("embedsurgery: config: ")
    assert run.stderr.count("\n") == 1
    run = cli("verify", base, "--json")
    assert run.returncode == 1
    body: dict[str, Any] = json.loads(run.stdout)
    assert [check["name"] for check in body["checks"] if not check["ok"]] == ["config"]
    assert body["ok"] is False


def test_plugins() -> None:
    body = json.loads(good("plugins", "--json"))
    assert body["plugins"][0]["name"] == "builtin"
    assert "trainable_tokens" in [surgery["name"] for surgery in body["surgeries"]]
    assert "trainable_tokens" in good("plugins")


def test_refusals_are_one_line_and_leave_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    trained(tiny("llama-tied", seed=7), [1]).save(tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_model.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "broken/adapter_config.json").write_text("{}")
    before, out = listing(tmp_path), tmp_path / "out"
    refused("merge", base, tmp_path / "other", "-o", out, says="rows")
    refused("merge", base, adapter, adapter, "-o", out, says="several adapters set the same rows")
    refused("merge", base, adapter, "-o", tmp_path / "adapter", says="exists")
    refused("merge", base, tmp_path / "broken", "-o", out, says="broken")
    refused("merge", base, tmp_path / "nowhere", "-o", out, says="nowhere")
    refused("merge", tmp_path / "nowhere", adapter, "-o", out, says="nowhere")
    refused("merge", adapter, adapter, "-o", out, says="adapter")
    refused("unmerge", base, "-o", out, says="no merge is recorded")
    refused("show", base, says="adapter_model.safetensors")
    refused("show", tmp_path / "other", "--model", base, says="rows")
    refused("show", base / "config.json", says="config.json")
    refused("inspect", adapter, says="adapter")
    refused("inspect", base / "config.json", says="config.json")
    refused("verify", tmp_path / "nowhere", says="nowhere")
    assert listing(tmp_path) == before


def test_an_output_that_cannot_be_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    before = listing(tmp_path)
    refused("merge", base, adapter, "-o", tmp_path / "file" / "out", says="file")
    refused("merge", base, adapter, "-o", "/proc/out", says="/proc")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["merge"],
        ["merge", "a"],
        ["merge", "a", "b"],
        ["merge", "a", "b", "-o", "c", "--nonsense"],
        ["inspect"],
        ["verify", "a", "b"],
        ["--nonsense"],
        ["unmerge", "a"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert "sage" in refused(*arguments, code=2)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["merge", "--help"], ["verify", "-h"], ["--version"]], ids=" ".join
)
def test_help_is_0(arguments: list[str]) -> None:
    assert "embedsurgery" in good(*arguments)


def test_the_verbs_in_the_help_exist() -> None:
    from embedsurgery.cli.main import VERBS

    said = good("--help")
    for verb, line in VERBS.items():
        assert verb in said
        assert line.split(",")[0].split(":")[0] in " ".join(said.split())
        assert "Usage: embedsurgery" in good(verb, "--help")


def test_a_file_from_peft_is_warned_of_in_one_line(base: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.safetensors")
    run = cli("merge", base, adapter, "-o", tmp_path / "merged")
    assert run.returncode == 0
    assert run.stderr.startswith("embedsurgery: warning: ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("inspct", "inspect"),
        ("merg", "merge"),
        ("un-merge", "unmerge"),
        ("Verify", "verify"),
        ("plugin", "plugins"),
    ],
)
def test_a_misspelt_verb_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    refused(typed, "somewhere", says=f"no such command '{typed}'; did you mean '{meant}'?", code=2)


def test_a_verb_like_no_other_is_answered_with_none() -> None:
    said = refused("\x1b[31mzzz", says="no such command", code=2)
    assert "did you mean" not in said
    assert "\x1b" not in said


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
def test_the_reader_of_a_pipe_may_go_away(arguments: list[str], base: Path, adapter: Path) -> None:
    """141 as of a tool that SIGPIPE ends: with 0, ``verify`` would say of a broken checkpoint that it is whole."""
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
def test_the_head_of_what_is_said(more: str, first: str, base: Path) -> None:
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
def test_json_stands_alone_whatever_a_library_prints(
    verb: list[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    places = {"BASE": base, "ADAPTER": adapter}
    run = cli(*(places.get(a, a) for a in verb), "--json", env=plugin(tmp_path / "noisy", NOISE))
    assert run.returncode == 0
    assert len(json.loads(run.stdout)) > 1
    assert sorted(run.stderr.splitlines()) == SAID


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


def test_a_process_that_goes_on_after_json_has_its_output_back() -> None:
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


def test_json_where_standard_output_is_in_memory() -> None:
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
    assert run.stderr.strip() == "embedsurgery: interrupted; nothing is half done"


def test_a_name_that_a_terminal_would_obey(tmp_path: Path) -> None:
    folder = tmp_path / "x\x1b[31m\ny"
    folder.mkdir()
    assert "\x1b" not in refused("inspect", folder)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["encoding", "locale"],
)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_a_terminal_that_knows_only_ascii(more: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    model = tiny("llama-tied")
    es.attach(model, es.TrainableTokensConfig(INDICES), tokenizer=Tokenizer()).adapter().save(tmp_path / "a")
    run = cli("show", tmp_path / "a", *more, env={**os.environ, **environment})
    assert run.stderr == ""
    assert run.returncode == 0
    assert "29" in run.stdout
