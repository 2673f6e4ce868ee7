"""Attaches learned embeddings to a CLIP text model, or bakes them into the text encoders of a pipeline's directory.

A pipeline keeps an encoder and its tokenizer in two directories, ``text_encoder`` and ``tokenizer`` (and, for SDXL,
``text_encoder_2`` and ``tokenizer_2``). They are copied into one directory, edited as one checkpoint, and copied back.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embedsurgery as es
from embedsurgery.errors import CheckpointError, ConfigError, OutputExistsError, warn
from embedsurgery.files.atomic import staged_directory
from embedsurgery_textual_inversion.files import LearnedEmbedding, read_embedding

PARTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3"))
"""Directories of an encoder and its tokenizer in a pipeline."""

_SLOW = ("vocab.json", "merges.txt")
_ADDED, _TOKENIZER, _CONFIG = "added_tokens.json", "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class BakeReport:
    """What was baked into a pipeline.

    Attributes:
        output: The new directory.
        tokens: Encoder's directory -> token -> its id there.
    """

    output: str
    tokens: Mapping[str, Mapping[str, int]]


def attach_embedding(model: Any, tokenizer: Any, path: str | Path, token: str | None = None) -> tuple[Any, Any]:
    """Add a learned embedding's tokens to a CLIP text model and attach their rows, to use or train them.

    Args:
        model: A text model such as transformers' ``CLIPTextModel``, without an attachment.
        tokenizer: Its tokenizer, to add the tokens to.
        path: A file of learned embeddings.
        token: The token to use in prompts, instead of the one that the file gives.

    Returns:
        The attachment, and what `embedsurgery.add_tokens` returned: after ``detach()`` its ``undo()`` removes the
        tokens.

    Raises:
        AdapterError: The file cannot be read, or is a pickle.
        ConfigError: The embedding has another width, or the tokenizer has a token of this name.
    """
    embedding = read_embedding(path, token)
    _refuse_known(embedding, set(tokenizer.get_vocab()), "tokenizer")
    _warn_pooling(getattr(getattr(model, "config", None), "eos_token_id", None), type(model).__name__)
    ids = es.add_tokens(model, tokenizer, embedding.tokens, init=_inits(embedding, Path(path)))
    attachment = es.attach(model, es.TrainableTokensConfig(token_indices=ids), tokenizer=tokenizer)
    return attachment, ids


def bake(
    pipeline: str | Path, embeddings: Sequence[str | Path], output: str | Path, *, token: str | None = None
) -> BakeReport:
    """Write a copy of a pipeline with learned embeddings in its text encoders and tokenizers.

    All other files are copied byte for byte.

    Args:
        pipeline: A directory with ``text_encoder`` and ``tokenizer``.
        embeddings: Files of learned embeddings.
        output: A directory that does not exist yet.
        token: The token to use in prompts; only for a single embedding.

    Raises:
        AdapterError: A file cannot be read, or is a pickle.
        ConfigError: A token exists already, or a file fits none of the pipeline's encoders.
        CheckpointError: The directory is not such a pipeline, or an encoder has weights of several variants.
        OutputExistsError: The output exists already.
    """
    source, target = Path(pipeline), Path(output)
    if not embeddings:
        raise ConfigError("no learned embeddings", where="embeddings", expected="at least one file")
    if token is not None and len(embeddings) != 1:
        raise ConfigError("one token for several embeddings", where="token", expected="one file", found=len(embeddings))
    read = [(read_embedding(path, token), Path(path)) for path in embeddings]
    parts = [(e, t) for e, t in PARTS if (source / e).is_dir() and (source / t).is_dir()]
    if not parts:
        raise CheckpointError(
            "the directory has no text encoder with its tokenizer",
            where=source,
            expected="text_encoder and tokenizer",
            hint="name the pipeline's directory",
        )
    if target.exists():
        raise OutputExistsError("the output exists already", where=target, hint="name a new directory")
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError("the output is inside the pipeline", where=target, hint="name a directory beside it")
    tokens_of: dict[str, dict[str, int]] = {}
    with staged_directory(target) as staging:
        shutil.copytree(source, staging, symlinks=False, dirs_exist_ok=True)
        tables = {encoder: es.walk(source / encoder).main_input() for encoder, _ in parts}
        for encoder, tokenizer in parts:
            table = tables[encoder]
            fits = [(one, path) for one, path in read if one.of_width(table.shape[1]) is not None]
            if fits:
                tokens_of[encoder] = _bake_encoder(staging / encoder, staging / tokenizer, fits)
        for one, path in read:
            if not any(one.token in tokens for tokens in tokens_of.values()):
                widths = ", ".join(f"{key} {list(raw.shape)}" for key, raw in one.vectors.items())
                raise ConfigError(
                    "a learned embedding fits none of the text encoders",
                    where=path,
                    found=widths,
                    hint="use a file that was learned for this pipeline's model",
                )
        for one, path in read:
            _warn_unmatched(one, path, widths=[table.shape[1] for table in tables.values()])
    return BakeReport(str(target), tokens_of)


def _bake_encoder(encoder: Path, tokenizer: Path, fits: list[tuple[LearnedEmbedding, Path]]) -> dict[str, int]:
    """Change one encoder and its tokenizer in place; returns token -> id."""
    weights = [path.name for path in encoder.glob("*.safetensors")]
    if not (encoder / "model.safetensors.index.json").exists() and len(weights) > 1:
        raise CheckpointError(
            "the encoder has weights of several variants",
            where=encoder,
            expected="one variant",
            found=", ".join(sorted(weights)),
            hint="remove those that are not used",
        )
    config = json.loads((encoder / "config.json").read_text())
    _warn_pooling(config.get("eos_token_id"), str(encoder.name))
    names = [name for one, _ in fits for name in one.tokens]
    inits = {name: init for one, path in fits for name, init in _inits(one, path).items()}
    with tempfile.TemporaryDirectory(dir=encoder.parent, prefix=".embedsurgery-") as folder:
        both = Path(folder, "both")
        shutil.copytree(encoder, both)
        fast = (tokenizer / _TOKENIZER).exists()
        for path in _tokenizer_files(tokenizer, Path(folder, "fast"), fast=fast):
            if (both / path.name).exists():
                raise CheckpointError("encoder and tokenizer have a file of the same name", where=path)
            shutil.copyfile(path, both / path.name)
        for one, _ in fits:
            _refuse_known(one, set(_vocabulary(both / _TOKENIZER)), str(tokenizer.name))
        report = es.add_tokens_checkpoint(both, names, Path(folder, "out"), init=inits)
        out = Path(folder, "out")
        for path in [p for p in encoder.iterdir() if p.is_file() and (out / p.name).exists()]:
            _copy_if_changed(out / path.name, path)
        if fast:
            for path in [p for p in tokenizer.iterdir() if p.is_file() and (out / p.name).exists()]:
                _copy_if_changed(out / path.name, path)
        else:
            _add_to_slow_tokenizer(tokenizer, {name: report.tokens[name] for name in names})
    return dict(report.tokens)


def _tokenizer_files(tokenizer: Path, folder: Path, *, fast: bool) -> list[Path]:
    """Return a tokenizer's files. A slow one is converted by transformers, only to plan the ids of the new tokens."""
    if fast:
        return [path for path in tokenizer.iterdir() if path.is_file()]
    if not all((tokenizer / name).exists() for name in _SLOW):
        raise CheckpointError(
            "unknown kind of tokenizer", where=tokenizer, expected=f"{_TOKENIZER}, or {' and '.join(_SLOW)}"
        )
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return [path for path in folder.iterdir() if path.is_file()]


