"""Small models and their tokenizers for tests that add, train and merge new tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tr

import embedsurgery as es
from tests.support import tokenizers

WIDTH = 16

NEW = ["<tool>", "<answer>"]

MODELS = {
    "llama-tied": "llama-2",
    "llama-untied": "llama-3",
    "gpt2": "gpt2",
    "bert": "word-piece",
    "t5": "t5",
    "gemma3": "llama-2",
    "qwen2-vl": "llama-3",
    "whisper": "gpt2",
    "mpt": "llama-3",
    "mobilebert": "word-piece",
}
"""Model -> its kind of tokenizer, in ``tokenizers.KINDS``."""


def build(kind: str, rows: int) -> Any:
    """Build a small transformers model with ``rows`` rows and random parameters, biases included."""
    text = {
        "vocab_size": rows,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    encoder = {k: v for k, v in text.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind.startswith("llama"):
        model: Any = tr.LlamaForCausalLM(tr.LlamaConfig(tie_word_embeddings=kind == "llama-tied", **text))
    elif kind == "gpt2":
        config: Any = tr.GPT2Config(
            vocab_size=rows,
            n_embd=WIDTH,
            n_layer=1,
            n_head=2,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = tr.GPT2LMHeadModel(config)
    elif kind == "bert":
        model = tr.BertForMaskedLM(tr.BertConfig(**encoder))
    elif kind == "mobilebert":
        config = tr.MobileBertConfig(**encoder, embedding_size=8, intra_bottleneck_size=8)
        model = tr.MobileBertForMaskedLM(config)
    elif kind == "t5":
        config = tr.T5Config(
            vocab_size=rows,
            d_model=WIDTH,
            d_ff=24,
            d_kv=8,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            **special,
        )
        model = tr.T5ForConditionalGeneration(config)
    elif kind == "whisper":
        config = tr.WhisperConfig(
            vocab_size=rows,
            d_model=WIDTH,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=64,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **special,
        )
        model = tr.WhisperForConditionalGeneration(config)
    elif kind == "mpt":
        config = tr.MptConfig(d_model=WIDTH, n_heads=2, n_layers=1, expansion_ratio=2, max_seq_len=64, vocab_size=rows)
        model = tr.MptForCausalLM(config)
    elif kind == "gemma3":
        vision = {
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        config = tr.Gemma3Config(
            text_config={**text, "head_dim": 8, "sliding_window": 16},
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=5,
            boi_token_index=6,
            eoi_token_index=7,
        )
        model = tr.Gemma3ForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        vision = {"depth": 1, "embed_dim": WIDTH, "num_heads": 2, "hidden_size": WIDTH, "patch_size": 14}
        config = tr.Qwen2VLConfig(
            text_config={**text, "rope_parameters": rope, "tie_word_embeddings": True},
            vision_config=vision,
            image_token_id=5,
            video_token_id=6,
            vision_start_token_id=7,
            vision_end_token_id=8,
            tie_word_embeddings=True,
        )
        model = tr.Qwen2VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def forward(model: Any, ids: torch.Tensor) -> Any:
    if isinstance(model, tr.WhisperForConditionalGeneration):
        return model(
            input_features=torch.linspace(-1, 1, ids.shape[0] * 8 * 16).reshape(-1, 8, 16), decoder_input_ids=ids
        )
    more = {"decoder_input_ids": ids.flip(0)} if hasattr(model.config, "d_kv") else {}
    return model(input_ids=ids, **more)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, ids).logits


@dataclass
class Start:
    """A model and its tokenizer, in memory and on disk, before tokens are added."""

    model: Any
    tokenizer: Any
    folder: Path
    used: int

    def fresh(self) -> Start:
        """Load both from disk."""
        model = type(self.model).from_pretrained(self.folder).eval()
        return Start(model, tr.AutoTokenizer.from_pretrained(self.folder), self.folder, self.used)

    def text(self) -> dict[str, Any]:
        """Return the tokenizer's content without truncation and padding, which each encoding sets."""
        body: dict[str, Any] = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return {key: value for key, value in body.items() if key not in ("truncation", "padding")}


def start(kind: str, tmp_path: Path, spare: int = 0, *, shards: bool = False) -> Start:
    tokenizer = tokenizers.KINDS[MODELS[kind]].build()
    used = max(tokenizer.get_vocab().values()) + 1
    model = build(kind, used + spare)
    folder = tmp_path / "base"
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
    tokenizer.save_pretrained(folder)
    return Start(model, tr.AutoTokenizer.from_pretrained(folder), folder, used)


def batch(ids: Any) -> torch.Tensor:
    """Return token ids that include the new ones."""
    return torch.tensor([[9, 10, ids[0], 11, 12], [13, ids[-1], 14, 15, ids[0]]])


def trained(begun: Start, ids: Any, **options: Any) -> tuple[es.Adapter, torch.Tensor]:
    """Train an adapter for two steps of AdamW, and return it with the logits of the model."""
    attachment = es.attach(begun.model, es.TrainableTokensConfig(ids, **options), tokenizer=begun.tokenizer)
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=0.1)
    for _ in range(2):
        loss = forward(begun.model, batch(ids)).logits[..., list(ids)].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter, found = attachment.adapter(), logits(begun.model, batch(ids))
    attachment.detach()
    return adapter, found


def check_encodes(tokenizer: Any, ids: Any, texts: list[str] = NEW) -> None:
    for text, index in zip(texts, ids, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == [index]
        assert index in tokenizer.encode(f"the {text} and", add_special_tokens=False)
