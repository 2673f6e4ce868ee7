"""Rows to write into stores, and comparison of tensors bit for bit."""

from __future__ import annotations

import torch

from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import bits
from tests.support.homes import D


def new_rows(count: int, width: int = D, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return random rows: some values overflow fp16, some are its subnormals, some are halfway between two bf16."""
    generator = torch.Generator().manual_seed(9)
    size = 10.0 ** torch.randint(-9, 7, (count, width), generator=generator)
    rows = torch.randn((count, width), generator=generator) * size
    rows.view(torch.int32)[:1] = (rows.view(torch.int32)[:1] & ~0xFFFF) | 0x8000
    return rows.to(dtype)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors have the same bytes."""
    assert found.keys() == expected.keys()
    different = [name for name in found if bits(found[name]) != bits(expected[name])]
    assert not different


def raw(*shape: int, dtype: str = "F32") -> RawArray:
    """Return an array of zeros."""
    return RawArray(dtype, shape, bytes(torch.Size(shape).numel() * {"F32": 4, "I64": 8, "I8": 1}[dtype]))
