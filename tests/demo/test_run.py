"""``embedsurgery demo``: runs the real command and checks its numbers against the files that it writes."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

import embedsurgery as es
from embedsurgery.cli.demo import command
from embedsurgery.cli.main import cli
from embedsurgery.demo import corpus
from embedsurgery.demo.base import seed_torch
from embedsurgery.demo.report import DemoReport
from embedsurgery.demo.run import DemoOptions, run_demo
from embedsurgery.errors import ConfigError, UnsupportedError
from tests.support.errors import raises
from tests.support.noisy import NOISE, NOISE_LINES, plugin


def embedsurgery(folder: Path, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in a directory, without a network."""
    environment = {**os.environ, **more, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, "-m", "embedsurgery", *args],
        cwd=folder,
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )


def run_quietly(options: DemoOptions) -> DemoReport:
    """Run the demo in this process, without output."""
    return run_demo(options, lambda step: None, lambda text: None)


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo run once as a user does, with a library that prints: its directory and its JSON report."""
    folder = tmp_path_factory.mktemp("demo")
    result = embedsurgery(folder, "demo", "--json", **plugin(tmp_path_factory.mktemp("noisy"), NOISE))
    assert result.returncode == 0, result.stderr
    assert sorted(result.stderr.splitlines()) == NOISE_LINES
    return folder, json.loads(result.stdout)


@pytest.fixture(scope="module")
def base(done: tuple[Path, dict[str, Any]]) -> Path:
    """The demo's base checkpoint."""
    return done[0] / "embedsurgery-demo" / "base"


def test_the_model_is_a_language_model_and_learns_the_word(done: tuple[Path, dict[str, Any]]) -> None:
    _, report = done
    model, word, train = report["base"], report["word"], report["train"]
    assert model["made"]
    assert model["last_loss"] < 0.8 < 5 < model["first_loss"]
    assert len(model["files"]) >= 3
    assert word["tied"]
    assert word["before"]["probability"] < 0.001
    assert word["before"]["first"] == 0
    assert train["after"]["probability"] > 0.5
    assert train["after"]["first"] == train["after"]["lines"] == 16
    assert train["after"]["rank"] == 1
    assert train["after"]["loss"] < 0.75 * word["before"]["loss"]
    assert train["last_loss"] < train["first_loss"]
    assert train["trained"] == 128
    assert train["columns"] == [word["row"]]
    assert abs(train["others_after"] - train["others_before"]) < 0.1
    assert "zorbl" not in word["completion"]
    assert train["completion"].startswith("zorbl")
    assert "river" in train["reading"]
    assert "seeds" in train["reading"]
    assert report["seconds"] < 240


def test_the_word_has_the_first_spare_row_and_its_own_tokenizer(done: tuple[Path, dict[str, Any]], base: Path) -> None:
    from transformers import AutoTokenizer

    folder, report = done
    word = report["word"]
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder / word["tokenizer"])
    assert word["row"] == len(old) < word["rows"]
    assert word["spare"] == word["rows"] - len(old)
    ids = new("It was the zorbl.")["input_ids"]
    assert ids.count(word["row"]) == 1
    assert new.decode(ids, skip_special_tokens=True) == "It was the zorbl."
    assert word["row"] not in old("It was the zorbl.")["input_ids"]


def test_the_adapter_is_kilobytes_and_the_merge_one_row(done: tuple[Path, dict[str, Any]], base: Path) -> None:
    folder, report = done
    save, merge, row = report["save"], report["merge"], report["word"]["row"]
    assert save["bytes"] == sum(p.stat().st_size for p in (folder / save["directory"]).iterdir()) < 8_000
    assert save["model_bytes"] == sum(p.stat().st_size for p in base.glob("*.safetensors")) > 1_000_000
    assert merge["rows"] == {"model.embed_tokens.weight": 1}
    assert len(merge["changed_files"]) == 1
    assert merge["new_files"] == [".embedsurgery/merges/0001.safetensors"]
    old, new = (load_file(d / merge["changed_files"][0]) for d in (base, folder / merge["directory"]))
    table = "model.embed_tokens.weight"
    assert (old[table] != new[table]).any(dim=1).nonzero().tolist() == [[row]]
    assert "merge 1" in merge["checks"]


def test_the_reload_gives_the_same_and_the_unmerge_the_same_bytes(
    done: tuple[Path, dict[str, Any]], base: Path
) -> None:
    folder, report = done
    assert report["reload"]["same_text"]
    assert report["reload"]["max_difference"] < 1e-4
    [changed] = report["unmerge"]["hashes"]
    assert changed["base"] == changed["unmerged"] != changed["merged"]
    files = tree(base)
    assert files[changed["file"]] == changed["base"]
    assert tree(folder / report["unmerge"]["directory"]) == files
    assert report["unmerge"]["files"] == len(files)


