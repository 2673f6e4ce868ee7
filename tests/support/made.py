"""Adapters for tests on disk: made from a checkpoint alone, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.stores.shards import ShardStore
from embedsurgery.surgeries.surgery import Base
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens
from embedsurgery.tensors.raw import RawArray


class StubTokenizer:
    """A tokenizer with a text for every id; it has only what adapters call."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Sequence[str]:
        return [f"t{i}" for i in ids]


def make_adapter(
    folder: Path, indices: Sequence[int] | Mapping[str, Sequence[int]], *, seed: int = 1, scale: float = 1.0
) -> Adapter:
    """Make an adapter of trainable tokens with random rows for a checkpoint."""
    config = es.TrainableTokensConfig(indices)  # type: ignore[arg-type]
    adapter = TrainableTokens().start(config, ShardStore.open(folder), Base("org/base", None, StubTokenizer()))
    stream = np.random.default_rng(seed)
    raw = {
        name: RawArray.of((stream.standard_normal(value.shape) * scale).astype(np.float32)).to(value.dtype)
        for name, value in adapter.raw.items()
    }
    return replace(adapter, raw=raw)


def replace_values(adapter: Adapter, **changes: float) -> Adapter:
    """Replace single values of an adapter: ``row5=nan`` sets the first value of row 5 of every table."""
    raw = {}
    for record in adapter.manifest.tables:
        values = adapter.raw[record.name].float32().copy()
        for name, value in changes.items():
            index = int(name.removeprefix("row"))
            if index in record.indices:
                values[record.indices.index(index), 0] = value
        raw[record.name] = RawArray.of(values)
    return replace(adapter, raw={**adapter.raw, **raw})
