"""The settings of a surgery's contract that a subclass can change, and the helpers of its tests.

The tests are in ``surgeries.py``.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.plan import Undo
from embedsurgery.plugins.current import registry
from embedsurgery.testing.base import Contract
from embedsurgery.testing.models import (
    ROWS,
    TinyModel,
    contents,
    every_token,
    live_tokenizer,
    texts_of,
    write_checkpoint,
)


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer with the adapter's tokens; None if the surgery makes no tokens.
        undo: The undo of the merge.
    """

    model: Any
    tokenizer: Any
    undo: Undo


class SurgerySetup(Contract):
    """The settings of a surgery's contract: see `SurgeryContract`."""

    config: Any
    dtypes: ClassVar[tuple[str, ...]] = ("F32", "BF16", "F16", "F64")
    ties: ClassVar[tuple[bool, ...]] = (True, False)
    starts_as_base = True
    keeps_ties = True
    bake: Any = None
    parameters: ClassVar[dict[str, str]] = {"dtype": "dtypes", "tied": "ties"}

    # -- to override in a subclass -------------------------------------------------------------------------------

    def make_config(self, model: TinyModel) -> Any:
        """Return the config for a model."""
        return self.config

    def make_model(self, *, tied: bool, dtype: str = "F32", seed: int = 0) -> Any:
        """Return a base; another seed gives another base."""
        return TinyModel(tied=tied, dtype=dtype, seed=seed)

    def write(self, model: Any, folder: Path, *, shards: bool = False) -> Path:
        """Write a base as a checkpoint; returns its directory."""
        return write_checkpoint(model, folder, shards=shards)

    def run(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Run a model on ids int64 (B, T); returns logits (B, T, V)."""
        logits: torch.Tensor = model(ids)
        return logits

    def logits(self, model: Any) -> torch.Tensor:
        """Run a model on a batch that contains every token."""
        return self.run(model, every_token())

    def randomize(self, attachment: Any) -> None:
        """Set every trainable tensor to random values."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in attachment.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    # -- helpers of the tests ------------------------------------------------------------------------------------

    def make_adapter(self, model: Any) -> Adapter:
        """Return an adapter with random values for a model, which is left unchanged."""
        attachment = es.attach(model, self.make_config(model))
        self.randomize(attachment)
        adapter = attachment.adapter()
        attachment.detach()
        return adapter

    def makes_tokens(self) -> bool:
        """Whether a merge makes the surgery into tokens."""
        config = self.make_config(self.make_model(tied=self.ties[0]))
        return registry().for_config(config).surgery.makes_tokens

    def merge(self, model: Any, adapter: Adapter) -> Merged:
        """Merge an adapter into a model, in place."""
        tokenizer = live_tokenizer() if self.makes_tokens() else None
        return Merged(model, tokenizer, es.merge(model, adapter, tokenizer, bake=self.bake))

    def merge_copy(self, model: Any, adapter: Adapter) -> Merged:
        """Merge an adapter into a copy of a model."""
        return self.merge(copy.deepcopy(model), adapter)

    def merged_logits(self, merged: Merged) -> torch.Tensor:
        """Run a merged model on the batch of `logits`; on its texts, if the surgery makes tokens."""
        if merged.tokenizer is None:
            return self.logits(merged.model)
        batch = every_token()
        ids = torch.tensor(merged.tokenizer(texts_of(batch))["input_ids"])
        new = ids.shape[1] - batch.shape[1]
        assert new > 0, "the tokenizer puts no tokens before a text"
        assert torch.equal(ids[:, new:], batch)
        return self.run(merged.model, ids)[:, new:, :ROWS]

    def save_as_cached(self, adapter: Adapter, tmp_path: Path) -> Path:
        """Save an adapter in the layout of the Hub cache; returns its directory."""
        adapter.save(tmp_path / "adapter")
        blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123abc"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for path, data in contents(tmp_path / "adapter").items():
            blob = blobs / hashlib.sha256(data).hexdigest()
            blob.write_bytes(data)
            (snapshot / path).symlink_to(Path("..", "..", "blobs", blob.name))
        return snapshot
