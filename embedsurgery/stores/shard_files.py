"""Files of a checkpoint that take the places of others: weight files made of pieces of the old ones, and small files.

Each is made beside its place, or in the directory that the caller names, and renamed into it.
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
        work: Where files are made, for one who changes the checkpoint in place and can put everything back; None
            where they are made beside their places.
    """

    directory: Path
    work: Path | None = None

    def make(self, anew: Mapping[str, tuple[bytes, Iterable[Piece]]], small: Mapping[str, bytes]) -> None:
        """Make weight files, each of a header and pieces of the old one, and small files anew: all or nothing."""
        from embedsurgery.stores.resized_files import write_pieces

        directory = self.directory
        staged: dict[Path, Path] = {}
        try:
            for file, (head, parts) in anew.items():
                staged[directory / file] = new = self._beside(directory / file)
                write_pieces(directory / file, new, head, parts)
            for path, data in small.items():
                staged[directory / path] = self._write_beside(directory / path, data)
            for target, made in staged.items():
                self._give_owner(target, made)
            replace_files(staged, keep=self.work is None)
        except BaseException:
            for new in staged.values():
                new.unlink(missing_ok=True)
            raise

    def read(self, path: str) -> bytes | None:
        """The bytes of a file beside the weights, None where there is none.

        Raises:
            CheckpointError: The path leads out of the directory.
        """
        file = self._inside(path)
        return read_small(file) if file.exists() else None

    def patch(self, edit: PatchFile) -> None:
        """Write the file beside its place and rename it, so that it is never half written."""
        file = self._inside(edit.path)
        if edit.after is None:
            file.unlink(missing_ok=True)
            return
        new = self._write_beside(file, edit.after)
        self._give_owner(file, new)
        os.replace(new, file)

    def _inside(self, path: str) -> Path:
        parts = path.split("/")
        if not all(part and part not in (".", "..") and "\0" not in part and "\\" not in part for part in parts):
            raise CheckpointError("a path that leads out of the checkpoint", where=self.directory, found=repr(path))
        file = self.directory.joinpath(*parts)
        if self.directory.resolve() not in file.resolve().parents:
            raise CheckpointError("a link that leads out of the checkpoint", where=self.directory, found=repr(path))
        if not file.parent.is_dir():
            raise CheckpointError("no such directory in the checkpoint", where=self.directory, found=repr(path))
        return file

    def _beside(self, file: Path) -> Path:
        """A name for what is to become a file; engines do not take it for weights."""
        name = f".{file.name}"[:80] + f".{os.getpid()}"
        return (file.parent if self.work is None else self.work) / name

    def _write_beside(self, file: Path, data: bytes) -> Path:
        """Write what a small file is to become, with the mode that it has; a failure leaves nothing."""
        staged = self._beside(file)
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

    def _give_owner(self, file: Path, new: Path) -> None:
        """Give what takes a file's place in a checkpoint itself that file's owner and group, as far as one may."""
        if self.work is None or not file.exists():
            return
        was, now = file.stat(), new.stat()
        if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
            with suppress(PermissionError):
                os.chown(new, was.st_uid, was.st_gid)
                os.chmod(new, stat.S_IMODE(was.st_mode))  # of which a change of owner takes a part


def refuse_links(path: Path, links: int) -> None:
    """Raise UnsupportedError for a weight file with other hard links, which would change too."""
    if links > 1:
        raise UnsupportedError(
            "a weight file has more than one name, and all would change",
            where=path,
            found=f"{links} hard links",
            hint="work on a copy of the file",
        )
