"""The built-in initialisers of new rows, each with the source of its method.

Means and scales are those of the known rows of the one table, in float64 accumulators over blocks of fixed size. A
row that holds NaN or infinity is left out of them, and that is said. Of a table with one known row the mean is that
row and the scale is zero; a table without any has no mean and is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsurgery.errors import ConfigError, EmbedSurgeryWarning
from embedsurgery.initializers.initializer import Ask, Initializer, InitializerRecord, NewToken, TableView, sound
from embedsurgery.stores.store import shorten

Rows = npt.NDArray[Any]
Streams = Sequence[np.random.Generator]

SHRINK = 1e-9
"""Factor of the covariance in `Normal`, transformers' ``epsilon``."""


class Current(Initializer):
    """The value that the row has now.

    What PEFT's trainable tokens start from (``init_weights=True``,
    https://huggingface.co/docs/peft/package_reference/trainable_tokens). Meant for reserved tokens and spare rows; a
    row that the table does not have yet is refused.
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        missing = [f"{token.content!r} ({token.id})" for token in tokens if not 0 <= token.id < view.shape[0]]
        if missing:
            raise ConfigError(
                "init 'current' for rows that the table does not have yet",
                where=view.name,
                expected=f"rows below {view.shape[0]}",
                found=", ".join(missing[:8]),
                hint="choose another init, such as 'mean'",
            )
        return view.rows([token.id for token in tokens])


class Zeros(Initializer):
    """All zeros: nothing at the input, and a logit of zero at the output.

    As the row at padding_idx starts (https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html). A logit
    of zero can be the largest there is, since training may leave all others far below (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        return np.zeros((len(tokens), view.shape[1]), dtype=np.float32)


class Mean(Initializer):
    """The mean of the rows of all known tokens.

    Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html: it bounds how far the model's predictions
    for the old tokens move when the new ones join them.
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        total = np.zeros(view.shape[1])

        def add(rows: Rows, fine: Rows) -> None:
            np.add(total, rows.sum(axis=0), out=total)

        count = _over_known(view, add)
        return np.tile(total / count, (len(tokens), 1))


class Normal(Initializer):
    """Drawn around the mean with the table's covariance times 1e-9; transformers' default.

    Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html (whose code has the factor 1e-5), and
    transformers' ``resize_token_embeddings(mean_resizing=True)``.

    The same as there: the mean, the covariance (of the population: divided by the number of rows) and the factor.
    Different: spare rows do not count, and neither do rows of NaN; a covariance that is not positive definite, such
    as that of fewer rows than columns, is sampled too, where transformers falls back to the mean alone; a bias is
    drawn by the same rule, where transformers takes 1e-9 of its standard deviation, not of its variance, or zero
    (BERT's); and the random numbers are numpy's, one stream for each token.

    No covariance is computed: with z of V standard normal numbers, ``mean + sqrt(1e-9 / V) * z @ (rows - mean)`` has
    that distribution exactly, for V * D operations a token in place of V * D * D.
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        total = np.zeros(view.shape[1])
        mixed = np.zeros((len(tokens), view.shape[1]))
        weight = np.zeros((len(tokens), 1))

        def add(rows: Rows, fine: Rows) -> None:
            drawn = np.stack([stream.standard_normal(len(rows)) for stream in streams])
            drawn[:, ~fine] = 0
            np.add(total, rows.sum(axis=0), out=total)
            np.add(weight, drawn.sum(axis=1, keepdims=True), out=weight)
            np.add(mixed, drawn @ rows, out=mixed)

        count = _over_known(view, add)
        mean = total / count
        rows: Rows = mean + np.sqrt(SHRINK / count) * (mixed - weight * mean)
        return rows


class Random(Initializer):
    """Drawn at the table's own scale: each column normal with that column's mean and standard deviation.

    As WECHSEL starts tokens it finds no relatives of (Minixhofer et al. 2022,
    https://aclanthology.org/2022.naacl-main.293/). The expected squared length of a row is the mean squared length
    of the table's; a bias is drawn around the mean bias.
    """

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        mean, squares = np.zeros(view.shape[1]), np.zeros(view.shape[1])
        before = 0

        def add(rows: Rows, fine: Rows) -> None:
            # block by block as in Chan, Golub and LeVeque 1979, since a mean far from zero cancels in a sum of squares
            nonlocal before
            count = int(fine.sum())
            if count == 0:
                return
            here = rows.sum(axis=0) / count
            away = np.where(fine[:, None], rows - here, 0)
            step = here - mean
            np.add(squares, (away * away).sum(axis=0) + step * step * (before * count / (before + count)), out=squares)
            np.add(mean, step * (count / (before + count)), out=mean)
            before += count

        count = _over_known(view, add)
        drawn = np.stack([stream.standard_normal(view.shape[1]) for stream in streams])
        return mean + np.sqrt(squares / count) * drawn


class Subtokens(Initializer):
    """The mean of the rows of the sub-tokens that the token's text had so far.

    Fast Vocabulary Transfer (Gee et al. 2022, https://aclanthology.org/2022.emnlp-industry.41/).
    """

    def ask(self, token: NewToken, argument: str | None) -> Ask | None:
        return Ask(token.content)

    def rows(self, view: TableView, tokens: Sequence[NewToken], argument: str | None, streams: Streams) -> Rows:
        means = {parts: _mean_of(view, parts) for parts in dict.fromkeys(token.parts for token in tokens)}
        return np.stack([means[token.parts] for token in tokens])


class Description(Subtokens):
    """The mean of the rows of the sub-tokens of a description.

    LLaMA-Factory's ``desc_init``
    (https://github.com/hiyouga/LLaMA-Factory, src/llamafactory/model/model_utils/embedding.py); for soft prompts
    such a start from text is in Lester et al. 2021 (https://aclanthology.org/2021.emnlp-main.243/).
    """

    def ask(self, token: NewToken, argument: str | None) -> Ask | None:
        return Ask(argument if argument and argument.strip() else "")  # blanks are tokens to some, and describe nothing


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


def _over_known(view: TableView, add: Callable[[Rows, Rows], None]) -> int:
    """Show a table's known rows to ``add``, block after block: float64 (n, D), and which are sound, (n,).

    Rows that hold NaN or infinity are shown as zeros, and said in the end.

    Returns:
        How many rows are sound.

    Raises:
        ConfigError: None is.
    """
    count, broken = 0, []
    for start, block in view.blocks():
        fine = sound(block)
        rows = block.astype(np.float64)
        rows[~fine] = 0
        add(rows, fine)
        count += int(fine.sum())
        broken.extend((start + np.flatnonzero(~fine)).tolist())
    if broken:
        _left_out(view, broken)
    if count == 0:
        raise ConfigError(
            "no row to start new rows from",
            where=view.name,
            expected="rows of known tokens",
            found=f"{view.known} rows, none of finite numbers" if view.known else "no known token",
            hint="choose init 'zeros'",
        )
    return count


def _mean_of(view: TableView, parts: tuple[int, ...]) -> Rows:
    """The mean of some rows, float64 (D,)."""
    rows = view.rows(parts).astype(np.float64)
    fine = sound(rows)
    if not fine.all():
        _left_out(view, sorted({part for part, whole in zip(parts, fine, strict=True) if not whole}))
    if not fine.any():
        raise ConfigError(
            "the rows of all sub-tokens hold NaN or infinity",
            where=view.name,
            found=shorten(sorted(set(parts))),
            hint="choose another init, such as 'mean'",
        )
    mean: Rows = rows[fine].mean(axis=0)
    return mean


def _left_out(view: TableView, broken: list[int]) -> None:
    warnings.warn(
        f"rows of {view.name} that hold NaN or infinity do not count for new rows: {shorten(broken)}",
        EmbedSurgeryWarning,
        stacklevel=2,
    )
