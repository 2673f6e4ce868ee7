"""Write a Llama checkpoint as a GGUF file, as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers as tr
from safetensors.torch import load_file

_NORMAL, _CONTROL, _PLAIN_ADDED, _UNUSED = 1, 3, 4, 5
"""Token types of GGUF."""


def write_gguf(folder: Path, path: Path) -> None:
    """Write a `LlamaForCausalLM` checkpoint with a byte-level tokenizer as fp32 GGUF.

    Args:
        folder: The checkpoint, with one safetensors file.
        path: The new file.
    """
    import gguf

    config: Any = tr.AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF interleaves the two halves of each head's rows
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(values.shape).contiguous()
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Add texts and types of all rows, merges, special tokens and the chat template. GGUF has no post-processor."""
    tokenizer: Any = tr.AutoTokenizer.from_pretrained(folder)
    body = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token for token in body["added_tokens"]}
    texts = {index: text for text, index in body["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    types = {index: _CONTROL if token["special"] else _PLAIN_ADDED for index, token in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([types.get(index, _NORMAL if index in texts else _UNUSED) for index in range(rows)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in body["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
