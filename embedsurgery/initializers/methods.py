"""The built-in initialisers, each with the source of its method.

Means and scales are computed from the known rows of one table, with float64 accumulators over blocks of fixed size.
Rows with NaN or infinity are left out, with a warning. With one known row, the mean is that row and the scale is zero.
A table without known rows has no mean and is refused. ``initializer.py`` has the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsurgery.errors import ConfigError, warn
from embedsurgery.initializers.initializer import (
    Ask,
    Initializer,
    InitializerRecord,
    NewToken,
    TableView,
    find_finite_rows,
)
from embedsurgery.stores.store import shorten

Rows = npt.NDArray[Any]
Streams = Sequence[np.random.Generator]

COVARIANCE_FACTOR = 1e-9
"""The factor of the covariance in `Normal`: transformers' ``epsilon``."""


class Current(Initializer):
    """The current value of the row.

    As PEFT's trainable tokens are initialised (``init_weights=True``,
    https://huggingface.co/docs/peft/package_reference/trainable_tokens). For reserved tokens and spare rows: a row that
    the table does not have yet is refused.
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        missing = [f"{token.content!r} ({token.id})" for token in tokens if not 0 <= token.id < view.shape[0]]
        if missing:
            raise ConfigError(
                "init 'current' does not apply to rows that the table does not have yet",
                where=view.name,
                expected=f"rows below {view.shape[0]}",
                found=", ".join(missing[:8]),
                hint="choose another init, such as 'mean'",
            )
        return view.rows([token.id for token in tokens])


class Zeros(Initializer):
    """All zeros: nothing at the input, and a logit of zero at the output.

    As the row of padding_idx is initialised (https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html). A
    logit of zero can be the largest, since training may leave all others far below (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        return np.zeros((len(tokens), view.shape[1]), dtype=np.float32)


class Mean(Initializer):
    """The mean of the rows of all known tokens.

    Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html: it bounds how much the new tokens change the
    model's predictions of the old ones.
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        total = np.zeros(view.shape[1])

        def add(rows: Rows, finite: Rows) -> None:
            np.add(total, rows.sum(axis=0), out=total)

        count = _visit_known_rows(view, add)
        return np.tile(total / count, (len(tokens), 1))


class Normal(Initializer):
    """Drawn around the mean with the table's covariance times 1e-9; transformers' default.

    Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html (whose code has the factor 1e-5), and
    transformers' ``resize_token_embeddings(mean_resizing=True)``.

    As in transformers: the mean, the covariance (of the population: divided by the number of rows) and the factor.
    Different from transformers:

    - Spare rows and rows with NaN are left out.
    - A covariance that is not positive definite, such as that of fewer rows than columns, is sampled too. transformers
      falls back to the mean.
    - A bias is drawn by the same rule. transformers uses 1e-9 of its standard deviation instead of its variance, or
      zero (BERT's).
    - The random numbers are numpy's, with one stream for each token.

    The covariance is not computed: with z of V standard normal numbers, ``mean + sqrt(1e-9 / V) * z @ (rows - mean)``
    has exactly that distribution, with V * D operations per token instead of V * D * D.
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        total = np.zeros(view.shape[1])
        mixed = np.zeros((len(tokens), view.shape[1]))
        weight = np.zeros((len(tokens), 1))

        def add(rows: Rows, finite: Rows) -> None:
            drawn = np.stack([stream.standard_normal(len(rows)) for stream in streams])
            drawn[:, ~finite] = 0
            np.add(total, rows.sum(axis=0), out=total)
            np.add(weight, drawn.sum(axis=1, keepdims=True), out=weight)
            np.add(mixed, drawn @ rows, out=mixed)

        count = _visit_known_rows(view, add)
        mean = total / count
        rows: Rows = mean + np.sqrt(COVARIANCE_FACTOR / count) * (mixed - weight * mean)
        return rows


class Random(Initializer):
    """Drawn at the table's scale: each column normal with that column's mean and standard deviation.

    As WECHSEL initialises tokens without similar ones (Minixhofer et al. 2022,
    https://aclanthology.org/2022.naacl-main.293/). The expected squared norm of a row is the mean squared norm of the
    table's rows. A bias is drawn around the mean bias.
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        mean, squares = np.zeros(view.shape[1]), np.zeros(view.shape[1])
        seen = 0

        def add(rows: Rows, finite: Rows) -> None:
            # Mean and sum of squared deviations are updated block by block (Chan, Golub and LeVeque 1979). The mean of
            # the squares minus the square of the mean would lose all digits where the mean is far from zero.
            nonlocal seen
            count = int(finite.sum())
            if count == 0:
                return
            block_mean = rows.sum(axis=0) / count
            deviations = np.where(finite[:, None], rows - block_mean, 0)
            step = block_mean - mean
            between = step * step * (seen * count / (seen + count))
            np.add(squares, (deviations * deviations).sum(axis=0) + between, out=squares)
            np.add(mean, step * (count / (seen + count)), out=mean)
            seen += count

        count = _visit_known_rows(view, add)
        drawn = np.stack([stream.standard_normal(view.shape[1]) for stream in streams])
        return mean + np.sqrt(squares / count) * drawn


class Subtokens(Initializer):
    """The mean of the rows of the sub-tokens that the tokenizer splits the text into without the new token.

    Fast Vocabulary Transfer (Gee et al. 2022, https://aclanthology.org/2022.emnlp-industry.41/).
    """

    def ask(self, token: NewToken, argument: str | None) -> Ask | None:
        return Ask(token.content)

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        means = {parts: _average_rows(view, parts) for parts in dict.fromkeys(token.parts for token in tokens)}
        return np.stack([means[token.parts] for token in tokens])


class Description(Subtokens):
    """The mean of the rows of the sub-tokens of a description.

    LLaMA-Factory's ``desc_init``
    (https://github.com/hiyouga/LLaMA-Factory, src/llamafactory/model/model_utils/embedding.py). Soft prompts are
    initialised from a text in Lester et al. 2021 (https://aclanthology.org/2021.emnlp-main.243/).
    """

    def ask(self, token: NewToken, argument: str | None) -> Ask | None:
        return Ask(
            argument if argument and argument.strip() else ""
        )  # some tokenizers encode blanks, which describe nothing


class Copy(Initializer):
    """The row of another token, bit for bit.

    Textual inversion's ``initializer_token`` (Gal et al. 2022, https://arxiv.org/abs/2208.01618).
    """

    def ask(self, token: NewToken, argument: str | None) -> Ask | None:
        return Ask(argument or "", single=True)

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        return view.rows([token.parts[0] for token in tokens])


BUILT_IN = (
    InitializerRecord("current", Current()),
    InitializerRecord("zeros", Zeros()),
    InitializerRecord("random", Random()),
    InitializerRecord("mean", Mean()),
    InitializerRecord("normal", Normal()),
    InitializerRecord("subtokens", Subtokens()),
    InitializerRecord("description", Description(), "TEXT"),
    InitializerRecord("copy", Copy(), "TOKEN"),
)
"""What the built-in plugin registers."""


def _visit_known_rows(view: TableView, add: Callable[[Rows, Rows], None]) -> int:
    """Call ``add`` with each block of a table's known rows: float64 (n, D), and which of them are finite, (n,).

    Rows with NaN or infinity are passed as zeros, and warned of at the end.

    Returns:
        The number of finite rows.

    Raises:
        ConfigError: There are none.
    """
    count, broken = 0, []
    for start, block in view.blocks():
        finite = find_finite_rows(block)
        rows = block.astype(np.float64)
        rows[~finite] = 0
        add(rows, finite)
        count += int(finite.sum())
        broken.extend((start + np.flatnonzero(~finite)).tolist())
    if broken:
        _warn_left_out(view, broken)
    if count == 0:
        raise ConfigError(
            "the table has no rows to initialise new rows from",
            where=view.name,
            expected="finite rows of known tokens",
            found=f"{view.known} rows, none of them finite" if view.known else "0 rows",
            hint="choose init 'zeros'",
        )
    return count


def _average_rows(view: TableView, parts: tuple[int, ...]) -> Rows:
    """Return the mean of some rows, float64 (D,)."""
    rows = view.rows(parts).astype(np.float64)
    finite = find_finite_rows(rows)
    if not finite.all():
        _warn_left_out(view, sorted({part for part, ok in zip(parts, finite, strict=True) if not ok}))
    if not finite.any():
        raise ConfigError(
            "the rows of all sub-tokens have NaN or infinity",
            where=view.name,
            found=shorten(sorted(set(parts))),
            hint="choose another init, such as 'mean'",
        )
    mean: Rows = rows[finite].mean(axis=0)
    return mean


def _warn_left_out(view: TableView, broken: list[int]) -> None:
    warn(f"rows of {view.name} with NaN or infinity are left out of initial values: {shorten(broken)}")
