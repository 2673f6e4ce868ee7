"""Learned embeddings on a CLIP text model in memory, and baked into the text encoders of a pipeline's directory.

A pipeline keeps an encoder and its tokenizer in two directories, ``text_encoder`` and ``tokenizer`` (and, for SDXL,
``text_encoder_2`` and ``tokenizer_2``). They are put together, edited as one checkpoint, and taken apart again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embedsurgery as es
from embedsurgery.errors import CheckpointError, ConfigError, EmbedSurgeryWarning, OutputExistsError
from embedsurgery.files.atomic import staged_directory
from embedsurgery_textual_inversion.files import LearnedEmbedding, read_embedding

PARTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3"))
"""Where pipelines keep an encoder and its tokenizer."""

_SLOW = ("vocab.json", "merges.txt")
_ADDED, _TOKENIZER, _CONFIG = "added_tokens.json", "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Baked:
    """What was baked into a pipeline.

    Attributes:
        output: The new directory.
        tokens: Encoder's directory -> token -> its id there.
    """

    output: str
    tokens: Mapping[str, Mapping[str, int]]


def attach_embedding(model: Any, tokenizer: Any, path: str | Path, token: str | None = None) -> tuple[Any, Any]:
    """Give a CLIP text model a learned embedding's tokens, live and trainable.

    Args:
        model: Such as transformers' ``CLIPTextModel``, without an attachment.
        tokenizer: Its tokenizer, which gets the tokens.
        path: A file of learned embeddings.
        token: What stands for it in prompts, in the place of what the file says.

    Returns:
        The attachment, and what `embedsurgery.add_tokens` returned: after ``detach()`` its ``undo()`` takes the tokens
        out again.

    Raises:
        AdapterError: The file cannot be read, or is a pickle.
        ConfigError: It is of another width, or a token of this name exists.
    """
    embedding = read_embedding(path, token)
    _refuse_known(embedding, set(tokenizer.get_vocab()), "tokenizer")
    _warn_of_pooling(getattr(getattr(model, "config", None), "eos_token_id", None), type(model).__name__)
    ids = es.add_tokens(model, tokenizer, embedding.tokens, init=_inits(embedding, Path(path)))
    attachment = es.attach(model, es.TrainableTokensConfig(token_indices=ids), tokenizer=tokenizer)
    return attachment, ids


def bake(
    pipeline: str | Path, embeddings: Sequence[str | Path], output: str | Path, *, token: str | None = None
) -> Baked:
    """Write a new pipeline directory whose text encoders and tokenizers know learned embeddings.

    Everything else of the pipeline is copied byte for byte.

    Args:
        pipeline: A directory with ``text_encoder`` and ``tokenizer``.
        embeddings: Files of learned embeddings.
        output: A directory that does not exist yet.
        token: What stands for the one embedding in prompts.

    Raises:
        AdapterError: A file cannot be read, or is a pickle.
        ConfigError: A token exists, or a file fits none of the pipeline's encoders.
        CheckpointError: The directory is no such pipeline, or weights of several variants lie in one encoder.
        OutputExistsError: The output exists.
    """
    source, target = Path(pipeline), Path(output)
    if not embeddings:
        raise ConfigError("no learned embedding is named", where=source, expected="one file at least")
    if token is not None and len(embeddings) != 1:
        raise ConfigError("one token for several embeddings", found=f"{len(embeddings)} files", expected="one")
    read = [(read_embedding(path, token), Path(path)) for path in embeddings]
    parts = [(e, t) for e, t in PARTS if (source / e).is_dir() and (source / t).is_dir()]
    if not parts:
        raise CheckpointError(
            "no text encoder with its tokenizer",
            where=source,
            expected="text_encoder and tokenizer",
            hint="name the pipeline's directory",
        )
    if target.exists():
        raise OutputExistsError("the output exists", where=target, hint="name a new directory")
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError("the output lies in the pipeline that is copied", where=target, hint="name one beside it")
    given: dict[str, dict[str, int]] = {}
    with staged_directory(target) as staging:
        shutil.copytree(source, staging, symlinks=False, dirs_exist_ok=True)
        tables = {encoder: es.walk(source / encoder).main_input() for encoder, _ in parts}
        for encoder, tokenizer in parts:
            table = tables[encoder]
            fits = [(one, path) for one, path in read if one.of_width(table.shape[1]) is not None]
            if fits:
                given[encoder] = _bake_one(staging / encoder, staging / tokenizer, fits)
        for one, path in read:
            if not any(one.token in tokens for tokens in given.values()):
                widths = ", ".join(f"{key} {list(raw.shape)}" for key, raw in one.vectors.items())
                raise ConfigError(
                    "a learned embedding fits none of the text encoders",
                    where=path,
                    found=widths,
                    hint="was it learned for this pipeline's model?",
                )
        for one, path in read:
            _say_what_is_left(one, path, widths=[table.shape[1] for table in tables.values()])
    return Baked(str(target), given)


def _bake_one(encoder: Path, tokenizer: Path, fits: list[tuple[LearnedEmbedding, Path]]) -> dict[str, int]:
    """Change one encoder and its tokenizer, which are copies, in place."""
    weights = [path.name for path in encoder.glob("*.safetensors")]
    if not (encoder / "model.safetensors.index.json").exists() and len(weights) > 1:
        raise CheckpointError(
            "weights of several variants lie in one encoder",
            where=encoder,
            expected="one variant",
            found=", ".join(sorted(weights)),
            hint="remove those that are not used",
        )
    config = json.loads((encoder / "config.json").read_text())
    _warn_of_pooling(config.get("eos_token_id"), str(encoder.name))
    names = [name for one, _ in fits for name in one.tokens]
    inits = {name: init for one, path in fits for name, init in _inits(one, path).items()}
    with tempfile.TemporaryDirectory(dir=encoder.parent, prefix=".embedsurgery-") as folder:
        both = Path(folder, "both")
        shutil.copytree(encoder, both)
        fast = (tokenizer / _TOKENIZER).exists()
        for path in _files_of(tokenizer, Path(folder, "fast"), fast=fast):
            if (both / path.name).exists():
                raise CheckpointError("encoder and tokenizer have a file of one name", where=path)
            shutil.copyfile(path, both / path.name)
        for one, _ in fits:
            _refuse_known(one, set(_vocabulary(both / _TOKENIZER)), str(tokenizer.name))
        report = es.add_tokens_checkpoint(both, names, Path(folder, "out"), init=inits)
        out = Path(folder, "out")
        for path in [p for p in encoder.iterdir() if p.is_file() and (out / p.name).exists()]:
            _replace(out / path.name, path)
        if fast:
            for path in [p for p in tokenizer.iterdir() if p.is_file() and (out / p.name).exists()]:
                _replace(out / path.name, path)
        else:
            _add_slowly(tokenizer, {name: report.tokens[name] for name in names})
    return dict(report.tokens)


def _files_of(tokenizer: Path, folder: Path, *, fast: bool) -> list[Path]:
    """A tokenizer's files; of a slow one those that transformers makes of it, for planning alone."""
    if fast:
        return [path for path in tokenizer.iterdir() if path.is_file()]
    if not all((tokenizer / name).exists() for name in _SLOW):
        raise CheckpointError(
            "no tokenizer that is known here", where=tokenizer, expected=f"{_TOKENIZER}, or {' and '.join(_SLOW)}"
        )
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return [path for path in folder.iterdir() if path.is_file()]


