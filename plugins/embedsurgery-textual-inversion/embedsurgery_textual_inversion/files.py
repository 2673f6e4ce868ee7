"""Reads files of learned embeddings, and names their tokens. Pickles are refused, because they can run code.

There are three kinds of safetensors files: diffusers' ``learned_embeds.safetensors``, {token: (D,) or (n, D)}; those of
AUTOMATIC1111's web UI, {"emb_params": (n, D)}, whose token is the file's name; and SDXL's for two encoders,
{"clip_l": (n, 768), "clip_g": (n, 1280)}. Several vectors are several tokens, ``name``, ``name_1`` and so on, as
diffusers names them (``loaders/textual_inversion.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedsurgery.errors import AdapterError, CheckpointError
from embedsurgery.files.regular import open_regular
from embedsurgery.files.safetensors import read_header, read_tensor
from embedsurgery.tensors.raw import EDITABLE, RawArray

NAME = "learned_embeds.safetensors"
_PICKLES = (".pt", ".bin", ".pth", ".ckpt", ".pkl")
_ENCODERS = ("clip_l", "clip_g")


@dataclass(frozen=True)
class LearnedEmbedding:
    """A learned embedding.

    Attributes:
        token: Its token in prompts.
        vectors: Key in the file -> vectors (n, D); one entry, or one for each text encoder.
    """

    token: str
    vectors: Mapping[str, RawArray]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of its vectors, in order."""
        count = next(iter(self.vectors.values())).shape[0]
        return (self.token, *(f"{self.token}_{number}" for number in range(1, count)))

    def of_width(self, width: int) -> RawArray | None:
        """Return the vectors (n, D) for an encoder of width D; None if there are none."""
        return next((raw for raw in self.vectors.values() if raw.shape[1] == width), None)


def read_embedding(path: str | Path, token: str | None = None) -> LearnedEmbedding:
    """Read a file, or the file `NAME` in a directory.

    Args:
        path: The file or directory.
        token: The token to use in prompts, instead of the one that the file gives.

    Raises:
        AdapterError: The file is missing, broken, a pickle, or not a learned embedding.
    """
    file = Path(path)
    if file.is_dir():
        if not (file / NAME).exists() and any(p.suffix in _PICKLES for p in file.iterdir()):
            raise _pickle_error(file)
        file = file / NAME
    if file.suffix.lower() in _PICKLES:
        raise _pickle_error(file)
    try:
        header = read_header(file)
        with open_regular(file) as descriptor:
            tensors = {name: read_tensor(descriptor, entry) for name, entry in header.entries.items()}
    except (CheckpointError, OSError) as error:
        raise AdapterError(
            "cannot read a learned embedding", where=file, found=str(error), expected="a safetensors file"
        ) from error
    if tensors.keys() == set(_ENCODERS):
        name = file.stem
    elif len(tensors) == 1:
        only = next(iter(tensors))
        name = file.stem if only in ("emb_params", *_ENCODERS) else only
    else:
        raise AdapterError(
            "not a learned embedding",
            where=file,
            found=", ".join(list(tensors)[:6]),
            expected="one tensor, or clip_l and clip_g",
        )
    vectors = {key: _to_matrix(raw, key, file) for key, raw in tensors.items()}
    if len({raw.shape[0] for raw in vectors.values()}) != 1:
        raise AdapterError(
            "the encoders have different numbers of vectors",
            where=file,
            found=", ".join(f"{key} {list(raw.shape)}" for key, raw in vectors.items()),
        )
    name = name if token is None else token
    if not name.strip():
        raise AdapterError("the embedding's token is empty", where=file, hint="give a token")
    return LearnedEmbedding(name, vectors)


def _to_matrix(raw: RawArray, key: str, file: Path) -> RawArray:
    shape = (1, *raw.shape) if len(raw.shape) == 1 else raw.shape
    if len(shape) != 2 or 0 in shape or raw.dtype not in EDITABLE:
        raise AdapterError(
            "not a tensor of vectors", where=f"{file}: {key}", expected="(n, D) floats", found=f"{raw!r}"
        )
    matrix = RawArray(raw.dtype, shape, raw.data)
    if not np.isfinite(matrix.float32()).all():
        raise AdapterError(
            "the learned embedding contains NaN or infinity", where=f"{file}: {key}", hint="train it again"
        )
    return matrix


def _pickle_error(file: Path) -> AdapterError:
    return AdapterError(
        "the file is a pickle, which can run code when it is loaded",
        where=file,
        expected="a safetensors file",
        hint="ask its author for a safetensors file, or convert it in a sandbox: "
        "safetensors.torch.save_file({'emb_params': torch.load(FILE, weights_only=True)['string_to_param']['*']}, ...)",
    )


def expand_prompt(prompt: str, embedding: LearnedEmbedding) -> str:
    """Replace an embedding's token in a prompt by all its tokens: "name name_1 name_2".

    In diffusers, ``maybe_convert_prompt`` does this automatically.
    """
    pattern = rf"(?<![\w]){re.escape(embedding.token)}(?![\w])"
    return re.sub(pattern, lambda match: " ".join(embedding.tokens), prompt)
