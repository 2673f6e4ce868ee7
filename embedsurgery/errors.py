"""Every error and warning that embedsurgery raises on purpose.

    EmbedSurgeryError
    ├── ConfigError (ValueError)            a value that a config or a call cannot take
    │   └── TokenIndexError                 token indices: range, sign, type, duplicates
    ├── TableError (LookupError)            no table, or more than one, fits a name
    ├── OverlapError                        memory that is shared in part only
    ├── UnsupportedError                    something that cannot be done right, refused by name
    │   └── UnsupportedEditError            a store that has no way to do an edit
    ├── AttachmentError (RuntimeError)      an attachment in the wrong state for what was asked
    ├── AdapterError (ValueError)           an adapter's files cannot be read
    │   └── UnknownSurgeryError             no installed plugin brings that surgery
    ├── CheckpointError (ValueError)        a checkpoint's files cannot be read or disagree
    │   ├── UnfinishedError                 a change in place was interrupted: `embedsurgery recover`
    │   └── BusyError                       another process is reading or changing the checkpoint
    ├── BaseMismatchError (ValueError)      the adapter was made from another base
    ├── PlanError (ValueError)              a plan or undo that does not fit its store
    ├── HubError (RuntimeError)             the Hugging Face Hub said no, or could not be reached
    ├── OutputExistsError (FileExistsError) a target that is there already
    └── PluginError (RuntimeError)          two plugins with one name, a hook of the wrong shape

Each message says what failed, where, what was expected and found, and the way out, on one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EmbedSurgeryError(Exception):
    """The root of the tree.

    Args:
        what: What failed, as a short clause.
        where: The tensor, file, module or option it happened at.
        expected: What would have been right.
        found: What was there instead.
        hint: The way out.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.what} ({self.where})"
        facts = [
            f"{word} {value}"
            for word, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if facts:
            text += ": " + ", ".join(facts)
        if self.hint:
            text += f"; {self.hint}"
        return printable(text.replace("\n", " "))  # names come from files

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.expected, self.found, self.hint)


def printable(text: str) -> str:
    """The text with everything that a terminal might obey, or that ends a line, written as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def named(path: object) -> Iterator[None]:
    """Inside, errors of the operating system that name no file, as those of a write do, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _rebuild(
    kind: type[EmbedSurgeryError], what: str, where: object, expected: object, found: object, hint: str | None
) -> EmbedSurgeryError:
    return kind(what, where=where, expected=expected, found=found, hint=hint)


class ConfigError(EmbedSurgeryError, ValueError):
    """A value that a config or a call cannot take."""


class TokenIndexError(ConfigError):
    """Token indices that are out of range, negative, empty, repeated or no integers."""


class TableError(EmbedSurgeryError, LookupError):
    """No table, or more than one, fits a name."""


class OverlapError(EmbedSurgeryError):
    """A parameter shares a table's memory in part only."""


class UnsupportedError(EmbedSurgeryError):
    """Something that cannot be done right here, refused by name."""


class UnsupportedEditError(UnsupportedError):
    """A store that has no way to do one of a plan's edits."""


class AttachmentError(EmbedSurgeryError, RuntimeError):
    """An attachment is in the wrong state for what was asked of it."""


class AdapterError(EmbedSurgeryError, ValueError):
    """An adapter's files are missing, broken or contradict each other."""


class UnknownSurgeryError(AdapterError):
    """No installed plugin brings the surgery that an adapter names."""


class CheckpointError(EmbedSurgeryError, ValueError):
    """A checkpoint's files are missing, broken or contradict each other."""


class UnfinishedError(CheckpointError):
    """A change of a checkpoint in place was interrupted, and has to be taken back first."""


class BusyError(CheckpointError):
    """Another process of embedsurgery is reading or changing the checkpoint."""


class BaseMismatchError(EmbedSurgeryError, ValueError):
    """The rows of this base are not those that the adapter was made from."""


class PlanError(EmbedSurgeryError, ValueError):
    """A plan or an undo that does not fit the store it is applied to."""


class HubError(EmbedSurgeryError, RuntimeError):
    """The Hugging Face Hub said no, could not be reached, or answered with something wrong."""


class OutputExistsError(EmbedSurgeryError, FileExistsError):
    """The target of a write is there already."""

    __str__ = EmbedSurgeryError.__str__


class PluginError(EmbedSurgeryError, RuntimeError):
    """Two plugins with one name, or a hook that returns the wrong thing."""


class EmbedSurgeryWarning(UserWarning):
    """Something that works, and that its user should know of."""
