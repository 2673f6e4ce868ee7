"""What a plugin's classifier is asked about a module of an unknown class, and what it answers.

``from_modules.py`` calls the classifier. ``plugins/hookspecs.py`` has the hook that registers one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedsurgery.graph.tables import Kind, Role

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class UnknownModule:
    """A module with a two-dimensional parameter whose use the walker does not know.

    Attributes:
        path: Dotted path in the model.
        type_name: ``module.QualifiedName`` of its class.
        shapes: (name, shape) of each parameter of the module itself.
        module: The module, for reading only.
    """

    path: str
    type_name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    module: nn.Module = field(repr=False, compare=False)


@dataclass(frozen=True)
class EmbeddingModule:
    """A classifier's answer: the module is a lookup or a projection.

    Attributes:
        role: "input" for a lookup by token ids, "output" for a projection to logits.
        parameter: Name of the parameter that holds the table.
        kind: "vocabulary" if rows are token ids, "unknown" for a table that is edited only when it is named.
        scale: Factor that the lookup multiplies its rows by, None without one.
        transposed: Whether the parameter is stored (D, V).
    """

    role: Role
    parameter: str = "weight"
    kind: Kind = "vocabulary"
    scale: float | None = None
    transposed: bool = False


Classify = Callable[[UnknownModule], EmbeddingModule | None]
"""Classifies a module; None if the classifier does not know it."""
