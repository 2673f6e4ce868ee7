"""Synthetic Llama checkpoints for the benchmark on disk: one with real bytes, and one of any size that is all holes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from embedsurgery.files.safetensors import TensorSource, encode_header, write_file

ROWS = 128_000
SPARE = 16
"""Rows without a token."""

SHARD = 900_000_000
BLOCK = 1 << 24
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """How wide and deep a model is.

    Attributes:
        width: Of the hidden states.
        inner: Of the MLP.
        layers: How many.
        shard: Bytes of a shard, about.
    """

    width: int
    inner: int
    layers: int
    shard: int = SHARD

    @classmethod
    def of(cls, size: int) -> Size:
        """A model of about so many bytes, in bf16; a wide one where that is many, in about 60 shards."""
        width, inner, shard = (2048, 8192, SHARD) if size < 20e9 else (8192, 28672, size // 58)
        layer = 2 * (4 * width * width + 3 * width * inner)
        return cls(width, inner, max(1, round((size - 4 * ROWS * width) / layer)), shard)

    def tensors(self) -> Shapes:
        """Every tensor of the model, in the order of a checkpoint."""
        found: Shapes = {TABLE: (ROWS, self.width), HEAD: (ROWS, self.width), "model.norm.weight": (self.width,)}
        square = (self.width, self.width)
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            found |= {f"{layer}.self_attn.{name}_proj.weight": square for name in "qkvo"}
            found |= {f"{layer}.mlp.{name}_proj.weight": (self.inner, self.width) for name in ("gate", "up")}
            found[f"{layer}.mlp.down_proj.weight"] = (self.width, self.inner)
            found |= {f"{layer}.{name}_layernorm.weight": (self.width,) for name in ("input", "post_attention")}
        return found

    def shards(self) -> dict[str, Shapes]:
        """The files, each with its tensors."""
        parts: list[Shapes] = [{}]
        for name, shape in self.tensors().items():
            if parts[-1] and sum(map(prod, parts[-1].values())) * 2 + prod(shape) * 2 > self.shard:
                parts.append({})
            parts[-1][name] = shape
        return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}

    def config(self) -> dict[str, object]:
        """``config.json``."""
        heads = self.width // 128
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": ROWS,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": 128,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def make(folder: Path, size: Size, *, sparse: bool = False, text: int = 8) -> Path:
    """Write a checkpoint.

    Args:
        folder: A directory that is not there yet.
        size: Of the model.
        sparse: Headers and holes, which take no space.
        text: Characters of a token, which make the size of ``tokenizer.json``.
    """
    folder.mkdir()
    where = {}
    for file, tensors in size.shards().items():
        where.update(dict.fromkeys(tensors, file))
        if sparse:
            with open(folder / file, "xb") as out:
                header = encode_header({name: ("BF16", shape) for name, shape in tensors.items()}, {"format": "pt"})
                out.write(header)
                out.truncate(len(header) + sum(map(prod, tensors.values())) * 2)
        else:
            sources = {n: TensorSource("BF16", shape, _noise(prod(shape) * 2)) for n, shape in tensors.items()}
            write_file(folder / file, sources, {"format": "pt"})
    total = 2 * sum(map(prod, size.tensors().values()))
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    _write(folder / "config.json", size.config())
    write_tokenizer(folder / "tokenizer.json", ROWS - SPARE, text)
    return folder


def write_tokenizer(path: Path, count: int, text: int) -> None:
    """A tokenizer of so many tokens of so many characters."""
    vocabulary = {f"t{n}".ljust(text, "x"): n for n in range(count)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": next(iter(vocabulary))}
    _write(path, {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model})


@cache
def _block() -> bytes:
    """Random numbers in bf16."""
    values = np.random.default_rng(0).standard_normal(BLOCK // 2).astype(np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _noise(size: int) -> Iterator[bytes]:
    """Bytes that are finite bf16 numbers: a block of random ones, again and again."""
    for start in range(0, size, BLOCK):
        yield _block()[: min(BLOCK, size - start)]


def _write(path: Path, body: object) -> None:
    path.write_text(json.dumps(body) + "\n")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
