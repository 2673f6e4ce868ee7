"""The operations on small checkpoints that are interrupted, and snapshots to compare with; without torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.files.locking import journal_segments
from embedsurgery.files.safetensors import TensorSource, write_file
from embedsurgery.stores.shards import ShardStore
from embedsurgery.surgeries.soft_prompt.config import TENSOR
from embedsurgery.surgeries.soft_prompt.surgery import SoftPrompt
from embedsurgery.surgeries.surgery import Base
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens
from embedsurgery.tensors.raw import RawArray
from tests.faults.tracer import Fault, run

ROWS, WIDTH = 24, 8
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARDS = {
    "model-00001-of-00003.safetensors": {TABLE: (ROWS, WIDTH)},
    "model-00002-of-00003.safetensors": {"model.layers.0.mlp.up_proj.weight": (WIDTH, WIDTH)},
    "model-00003-of-00003.safetensors": {HEAD: (ROWS, WIDTH), "model.norm.weight": (WIDTH,)},
}


def make(folder: Path, spare: int = 0, *, tied: bool = False) -> Path:
    """Make a checkpoint in three shards with a tokenizer and spare rows; a tied one stores no head."""
    folder.mkdir()
    random = np.random.default_rng(0)
    where = {}
    for file, named in SHARDS.items():
        tensors = {name: shape for name, shape in named.items() if name != HEAD or not tied}
        sources = {}
        for name, shape in tensors.items():
            raw = RawArray.of(random.standard_normal(shape).astype(np.float32), "BF16")
            sources[name] = TensorSource("BF16", shape, (raw.data,))
            where[name] = file
        write_file(folder / file, sources, {"format": "pt"})
    total = sum((folder / file).stat().st_size for file in SHARDS)
    texts = {f"t{n}": n for n in range(ROWS - spare)}
    bodies = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": where},
        "config.json": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": ROWS,
            "hidden_size": WIDTH,
            "tie_word_embeddings": tied,
        },
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": texts, "unk_token": "t0"},
        },
    }
    for name, body in bodies.items():
        (folder / name).write_text(json.dumps(body) + "\n")
    (folder / "assets").mkdir()
    (folder / "assets" / "card.md").write_text("kept\n")
    os.chmod(folder / "assets" / "card.md", 0o640)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, ns=(10**18 + number, 10**18 + 7 * number))
    return folder


def adapter(base: Path, rows: list[int], value: float) -> Adapter:
    """Make an adapter that sets rows of the input table to one value."""
    started = TrainableTokens().start(es.TrainableTokensConfig(rows), ShardStore.open(base), Base())
    values = RawArray.of(np.full((len(rows), WIDTH), value, np.float32))
    return Adapter(started.manifest, {TABLE: values}, started.surgery)


def prompt(base: Path) -> Adapter:
    """Make a soft prompt of two virtual tokens."""
    started = SoftPrompt().start(es.SoftPromptConfig(2), ShardStore.open(base), Base())
    values = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    return Adapter(started.manifest, {TENSOR: RawArray.of(values)}, started.surgery)


@dataclass(frozen=True)
class Scenario:
    """One operation on a directory with a checkpoint in it.

    Attributes:
        name: For messages.
        prepare: Called once with an empty directory, to fill it.
        act: Called with the directory, or a copy of it; does the operation.
        target: The name in the directory to pass to `embedsurgery recover`.
        base: Makes what a recovery must restore.
    """

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    target: str = "base"
    base: Callable[[Path], Path] = make


_ADAPTERS: dict[str, Adapter] = {}


def _base(spare: int = 0) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        base = make(folder / "base", spare)
        if "a" not in _ADAPTERS:
            _ADAPTERS.update(a=adapter(base, [3, 1, 4], 1.0), b=adapter(base, [9, 5], 2.0))

    return prepare


def _tied(spare: int = 0) -> Callable[[Path], None]:
    """A tied base; baking a soft prompt into it unties the head."""

    def prepare(folder: Path) -> None:
        base = make(folder / "base", spare, tied=True)
        if "prompt" not in _ADAPTERS:
            _ADAPTERS["prompt"] = prompt(base)
            _ADAPTERS["tied"] = adapter(base, [3, 1, 4], 1.0)

    return prepare


def _prepare_with(
    *steps: Callable[[Path], None], spare: int = 0, base: Callable[[int], Callable[[Path], None]] = _base
) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        base(spare)(folder)
        for step in steps:
            step(folder)

    return prepare


def _merge(*names: str) -> Callable[[Path], None]:
    return lambda folder: void(es.merge_checkpoint(folder / "base", [_ADAPTERS[n] for n in names], in_place=True))


def _new(hardlink: bool) -> Callable[[Path], None]:
    return lambda folder: void(es.merge_checkpoint(folder / "base", _ADAPTERS["a"], folder / "out", hardlink=hardlink))


def _bake(folder: Path) -> None:
    es.merge_checkpoint(folder / "base", _ADAPTERS["prompt"], in_place=True, bake=es.BakeConfig("p"))


def _bake_into_new(folder: Path) -> None:
    es.merge_checkpoint(folder / "base", _ADAPTERS["prompt"], folder / "out", bake=es.BakeConfig("p"))


def _bake_both(folder: Path) -> None:
    """A prompt, and then rows that both ends of the former tie get."""
    both = [_ADAPTERS["prompt"], _ADAPTERS["tied"]]
    es.merge_checkpoint(folder / "base", both, in_place=True, bake=[es.BakeConfig("p"), None])


def _grow(folder: Path) -> None:
    es.add_tokens_checkpoint(folder / "base", ["<tool>", "<x>"], in_place=True)


def _unmerge(folder: Path) -> None:
    es.unmerge_checkpoint(folder / "base", in_place=True)


def _unmerge_all(folder: Path) -> None:
    es.unmerge_checkpoint(folder / "base", in_place=True, all=True)


def _unmerge_into_new(folder: Path) -> None:
    es.unmerge_checkpoint(folder / "base", folder / "out")


def _grow_into_new(folder: Path) -> None:
    es.add_tokens_checkpoint(folder / "base", ["<tool>"], folder / "out")


def _kill_at(act: Callable[[Path], None], call: str, time: int = 1) -> Callable[[Path], None]:
    """Run an operation and kill it at the n-th call whose description contains a text."""

    def prepare(folder: Path) -> None:
        trial = folder.with_name("trial")
        shutil.copytree(folder, trial)
        seen = [place for place, text in enumerate(run(lambda: act(trial), ()).calls, 1) if call in text]
        shutil.rmtree(trial)
        assert run(lambda: act(folder), (), Fault(seen[time - 1])).code == -signal.SIGKILL
        assert journal_segments(folder / "base")

    return prepare


def _recover(folder: Path) -> None:
    es.recover_checkpoint(folder / "base")


def void(_: object) -> None:
    """Drop a result."""


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("merge into a new directory", _base(), _new(hardlink=False), "out"),
        Scenario("merge into a new directory, hard links", _base(), _new(hardlink=True), "out"),
        Scenario("merge in place", _base(), _merge("a")),
        Scenario("two adapters in place", _base(), _merge("a", "b")),
        Scenario("a second merge in place", _prepare_with(_merge("a")), _merge("b")),
        Scenario("growth in place", _base(), _grow),
        Scenario("growth in place, onto a merge", _prepare_with(_merge("a")), _grow),
        Scenario("growth into a new directory", _base(), _grow_into_new, "out"),
        Scenario("tokens on spare rows in place", _base(spare=4), _grow),
        Scenario("unmerge in place", _prepare_with(_merge("a")), _unmerge),
        Scenario("unmerge of growth in place", _prepare_with(_grow), _unmerge),
        Scenario("unmerge of spare rows in place", _prepare_with(_grow, spare=4), _unmerge),
        Scenario("unmerge of a stack in place", _prepare_with(_merge("a"), _grow, _merge("b")), _unmerge_all),
        Scenario("recovery of rows", _prepare_with(_kill_at(_merge("a", "b"), "0002.part")), _recover),
        Scenario("recovery of growth", _prepare_with(_kill_at(_grow, "renam", 4)), _recover),
        Scenario("recovery just before the commit", _prepare_with(_kill_at(_grow, ".embedsurgery/done")), _recover),
        Scenario("a prompt in place", _tied(), _bake),
        Scenario("a prompt on spare rows in place", _tied(spare=4), _bake),
        Scenario("a prompt and rows in place", _tied(spare=4), _bake_both),
        Scenario("a prompt into a new directory", _tied(), _bake_into_new, "out"),
        Scenario("unmerge of a prompt in place", _prepare_with(_bake, base=_tied), _unmerge),
        Scenario("unmerge of a prompt on spare rows in place", _prepare_with(_bake, spare=4, base=_tied), _unmerge),
        Scenario(
            "recovery of a prompt",
            _prepare_with(_kill_at(_bake, "renam", 4), base=_tied),
            _recover,
            base=partial(make, tied=True),
        ),
        Scenario("unmerge into a new directory", _prepare_with(_merge("a")), _unmerge_into_new, "out"),
    )
}


@dataclass(frozen=True)
class Snapshot:
    """The contents of a directory.

    Attributes:
        files: Path -> (bytes, mode) of every file of a checkpoint.
        times: Path -> mtime_ns of the same files.
        state: Paths in ``.embedsurgery`` directories and in the hidden directories that runs build in.
    """

    files: dict[str, tuple[bytes, int]]
    times: dict[str, int]
    state: frozenset[str]

    @classmethod
    def of(cls, folder: Path) -> Snapshot:
        """Read a directory."""
        files, times, state = {}, {}, set()
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if ".embedsurgery" in name:
                state.add(name)
            elif not path.is_dir():
                status = path.lstat()
                files[name], times[name] = (path.read_bytes(), status.st_mode), status.st_mtime_ns
        return cls(files, times, frozenset(state))