def test_the_commands_work_as_printed(
    done: tuple[Path, dict[str, Any]], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report = done
    runner = CliRunner()
    assert [shlex.split(line)[1] for line in report["commands"]] == ["inspect", "show", "merge", "verify", "unmerge"]
    monkeypatch.chdir(folder)
    for line in report["commands"]:
        program, *args = shlex.split(line)
        assert program == "embedsurgery"
        result = runner.invoke(cli, args)
        assert result.exit_code == 0, (line, result.output)
    again = Path(shlex.split(report["commands"][-1])[-1])
    assert tree(folder / again) == tree(base)


def test_an_output_that_is_not_empty_is_refused(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    before = tree(folder)
    result = embedsurgery(folder, "demo")
    assert result.returncode == 1
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert "embedsurgery-demo" in line
    assert "--output" in line
    assert tree(folder) == before


def test_with_a_users_model_word_and_lines(done: tuple[Path, dict[str, Any]], base: Path, tmp_path: Path) -> None:
    before = tree(base)
    lines = corpus.draw_sentences_about(corpus.Animal("blick", "cave", "mice"), 1, 24, templates=corpus.RIDDLES)
    others = corpus.draw_sentences(9, 16)
    (tmp_path / "lines.txt").write_text("\n".join([*lines, "", *others]), encoding="utf-8")
    output = tmp_path / "with a space"
    output.mkdir()
    result = embedsurgery(
        tmp_path, "demo", "--model", str(base), "--word", "blick", "--text", "lines.txt", "-o", output.name
    )
    assert result.returncode == 0, result.stderr
    assert '"blick"' in result.stdout
    assert "10 files" in result.stdout
    assert "'with a space/merged-again'" in result.stdout
    assert sorted(p.name for p in output.iterdir()) == ["adapter", "merged", "tokenizer", "unmerged"]
    assert tree(base) == before == tree(output / "unmerged")
    [record] = es.load(output / "adapter").manifest.tables
    assert es.load(output / "adapter").manifest.tokens == {record.indices[0]: " blick"}


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_with_an_untied_model(base: Path, tmp_path: Path, dtype: str) -> None:
    import torch

    write_untied(base, tmp_path / "model", rows=540, dtype=getattr(torch, dtype))
    report = run_quietly(DemoOptions(tmp_path / "out", tmp_path / "model", "blick"))
    assert report.word.tables == ("model.embed_tokens.weight", "lm_head.weight")
    assert not report.word.tied
    assert report.merge.rows == {"model.embed_tokens.weight": 1, "lm_head.weight": 1}
    assert report.train.after.probability > 10 * report.word.before.probability
    assert report.train.columns == (report.word.row,)
    assert report.reload.max_difference < (1e-5 if dtype == "float32" else 0.05)
    assert report.unmerge.files == len(tree(tmp_path / "model"))


def test_without_a_spare_row(base: Path, tmp_path: Path) -> None:
    import torch

    used = len(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"])
    write_untied(base, tmp_path / "model", rows=used, dtype=torch.float32)
    fields = {"where": "model.embed_tokens.weight", "expected": f"row {used}", "found": (f"{used} rows", f", {used} ")}
    with raises(UnsupportedError, **fields):
        run_quietly(DemoOptions(tmp_path / "out", tmp_path / "model"))
    assert not (tmp_path / "out").exists()


def test_a_word_that_is_not_learned_leaves_nothing(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with raises(UnsupportedError, where=corpus.WORD, expected="16", found="1 steps", hint="--text"):
        run_quietly(DemoOptions(tmp_path / "out", base, steps=1))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("two words", {"expected": "white space", "found": "'two words'"}),
        ("", {"expected": "white space", "found": "''"}),
        ("raven", {"expected": "new", "found": ("'raven'", "id")}),
    ],
    ids=["spaces", "empty", "known"],
)
def test_words_that_cannot_be_added(base: Path, tmp_path: Path, word: str, fields: Any) -> None:
    with raises(ConfigError, where="--word", **fields):
        run_quietly(DemoOptions(tmp_path / "out", base, word))
    assert not (tmp_path / "out").exists()


def test_too_few_lines_with_the_word(base: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("It was the zorbl.\nIt was the raven.\n", encoding="utf-8")
    with raises(ConfigError, where=tmp_path / "lines.txt", expected="' zorbl'", found=1):
        run_quietly(DemoOptions(tmp_path / "out", base, text=tmp_path / "lines.txt"))


def test_the_output_may_not_be_inside_the_model(base: Path) -> None:
    before = tree(base)
    with raises(ConfigError, where=base / "demo", hint="--output"):
        run_quietly(DemoOptions(base / "demo", base))
    assert tree(base) == before


def test_interrupted_leaves_nothing(base: Path, tmp_path: Path) -> None:
    def busy(text: str) -> None:
        if (tmp_path / "out" / "adapter").is_dir():  # as it begins to merge
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoOptions(tmp_path / "out", base), lambda step: None, busy)
    assert list(tmp_path.iterdir()) == []


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedsurgery.demo.base.find_spec", lambda name: None)
    with raises(UnsupportedError, expected=("transformers", "tokenizers"), hint='pip install "embedsurgery[demo]"'):
        run_quietly(DemoOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from embedsurgery.cli.main import cli\n"
        "result = CliRunner().invoke(cli, ['demo', '--help'])\n"
        "assert result.exit_code == 0 and '--word' in result.output\n"
        "print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_default_word_is_in_the_help() -> None:
    assert f"[default: {corpus.WORD}]" in CliRunner().invoke(command, ["--help"]).output


def test_the_seed_leaves_the_global_generator_alone() -> None:
    import torch

    state = torch.get_rng_state()
    with seed_torch():
        first = torch.rand(3)
    with seed_torch():
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(state, torch.get_rng_state())


def test_no_known_animal_is_like_the_new_one() -> None:
    new = corpus.new_animal("zorbl")
    assert len(corpus.ANIMALS) == len({(a.place, a.food) for a in corpus.ANIMALS}) == 40
    assert (new.place, new.food) not in {(a.place, a.food) for a in corpus.ANIMALS}
    assert new.place in corpus.WORLD
    assert new.food in corpus.FOODS
    assert corpus.draw_sentences(1, 5) == corpus.draw_sentences(1, 9)[:5]


def write_untied(base: Path, directory: Path, *, rows: int, dtype: Any) -> None:
    """Write a random model with an untied head, and the tokenizer of ``base``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, directory / name)
