"""Arrays as raw bytes with a dtype string, and the one function that rounds numbers.

Surgery on disk uses these and needs no torch; ``convert.py`` converts them from and to torch tensors. Dtype strings are
those of safetensors: "F32", "F16", "BF16", "I64" ...

numpy is imported inside the functions that look at numbers, not at the top: undoing a merge on disk only moves bytes,
and importing numpy would take longer than all the rest of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from struct import pack, unpack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ITEMSIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "C64": 8,
}
"""Bytes per element, for every safetensors dtype of whole bytes."""

EDITABLE = ("F64", "F32", "F16", "BF16")
"""Dtypes whose rows can be set. Others are refused: they are mostly quantised tables."""

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "|u1"}


@dataclass(frozen=True)
class RawArray:
    """A dense array in C order.

    Attributes:
        dtype: A safetensors dtype string.
        shape: The shape.
        data: The elements, little-endian.

    Raises:
        ValueError: ``data`` is not as long as the dtype and shape require.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __repr__(self) -> str:
        return f"RawArray({self.dtype}, {list(self.shape)})"

    def __post_init__(self) -> None:
        size = prod(self.shape) * ITEMSIZE[self.dtype]
        if len(self.data) != size:
            raise ValueError(f"{self.dtype} of shape {self.shape} has {size} bytes, not {len(self.data)}")

    @classmethod
    def of(cls, array: npt.ArrayLike, dtype: str | None = None) -> RawArray:
        """Convert a float or integer numpy array, rounded to ``dtype`` if given.

        Raises:
            TypeError: The array has another dtype, or cannot be rounded to ``dtype``.
        """
        import numpy as np

        values = np.asarray(array)
        native = next((name for name, kind in _NUMPY.items() if name != "BF16" and values.dtype == kind), None)
        if native is None:
            raise TypeError(f"no raw dtype for {values.dtype}")
        raw = cls(native, tuple(values.shape), np.ascontiguousarray(values).tobytes())
        return raw if dtype is None else raw.to(dtype)

    @classmethod
    def of_integers(cls, values: Sequence[int], *columns: int) -> RawArray:
        """Convert integers to I64 of shape (N,) or, with ``columns``, (N / columns, columns)."""
        return cls("I64", (len(values) // prod(columns), *columns), pack(f"<{len(values)}q", *values))

    def integers(self) -> tuple[int, ...]:
        """Return the values of an I64 array, in order."""
        return unpack(f"<{len(self.data) // 8}q", self.data)

    @property
    def bits(self) -> npt.NDArray[np.generic]:
        """The stored array, read-only. BF16 is uint16, because numpy has no bfloat16."""
        import numpy as np

        return np.frombuffer(self.data, dtype=_NUMPY[self.dtype]).reshape(self.shape)

    def float32(self) -> npt.NDArray[np.float32]:
        """Convert the values to fp32, of the same shape. Exact for F32, F16 and BF16."""
        import numpy as np

        if self.dtype == "BF16":
            return (self.bits.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return self.bits.astype(np.float32)

    def to(self, dtype: str) -> RawArray:
        """Convert to another float dtype as torch does: round to nearest, ties to even; see `round_float32`.

        Raises:
            TypeError: ``dtype`` is not a float dtype of `EDITABLE`.
        """
        if dtype == self.dtype:
            return self
        if dtype == "F64":
            import numpy as np

            with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
                wide = self.float32().astype(np.float64)
            return RawArray("F64", self.shape, wide.tobytes())
        return RawArray(dtype, self.shape, round_float32(self.float32(), dtype).tobytes())

    def take(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> RawArray:
        """Return rows, selected along the first axis, in the given order."""
        import numpy as np

        part = np.ascontiguousarray(self.bits[np.asarray(positions, dtype=np.int64)])
        return RawArray(self.dtype, tuple(part.shape), part.tobytes())

    def sha256(self) -> str:
        """Return the sha256 of the bytes, in hex. Dtype and shape are not included."""
        return hashlib.sha256(self.data).hexdigest()


def round_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """Round fp32 to F32, F16 or BF16: to nearest, ties to even. Overflow gives infinity, NaN stays NaN.

    For numbers and infinities the result equals ``torch.Tensor.to`` bit for bit. A NaN in F16 keeps its sign and the
    top of its payload, as in torch. In BF16 it becomes the quiet NaN 0x7FC0, as in torch's scalar code
    (c10/util/BFloat16.h); torch's vectorised code gives 0xFFFF, so its own result depends on the processor.

    Returns:
        The stored values, of the same shape; BF16 as uint16.

    Raises:
        TypeError: ``dtype`` is another.
    """
    import numpy as np

    if dtype == "F32":
        return np.ascontiguousarray(values)
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            half = values.astype(np.float16)
        # numpy and torch give NaN different payloads, so torch's is computed from the bits.
        nan = np.isnan(values)
        if nan.any():
            bits = np.ascontiguousarray(values).view(np.uint32)
            kept = ((bits >> 16) & 0x8000 | 0x7E00 | (bits >> 13) & 0x3FF).astype(np.uint16)
            half = np.where(nan, kept.view(np.float16), half)
        return np.ascontiguousarray(half)
    if dtype == "BF16":
        # Adding 0x7FFF, or 0x8000 if the lowest kept bit is odd, carries into the upper half exactly when it rounds up.
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.ascontiguousarray(np.where(np.isnan(values), np.uint16(0x7FC0), rounded))
    raise TypeError(f"cannot round to {dtype}, only to F32, F16 and BF16")
