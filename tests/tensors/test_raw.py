"""Raw arrays, and rounding that equals torch's bit for bit."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedsurgery.tensors.convert import DTYPES, from_raw, to_raw
from embedsurgery.tensors.raw import EDITABLE, ITEMSIZE, RawArray, round_float32
from tests.support.comparing import bits
from tests.support.processes import python

HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def raw(values: torch.Tensor) -> RawArray:
    return to_raw(values)


def is_number(tensor: torch.Tensor) -> torch.Tensor:
    return ~tensor.isnan()


@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_of_16_bits_survives_fp32(dtype: str) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    values = patterns.view(HALVES[dtype])
    wide = raw(values).float32()
    numbers = is_number(values).numpy()
    assert wide[numbers].tobytes() == bits(values.float()[is_number(values)])
    assert np.isnan(wide[~numbers]).all()
    back = round_float32(wide, dtype)
    assert back[numbers].tobytes() == bits(values[is_number(values)])
    assert raw(values).to("F32").to(dtype).dtype == dtype
    assert np.isnan(RawArray.of(wide).to(dtype).float32()[~numbers]).all()


def samples() -> torch.Tensor:
    """4 million fp32 patterns: all exponents with random mantissas, and every tie and its two neighbours."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (3_000_000,), generator=generator).to(torch.int32)
    upper = torch.arange(65536, dtype=torch.int64) << 16
    bf16_ties = torch.cat([upper | low for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF, 0)])
    half = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    half = half[is_number(half) & half.isfinite()].double()
    middle = ((half.sort().values[1:] + half.sort().values[:-1]) / 2).float().view(torch.int32).to(torch.int64)
    f16_ties = torch.cat([middle + step for step in (-1, 0, 1)])
    edges = torch.tensor(
        [
            65504.0,
            65519.996,
            65520.0,
            65536.0,
            3.4e38,
            -3.4e38,
            0.0,
            -0.0,
            float("inf"),
            -float("inf"),
            5.960464e-08,
            2.980232e-08,
            2.9802326e-08,
            1e-45,
        ]
    )
    edges = edges.view(torch.int32).to(torch.int64)
    return torch.cat([anything.to(torch.int64), bf16_ties, f16_ties, edges]).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_round_as_torch_rounds_them(dtype: str) -> None:
    values = samples()
    values = values[is_number(values)]
    assert len(values) > 3_000_000
    expected = values.to(HALVES[dtype])
    found = torch.from_numpy(round_float32(values.numpy(), dtype).view(np.int16)).view(HALVES[dtype])
    wrong = (found.view(torch.int16) != expected.view(torch.int16)).nonzero().flatten()
    assert len(wrong) == 0, values[wrong[:4]]
    assert RawArray.of(values.numpy(), dtype).data == bits(expected)


_SCALAR_NAN = """
import numpy as np, torch
from embedsurgery.tensors.raw import round_float32
generator = torch.Generator().manual_seed(1)
payload = torch.randint(1, 2**23, (200_000,), generator=generator)
payload[:23] = 1 << torch.arange(23)
sign = torch.randint(0, 2, (200_000,), generator=generator) << 31
nan = (sign | 0x7F800000 | payload).to(torch.int32).view(torch.float32)
assert nan.isnan().all()
for name, kind in (("F16", torch.float16), ("BF16", torch.bfloat16)):
    found = round_float32(nan.numpy(), name).view(np.int16)
    expected = nan.to(kind).view(torch.int16).numpy()
    wrong = expected[found != expected].tolist()
    print(name, len(wrong), sorted({hex(v & 0xFFFF) for v in wrong})[:4])
"""


def test_nan_rounds_as_in_torchs_scalar_code() -> None:
    run = python(_SCALAR_NAN, env={**os.environ, "ATEN_CPU_CAPABILITY": "default"})
    assert run.stderr == ""
    assert run.stdout.split("\n")[:2] == ["F16 0 []", "BF16 0 []"]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_nan_stays_nan(dtype: str) -> None:
    patterns = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000, 0x7FBFFFFF])
    assert np.isnan(RawArray.of(patterns.view(np.float32), dtype).float32()).all()


@pytest.mark.parametrize("target", EDITABLE)
@pytest.mark.parametrize("source", EDITABLE)
def test_every_dtype_to_every_other(source: str, target: str) -> None:
    """fp64 goes through fp32, as it does in torch."""
    generator = torch.Generator().manual_seed(3)
    size = 10.0 ** torch.randint(-12, 12, (5000,), generator=generator, dtype=torch.float64)
    values = (torch.randn(5000, generator=generator, dtype=torch.float64) * size).to(DTYPES[source])
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    assert raw(values).to(target).data == bits(values.to(DTYPES[target]))


@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=False)))
def test_any_numbers(values: np.ndarray) -> None:
    for name, dtype in HALVES.items():
        assert RawArray.of(values, name).data == bits(torch.from_numpy(values).to(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (0, 4), (2, 1, 2)])
@pytest.mark.parametrize("dtype", sorted(set(DTYPES) & set(ITEMSIZE)))
def test_tensors_to_bytes_and_back(dtype: str, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel() * ITEMSIZE[dtype]
    if dtype == "BOOL":
        data = bytes(i % 2 for i in range(count))
    else:
        data = bytes((i * 37 + 11) % 256 for i in range(count))
    tensor = from_raw(RawArray(dtype, shape, data))
    assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[dtype], shape)
    assert to_raw(tensor) == RawArray(dtype, shape, data)


def test_from_raw_gives_memory_of_its_own() -> None:
    array = RawArray.of(np.zeros((2, 3), np.float32))
    from_raw(array).add_(1)
    assert array.data == bytes(24)
    with pytest.raises(ValueError, match="read-only"):
        array.bits[0, 0] = 1


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_to_raw_reads_in_logical_order(layout: str) -> None:
    table = torch.arange(24.0).reshape(4, 6)
    view = {"transposed": table.t(), "strided": table[::2, 1::3], "expanded": table[:1].expand(4, 6)}[layout]
    assert to_raw(view).data == view.numpy().tobytes()


def test_to_raw_of_an_empty_tensor() -> None:
    assert to_raw(torch.from_numpy(np.zeros(0, np.float32)).half()) == RawArray("F16", (0,), b"")
    assert to_raw(torch.zeros(1).expand(0)).data == b""


def test_rows_are_taken_in_order() -> None:
    array = RawArray.of(np.arange(12, dtype=np.float32).reshape(4, 3))
    assert array.take([2, 0]).data == np.float32([6, 7, 8, 0, 1, 2]).tobytes()
    assert array.take([]).shape == (0, 3)
    assert array.take(np.array([3])).shape == (1, 3)


def test_bad_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"24\b.*\b23"):
        RawArray("F32", (2, 3), bytes(23))
    with pytest.raises(TypeError, match="complex128"):
        RawArray.of(np.zeros(3, np.complex128))
    with pytest.raises(TypeError, match="I64"):
        RawArray.of(np.zeros(3, np.float32), "I64")


def test_the_hash_is_of_the_bytes() -> None:
    import hashlib

    assert RawArray.of(np.float32([1, 2])).sha256() == hashlib.sha256(np.float32([1, 2]).tobytes()).hexdigest()
