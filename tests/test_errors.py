"""The error tree: drawn as it is, picklable, and on one line."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from embedsurgery import errors
from embedsurgery.errors import EmbedSurgeryError

ERRORS = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, EmbedSurgeryError)]


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """Name -> (parent, built-in base) of every class in the docstring's drawing."""
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
        ours = [b.__name__ for b in error.__bases__ if issubclass(b, EmbedSurgeryError)]
        others = [b.__name__ for b in error.__bases__ if not issubclass(b, EmbedSurgeryError) and b is not Exception]
        tree[error.__name__] = (ours[0] if ours else None, others[0] if others else None)
        assert len(ours) <= 1
        assert len(others) <= 1
    assert drawn() == tree
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
def test_a_message_says_what_where_expected_found_and_the_way_out(error: type[EmbedSurgeryError]) -> None:
    full = error("it failed", where="here", expected=3, found=4, hint="go there")
    assert str(full) == "it failed (here): expected 3, found 4; go there"
    assert str(error("it failed")) == "it failed"
    assert str(error("it failed", expected=0)) == "it failed: expected 0"
    assert str(error("it failed", where="", found=False)) == "it failed (): found False"
    assert repr(full).startswith(error.__name__)
    with pytest.raises(EmbedSurgeryError, match="it failed"):
        raise full


def test_a_message_is_one_line_whatever_came_with_data() -> None:
    """Names from files go into messages: no line end of any kind, and nothing that a terminal would obey."""
    text = str(EmbedSurgeryError("a\r\nb", where="c\u2028d", found="e\x1b[31m\x85f"))
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text


def test_every_error_has_a_docstring_of_its_own() -> None:
    assert all(
        error.__doc__ and error.__doc__ != EmbedSurgeryError.__doc__
        for error in ERRORS[1:]
        if error is not EmbedSurgeryError
    )
