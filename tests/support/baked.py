"""Tiny models with real tokenizers and a soft prompt, for what is baked: made once for each kind."""

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
"""Kind of model -> of tokenizer."""

CAUSAL = ("llama-tied", "llama-untied", "gpt2", "gemma3", "opt", "qwen2")
SEQ2SEQ = ("t5", "bart")


def roberta() -> Any:
    """As RoBERTa and BART have it: byte-level, with a post-processor of its own kind."""
    model = json.loads(tokenizers.byte_level(0).to_str())["model"]
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    vocab = special | {text: index + 5 for text, index in model["vocab"].items()}
    return tr.RobertaTokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])


def qwen2() -> Any:
    """As Qwen2 has it: byte-level, without a BOS."""
    model = json.loads(tokenizers.byte_level(0).to_str())["model"]
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    return tr.Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that puts its BOS before every text."""
    from tokenizers import processors

    bos = tokenizer.bos_token
    inner = tokenizer.backend_tokenizer
    begin = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer


def tokenizer_of(kind: str) -> Any:
    """The tokenizer of a kind of model; those that have a BOS write it."""
    name = TOKENIZER[kind]
    own = {"roberta": roberta, "qwen2": qwen2}
    made = own[name]() if name in own else tokenizers.KINDS[name].build()
    return with_bos(made) if name == "llama-3" else made


def model_of(kind: str, rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model with so many rows, every parameter random, biases included."""
    ids = {"vocab_size": rows, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 160,
    }
    if kind.startswith("llama"):
        tied = kind == "llama-tied"
        model: Any = tr.LlamaForCausalLM(tr.LlamaConfig(tie_word_embeddings=tied, **ids, **sizes))
    elif kind == "gpt2":
        model = tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=160, **ids))
    elif kind == "gemma3":
        model = tr.Gemma3ForCausalLM(
            tr.Gemma3TextConfig(
                head_dim=8, num_key_value_heads=1, sliding_window=32, query_pre_attn_scalar=8, **ids, **sizes
            )
        )
    elif kind == "opt":
        model = tr.OPTForCausalLM(
            tr.OPTConfig(
                hidden_size=16,
                ffn_dim=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=160,
                word_embed_proj_dim=8,
                **ids,
            )
        )
    elif kind == "qwen2":
        model = tr.Qwen2ForCausalLM(tr.Qwen2Config(num_key_value_heads=1, tie_word_embeddings=True, **ids, **sizes))
    elif kind.startswith("bert"):
        config = tr.BertConfig(**{k: v for k, v in ids.items() if k != "bos_token_id"}, **sizes, num_labels=3)
        model = (tr.BertForSequenceClassification if kind == "bert-cls" else tr.BertForMaskedLM)(config)
    elif kind == "t5":
        config = tr.T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0, **ids)
        model = tr.T5ForConditionalGeneration(config)
    else:
        config = tr.BartConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=160,
            decoder_start_token_id=2,
            scale_embedding=True,
            forced_eos_token_id=None,
            **ids,
        )
        model = tr.BartForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.7 * ("norm" in name))
    return model.to(dtype).eval()


@dataclass
class Start:
    """A base on disk, and a soft prompt for it.

    Attributes:
        kind: Of model.
        folder: The base.
        adapter: The soft prompt.
        rows: Of the base's table.
    """

    kind: str
    folder: Path
    adapter: es.Adapter
    rows: int

    def model(self, folder: Path | None = None, **options: Any) -> Any:
        """The base, or another checkpoint, as transformers loads it."""
        kinds = {"bert-cls": tr.AutoModelForSequenceClassification, "bert-mlm": tr.AutoModelForMaskedLM}
        auto = tr.AutoModelForSeq2SeqLM if self.kind in SEQ2SEQ else kinds.get(self.kind, tr.AutoModelForCausalLM)
        return auto.from_pretrained(folder or self.folder, **options).eval()

    def tokenizer(self, folder: Path | None = None) -> Any:
        """The base's tokenizer, or another checkpoint's."""
        return tr.AutoTokenizer.from_pretrained(folder or self.folder)

    def attached(self, adapter: es.Adapter | None = None) -> Any:
        """The base with the prompt attached."""
        model = self.model()
        es.attach(model, adapter or self.adapter)
        return model


def start(
    kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, spare: int = 0, shards: bool = False
) -> Start:
    """A base in a directory, with a random prompt."""
    tokenizer = tokenizer_of(kind)
    rows = max(tokenizer.get_vocab().values()) + 1 + spare
    model = model_of(kind, rows, dtype)
    model.save_pretrained(folder / "base", **({"max_shard_size": "20KB"} if shards else {}))
    tokenizer.save_pretrained(folder / "base")
    return Start(kind, folder / "base", random_prompt(model), rows)


def random_prompt(model: Any, count: int = N, seed: int = 1, **options: Any) -> es.Adapter:
    """A prompt of random virtual tokens, as long as the model's embeddings."""
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
    """Logits of the next token; of the class, or of every token of the text."""
    with torch.no_grad():
        if kind in SEQ2SEQ:
            return model(input_ids=ids, decoder_input_ids=torch.tensor([[0, 7, 8]])).logits[0, -1]
        logits = model(input_ids=ids).logits
    return logits[0] if kind == "bert-cls" else logits[0, -1]


def greedy(model: Any, ids: torch.Tensor, count: int = 12, **options: Any) -> list[int]:
    """What greedy decoding adds to a text."""
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
