"""A plugin's function is called, and what goes wrong in it, or comes out of it, is said as its own fault.

What a surgery's answers must be like beyond their kind is ``surgeries/answers.py``'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from embedsurgery.errors import EmbedSurgeryError, PluginError

_T = TypeVar("_T")

_NOT_ITS_FAULT = (EmbedSurgeryError, OSError, MemoryError, Warning)
"""What a plugin's function may raise as it is."""


def call(where: str, kind: type[_T], function: Callable[..., Any], *arguments: Any) -> _T:
    """What a plugin's function returns.

    Args:
        where: What to call the function in a message, such as "lora.plan".
        kind: What it must return; ``object`` for anything.
        function: It.
        arguments: What it is given.

    Raises:
        PluginError: It fails with an error that is none of embedsurgery's, or returns something else.
    """
    try:
        answer = function(*arguments)
    except _NOT_ITS_FAULT:
        raise
    except Exception as error:  # whatever a third party's code raises
        raise PluginError(
            "a plugin's function failed", where=where, found=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(answer, kind):
        raise wrong(where, kind.__name__, type(answer).__name__)
    return answer


def wrong(where: str, expected: object, found: object) -> PluginError:
    """The error for an answer that is not what was asked for."""
    return PluginError("a plugin's function returned the wrong thing", where=where, expected=expected, found=found)


def check_json(where: str, values: Mapping[str, Any]) -> None:
    """Refuse what cannot be written as JSON.

    Raises:
        PluginError: It says what is none.
    """
    try:
        json.dumps(values, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise wrong(where, "JSON values", f"{type(error).__name__}: {error}") from error