def _vocabulary(path: Path) -> list[str]:
    body = json.loads(path.read_text(encoding="utf-8"))
    return [*body["model"]["vocab"], *(token["content"] for token in body["added_tokens"])]


def _add_to_slow_tokenizer(tokenizer: Path, ids: Mapping[str, int]) -> None:
    """Add tokens to a tokenizer without ``tokenizer.json``, in both files from which transformers reads them."""
    path = tokenizer / _ADDED
    added = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**added, **ids}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    config = json.loads((tokenizer / _CONFIG).read_text(encoding="utf-8")) if (tokenizer / _CONFIG).exists() else {}
    if "added_tokens_decoder" in config:  # then transformers ignores added_tokens.json
        plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
        config["added_tokens_decoder"].update({str(i): {"content": name, **plain} for name, i in ids.items()})
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (tokenizer / _CONFIG).write_text(text, encoding="utf-8")


def _copy_if_changed(new: Path, old: Path) -> None:
    if new.read_bytes() != old.read_bytes():
        shutil.copyfile(new, old)


def _inits(embedding: LearnedEmbedding, path: Path) -> dict[str, str]:
    return {name: f"textual-inversion:{path}#{number}" for number, name in enumerate(embedding.tokens)}


def _refuse_known(embedding: LearnedEmbedding, known: set[str], where: str) -> None:
    existing = [name for name in embedding.tokens if name in known]
    if existing:
        raise ConfigError(
            "the token exists already",
            where=where,
            found=", ".join(existing[:4]),
            hint="give another name with token=",
        )


def _warn_unmatched(embedding: LearnedEmbedding, path: Path, widths: list[int]) -> None:
    """Warn of vectors without an encoder of their width, and of encoders without vectors."""
    key_widths = {key: raw.shape[1] for key, raw in embedding.vectors.items()}
    unused = [key for key, width in key_widths.items() if width not in widths]
    without = [width for width in widths if width not in key_widths.values()]
    if unused:
        message = f"{path}: no text encoder of this pipeline has the width of {', '.join(unused)}: left out"
        warn(message, plugin=__file__)
    if without:
        message = f"{path}: no vectors for the text encoder of width {', '.join(map(str, without))}, "
        message += f"which tokenises {embedding.token!r} as ordinary text"
        warn(message, plugin=__file__)


def _warn_pooling(eos: object, where: str) -> None:
    """Warn of CLIP configs with ``eos_token_id`` 2: their pooled output is taken at the highest id, a new token."""
    if eos == 2:
        warn(
            f"{where}: with eos_token_id 2, CLIP takes its pooled output at the highest token id, a new token; "
            "if the pooled output is used, set eos_token_id to the tokenizer's end-of-text id",
            plugin=__file__,
        )
