"""Every command as a process: exit codes, one line for an error, JSON, and no stray files.

Lines are checked for what they name; ``test_golden_lines.py`` has the wording of whole lines and screens, and
``test_streams.py`` closed pipes, signals and encodings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.cli.main import VERBS
from tests.cli.conftest import INDICES, StubTokenizer
from tests.support.comparing import contents, listing, tree
from tests.support.models import INPUT, save, tiny, trained
from tests.support.processes import cli

NAME = INPUT["llama-tied"]


def run_ok(*arguments: object) -> str:
    """Run a command that succeeds. Returns its standard output."""
    run = cli(*arguments)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def run_refused(*arguments: object, names: tuple[object, ...] = (), code: int = 1) -> str:
    """Run a command that fails. Returns its standard error, which has all of ``names``."""
    run = cli(*arguments)
    assert run.returncode == code, run.stderr
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    if code == 1:
        assert run.stderr.startswith("embedsurgery: ")
        assert run.stderr.count("\n") == 1
    for name in names:
        assert str(name) in run.stderr, run.stderr
    return run.stderr


def test_merge_verify_unmerge(base: Path, adapter: Path, tmp_path: Path) -> None:
    shown = run_ok("merge", base, adapter, "-o", tmp_path / "merged")
    assert "3 rows" in shown
    assert NAME in shown
    assert str(tmp_path / "merged") in shown
    assert "merge 1" in run_ok("verify", tmp_path / "merged")
    assert "3 rows" in run_ok("unmerge", tmp_path / "merged", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_several_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    trained(tiny("llama-tied"), [1, 2]).save(tmp_path / "other")
    report = json.loads(run_ok("merge", base, adapter, tmp_path / "other", "-o", tmp_path / "merged", "--json"))
    assert report["rows"] == {NAME: 5}
    assert sorted(os.listdir(tmp_path / "merged/.embedsurgery/merges")) == ["0001.safetensors", "0002.safetensors"]


def test_a_dry_run_writes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    shown = run_ok("merge", base, adapter, "-o", tmp_path / "merged", "--dry-run")
    assert "would be" in shown
    report = json.loads(run_ok("merge", base, adapter, "-o", tmp_path / "merged", "--dry-run", "--json"))
    assert (report["done"], report["rows"]) == (False, {NAME: 3})
    assert tree(tmp_path) == before
    run_ok("merge", base, adapter, "-o", tmp_path / "merged")
    before = tree(tmp_path)
    assert not json.loads(run_ok("unmerge", tmp_path / "merged", "-o", tmp_path / "back", "--dry-run", "--json"))[
        "done"
    ]
    assert tree(tmp_path) == before


def test_a_dry_run_needs_no_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    run_ok("merge", base, adapter, "-o", tmp_path / "merged")
    before = tree(tmp_path)
    for verb in (("merge", base, adapter), ("unmerge", tmp_path / "merged")):
        named, unnamed = (
            json.loads(run_ok(*verb, *more, "--dry-run", "--json")) for more in (("-o", tmp_path / "out"), ())
        )
        assert (named["output"], unnamed["output"], unnamed["done"]) == (str(tmp_path / "out"), None, False)
        assert {**named, "output": None} == unnamed
        shown = run_ok(*verb, "--dry-run")
        assert "would be written" in shown
        assert os.devnull not in shown
        run_refused(*verb, names=("-o", "--output", "--in-place", "--dry-run"), code=2)
    run_refused("merge", base, adapter, adapter, "--dry-run", names=(NAME, "on_conflict"))
    assert tree(tmp_path) == before


def test_inspect(base: Path) -> None:
    facts = json.loads(run_ok("inspect", base, "--json"))
    assert facts["input"] == NAME
    (table,) = (t for t in facts["tables"] if t["name"] == NAME)
    assert (table["shape"], table["dtype"], table["roles"]) == ([40, 16], "F32", ["input", "output"])
    assert table["files"] == {NAME: "model.safetensors"}
    assert table["bytes"] == 40 * 16 * 4
    shown = run_ok("inspect", base)
    assert NAME in shown
    assert "lm_head.weight" in shown


@pytest.mark.parametrize("kind", ["llama-untied", "gpt2", "t5", "bert"])
def test_inspect_agrees_with_walk(kind: str, tmp_path: Path) -> None:
    base = save(tiny(kind), tmp_path / "base", shards=True)
    facts = json.loads(run_ok("inspect", base, "--json"))
    graph = es.walk(base)
    assert facts["input"] == graph.input == INPUT[kind]
    assert [(t["name"], tuple(t["aliases"]), tuple(t["shape"])) for t in facts["tables"]] == [
        (t.name, t.aliases, t.shape) for t in graph.tables
    ]


def test_show(base: Path, adapter: Path) -> None:
    facts = json.loads(run_ok("show", adapter, "--json"))
    (table,) = facts["tables"]
    assert [row["row"] for row in table["rows"]] == INDICES
    rows = es.load(adapter).tensors[NAME].double()
    assert [row["norm"] for row in table["rows"]] == pytest.approx(rows.norm(dim=1).tolist())
    facts = json.loads(run_ok("show", adapter, "--model", base, "--json"))
    old = tiny("llama-tied").model.embed_tokens.weight[INDICES].double()
    cosine = torch.nn.functional.cosine_similarity(rows, old)
    assert [row["cosine"] for row in facts["tables"][0]["rows"]] == pytest.approx(cosine.tolist())
    assert facts["tables"][0]["located"] == NAME
    assert all(str(index) in run_ok("show", adapter, "--model", base) for index in INDICES)


def test_show_escapes_control_characters_of_tokens(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    es.attach(model, es.TrainableTokensConfig(INDICES), tokenizer=StubTokenizer()).adapter().save(tmp_path / "a")
    shown = run_ok("show", tmp_path / "a")
    assert "t\u00f6k11" in shown
    assert "\x1b" not in shown
    facts = json.loads(run_ok("show", tmp_path / "a", "--json"))
    assert [row["token"] for row in facts["tables"][0]["rows"]] == [f"t\u00f6k{i}\n\x1b[31m" for i in INDICES]


@pytest.mark.parametrize("text", ["\ud800", "\u0000", "\U0001f600"], ids=ascii)
def test_unusual_token_texts_are_printed(text: str, tmp_path: Path) -> None:
    class Odd:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [text for _ in ids]

    es.attach(tiny("llama-tied"), es.TrainableTokensConfig([3]), tokenizer=Odd()).adapter().save(tmp_path / "a")
    assert "3" in run_ok("show", tmp_path / "a")
    assert json.loads(run_ok("show", tmp_path / "a", "--json"))["tables"][0]["rows"][0]["row"] == 3


def test_verify_lists_what_disagrees(base: Path) -> None:
    assert json.loads(run_ok("verify", base, "--json"))["ok"] is True
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
    body = json.loads(run_ok("plugins", "--json"))
    assert body["plugins"][0]["name"] == "builtin"
    assert "trainable_tokens" in [surgery["name"] for surgery in body["surgeries"]]
    assert "trainable_tokens" in run_ok("plugins")


def test_refusals_are_one_line_and_leave_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    trained(tiny("llama-tied", seed=7), [1]).save(tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_model.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "broken/adapter_config.json").write_text("{}")
    before, out = listing(tmp_path), tmp_path / "out"
    mismatch = (base, NAME, "rows 1", "sha256")
    run_refused("merge", base, tmp_path / "other", "-o", out, names=mismatch)
    run_refused("merge", base, adapter, adapter, "-o", out, names=(NAME, "3, 11, 29", "on_conflict"))
    run_refused("merge", base, adapter, "-o", tmp_path / "adapter", names=(tmp_path / "adapter",))
    run_refused("merge", base, tmp_path / "broken", "-o", out, names=(tmp_path / "broken",))
    run_refused("merge", base, tmp_path / "nowhere", "-o", out, names=(tmp_path / "nowhere",))
    run_refused("merge", tmp_path / "nowhere", adapter, "-o", out, names=(tmp_path / "nowhere",))
    run_refused("merge", adapter, adapter, "-o", out, names=(adapter,))
    run_refused("unmerge", base, "-o", out, names=(base, ".embedsurgery/merges"))
    run_refused("show", base, names=(base, "adapter_model.safetensors"))
    run_refused("show", tmp_path / "other", "--model", base, names=mismatch)
    run_refused("show", base / "config.json", names=(base / "config.json",))
    run_refused("inspect", adapter, names=(adapter,))
    run_refused("inspect", base / "config.json", names=(base / "config.json",))
    run_refused("verify", tmp_path / "nowhere", names=(tmp_path / "nowhere",))
    assert listing(tmp_path) == before


def test_an_output_that_cannot_be_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    before = listing(tmp_path)
    run_refused("merge", base, adapter, "-o", tmp_path / "file" / "out", names=(tmp_path / "file",))
    run_refused("merge", base, adapter, "-o", "/proc/out", names=("/proc",))
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
    run_refused(*arguments, names=("sage",), code=2)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["merge", "--help"], ["verify", "-h"], ["--version"]], ids=" ".join
)
def test_help_is_0(arguments: list[str]) -> None:
    assert "embedsurgery" in run_ok(*arguments)


def test_the_commands_in_the_help_exist() -> None:
    shown = run_ok("--help")
    for verb, line in VERBS.items():
        assert verb in shown
        assert line.split(",")[0].split(":")[0] in " ".join(shown.split())
        assert "Usage: embedsurgery" in run_ok(verb, "--help")


def test_a_file_from_peft_warns_in_one_line(base: Path, adapter: Path, tmp_path: Path) -> None:
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
def test_a_misspelt_command_gets_a_suggestion(typed: str, meant: str) -> None:
    run_refused(typed, "somewhere", names=(f"'{typed}'", f"'{meant}'"), code=2)


def test_an_unknown_command_without_a_near_one_gets_no_suggestion() -> None:
    shown = run_refused("\x1b[31mzzz", names=("zzz",), code=2)
    assert not any(f"'{command}'" in shown for command in VERBS)
    assert "\x1b" not in shown


def test_control_characters_of_a_path_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "x\x1b[31m\ny"
    folder.mkdir()
    assert "\x1b" not in run_refused("inspect", folder)
