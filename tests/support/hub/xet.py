"""hf_xet's local store, used as the content store of the loopback Hub.

hf_xet accepts ``local://DIRECTORY`` instead of the URL of a content server, and writes the blocks and their index
("shards") there that it would upload. This file parses shards; hf_xet itself reads the bytes.
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
"""Flags of a file's entry: a verification follows for each segment; a description with the sha256 follows."""

_LINE = 48
"""Size in bytes of each item in a shard: header, entry, segment, verification, description."""

_READ = """
import sys, hf_xet
address, name, size, path = sys.argv[1:]
with hf_xet.XetSession().new_file_download_group(endpoint=address) as group:
    group.start_download_file(hf_xet.XetFileInfo(name, int(size)), path)
"""


class XetStore:
    """A directory that hf_xet writes to.

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
        """The directory of what hf_xet would upload."""
        return self.folder / "xet" / "xorbs"

    def hash_of(self, sha256: str) -> str | None:
        """Return xet's hash of a file by its sha256; None if the file is not in the store."""
        return self._index().get(sha256, (None, 0))[0]

    def bring(self, sha256: str, repo: Repo) -> None:
        """Copy a file's bytes to a repository, for clients without xet; does nothing if the store lacks the file."""
        if sha256 not in self._index():
            return
        name, size = self._index()[sha256]
        out = self.folder / "out"
        copy = self.folder / "copy"  # a push that is under way locks the store itself
        shutil.copytree(self.folder / "xet", copy / "xet")
        env = {"PATH": os.environ["PATH"], "HF_HOME": str(self.folder / "home")}
        command = [sys.executable, "-c", _READ, f"local://{copy}", name, str(size), str(out)]
        subprocess.run(command, check=True, capture_output=True, env=env)
        shutil.rmtree(copy)
        assert repo.keep(out.read_bytes()) == sha256
        out.unlink()

    def _index(self) -> dict[str, tuple[str, int]]:
        """Return sha256 -> (xet's hash, size) of all files."""
        shards = sorted(self.blocks.glob("shards/*.mdb"))
        return {sha256: (name, size) for shard in shards for sha256, name, size in _files(shard.read_bytes())}


def _files(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """Yield sha256, xet's hash and size of each file in a shard. The list of files comes first and ends with ones."""
    offset = _LINE
    while shard[offset : offset + 32] != b"\xff" * 32:
        name, (flags, count) = _hex(shard[offset:]), struct.unpack_from("<II", shard, offset + 32)
        segments = (offset + _LINE * (1 + i) for i in range(count))
        size = sum(struct.unpack_from("<I", shard, segment + 36)[0] for segment in segments)
        offset += _LINE * (1 + count + (count if flags & _VERIFIED else 0))
        if flags & _DESCRIBED:
            yield _hex(shard[offset:]), name, size
            offset += _LINE


def _hex(data: bytes) -> str:
    """Format a hash as xet does: four numbers of eight bytes, the lowest byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", data))
