"""A small language model in plain torch, in memory and as a checkpoint, and ways to compare bits and files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

ROWS, WIDTH = 24, 8
INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""Names of `TinyModel`'s tables, in memory and on disk."""

TOKEN_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}
"""Files beside the weights that may change when tokens are added."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TinyModel(nn.Module):
    """A lookup, a layer that mixes each token with those before it, and a projection, all random.

    Args:
        tied: Whether lookup and projection share their weight.
        dtype: As safetensors writes it, such as "F32".
        seed: Another seed gives another base.
    """

    def __init__(self, *, tied: bool = True, dtype: str = "F32", seed: int = 0) -> None:
        super().__init__()
        self.tied = tied
        self.config = SimpleNamespace(**model_config(tied=tied))
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(ROWS, WIDTH)
        self.model.mix = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.to(DTYPES[dtype])

    def get_input_embeddings(self) -> nn.Module:
        """As in transformers."""
        lookup: nn.Module = self.model.get_submodule("embed_tokens")
        return lookup

    def get_output_embeddings(self) -> nn.Module:
        """As in transformers."""
        return self.lm_head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return logits (B, T, V) for ids int64 (B, T)."""
        states = self.get_input_embeddings()(input_ids)
        count = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)
        mixed = torch.tanh(self.model.get_submodule("mix")(states.cumsum(1) / count[:, None]))
        logits: torch.Tensor = self.lm_head(mixed)
        return logits


def model_config(*, tied: bool) -> dict[str, Any]:
    """Return `TinyModel`'s config, in memory and on disk."""
    return {"architectures": ["LlamaForCausalLM"], "vocab_size": ROWS, "tie_word_embeddings": tied}


def every_token() -> torch.Tensor:
    """Return a batch with each of `TinyModel`'s tokens, some of them twice: int64 (2, T)."""
    ids = torch.arange(ROWS)
    return torch.cat([ids, ids[:4]]).reshape(2, -1)


def write_checkpoint(model: TinyModel, folder: Path, *, shards: bool = False) -> Path:
    """Write the model as a checkpoint: safetensors in one file or two shards, a config, a tokenizer, and a README.

    Returns:
        The directory.
    """
    folder.mkdir(parents=True)
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if model.tied:
        del tensors[OUTPUT]
    (folder / "config.json").write_text(json.dumps(model_config(tied=model.tied), indent=2))
    (folder / "README.md").write_bytes(b"kept byte for byte\r\n")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    if not shards:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    halves = [{n: t for n, t in tensors.items() if (n == INPUT) == first} for first in (True, False)]
    files = {f"model-0000{n}-of-00002.safetensors": half for n, half in enumerate(halves, 1)}
    for file, half in files.items():
        save_file(half, folder / file, {"format": "pt"})
    body = {"metadata": {}, "weight_map": {name: file for file, half in files.items() for name in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(body))
    return folder


def tokenizer_json(words: int = ROWS) -> dict[str, Any]:
    """Return the ``tokenizer.json`` of a tokenizer of whole words, ``t0`` and so on, for `TinyModel`."""
    vocabulary = {f"t{number}": number for number in range(words)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }


def live_tokenizer(text: str | None = None) -> Any:
    """Return the transformers tokenizer of `tokenizer_json`, or of the text of another ``tokenizer.json``."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(text or json.dumps(tokenizer_json()))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def texts_of(ids: torch.Tensor) -> list[str]:
    """Return the texts of a batch of `TinyModel`'s ids, int64 (B, T)."""
    return [" ".join(f"t{index}" for index in row) for row in ids.tolist()]


def shared_memory(model: nn.Module) -> list[list[str]]:
    """Group the names of a model's parameters by the memory that they share."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.data_ptr(), []).append(name)
    return sorted(groups.values())


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's elements as bytes, in logical order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def state_bits(model: nn.Module) -> dict[str, bytes]:
    """Return name -> bytes of every tensor in a model's state dict."""
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return relative path -> bytes of every file below a directory."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
