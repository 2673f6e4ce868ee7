"""Edits of files: `PatchFile` for small files of a checkpoint, and the edits of a journal, which restore files.

The edits of a journal refer to files and bytes, not to tables: after an interrupted change the checkpoint may not be
readable as one. ``checkpoints/journal.py`` writes them and calls `Edit.restore_file`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from embedsurgery.errors import UnfinishedError
from embedsurgery.files.locking import JOURNAL
from embedsurgery.files.regular import open_regular, pread_exactly, pwrite_exactly
from embedsurgery.files.safetensors import MAX_HEADER, TensorSource
from embedsurgery.plan.edit import Edit, Footprint, Range, Sizes, StoreFiles, Touched
from embedsurgery.plan.serial import CHUNK, bytes_source, string_or_none
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    from embedsurgery.plan.serial import PlanFile


@dataclass(frozen=True)
class PatchFile(Edit):
    """Write, replace or remove a small file beside the weights.

    Attributes:
        path: Relative to the checkpoint, with forward slashes.
        after: The new bytes; None removes the file.
        before: sha256 (hex) of the current file, None if it must not exist. Any other file is refused.
    """

    interpolates: ClassVar[bool] = False

    path: str
    after: bytes | None
    before: str | None

    @classmethod
    def change(cls, path: str, before: bytes | None, after: bytes | None) -> PatchFile:
        """Create the edit that turns one content into another; None means no file."""
        return cls(path, after, None if before is None else hashlib.sha256(before).hexdigest())

    def describe(self) -> str:
        return f"{'remove' if self.after is None else 'write'} {self.path}"

    def touches(self, sizes: Sizes) -> Touched:
        return Touched(files=frozenset((self.path,)))

    def footprint(self, store: StoreFiles) -> Footprint:
        return Footprint(replaced=(self.path,))

    def expected_file(self) -> tuple[str, str | None]:
        return self.path, self.before

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        if self.after is not None:
            tensors[prefix + "after"] = bytes_source(self.after)
        return {"path": self.path, "removed": self.after is None, "before": self.before}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> PatchFile:
        after = None if body["removed"] else file.data(prefix + "after")
        return cls(str(body["path"]), after, string_or_none(body["before"]))

    def restore_file(self, directory: Path, journal: Path) -> str:
        # In a journal this edit removes a file that the change created. Replaced files are restored by `PutFile`.
        file = resolve_inside(directory, self.path)
        if self.after is not None or (os.path.lexists(file) and (file.is_dir() and not file.is_symlink())):
            raise journal_mismatch(file, "a file that the change created", "something else")
        file.unlink(missing_ok=True)
        return self.path


# -- the edits of a journal -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileState:
    """Identifies a file. A weight file is still the same after rows in it were overwritten.

    Attributes:
        size: Bytes.
        head: sha256 (hex) of a weight file's header, or of the whole of another file.
        mtime_ns: Time of the last change, in nanoseconds.
    """

    size: int
    head: str
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> FileState:
        """Read the state of a file.

        Args:
            path: The file.
            name: Its name in the checkpoint, if that is another.

        Raises:
            CheckpointError: It does not exist, or is not a regular file.
        """
        with open_regular(path, os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
            status = os.fstat(descriptor)
            end = status.st_size
            if (name or path.name).endswith(".safetensors") and end >= 8:
                # Bounded, because the length field may be broken.
                end = min(end, 8 + int.from_bytes(pread_exactly(descriptor, 8, 0), "little"), MAX_HEADER)
            digest = hashlib.sha256()
            for start in range(0, end, CHUNK):
                digest.update(pread_exactly(descriptor, min(CHUNK, end - start), start))
        return cls(status.st_size, digest.hexdigest(), status.st_mtime_ns)

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> FileState:
        """Read the state from JSON.

        Raises:
            ValueError: A number is not an integer, or out of range.
        """
        size, time = body["size"], body["mtime_ns"]
        if type(size) is not int or type(time) is not int or not (0 <= size < 2**63 and -(2**63) <= time < 2**63):
            raise ValueError("size and mtime_ns must be 64-bit integers")
        return cls(size, str(body["head"]), time)

    def same_file(self, other: FileState) -> bool:
        """Whether both are states of one file; its rows may differ."""
        return (self.size, self.head) == (other.size, other.head)


@dataclass(frozen=True)
class SetBytes(Edit):
    """Restore bytes of a file in place. An edit of a journal.

    Attributes:
        path: Relative to the checkpoint, with forward slashes.
        ranges: (begin, end) in bytes from the start of the file, ascending and disjoint.
        state: State of the file before the change.
        chunks: Called for the bytes of all ranges, in order, in pieces of bounded size.
    """

    rearranges: ClassVar[bool] = False

    path: str
    ranges: tuple[Range, ...]
    state: FileState
    chunks: Callable[[], Iterator[bytes]]

    @classmethod
    def of_current_bytes(cls, directory: Path, path: str, ranges: Sequence[Range]) -> SetBytes:
        """Create the edit that restores the current bytes. They are read when the edit is serialised."""
        file = directory / path

        def chunks() -> Iterator[bytes]:
            with open_regular(file) as descriptor:
                for begin, end in ranges:
                    for start in range(begin, end, CHUNK):
                        yield pread_exactly(descriptor, min(CHUNK, end - start), start)

        return cls(path, tuple(ranges), FileState.of(file), chunks)

    @property
    def size(self) -> int:
        """Bytes of all ranges."""
        return sum(end - begin for begin, end in self.ranges)

    def describe(self) -> str:
        return f"restore {self.size:,} bytes of {self.path}"

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        ends = [end for part in self.ranges for end in part]
        tensors[prefix + "ranges"] = TensorSource.of(RawArray.of_integers(ends, 2))
        tensors[prefix + "bytes"] = TensorSource("U8", (self.size,), self.chunks())
        return {"path": self.path, "state": asdict(self.state)}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> SetBytes:
        entry, data = file.entries[prefix + "ranges"], file.entries[prefix + "bytes"]
        if (entry.dtype, len(entry.shape), entry.shape[-1], data.dtype, len(data.shape)) != ("I64", 2, 2, "U8", 1):
            raise ValueError("ranges must be I64 (N, 2) and bytes U8 (N,)")
        # A damaged or forged journal must not write outside the ranges it declares, or beyond the end of the file.
        numbers, state = file.tensor(prefix + "ranges").integers(), FileState.decode(body["state"])
        ranges = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        ends = [0, *numbers, state.size]
        if ends != sorted(ends) or sum(end - begin for begin, end in ranges) != data.shape[0]:
            raise ValueError("ranges overlap, or do not match the number of bytes")
        return cls(str(body["path"]), ranges, state, file.chunks(prefix + "bytes"))

    def restore_file(self, directory: Path, journal: Path) -> str:
        file = resolve_inside(directory, self.path)
        if not FileState.of(file).same_file(self.state):
            raise journal_mismatch(file, "the file that was being changed", "another size or header")
        with open_regular(file, os.O_RDWR | os.O_NOFOLLOW) as descriptor:
            places = iter(self.ranges)
            begin = end = 0
            for chunk in self.chunks():
                rest = memoryview(chunk)
                while rest:
                    while begin == end:
                        begin, end = next(places)
                    size = min(len(rest), end - begin)
                    pwrite_exactly(descriptor, bytes(rest[:size]), begin)
                    begin, rest = begin + size, rest[size:]
            os.utime(descriptor, ns=(os.fstat(descriptor).st_atime_ns, self.state.mtime_ns))
            os.fsync(descriptor)
        return self.path


@dataclass(frozen=True)
class PutFile(Edit):
    """Restore a file that was kept under another name. An edit of a journal.

    Attributes:
        path: Relative to the checkpoint, with forward slashes.
        kept: Name of the kept file, in the directory of the journal.
        state: State of the kept file.
    """

    rearranges: ClassVar[bool] = False

    path: str
    kept: str
    state: FileState

    def describe(self) -> str:
        return f"restore {self.path}"

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        return {"path": self.path, "kept": self.kept, "state": asdict(self.state)}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> PutFile:
        return cls(str(body["path"]), str(body["kept"]), FileState.decode(body["state"]))

    def restore_file(self, directory: Path, journal: Path) -> str:
        file, kept = resolve_inside(directory, self.path), journal / self.kept
        # The name must not lead out of the journal's directory, or to another of its files.
        if self.kept != kept.name or not self.kept.endswith(".kept") or not _is_encodable(self.kept):
            raise journal_mismatch(file, "the name of a kept file", repr(self.kept))
        if os.path.lexists(kept):
            if not FileState.of(kept, self.path).same_file(self.state):
                raise journal_mismatch(kept, "the file that was kept", "another size or content")
            os.replace(kept, file)
        # Recovery itself may have been killed after this file was moved back: then it is in its place already.
        elif not os.path.lexists(file) or not FileState.of(file).same_file(self.state):
            raise journal_mismatch(file, f"{self.kept} in the journal, or the original file", "neither")
        return self.path


def resolve_inside(directory: Path, path: str) -> Path:
    """Resolve a path in a journal. It must be inside the checkpoint and not lead through a link.

    Raises:
        UnfinishedError: The path leaves the checkpoint, leads through a link, or cannot be a file name.
    """
    parts = path.split("/")
    file = directory.joinpath(*parts)
    plain = all(part and part not in (".", "..") and "\0" not in part and "\\" not in part for part in parts)
    if not plain or not _is_encodable(path):
        raise journal_mismatch(directory, "a path inside the checkpoint", repr(path)[:200])
    # A directory of the checkpoint may have been replaced by a link since the journal was written.
    for parent in file.parents:
        if parent == directory:
            break
        if parent.is_symlink():
            raise journal_mismatch(file, "a path without links", parent)
    return file


def _is_encodable(path: str) -> bool:
    """Whether a file can have this name. JSON can hold unpaired surrogates, file systems cannot."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def journal_mismatch(where: Path, expected: object, found: object) -> UnfinishedError:
    """The error for a journal that was written for other files."""
    return UnfinishedError(
        "the journal was written for other files, so nothing was restored",
        where=where,
        expected=expected,
        found=found,
        hint=f"restore the files from a backup and remove {JOURNAL}",
    )
