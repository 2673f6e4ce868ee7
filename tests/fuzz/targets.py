"""What reads a mutated file: one of the commands that would. Only embedsurgery's own errors may come out."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import embedsurgery as es
from embedsurgery.errors import EmbedSurgeryError, EmbedSurgeryWarning
from tests.fuzz.mutation import Step, mutate
from tests.fuzz.seeds import build, files_of

SECONDS = 1.0
"""Processor time that one input may take."""

Act = Callable[[Path, "Bed"], object]


@dataclass(frozen=True)
class Target:
    """Files of a seed to mutate, and what reads them.

    Attributes:
        seed: Name of the directory.
        files: Suffixes of the files to mutate.
        acts: What to do with the directory; each may raise an `EmbedSurgeryError`.
    """

    seed: str
    files: tuple[str, ...]
    acts: tuple[Act, ...]


def _inspect(folder: Path, bed: Bed) -> object:
    from embedsurgery.cli.inspect import inspect

    return inspect(folder)


def _merge(adapter: str) -> Act:
    return lambda folder, bed: es.merge_checkpoint(folder, bed.seeds[adapter], dry_run=True)


def _verify(folder: Path, bed: Bed) -> object:
    return es.verify_checkpoint(folder, full=True)


def _add(folder: Path, bed: Bed) -> object:
    return es.add_tokens_checkpoint(folder, ["<more>", "<and more>", "<most>"], init="zeros", dry_run=True)


def _unmerge(folder: Path, bed: Bed) -> object:
    return es.unmerge_checkpoint(folder, dry_run=True)


def _unmerge_one(folder: Path, bed: Bed) -> object:
    return es.unmerge_checkpoint(folder, adapter="1", dry_run=True)


def _unmerge_all(folder: Path, bed: Bed) -> object:
    out = bed.folder / "out"
    try:
        return es.unmerge_checkpoint(folder, out, all=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _log(folder: Path, bed: Bed) -> object:
    return es.list_merges(folder)


def _adapter(base: str) -> tuple[Act, ...]:
    def shown(folder: Path, bed: Bed) -> object:
        from embedsurgery.cli.show import show

        return show(folder, bed.seeds[base])

    def dry(folder: Path, bed: Bed) -> object:
        return es.merge_checkpoint(bed.seeds[base], [(folder, 0.5)], dry_run=True)

    def merged(folder: Path, bed: Bed) -> object:
        out = bed.folder / "out"
        try:
            return es.merge_checkpoint(bed.seeds[base], folder, out)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    return shown, shown, dry, merged


def _recover(folder: Path, bed: Bed) -> object:
    return es.recover_checkpoint(folder)


_BASE = (_inspect, _inspect, _inspect, _inspect, _verify, _add)
_STACK = (_log, _log, _verify, _unmerge, _unmerge_one, _unmerge_all)
TARGETS: dict[str, tuple[Target, ...]] = {
    "header": (
        Target("sharded", (".safetensors",), (*_BASE, _merge("sharded-rows"))),
        Target("biased", (".safetensors",), (*_BASE, _merge("biased-new"))),
    ),
    "index": (Target("sharded", (".index.json",), (_inspect, _verify, _merge("sharded-new"))),),
    "config": (
        Target("sharded", ("/config.json",), (*_BASE, _merge("sharded-new"))),
        Target("biased", ("/config.json",), (*_BASE, _merge("biased-new"))),
    ),
    "tokenizer": (
        Target("sharded", ("tokenizer.json", "_config.json", "_map.json"), (*_BASE, _merge("sharded-new"))),
        Target("biased", ("tokenizer.json", "_config.json", "_map.json"), (*_BASE, _merge("biased-new"))),
    ),
    "adapter config": (
        Target("sharded-rows", ("adapter_config.json",), _adapter("sharded")),
        Target("biased-new", ("adapter_config.json",), _adapter("biased")),
    ),
    "manifest": tuple(
        Target(f"{base}-{kind}", (".safetensors",), _adapter(base))
        for base in ("sharded", "biased")
        for kind in ("rows", "new")
    ),
    "record": tuple(
        Target(
            f"{base}-merged",
            ("/0001.safetensors", "/0002.safetensors", "/0004.safetensors", "/0005.safetensors", ".removed.json"),
            _STACK,
        )
        for base in ("sharded", "biased")
    ),
    "journal": (Target("journal", ("/0001.safetensors",), (_inspect, _recover)),),
}


class Bed:
    """The seeds; one file at a time is mutated and restored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "seeds").mkdir()
        self.seeds = build(folder / "seeds")
        self.files = {
            name: {path: (seed / path).read_bytes() for path in files_of(seed)} for name, seed in self.seeds.items()
        }
        self.count = 0

    def run(self, target: Target, which: int, act: int, plan: Sequence[Step]) -> None:
        """Mutate one file and run one act on it.

        Raises:
            AssertionError: It took long, or a file changed.
            Exception: An exception that is not an `EmbedSurgeryError`.
        """
        self.count += 1
        seed, files = self.seeds[target.seed], self.files[target.seed]
        names = [n for n in files if f"/{n}".endswith(target.files)]
        name, read = names[which % len(names)], target.acts[act % len(target.acts)]
        (seed / name).write_bytes(mutate(name, files[name], plan))
        try:
            before = _stamps(seed)
            begun, message = time.process_time(), ""
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", EmbedSurgeryWarning)
                try:
                    read(seed, self)
                except EmbedSurgeryError as error:
                    message = str(error)
            assert "\n" not in message
            assert len(message) < 4000, message[:400]
            assert time.process_time() - begun < SECONDS, "slow"
            assert read is _recover or _stamps(seed) == before
            assert {p.name for p in self.folder.iterdir()} == {"seeds"}
        finally:
            if read is _recover:
                shutil.rmtree(seed)
                for path, data in files.items():
                    (seed / path).parent.mkdir(parents=True, exist_ok=True)
                    (seed / path).write_bytes(data)
            else:
                (seed / name).write_bytes(files[name])


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Path -> inode, size and mtime: they show whether a file changed."""
    found = {}
    for top, _, names in os.walk(folder):
        for name in names:
            status = os.stat(os.path.join(top, name))
            found[os.path.join(top, name)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found
