"""Tiny transformers models of the families that soft prompts are tested on, every parameter random, biases included."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

V, D, PAD = 60, 16, 0
CAUSAL = ("llama", "gpt2", "opt", "gemma3", "qwen2")
EACH_CAUSAL = ("llama", "gpt2", "gemma3", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("opt", "qwen2")))
"""All of them, for parametrizing; those that are built like another are left to the sweep."""
ENCODERS = ("bert-cls", "bert-mlm", "roberta-tok", "bert-qa", "bert")
TWO = ("t5", "bart")
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""Name of the cache among arguments and outputs in this version of transformers."""


def cache_in(output: Any) -> Any:
    """Return the cache among a model's outputs."""
    return getattr(output, CACHE)


def _config(name: str, **more: Any) -> Any:
    import transformers as tr

    ids = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return getattr(tr, name)(**ids, **sizes, **more)


def _make(kind: str) -> Any:
    import transformers as tr

    ids = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        return tr.LlamaForCausalLM(_config("LlamaConfig", num_key_value_heads=1, max_position_embeddings=64))
    if kind == "llama-cls":
        return tr.LlamaForSequenceClassification(_config("LlamaConfig", max_position_embeddings=64, num_labels=3))
    if kind == "gpt2":
        return tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=D, n_layer=2, n_head=2, n_positions=64, **ids))
    if kind == "gpt2-cls":
        config = tr.GPT2Config(n_embd=D, n_layer=2, n_head=2, n_positions=64, num_labels=3, **ids)
        return tr.GPT2ForSequenceClassification(config)
    if kind == "opt":
        return tr.OPTForCausalLM(
            tr.OPTConfig(
                hidden_size=D,
                ffn_dim=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=D,
                **ids,
            )
        )
    if kind == "gemma3":
        return tr.Gemma3ForCausalLM(
            _config(
                "Gemma3TextConfig",
                head_dim=8,
                num_key_value_heads=1,
                sliding_window=6,
                layer_types=["sliding_attention", "full_attention"],
                max_position_embeddings=64,
            )
        )
    if kind == "qwen2":
        return tr.Qwen2ForCausalLM(_config("Qwen2Config", num_key_value_heads=1, max_position_embeddings=64))
    if kind == "bert-cls":
        return tr.BertForSequenceClassification(_config("BertConfig", max_position_embeddings=64, num_labels=3))
    if kind == "bert-mlm":
        return tr.BertForMaskedLM(_config("BertConfig", max_position_embeddings=64))
    if kind == "bert-qa":
        return tr.BertForQuestionAnswering(_config("BertConfig", max_position_embeddings=64))
    if kind == "bert":
        return tr.BertModel(_config("BertConfig", max_position_embeddings=64))
    if kind == "roberta-tok":
        config = _config("RobertaConfig", max_position_embeddings=64, num_labels=5, type_vocab_size=2)
        return tr.RobertaForTokenClassification(config)
    if kind == "t5":
        return tr.T5ForConditionalGeneration(
            tr.T5Config(d_model=D, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=PAD, **ids)
        )
    if kind == "t5-encoder":
        return tr.T5EncoderModel(tr.T5Config(d_model=D, d_ff=24, d_kv=8, num_layers=2, num_heads=2, **ids))
    if kind == "bart":
        return tr.BartForConditionalGeneration(
            tr.BartConfig(
                d_model=D,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                max_position_embeddings=64,
                decoder_start_token_id=2,
                scale_embedding=True,
                forced_eos_token_id=None,
                **ids,
            )
        )
    assert kind == "whisper"
    return tr.WhisperForConditionalGeneration(
        tr.WhisperConfig(
            d_model=D,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=4,
            max_source_positions=6,
            max_target_positions=64,
            decoder_start_token_id=3,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **ids,
        )
    )


def tiny(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a model of a kind, in evaluation mode."""
    model = _make(kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.8 * ("norm.weight" in name))
    return model.to(dtype).eval()


def rows(*lengths: int, seed: int = 5) -> list[torch.Tensor]:
    """Return samples of the given lengths, without special ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, V, (length,), generator=generator) for length in lengths]


def padded(samples: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of samples, padded on one side, and its mask."""
    longest = max(map(len, samples))
    ids = torch.full((len(samples), longest), PAD)
    mask = torch.zeros_like(ids)
    for number, sample in enumerate(samples):
        where = slice(longest - len(sample), None) if side == "left" else slice(len(sample))
        ids[number, where], mask[number, where] = sample, 1
    return ids, mask


def unpadded(batch: torch.Tensor, samples: list[torch.Tensor], side: str) -> list[torch.Tensor]:
    """Return the entries of each sample's own tokens, from a tensor with one entry per token of a padded batch."""
    pairs = zip(batch, samples, strict=True)
    return [row[len(row) - len(s) :] if side == "left" else row[: len(s)] for row, s in pairs]
