"""Token Distillation as a way for new rows to start: ``init="distill:texts.txt"``.

An initialiser sees tables, and this one needs a model that reads texts: `teacher` says which, or the argument names it.
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
    """A model to learn from, and what it has taught already."""

    model: Any
    tokenizer: Any
    options: dict[str, Any]
    rows: dict[tuple[str, str, int, str], npt.NDArray[np.float32]] = field(default_factory=dict)


_current: ContextVar[_Teacher | None] = ContextVar("teacher", default=None)
_loaded: dict[str, _Teacher] = {}


@contextmanager
def teacher(model: Any, tokenizer: Any, **options: Any) -> Iterator[None]:
    """Inside, ``init="distill:TEXTS"`` learns from this model; it is copied, so it may be the one that grows.

    Args:
        model: A transformers model.
        tokenizer: Its fast tokenizer.
        options: For `embedsurgery_distill.distill`.
    """
    token = _current.set(_Teacher(copy.deepcopy(model), copy.deepcopy(tokenizer), options))
    try:
        yield
    finally:
        _current.reset(token)


class Distilled(Initializer):
    """Learned from texts: the states that its sub-tokens give there (Token Distillation).

    https://arxiv.org/abs/2505.20133. A table that is no input, and a head's bias, have the mean of the sub-tokens.
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
        source, texts = _source(argument or "")
        for number, token in enumerate(tokens):
            seed = int(streams[number].integers(2**31))
            learned = _learned(source, view, token, texts, seed)
            if learned is not None:
                means[number] = learned
        return means


def _source(argument: str) -> tuple[_Teacher, str]:
    """The teacher, and the path of its texts."""
    directory, separator, texts = argument.rpartition("::")
    if not separator:
        source = _current.get()
        if source is None:
            raise ConfigError(
                "init 'distill' has no model to learn from",
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
    """The lines of a file that are not empty.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the texts cannot be read", where=path, expected="a text a line, in UTF-8", found=str(error)
        ) from error
    return [line for line in lines if line.strip()]


def _learned(
    source: _Teacher, view: TableView, token: NewToken, texts: str, seed: int
) -> npt.NDArray[np.float32] | None:
    """A token's row in one table, None where the teacher's input is another table."""
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
        found = {record.name: adapter.raw[record.name].float32()[0] for record in records if record.trained}
        source.rows.update({(name, *key[1:]): row for name, row in found.items()})
    _check_teacher(source, tables[0].name, view, token)
    return source.rows.get(key)


def _same_name(a: str, b: str) -> bool:
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def _check_teacher(source: _Teacher, name: str, view: TableView, token: NewToken) -> None:
    """Refuse a teacher whose table is another."""
    weight = source.model.get_parameter(name).detach().float().cpu().numpy()
    if not np.allclose(weight[list(token.parts)], view.rows(token.parts), rtol=1e-2, atol=1e-3):
        raise BaseMismatchError(
            "the teacher's rows are not those of the model that gets the token",
            where=view.name,
            hint="distill from the same model",
        )
