"""Calls a plugin's function; whatever goes wrong in it is reported as that function's fault.

``surgeries/checked.py`` checks what a surgery returns beyond its type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from embedsurgery.errors import EmbedSurgeryError, PluginError

_T = TypeVar("_T")

_PASSED_ON = (EmbedSurgeryError, OSError, MemoryError, Warning)
"""Exceptions of a plugin's function that are not turned into a `PluginError`."""


def call_plugin(where: str, kind: type[_T], function: Callable[..., Any], *arguments: Any) -> _T:
    """Call a plugin's function.

    Args:
        where: The function's name in errors, such as "lora.plan".
        kind: The type that it must return; ``object`` for any.
        function: The function.
        arguments: Its arguments.

    Returns:
        What it returns.

    Raises:
        PluginError: It raises an error that is not one of embedsurgery's, or returns another type.
    """
    try:
        result = function(*arguments)
    except _PASSED_ON:
        raise
    except Exception as error:  # a plugin may raise anything
        raise PluginError(
            "a plugin's function failed", where=where, found=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, kind):
        raise wrong_result(where, kind.__name__, type(result).__name__)
    return result


def wrong_result(where: str, expected: object, found: object) -> PluginError:
    """Return the error for a wrong result of a plugin's function."""
    return PluginError("a plugin's function returned a wrong value", where=where, expected=expected, found=found)


def check_json(where: str, values: Mapping[str, Any]) -> None:
    """Refuse values that cannot be written as JSON.

    Raises:
        PluginError: A value cannot be written; the error says why.
    """
    try:
        json.dumps(values, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise wrong_result(where, "JSON values", f"{type(error).__name__}: {error}") from error
