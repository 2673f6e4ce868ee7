"""The errors and warnings of embedsurgery.

    EmbedSurgeryError
    ├── ConfigError (ValueError)            a config or a call has a wrong value
    │   └── TokenIndexError                 token indices are out of range, repeated or not integers
    ├── TableError (LookupError)            no table, or more than one, fits a name
    ├── OverlapError                        a parameter shares part of a table's memory
    ├── UnsupportedError                    something is refused because it cannot be done correctly
    │   └── UnsupportedEditError            a store cannot do an edit of a plan
    ├── AttachmentError (RuntimeError)      an attachment is in the wrong state for a call
    ├── AdapterError (ValueError)           an adapter's files are missing, broken or contradictory
    │   └── UnknownSurgeryError             no installed plugin has the adapter's surgery
    ├── CheckpointError (ValueError)        a checkpoint's files are missing, broken or contradictory
    │   ├── UnfinishedError                 a change in place was interrupted: `embedsurgery recover`
    │   └── BusyError                       another process is reading or changing the checkpoint
    ├── BaseMismatchError (ValueError)      the adapter was made from another base
    ├── PlanError (ValueError)              a plan or undo does not fit its store
    ├── HubError (RuntimeError)             the Hugging Face Hub refused a request or was unreachable
    ├── OutputExistsError (FileExistsError) the output exists already
    └── PluginError (RuntimeError)          a plugin is broken, or two have one name

Each message says what failed, where, what was expected and found, and the way out, on one line. ``plugin_calls.py``
reports a plugin's faults as errors of this tree; ``cli/main.py`` prints errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EmbedSurgeryError(Exception):
    """The root of the tree.

    Its text is "what (where): expected ..., found ...; hint", without the fields that are None.

    Args:
        what: What failed, as a short clause.
        where: The tensor, file, module or option with the problem.
        expected: What would be right.
        found: What is there instead.
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
        return escape_unprintable(text.replace("\n", " "))  # names from files may have anything in them

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_error, (type(self), self.what, self.where, self.expected, self.found, self.hint)


def escape_unprintable(text: str) -> str:
    """Escape control characters and line ends, so that a terminal neither obeys them nor breaks the line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def name_os_errors(path: object) -> Iterator[None]:
    """Add a file name to operating system errors that have none: a failed write or copy does not say which file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _rebuild_error(
    kind: type[EmbedSurgeryError], what: str, where: object, expected: object, found: object, hint: str | None
) -> EmbedSurgeryError:
    return kind(what, where=where, expected=expected, found=found, hint=hint)


class ConfigError(EmbedSurgeryError, ValueError):
    """A config or a call has a wrong value."""


class TokenIndexError(ConfigError):
    """Token indices are out of range, negative, empty, repeated or not integers."""


class TableError(EmbedSurgeryError, LookupError):
    """No table, or more than one, fits a name."""


class OverlapError(EmbedSurgeryError):
    """A parameter shares part of a table's memory."""


class UnsupportedError(EmbedSurgeryError):
    """Something is refused because it cannot be done correctly here."""


class UnsupportedEditError(UnsupportedError):
    """A store cannot do one of a plan's edits."""


class AttachmentError(EmbedSurgeryError, RuntimeError):
    """An attachment is in the wrong state for a call."""


class AdapterError(EmbedSurgeryError, ValueError):
    """An adapter's files are missing, broken or contradict each other."""


class UnknownSurgeryError(AdapterError):
    """No installed plugin has the surgery of an adapter."""


class CheckpointError(EmbedSurgeryError, ValueError):
    """A checkpoint's files are missing, broken or contradict each other."""


class UnfinishedError(CheckpointError):
    """A change of a checkpoint in place was interrupted; recover the checkpoint first."""


class BusyError(CheckpointError):
    """Another process of embedsurgery is reading or changing the checkpoint."""


class BaseMismatchError(EmbedSurgeryError, ValueError):
    """The adapter was made from a base with other rows."""


class PlanError(EmbedSurgeryError, ValueError):
    """A plan or an undo does not fit its store."""


class HubError(EmbedSurgeryError, RuntimeError):
    """The Hugging Face Hub refused a request, was unreachable, or sent a wrong answer."""


class OutputExistsError(EmbedSurgeryError, FileExistsError):
    """The output of a command exists already."""

    __str__ = EmbedSurgeryError.__str__


class PluginError(EmbedSurgeryError, RuntimeError):
    """A plugin fails to load or returns the wrong thing, or two plugins have one name."""


class EmbedSurgeryWarning(UserWarning):
    """Something works, but its user should know of a consequence."""


def warn(message: str, *, plugin: str = "") -> None:
    """Warn with an `EmbedSurgeryWarning` at the line that called embedsurgery, in no file of torch or pluggy.

    A fixed ``stacklevel`` names the wrong line as soon as a call in between is added.

    Args:
        message: The text.
        plugin: A plugin's ``__file__``, where the warning is the plugin's: lines in that directory are passed over too.
    """
    import inspect
    import sys
    import warnings
    from pathlib import Path

    libraries = (sys.modules.get(name) for name in ("torch", "pluggy"))
    inside = [str(Path(__file__).parent), *(str(Path(str(m.__file__)).parent) for m in libraries if m is not None)]
    inside += [contextmanager.__code__.co_filename, *([str(Path(plugin).parent)] if plugin else [])]
    stack = inspect.stack(0)
    outside = (level for level, frame in enumerate(stack, 1) if not frame.filename.startswith(tuple(inside)))
    warnings.warn(message, EmbedSurgeryWarning, stacklevel=next(outside, len(stack)))
