"""hf_xet's own local store, as the content store of the loopback Hub.

hf_xet takes ``local://DIRECTORY`` where a content server's address is expected, and keeps blocks and their index
("shards") there as it would send them. What a shard says is read here; bytes are taken out by hf_xet itself.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.hub.store import Repo

_VERIFIED, _DESCRIBED = 1 << 31, 1 << 30
"""Flags of a file's entry: a verification follows for each of its segments; a description follows with its sha256."""

_LINE = 48
"""Bytes of everything in a shard: header, entry, segment, verification and description alike."""

_READ = """
import sys, hf_xet
address, name, size, path = sys.argv[1:]
with hf_xet.XetSession().new_file_download_group(endpoint=address) as group:
    group.start_download_file(hf_xet.XetFileInfo(name, int(size)), path)
"""


class XetStore:
    """A directory that hf_xet fills.

    Args:
        folder: The directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    @property
    def url(self) -> str:
        return f"local://{self.folder}"

    @property
    def blocks(self) -> Path:
        """Where hf_xet puts what it would send."""
        return self.folder / "xet" / "xorbs"

    def hash_of(self, sha256: str) -> str | None:
        """What xet calls a file, by its sha256; None where it is not here."""
        return self._known().get(sha256, (None, 0))[0]

    def bring(self, sha256: str, repo: Repo) -> None:
        """Put a file's bytes beside a repository, for who does not speak xet; nothing where it is not here."""
        if sha256 not in self._known():
            return
        name, size = self._known()[sha256]
        out = self.folder / "out"
        copy = self.folder / "copy"  # the store itself is locked by whoever is in the middle of a push
        shutil.copytree(self.folder / "xet", copy / "xet")
        env = {"PATH": os.environ["PATH"], "HF_HOME": str(self.folder / "home")}
        command = [sys.executable, "-c", _READ, f"local://{copy}", name, str(size), str(out)]
        subprocess.run(command, check=True, capture_output=True, env=env)
        shutil.rmtree(copy)
        assert repo.keep(out.read_bytes()) == sha256
        out.unlink()

    def _known(self) -> dict[str, tuple[str, int]]:
        """sha256 -> xet's name and the size, of all files."""
        shards = sorted(self.blocks.glob("shards/*.mdb"))
        return {sha256: (name, size) for shard in shards for sha256, name, size in _files(shard.read_bytes())}


def _files(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """The files of a shard: sha256, xet's name, size. The list of files is the first in it, and ends with ones."""
    place = _LINE
    while shard[place : place + 32] != b"\xff" * 32:
        name, (flags, count) = _hex(shard[place:]), struct.unpack_from("<II", shard, place + 32)
        segments = (place + _LINE * (1 + i) for i in range(count))
        size = sum(struct.unpack_from("<I", shard, segment + 36)[0] for segment in segments)
        place += _LINE * (1 + count + (count if flags & _VERIFIED else 0))
        if flags & _DESCRIBED:
            yield _hex(shard[place:]), name, size
            place += _LINE


def _hex(data: bytes) -> str:
    """How xet writes a hash: four numbers of eight bytes, the lowest byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", data))
