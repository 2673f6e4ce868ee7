"""The whole line or screen that a person sees: a typical refusal of each command, and the main screens.

These are the only tests that hold the wording of messages. Everywhere else errors are checked by type and fields
(``tests/support/errors.py``), so rewording a message on purpose changes this file alone. Paths, sizes, times and hashes
are replaced by words, and the columns of tables are joined by two spaces.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

from embedsurgery import __version__
from tests.support.models import save, tiny, trained, write_tokenizer
from tests.support.processes import cli, python

REFUSALS = {
    "inspect TMP/nowhere": (
        "embedsurgery: no such checkpoint directory (TMP/nowhere): expected a directory; pass the directory "
        "that the model was downloaded or saved to"
    ),
    "show TMP/base": (
        "embedsurgery: this directory is a model, not an adapter (TMP/base): expected adapter_model.safetensors, "
        "found config.json; pass the adapter's directory"
    ),
    "merge TMP/base TMP/other -o TMP/out": (
        "embedsurgery: the base's rows are not those that the adapter was made from (TMP/base: "
        "model.embed_tokens.weight, rows 1): expected sha256 HASH as F32, found HASH; use the base named in "
        "the adapter's manifest, without this or another adapter merged into it"
    ),
    "merge TMP/base TMP/adapter TMP/adapter -o TMP/out": (
        "embedsurgery: several adapters set the same rows (TMP/base): found rows 3, 11, 29 of "
        "model.embed_tokens.weight by adapter and adapter; pass on_conflict (--on-conflict) 'last' or "
        "'average'"
    ),
    "merge TMP/base TMP/adapter -o TMP/out --weight mine=0.5": (
        "Error: Invalid value for '--weight': 'mine' is not an ADAPTER of this merge"
    ),
    "merge org/name TMP/adapter --in-place": (
        "embedsurgery: a model on the Hub cannot be changed in place: expected a directory, found org/name; "
        "pass an output"
    ),
    "unmerge TMP/base -o TMP/out": (
        "embedsurgery: the checkpoint has no merge records, so there is nothing to unmerge (TMP/base): "
        "expected .embedsurgery/merges/0001.safetensors; only merges made by embedsurgery can be unmerged"
    ),
    "verify TMP/broken": "embedsurgery: config: model.embed_tokens.weight has 40 rows, the config has 77",
    "tokens add TMP/base --token <tool>": (
        "Error: missing option '-o' / '--output' or '--in-place' (optional only with --dry-run)"
    ),
    "extract TMP/base TMP/other -o TMP/adapter": (
        "embedsurgery: the output exists already (TMP/adapter); choose a new directory, or remove this one"
    ),
    "recover TMP/nowhere": "embedsurgery: no checkpoint and no unfinished output found (TMP/nowhere)",
    "push TMP/adapter name": "embedsurgery: not a Hub id: expected org/name or org/name@revision, found 'name'",
    "plugins new 9lives -o TMP": (
        "embedsurgery: not a plugin name: expected lower-case letters, digits and single hyphens, such as "
        "row-scaling, found '9lives'"
    ),
    "demo -o TMP/base": "embedsurgery: the output exists already (TMP/base); choose another --output, or remove it",
    "inspct TMP/base": "Error: no such command 'inspct'; did you mean 'inspect'?",
}
"""Command line -> the last line of standard error."""

INTERRUPTED = """
import os, sys, warnings
import embedsurgery as es
from embedsurgery.stores.shards import ShardStore

