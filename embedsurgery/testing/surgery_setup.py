"""What the contract of a surgery is made of: what a subclass says and may change, and how models get merged.

The tests are ``surgeries.py``'s.
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
    """A model with an adapter baked in.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer, which knows the adapter's tokens; None where the surgery makes none.
        undo: What takes the adapter out of both.
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

    # -- what a subclass may change ------------------------------------------------------------------------------

    def make_config(self, model: TinyModel) -> Any:
        """The config for a model."""
        return self.config

    def make_model(self, *, tied: bool, dtype: str = "F32", seed: int = 0) -> Any:
        """A base; another seed is another base."""
        return TinyModel(tied=tied, dtype=dtype, seed=seed)

    def write(self, model: Any, folder: Path, *, shards: bool = False) -> Path:
        """The base as a checkpoint directory."""
        return write_checkpoint(model, folder, shards=shards)

    def ask(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """What the model gives for a batch of ids (B, T): logits (B, T, V)."""
        logits: torch.Tensor = model(ids)
        return logits

    def logits(self, model: Any) -> torch.Tensor:
        """What the model gives for a batch that holds every token."""
        return self.ask(model, every_token())

    def change(self, attachment: Any) -> None:
        """Give every trainable tensor values that it did not start with."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in attachment.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    # -- what the tests are made of ------------------------------------------------------------------------------

    def trained(self, model: Any) -> Adapter:
        """An adapter that changes the model; the model is as it was before."""
        attachment = es.attach(model, self.make_config(model))
        self.change(attachment)
        adapter = attachment.adapter()
        attachment.detach()
        return adapter

    def makes_tokens(self) -> bool:
        """Whether the surgery becomes tokens when it is baked in."""
        config = self.make_config(self.make_model(tied=self.ties[0]))
        return registry().for_config(config).surgery.makes_tokens

    def merge(self, model: Any, adapter: Adapter) -> Merged:
        """Bake the adapter into the model itself."""
        tokenizer = live_tokenizer() if self.makes_tokens() else None
        return Merged(model, tokenizer, es.merge(model, adapter, tokenizer, bake=self.bake))

    def merged(self, model: Any, adapter: Adapter) -> Merged:
        """A copy of the model with the adapter baked in."""
        return self.merge(copy.deepcopy(model), adapter)

    def merged_logits(self, merged: Merged) -> torch.Tensor:
        """What a merged model gives for the batch of `logits`, from its texts alone where the surgery makes tokens."""
        if merged.tokenizer is None:
            return self.logits(merged.model)
        batch = every_token()
        ids = torch.tensor(merged.tokenizer(texts_of(batch))["input_ids"])
        new = ids.shape[1] - batch.shape[1]
        assert new > 0, "the tokenizer puts no token before a text"
        assert torch.equal(ids[:, new:], batch)
        return self.ask(merged.model, ids)[:, new:, :ROWS]

    def in_a_cache(self, adapter: Adapter, tmp_path: Path) -> Path:
        """A snapshot of an adapter, as the Hub's cache has one."""
        adapter.save(tmp_path / "adapter")
        blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123abc"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for path, data in contents(tmp_path / "adapter").items():
            blob = blobs / hashlib.sha256(data).hexdigest()
            blob.write_bytes(data)
            (snapshot / path).symlink_to(Path("..", "..", "blobs", blob.name))
        return snapshot
