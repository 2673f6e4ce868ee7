"""Tiny models with real tokenizers and a soft prompt, for tests of baking."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tr

import embedsurgery as es
from tests.support import tokenizers

N = 5
TEXTS = ("hello world", "the quick brown fox answers", "a tool")
TOKENIZER = {
    "llama-tied": "llama-3",
    "llama-untied": "llama-2",
    "gpt2": "gpt2",
    "gemma3": "llama-2",
    "opt": "gpt2",
    "qwen2": "qwen2",
    "bert-cls": "word-piece",
    "bert-mlm": "word-piece",
    "t5": "t5",
    "bart": "roberta",
}
"""Kind of model -> kind of tokenizer."""

CAUSAL = ("llama-tied", "llama-untied", "gpt2", "gemma3", "opt", "qwen2")
SEQ2SEQ = ("t5", "bart")


def roberta() -> Any:
    """A tokenizer as of RoBERTa and BART: byte-level, with a RoBERTa post-processor."""
    model = json.loads(tokenizers.byte_level(0).to_str())["model"]
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    vocab = special | {text: index + 5 for text, index in model["vocab"].items()}
    return tr.RobertaTokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])


def qwen2() -> Any:
    """A tokenizer as of Qwen2: byte-level, without BOS."""
    model = json.loads(tokenizers.byte_level(0).to_str())["model"]
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    return tr.Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])


def with_bos(tokenizer: Any) -> Any:
    """Make a tokenizer add its BOS before every text."""
    from tokenizers import processors

    bos = tokenizer.bos_token
    inner = tokenizer.backend_tokenizer
    begin = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer


def tokenizer_of(kind: str) -> Any:
    """The tokenizer of a kind of model. If it has a BOS, it adds it."""
    name = TOKENIZER[kind]
    own = {"roberta": roberta, "qwen2": qwen2}
    made = own[name]() if name in own else tokenizers.KINDS[name].build()
    return with_bos(made) if name == "llama-3" else made


def model_of(kind: str, rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model with ``rows`` rows and random parameters, biases included."""
    ids = {"vocab_size": rows, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    model = seq2seq_model(kind, ids) if kind in SEQ2SEQ else plain_model(kind, ids)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.7 * ("norm" in name))
    return model.to(dtype).eval()


def plain_model(kind: str, ids: dict[str, Any]) -> Any:
    """A decoder or an encoder, two layers of width 16."""
    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 160}
    sizes = {"intermediate_size": 24, **layers}
    if kind.startswith("llama"):
        return tr.LlamaForCausalLM(tr.LlamaConfig(tie_word_embeddings=kind == "llama-tied", **ids, **sizes))
    if kind == "gpt2":
        return tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=160, **ids))
    if kind == "gemma3":
        attention = {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 32, "query_pre_attn_scalar": 8}
        return tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**attention, **ids, **sizes))
    if kind == "opt":
        return tr.OPTForCausalLM(tr.OPTConfig(ffn_dim=24, word_embed_proj_dim=8, **ids, **layers))
    if kind == "qwen2":
        return tr.Qwen2ForCausalLM(tr.Qwen2Config(num_key_value_heads=1, tie_word_embeddings=True, **ids, **sizes))
    config = tr.BertConfig(**{k: v for k, v in ids.items() if k != "bos_token_id"}, **sizes, num_labels=3)
    return (tr.BertForSequenceClassification if kind == "bert-cls" else tr.BertForMaskedLM)(config)


def seq2seq_model(kind: str, ids: dict[str, Any]) -> Any:
    """An encoder and a decoder, two layers of width 16 each."""
    if kind == "t5":
        config = tr.T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0, **ids)
        return tr.T5ForConditionalGeneration(config)
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    decoder = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "decoder_start_token_id": 2}
    others = {"max_position_embeddings": 160, "scale_embedding": True, "forced_eos_token_id": None}
    return tr.BartForConditionalGeneration(tr.BartConfig(d_model=16, **encoder, **decoder, **others, **ids))


@dataclass
class Start:
    """A base on disk and a soft prompt for it.

    Attributes:
        kind: Kind of model.
        folder: The base.
        adapter: The soft prompt.
        rows: Number of rows of the base's table.
    """

    kind: str
    folder: Path
    adapter: es.Adapter
    rows: int

    def model(self, folder: Path | None = None, **options: Any) -> Any:
        """Load the base, or another checkpoint, with transformers."""
        kinds = {"bert-cls": tr.AutoModelForSequenceClassification, "bert-mlm": tr.AutoModelForMaskedLM}
        auto = tr.AutoModelForSeq2SeqLM if self.kind in SEQ2SEQ else kinds.get(self.kind, tr.AutoModelForCausalLM)
        return auto.from_pretrained(folder or self.folder, **options).eval()

    def tokenizer(self, folder: Path | None = None) -> Any:
        """Load the tokenizer of the base, or of another checkpoint."""
        return tr.AutoTokenizer.from_pretrained(folder or self.folder)

    def attached(self, adapter: es.Adapter | None = None) -> Any:
        """Load the base and attach the prompt."""
        model = self.model()
        es.attach(model, adapter or self.adapter)
        return model


def start(
    kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, spare: int = 0, shards: bool = False
) -> Start:
    """Write a base, and make a random prompt for it."""
    tokenizer = tokenizer_of(kind)
    rows = max(tokenizer.get_vocab().values()) + 1 + spare
    model = model_of(kind, rows, dtype)
    model.save_pretrained(folder / "base", **({"max_shard_size": "20KB"} if shards else {}))
    tokenizer.save_pretrained(folder / "base")
    return Start(kind, folder / "base", random_prompt(model), rows)


def random_prompt(model: Any, count: int = N, seed: int = 1, **options: Any) -> es.Adapter:
    """A prompt of random virtual tokens, with twice the standard deviation of the model's embeddings."""
    attachment = es.attach(model, es.SoftPromptConfig(count, **options))
    lookup = model.get_input_embeddings()
    size = lookup(torch.arange(8)).detach().float().std()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 * size)
    adapter = attachment.adapter()
    attachment.detach()
    return adapter


def last_logits(model: Any, kind: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the next token; for "bert-cls", of the classes."""
    with torch.no_grad():
        if kind in SEQ2SEQ:
            return model(input_ids=ids, decoder_input_ids=torch.tensor([[0, 7, 8]])).logits[0, -1]
        logits = model(input_ids=ids).logits
    return logits[0] if kind == "bert-cls" else logits[0, -1]


def greedy(model: Any, ids: torch.Tensor, count: int = 12, **options: Any) -> list[int]:
    """The ids that greedy decoding adds to a text."""
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            **options,
        )
    return out[0].tolist() if model.config.is_encoder_decoder else out[0, ids.shape[1] :].tolist()
