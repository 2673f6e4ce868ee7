"""Finds out whether a forward reads a parameter, from its bytecode: before it runs, for compiled code.

The search is for attribute names in the bytecode of the forward, of the functions that it names, and so on, except
torch's. It misses a function in a container, a property, and an attribute whose name is computed.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_DEPTH = 4
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def reads_parameter(module: nn.Module, parameter: str) -> bool:
    """Whether a module's forward, or a function that it calls by name, names a parameter.

    Args:
        module: The module.
        parameter: The parameter's name, for instance ``weight``.
    """
    return _reads(module.forward, module, parameter, _DEPTH, set())


def _reads(given: Any, module: nn.Module, parameter: str, depth: int, seen: set[int]) -> bool:
    for function in reversed(list(_functions(given))):  # the wrapped function first: its depth must not be cut
        if id(function.__code__) in seen or function.__code__.co_filename.startswith(_TORCH):
            continue
        seen.add(id(function.__code__))
        found = {name for code in _codes(function.__code__) for name in code.co_names}
        if parameter in found:
            return True
        called = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        called += [value for name in found for value in (function.__globals__.get(name), _attribute(module, name))]
        if depth > 1 and any(_reads(one, module, parameter, depth - 1, seen) for one in called):
            return True
    return False


def _functions(given: Any) -> Iterator[FunctionType]:
    """Yield the Python function of a method, and the functions that it wraps: a decorator may read the weight, too."""
    if isinstance(given, MethodType):
        given = given.__func__
    while isinstance(given, FunctionType):
        yield given
        given = getattr(given, "__wrapped__", None)


def _attribute(module: nn.Module, name: str) -> Any:
    """Return an attribute of a module or its class, without running a property."""
    found = inspect.getattr_static(module, name, None)
    return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and those of the functions that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
