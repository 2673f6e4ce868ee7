"""A learned vector as a new row: ``init="textual-inversion:FILE#N"``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsurgery.errors import ConfigError
from embedsurgery.initializers import Initializer, NewToken, TableView
from embedsurgery_textual_inversion.files import read_embedding


class Vector(Initializer):
    """Vector N of a file of learned embeddings (textual inversion), of the table's width.

    Gal et al. 2022, https://arxiv.org/abs/2208.01618. Rows of a head are the mean of its known rows.
    """

    def rows(
        self,
        view: TableView,
        tokens: Sequence[NewToken],
        argument: str | None,
        streams: Sequence[np.random.Generator],
    ) -> npt.NDArray[Any]:
        path, _, number = (argument or "").rpartition("#")
        if not path or not number.isascii() or not number.isdigit():
            raise ConfigError(
                "the initialiser needs a file and the number of a vector",
                where=f"init 'textual-inversion:{argument}'",
                expected="textual-inversion:FILE#0",
            )
        if "input" not in view.roles:
            total = sum((block.astype(np.float64).sum(axis=0) for _, block in view.blocks()), np.zeros(view.shape[1]))
            return np.tile(total / max(1, view.known), (len(tokens), 1))
        embedding = read_embedding(path)
        vectors = embedding.of_width(view.shape[1])
        if vectors is None or int(number) >= vectors.shape[0]:
            found = ", ".join(f"{key} {list(raw.shape)}" for key, raw in embedding.vectors.items())
            raise ConfigError(
                "the file has no such vector of the table's width",
                where=view.name,
                found=found,
                expected=f"vector {number} of width {view.shape[1]}",
                hint="use a file that was learned for this text encoder",
            )
        return np.tile(vectors.float32()[int(number)], (len(tokens), 1))
