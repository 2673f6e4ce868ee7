"""Writes a checkpoint of the format of ``npy_store.py``, without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from embedsurgery.testing.models import INPUT


def write(folder: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Path:
    folder.mkdir(exist_ok=True)
    rows = tensors[INPUT].shape[0]
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": rows, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tensors.json").write_text(json.dumps(list(tensors)))
    for name, value in tensors.items():
        np.save(folder / f"{name}.npy", value.detach().numpy())
    return folder
