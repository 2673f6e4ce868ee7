"""Converts torch tensors to raw arrays (``raw.py``) and back. Memory and ties are in ``memory.py``."""

from __future__ import annotations

import numpy as np
import torch

from embedsurgery.tensors.raw import RawArray
from embedsurgery.tensors.sharded import gather

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
_STRINGS = {dtype: name for name, dtype in DTYPES.items()}


def dtype_string(tensor: torch.Tensor) -> str:
    """Return the safetensors string of a tensor's dtype, or torch's name if safetensors has no such dtype."""
    return _STRINGS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def to_raw(tensor: torch.Tensor) -> RawArray:
    """Copy a tensor's values to raw bytes, from any device and layout.

    A sharded tensor is gathered, so every rank must call this together.
    """
    tensor = gather(tensor)
    if tensor.numel() == 0:
        return RawArray(dtype_string(tensor), tuple(tensor.shape), b"")
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return RawArray(dtype_string(tensor), tuple(tensor.shape), flat.numpy().tobytes())


def from_raw(raw: RawArray) -> torch.Tensor:
    """Create a tensor on the CPU with a copy of the raw values."""
    if not raw.data:
        return torch.empty(raw.shape, dtype=DTYPES[raw.dtype])
    flat = torch.from_numpy(np.frombuffer(raw.data, dtype=np.uint8).copy())
    return flat.view(DTYPES[raw.dtype]).reshape(raw.shape)
