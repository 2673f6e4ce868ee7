"""Tiny real models and their checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter

VOCABULARY, WIDTH = 40, 16


KINDS = ("llama-tied", "llama-untied", "gpt2", "t5", "bert")


INPUT = {
    "llama-tied": "model.embed_tokens.weight",
    "llama-untied": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "t5": "shared.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
}
"""Name of each kind's input table, in memory and on disk."""


def tiny(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A small transformers model with every parameter random, biases included."""
    import transformers as tr

    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind.startswith("llama"):
        config = tr.LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=kind == "llama-tied",
            **common,
        )
        model = tr.LlamaForCausalLM(config)
    elif kind == "gpt2":
        model = tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32, **common))
    elif kind == "t5":
        config = tr.T5Config(
            d_model=WIDTH, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0, **common
        )
        model = tr.T5ForConditionalGeneration(config)
    else:
        config = tr.BertConfig(
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            **common,
        )
        model = tr.BertForMaskedLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).eval()


def logits(model: Any) -> torch.Tensor:
    """The model's logits on one fixed batch that holds every token."""
    ids = torch.arange(VOCABULARY).reshape(2, VOCABULARY // 2)
    more = {"decoder_input_ids": ids.flip(0)} if hasattr(getattr(model, "config", None), "d_kv") else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def trained(model: Any, indices: Any, *, seed: int = 1, **options: Any) -> Adapter:
    """An adapter whose rows are random; the model is as it was before."""
    attachment = es.attach(model, es.TrainableTokensConfig(token_indices=indices, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapter = attachment.adapter()
    attachment.detach()
    return adapter


def write_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    """A tokenizer.json with ``size`` tokens."""
    body = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(size)}, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(body))


def save(model: Any, folder: Path, *, shards: bool = False) -> Path:
    """A checkpoint as save_pretrained writes it, with neighbours whose times and modes are their own."""
    model.save_pretrained(folder, **({"max_shard_size": "3KB"} if shards else {}))
    assert (folder / "model.safetensors.index.json").exists() == shards
    write_tokenizer(folder)
    (folder / "README.md").write_bytes("kept byte for byte: \u00e9\r\n".encode())
    (folder / "run.sh").write_text("#!/bin/sh\n")
    os.chmod(folder / "run.sh", 0o751)
    (folder / "sub" / "deeper").mkdir(parents=True)
    (folder / "sub" / "deeper" / "empty").write_bytes(b"")
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, ns=(10**18 + number, 10**18 + 7 * number))
    return folder
