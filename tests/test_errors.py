"""The error tree: its drawing is right, and every error pickles and is one line."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from embedsurgery import errors
from embedsurgery.errors import EmbedSurgeryError

ERRORS = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, EmbedSurgeryError)]


def parse_drawing() -> dict[str, tuple[str | None, str | None]]:
    """Parse the docstring's drawing: name -> (parent, built-in base) of every class."""
    found: dict[str, tuple[str | None, str | None]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^( +[│ ]*(?:[├└]── )?)([A-Z]\w+Error)(?: \((\w+)\))?", line)
        if match:
            depth = len(match[1])
            above = [(d, n) for d, n in above if d < depth]
            found[match[2]] = (above[-1][1] if above else None, match[3])
            above.append((depth, match[2]))
    return found


def test_the_drawing_is_the_tree() -> None:
    tree = {}
    for error in ERRORS:
        parents = [b.__name__ for b in error.__bases__ if issubclass(b, EmbedSurgeryError)]
        others = [b.__name__ for b in error.__bases__ if not issubclass(b, EmbedSurgeryError) and b is not Exception]
        tree[error.__name__] = (parents[0] if parents else None, others[0] if others else None)
        assert len(parents) <= 1
        assert len(others) <= 1
    assert parse_drawing() == tree
    assert len(tree) > 10


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
@pytest.mark.parametrize(
    "copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"]
)
def test_every_error_pickles(error: type[EmbedSurgeryError], copied: object) -> None:
    one = error("it failed", where="a\nfile", expected=[1], found=("x", None), hint="try again")
    other = copied(one)  # type: ignore[operator]
    assert type(other) is error
    assert str(other) == str(one)
    assert vars(other) == vars(one)
    assert other.args == one.args


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
def test_a_message_has_its_five_fields(error: type[EmbedSurgeryError]) -> None:
    full = error("it failed", where="here", expected=3, found=4, hint="go there")
    assert str(full) == "it failed (here): expected 3, found 4; go there"
    assert str(error("it failed")) == "it failed"
    assert str(error("it failed", expected=0)) == "it failed: expected 0"
    assert str(error("it failed", where="", found=False)) == "it failed (): found False"
    assert repr(full).startswith(error.__name__)
    with pytest.raises(EmbedSurgeryError) as caught:
        raise full
    assert caught.value is full


def test_a_message_is_one_line_whatever_its_values() -> None:
    """Names from files go into messages, so line ends and control characters are escaped."""
    text = str(EmbedSurgeryError("a\r\nb", where="c\u2028d", found="e\x1b[31m\x85f"))
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text


def test_every_error_has_a_docstring_of_its_own() -> None:
    assert all(
        error.__doc__ and error.__doc__ != EmbedSurgeryError.__doc__
        for error in ERRORS[1:]
        if error is not EmbedSurgeryError
    )
