"""Modules that may be embeddings and are of no known class: what a plugin is asked of one, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedsurgery.graph.tables import Kind, Role

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class UnknownModule:
    """A module with a two-dimensional parameter, of which the walker knows no use.

    Attributes:
        path: Dotted path in the model.
        type_name: ``module.QualifiedName`` of its class.
        shapes: (Name, shape) of each of its own parameters.
        module: The module, to be looked at and not changed.
    """

    path: str
    type_name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    module: nn.Module = field(repr=False, compare=False)


@dataclass(frozen=True)
class EmbeddingModule:
    """What a plugin knows of an unknown module: it is a lookup or a projection.

    Attributes:
        role: "input" for a lookup by token ids, "output" for a projection to logits.
        parameter: Its parameter that holds the table.
        kind: "vocabulary" where rows are token ids, "unknown" where a table is edited only when named.
        scale: Factor that the lookup multiplies its rows by.
        transposed: The parameter is stored (D, V).
    """

    role: Role
    parameter: str = "weight"
    kind: Kind = "vocabulary"
    scale: float | None = None
    transposed: bool = False


Classify = Callable[[UnknownModule], EmbeddingModule | None]
"""Says what a module is, None for a stranger."""