warnings.simplefilter("ignore")
ShardStore.write_rows = lambda *_: os._exit(9)
es.merge_checkpoint(sys.argv[1], sys.argv[2], in_place=True)
"""


def run(folder: Path, line: str) -> tuple[str, str]:
    """Run a command line with ``TMP`` for a folder. Returns standard output and error, normalised."""
    done = cli(*(word.replace("TMP", str(folder)) for word in line.split()))
    return normalise(done.stdout, folder), normalise(done.stderr, folder)


def normalise(text: str, folder: Path) -> str:
    """Replace what differs from run to run, and drop empty lines and column widths."""
    text = text.replace(str(folder), "TMP").replace(__version__, "VERSION")
    for pattern, word in (
        (r"\d{4}-\d\d-\d\dT[\d:+Z]+", "TIME"),
        (r"\b[0-9a-f]{12}\b", "HASH"),
        (r"\d+\.\d [kM]B", "SIZE"),
        (r" *\n(?: *\n)*", "\n"),
        (r"(?<=\S) {2,}", "  "),
        ("─+", "──"),
    ):
        text = re.sub(pattern, word, text)
    return text


def screen(text: str) -> str:
    """A screen from an indented literal."""
    return textwrap.dedent(text).lstrip("\n")


@pytest.fixture
def folder(base: Path, adapter: Path, tmp_path: Path) -> Path:
    """A directory with a base, an adapter for it, an adapter for another base, and a broken base."""
    write_tokenizer(base)
    trained(tiny("llama-tied", seed=7), [1]).save(tmp_path / "other")
    broken = save(tiny("llama-tied"), tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 77}))
    return tmp_path


@pytest.mark.parametrize("line", REFUSALS)
def test_refusals(line: str, folder: Path) -> None:
    assert run(folder, line)[1].splitlines()[-1] == REFUSALS[line]


def test_an_unfinished_change(folder: Path) -> None:
    assert python(INTERRUPTED, folder / "base", folder / "adapter").returncode == 9
    assert run(folder, "verify TMP/base")[1] == screen("""
        embedsurgery: a change in place was interrupted, and the files are partly changed (TMP/base): \
found a journal in .embedsurgery/journal; run: embedsurgery recover TMP/base
    """)
    assert run(folder, "recover TMP/base")[0] == screen("""
        rolled back: .embedsurgery/merges/0001.safetensors, model.safetensors in TMP/base
    """)


def test_merge(folder: Path) -> None:
    assert run(folder, "merge TMP/base TMP/adapter -o TMP/out --dry-run")[0] == screen("""
        would be merged: 3 rows of model.embed_tokens.weight in model.safetensors
          set 3 rows of model.embed_tokens.weight
        would be kept for unmerge: 192 B
        would be written: TMP/out (SIZE)
    """)
    assert run(folder, "merge TMP/base TMP/adapter -o TMP/out")[0] == screen("""
        merged: 3 rows of model.embed_tokens.weight in model.safetensors
        written: TMP/out (SIZE)
    """)


def test_log_verify_and_unmerge(folder: Path) -> None:
    run(folder, "merge TMP/base TMP/adapter -o TMP/merged")
    assert run(folder, "log TMP/merged")[0] == screen("""
        TMP/merged
          merge  adapter  sha256  rows  tokens  time  version
         ──
          1  adapter  HASH  3 of model.embed_tokens.weight  -  TIME  VERSION
    """)
    assert run(folder, "verify TMP/merged")[0] == screen("""
        TMP/merged
               check  detail
         ──
          ok  weights  11 tensors in model.safetensors
          ok  tables  model.embed_tokens.weight [40, 16]
          ok  config  model.embed_tokens.weight has 40 rows, the config has 40
          ok  dtype  model.embed_tokens.weight is F32
          ok  tokenizer  highest token id 39, 40 rows
          ok  merge 1  3 rows as written
    """)
    assert run(folder, "unmerge TMP/merged -o TMP/out")[0] == screen("""
        unmerged: 3 rows of model.embed_tokens.weight in model.safetensors
        written: TMP/out (SIZE)
    """)


def test_tokens_add(folder: Path) -> None:
    assert run(folder, "tokens add TMP/base --token <tool> -o TMP/out")[0] == screen("""
        added: tokens '<tool>' as 40 in model.safetensors
          add tokens '<tool>' as 40
          grow the vocabulary of model.embed_tokens.weight by 1 row
        written: TMP/out (SIZE)
    """)
