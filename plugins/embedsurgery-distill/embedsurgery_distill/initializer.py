"""Token Distillation as an initialiser: ``init="distill:texts.txt"``.

An initialiser gets tables, but this one needs a model that reads texts: `teacher` sets it, or the argument names it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsurgery.errors import BaseMismatchError, ConfigError
from embedsurgery.initializers import Ask, Initializer, NewToken, TableView


@dataclass
class _Teacher:
    """A model to learn from, and the rows that were learned from it already."""

    model: Any
    tokenizer: Any
    options: dict[str, Any]
    rows: dict[tuple[str, str, int, str], npt.NDArray[np.float32]] = field(default_factory=dict)


_current: ContextVar[_Teacher | None] = ContextVar("teacher", default=None)
_loaded: dict[str, _Teacher] = {}


@contextmanager
def teacher(model: Any, tokenizer: Any, **options: Any) -> Iterator[None]:
    """Let ``init="distill:TEXTS"`` inside the block learn from a copy of this model, so it can be the one that grows.

    Args:
        model: A transformers model.
        tokenizer: Its fast tokenizer.
        options: Keyword arguments of `embedsurgery_distill.distill`.
    """
    token = _current.set(_Teacher(copy.deepcopy(model), copy.deepcopy(tokenizer), options))
    try:
        yield
    finally:
        _current.reset(token)


class TokenDistillation(Initializer):
    """Learned from texts, to match the hidden states of the sub-tokens (Token Distillation).

    https://arxiv.org/abs/2505.20133. Rows of a head and its bias are the mean of the sub-tokens.
    """

    def ask(self, token: NewToken, argument: str | None) -> Ask | None:
        return Ask(token.content)

    def rows(
        self,
        view: TableView,
        tokens: Sequence[NewToken],
        argument: str | None,
        streams: Sequence[np.random.Generator],
    ) -> npt.NDArray[Any]:
        means = np.stack([view.rows(token.parts).astype(np.float64).mean(axis=0) for token in tokens])
        if "input" not in view.roles:
            return means
        source, texts = _find_teacher(argument or "")
        for number, token in enumerate(tokens):
            seed = int(streams[number].integers(2**31))
            learned = _distill_row(source, view, token, texts, seed)
            if learned is not None:
                means[number] = learned
        return means


def _find_teacher(argument: str) -> tuple[_Teacher, str]:
    """Return the teacher that the argument or `teacher` sets, and the path of the texts."""
    directory, separator, texts = argument.rpartition("::")
    if not separator:
        source = _current.get()
        if source is None:
            raise ConfigError(
                "the initialiser has no model to learn from",
                where=f"init 'distill:{argument}'",
                expected="distill:MODEL::TEXTS, or a call inside embedsurgery_distill.teacher()",
                hint="the command embedsurgery distill needs neither",
            )
        return source, argument
    if directory not in _loaded:
        from embedsurgery_distill.loading import load

        _loaded[directory] = _Teacher(*load(directory), {})
    return _loaded[directory], texts


def read_texts(path: str | Path) -> list[str]:
    """Read the non-empty lines of a UTF-8 file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "cannot read the texts", where=path, expected="one text per line, in UTF-8", found=str(error)
        ) from error
    return [line for line in lines if line.strip()]


def _distill_row(
    source: _Teacher, view: TableView, token: NewToken, texts: str, seed: int
) -> npt.NDArray[np.float32] | None:
    """Learn a token's row in one table; None if the table is not the teacher's input table."""
    import embedsurgery as es
    from embedsurgery_distill.method import distill

    tables = [table for table in es.walk(source.model).tables if _same_name(table.name, view.name)]
    if not tables or tables[0].shape[1] != view.shape[1]:
        return None
    lines = read_texts(texts)
    key = (tables[0].name, token.content, seed, sha256("\n".join(lines).encode()).hexdigest())
    if key not in source.rows:
        adapter, _ = distill(source.model, source.tokenizer, token.content, lines, **{"seed": seed, **source.options})
        records = adapter.manifest.tables
        rows = {record.name: adapter.raw[record.name].float32()[0] for record in records if record.trained}
        source.rows.update({(name, *key[1:]): row for name, row in rows.items()})
    _check_teacher(source, tables[0].name, view, token)
    return source.rows.get(key)


def _same_name(a: str, b: str) -> bool:
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def _check_teacher(source: _Teacher, name: str, view: TableView, token: NewToken) -> None:
    """Refuse a teacher with other rows than the table that gets the token."""
    weight = source.model.get_parameter(name).detach().float().cpu().numpy()
    if not np.allclose(weight[list(token.parts)], view.rows(token.parts), rtol=1e-2, atol=1e-3):
        raise BaseMismatchError(
            "the teacher is not the model that gets the token: their rows differ",
            where=view.name,
            hint="distill from the model that gets the token",
        )
