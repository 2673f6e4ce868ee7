"""Replaces files of a checkpoint: weight files made of pieces of the old ones, and small files.

Each new file is written beside the old one, or in a directory that the caller names, and renamed into place.
``resized_files.py`` writes weight files; ``files/atomic.py`` moves all files of one edit into place.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from embedsurgery.errors import CheckpointError, UnsupportedError
from embedsurgery.files.atomic import replace_files
from embedsurgery.files.json_reading import read_small
from embedsurgery.plan import PatchFile

if TYPE_CHECKING:
    from embedsurgery.stores.resized_files import Piece


@dataclass(frozen=True)
class ShardFiles:
    """The files of a checkpoint directory.

    Attributes:
        directory: The checkpoint.
        work: Directory for new files if the checkpoint is changed in place, where the caller can restore everything
            from a journal. With None, new files are written beside the old ones.
    """

    directory: Path
    work: Path | None = None

    def replace(self, weights: Mapping[str, tuple[bytes, Iterable[Piece]]], small: Mapping[str, bytes]) -> None:
        """Replace files. If one cannot be written or moved, none is replaced.

        Args:
            weights: Weight file -> its new header, and the pieces that follow.
            small: Small file -> its new bytes.
        """
        from embedsurgery.stores.resized_files import write_pieces

        directory = self.directory
        staged: dict[Path, Path] = {}
        try:
            for file, (header, parts) in weights.items():
                staged[directory / file] = new = self._staging_path(directory / file)
                write_pieces(directory / file, new, header, parts)
            for path, data in small.items():
                staged[directory / path] = self._stage_small_file(directory / path, data)
            for target, new in staged.items():
                self._copy_owner(target, new)
            replace_files(staged, backup=self.work is None)
        except BaseException:
            for new in staged.values():
                new.unlink(missing_ok=True)
            raise

    def read(self, path: str) -> bytes | None:
        """Read a file beside the weights; None if it does not exist.

        Raises:
            CheckpointError: The path leads out of the directory.
        """
        file = self._resolve(path)
        return read_small(file) if file.exists() else None

    def patch(self, edit: PatchFile) -> None:
        """Apply a patch. The file is replaced by a rename, so it is never half written."""
        file = self._resolve(edit.path)
        if edit.after is None:
            file.unlink(missing_ok=True)
            return
        new = self._stage_small_file(file, edit.after)
        self._copy_owner(file, new)
        os.replace(new, file)

    def _resolve(self, path: str) -> Path:
        """Resolve a path from a plan, which must stay inside the checkpoint, also through links."""
        parts = path.split("/")
        if not all(part and part not in (".", "..") and "\0" not in part and "\\" not in part for part in parts):
            raise CheckpointError("path outside the checkpoint", where=self.directory, found=repr(path))
        file = self.directory.joinpath(*parts)
        if self.directory.resolve() not in file.resolve().parents:
            raise CheckpointError("link out of the checkpoint", where=self.directory, found=repr(path))
        if not file.parent.is_dir():
            raise CheckpointError("no such directory in the checkpoint", where=self.directory, found=repr(path))
        return file

    def _staging_path(self, file: Path) -> Path:
        """Return the path to write a new version of a file to."""
        # Inference engines load every *.safetensors, so the name must not end like that.
        name = f".{file.name}"[:80] + f".{os.getpid()}"
        return (file.parent if self.work is None else self.work) / name

    def _stage_small_file(self, file: Path, data: bytes) -> Path:
        """Write a new version of a small file, with the mode of the old one. A failure leaves no file."""
        staged = self._staging_path(file)
        try:
            with open(staged, "xb") as out:
                out.write(data)
                out.flush()
                if file.exists():
                    os.fchmod(out.fileno(), file.stat().st_mode & 0o7777)
                os.fsync(out.fileno())
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        return staged

    def _copy_owner(self, file: Path, new: Path) -> None:
        """In place, give a new version of a file the owner and group of the old one, if permitted."""
        if self.work is None or not file.exists():
            return
        was, now = file.stat(), new.stat()
        if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
            with suppress(PermissionError):
                os.chown(new, was.st_uid, was.st_gid)
                os.chmod(new, stat.S_IMODE(was.st_mode))  # chown clears the setuid and setgid bits


def refuse_hard_links(path: Path, links: int) -> None:
    """Refuse to write a weight file with other hard links, which would change too.

    Raises:
        UnsupportedError: ``links``, its number of links, is more than 1.
    """
    if links > 1:
        raise UnsupportedError(
            "the weight file has other hard links, which would change too",
            where=path,
            found=f"{links} hard links",
            hint="work on a copy of the file",
        )