def _vocabulary(path: Path) -> list[str]:
    body = json.loads(path.read_text(encoding="utf-8"))
    return [*body["model"]["vocab"], *(token["content"] for token in body["added_tokens"])]


def _add_slowly(tokenizer: Path, ids: Mapping[str, int]) -> None:
    """Add tokens to a tokenizer without ``tokenizer.json``: in both files that transformers reads them from."""
    path = tokenizer / _ADDED
    added = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**added, **ids}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    config = json.loads((tokenizer / _CONFIG).read_text(encoding="utf-8")) if (tokenizer / _CONFIG).exists() else {}
    if "added_tokens_decoder" in config:  # then nothing else is read
        plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
        config["added_tokens_decoder"].update({str(i): {"content": name, **plain} for name, i in ids.items()})
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (tokenizer / _CONFIG).write_text(text, encoding="utf-8")


def _replace(new: Path, old: Path) -> None:
    if new.read_bytes() != old.read_bytes():
        shutil.copyfile(new, old)


def _inits(embedding: LearnedEmbedding, path: Path) -> dict[str, str]:
    return {name: f"textual-inversion:{path}#{number}" for number, name in enumerate(embedding.tokens)}


def _refuse_known(embedding: LearnedEmbedding, known: set[str], where: str) -> None:
    twice = [name for name in embedding.tokens if name in known]
    if twice:
        raise ConfigError(
            "the tokenizer has this token already",
            where=where,
            found=", ".join(twice[:4]),
            hint="name another with token=",
        )


def _say_what_is_left(embedding: LearnedEmbedding, path: Path, widths: list[int]) -> None:
    """Vectors for a text encoder that the pipeline does not have, and encoders that get none."""
    held = {key: raw.shape[1] for key, raw in embedding.vectors.items()}
    unused = [key for key, width in held.items() if width not in widths]
    without = [width for width in widths if width not in held.values()]
    if unused:
        said = f"{path}: {', '.join(unused)} fits no text encoder of this pipeline, and is left"
        warnings.warn(said, EmbedSurgeryWarning, stacklevel=3)
    if without:
        said = f"{path}: holds nothing for the text encoder of width {', '.join(map(str, without))}, "
        said += f"which reads {embedding.token!r} as the words that it is spelled with"
        warnings.warn(said, EmbedSurgeryWarning, stacklevel=3)


def _warn_of_pooling(eos: object, where: str) -> None:
    """Old configs of CLIP say 2, and then the pooled output is taken where the highest id stands: at a new token."""
    if eos == 2:
        warnings.warn(
            f"{where}: eos_token_id is 2, so this CLIP takes its pooled output at the highest id, which new tokens "
            "have; set it to the tokenizer's end-of-text id where the pooled output is used",
            EmbedSurgeryWarning,
            stacklevel=3,
        )
