"""Edits of files beside the weights, and those that a journal is made of: bytes and files put back.

A journal's edits name files and bytes and no tables, because what they put right may be a checkpoint that cannot be
read as one. ``checkpoints/journal.py`` writes them and calls `Edit.put_back`.
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
    """Give a small file beside the weights other bytes.

    Attributes:
        path: Relative to the checkpoint, with forward slashes.
        after: The new bytes; None removes the file.
        before: sha256 (hex) of what must be there, None for no such file: anything else is refused.
    """

    interpolates: ClassVar[bool] = False

    path: str
    after: bytes | None
    before: str | None

    @classmethod
    def change(cls, path: str, before: bytes | None, after: bytes | None) -> PatchFile:
        """The edit that turns one content into another; None stands for no file."""
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

    def put_back(self, directory: Path, journal: Path) -> str:
        file = resolve_inside(directory, self.path)
        if self.after is not None or (os.path.lexists(file) and (file.is_dir() and not file.is_symlink())):
            raise journal_mismatch(file, "a file that was made", "something else")
        file.unlink(missing_ok=True)
        return self.path


# -- the edits of a journal --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileState:
    """What tells a file from others, even when rows in it have changed.

    Attributes:
        size: Bytes.
        head: sha256 (hex) of a weight file's header, or of all of another file.
        mtime_ns: When it was last changed, in nanoseconds.
    """

    size: int
    head: str
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> FileState:
        """The state of a file as it is.

        Args:
            path: Where it is.
            name: Its name in the checkpoint, where it has another name now.

        Raises:
            CheckpointError: It does not exist, or is not a regular file.
        """
        with open_regular(path, os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
            status = os.fstat(descriptor)
            end = status.st_size
            if (name or path.name).endswith(".safetensors") and end >= 8:
                end = min(end, 8 + int.from_bytes(pread_exactly(descriptor, 8, 0), "little"), MAX_HEADER)
            digest = hashlib.sha256()
            for start in range(0, end, CHUNK):
                digest.update(pread_exactly(descriptor, min(CHUNK, end - start), start))
        return cls(status.st_size, digest.hexdigest(), status.st_mtime_ns)

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> FileState:
        """The state from JSON.

        Raises:
            ValueError: A number is out of range, or not a number.
        """
        size, time = body["size"], body["mtime_ns"]
        if type(size) is not int or type(time) is not int or not (0 <= size < 2**63 and -(2**63) <= time < 2**63):
            raise ValueError("size and mtime_ns of a file must be integers of 64 bits")
        return cls(size, str(body["head"]), time)

    def same_file(self, other: FileState) -> bool:
        """Whether both are one file, whatever its rows are."""
        return (self.size, self.head) == (other.size, other.head)


@dataclass(frozen=True)
class SetBytes(Edit):
    """Put bytes of a file back where they lie.

    Attributes:
        path: Relative to the checkpoint, with forward slashes.
        ranges: (begin, end) in bytes from the start of the file, ascending, disjoint.
        state: The file's, as it was and will be.
        chunks: Called for the new bytes of all ranges, in order, in pieces of bounded size.
    """

    rearranges: ClassVar[bool] = False

    path: str
    ranges: tuple[Range, ...]
    state: FileState
    chunks: Callable[[], Iterator[bytes]]

    @classmethod
    def as_now(cls, directory: Path, path: str, ranges: Sequence[Range]) -> SetBytes:
        """The edit that puts back the present bytes, which are read when the edit is written down."""
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
        return f"put {self.size:,} bytes back into {self.path}"

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        ends = [end for part in self.ranges for end in part]
        tensors[prefix + "ranges"] = TensorSource.of(RawArray.of_integers(ends, 2))
        tensors[prefix + "bytes"] = TensorSource("U8", (self.size,), self.chunks())
        return {"path": self.path, "state": asdict(self.state)}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> SetBytes:
        entry, data = file.entries[prefix + "ranges"], file.entries[prefix + "bytes"]
        if (entry.dtype, len(entry.shape), entry.shape[-1], data.dtype, len(data.shape)) != ("I64", 2, 2, "U8", 1):
            raise ValueError("ranges or bytes of the wrong shape")
        numbers, state = file.tensor(prefix + "ranges").integers(), FileState.decode(body["state"])
        ranges = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        ends = [0, *numbers, state.size]
        if ends != sorted(ends) or sum(end - begin for begin, end in ranges) != data.shape[0]:
            raise ValueError("ranges overlap, or do not have as many bytes as are stored")
        return cls(str(body["path"]), ranges, state, file.chunks(prefix + "bytes"))

    def put_back(self, directory: Path, journal: Path) -> str:
        file = resolve_inside(directory, self.path)
        if not FileState.of(file).same_file(self.state):
            raise journal_mismatch(file, "the file that was being changed", "one of another size or header")
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
    """Put a file back from where it was kept.

    Attributes:
        path: Relative to the checkpoint, with forward slashes.
        kept: The name under which it was kept, in the directory of the journal.
        state: Its state.
    """

    rearranges: ClassVar[bool] = False

    path: str
    kept: str
    state: FileState

    def describe(self) -> str:
        return f"put {self.path} back"

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        return {"path": self.path, "kept": self.kept, "state": asdict(self.state)}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> PutFile:
        return cls(str(body["path"]), str(body["kept"]), FileState.decode(body["state"]))

    def put_back(self, directory: Path, journal: Path) -> str:
        file, kept = resolve_inside(directory, self.path), journal / self.kept
        if self.kept != kept.name or not self.kept.endswith(".kept") or not _encodes(self.kept):
            raise journal_mismatch(file, "the name of a kept file", repr(self.kept))
        if os.path.lexists(kept):
            if not FileState.of(kept, self.path).same_file(self.state):
                raise journal_mismatch(file, "the file that was kept", "another file")
            os.replace(kept, file)
        elif not os.path.lexists(file) or not FileState.of(file).same_file(self.state):
            raise journal_mismatch(file, f"{self.kept} in the journal, or the file as it was", "neither")
        return self.path


def resolve_inside(directory: Path, path: str) -> Path:
    """A file that a journal names, which must lie in the checkpoint and be reached without a link.

    Raises:
        UnfinishedError: It does not.
    """
    parts = path.split("/")
    file = directory.joinpath(*parts)
    plain = all(part and part not in (".", "..") and "\0" not in part and "\\" not in part for part in parts)
    if not plain or not _encodes(path):
        raise journal_mismatch(directory, "a path inside the checkpoint", repr(path)[:200])
    for parent in file.parents:
        if parent == directory:
            break
        if parent.is_symlink():
            raise journal_mismatch(file, "a path without links", parent)
    return file


def _encodes(path: str) -> bool:
    """Whether a file can have this name: JSON can hold half a surrogate pair, file systems cannot."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def journal_mismatch(where: Path, expected: object, found: object) -> UnfinishedError:
    """The error for a journal that was not written for these files."""
    return UnfinishedError(
        "the journal does not fit these files, so they are left as they are",
        where=where,
        expected=expected,
        found=found,
        hint=f"put the files back from elsewhere and remove {JOURNAL}",
    )
