"""What is measured: the cases, by name, and an estimate of the memory that each needs. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

VARIANTS = ("base", "floor", "embedsurgery", "peft", "full")
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Case:
    """One model, one batch and one kind of work, done by every variant.

    Attributes:
        name: How ``--cases`` finds it.
        work: "train" (a training step), "lookup" (the embedding alone, forward and backward), "generate" (greedy
            tokens with a cache); "prompt" and "prompt-generate" are a step and a generation with a soft prompt.
        vocabulary: V.
        width: D.
        rows: K, the rows that are trained; of a soft prompt its virtual tokens.
        tied: Whether the head shares the embedding's memory.
        dtype: Of the model. Rows are fp32.
        batch: Samples, and tokens of each. Under "generate": samples, and new tokens.
        keep: Where positive, logits and loss only at the last ``keep`` positions of each sample.
        layers: Of the model.
        repeats: Measured steps of each variant.
        consecutive: Whether the K rows are the table's last ones, as new tokens are, or spread over it.
    """

    name: str
    work: str
    vocabulary: int
    width: int
    rows: int
    tied: bool = True
    dtype: str = "float32"
    batch: tuple[int, int] = (2, 128)
    keep: int = 0
    layers: int = 2
    repeats: int = 9
    consecutive: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        """Those that differ here: to generate with a full embedding, or at no cost, is to generate with the base."""
        return VARIANTS if self.work in ("train", "lookup") else ("base", "embedsurgery", "peft")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def estimate(self, variant: str) -> tuple[int, int]:
        """Bytes that a variant holds between steps, and what a step takes on top, with a margin."""
        size = BYTES[self.dtype]
        table = self.vocabulary * self.width * size
        layers = self.layers * self.width * self.width * 11 * size
        head = 0 if self.work == "lookup" else table  # what goes through the head, too
        resident = table * (1 if self.tied or self.work == "lookup" else 2) + layers + 400_000_000
        samples, length = self.batch
        tokens = samples * (self.keep or length) if self.work in ("train", "prompt") else samples
        step = 0 if self.work == "lookup" else tokens * self.vocabulary * (12 if size == 4 else 18)
        if self.work.startswith("prompt"):
            step += 0 if variant == "base" else step * self.rows // length
        elif variant in ("embedsurgery", "floor"):
            resident, step = resident + 12 * self.rows * self.width, step + 16 * self.rows * self.width
        elif variant == "peft":
            step += 2 * table + (2 * head if self.tied else 0)
        elif variant == "full":
            resident, step = resident + 2 * table, step + table + (head if self.tied else 0)
        return resident, step


def _train(width: int, rows: int, *, tied: bool = True, suffix: str = "", **more: Any) -> Case:
    name = f"train/d{width}-{'tied' if tied else 'untied'}-k{rows}{suffix}"
    return Case(name, "train", more.pop("vocabulary", 256_000), width, rows, tied, **more)


def main_cases() -> list[Case]:
    """Those of the README's table."""
    cases = [_train(1024, rows, tied=tied) for tied in (True, False) for rows in (100, 10_000)]
    cases += [_train(2304, rows, repeats=7) for rows in (100, 10_000)]
    cases += [_train(2304, rows, tied=False, repeats=7) for rows in (100, 10_000)]
    cases += [_train(width, 10_000, suffix="-new", consecutive=True) for width in (1024, 2304)]
    cases += [_train(1024, 10_000, suffix="-new-2x1024", consecutive=True, batch=(2, 1024), repeats=5)]
    cases += [_train(1024, rows, suffix="-answers", keep=16) for rows in (100, 10_000)]
    cases += [_train(1024, rows, suffix="-bf16", dtype="bfloat16", repeats=7) for rows in (100, 10_000)]
    cases += [_train(1024, rows, suffix="-2x1024", batch=(2, 1024), repeats=5) for rows in (100, 10_000)]
    cases += [
        Case(f"lookup/d{width}-k{rows}-2x{length}", "lookup", 256_000, width, rows, batch=(2, length), layers=1)
        for width in (1024, 2304)
        for rows in (100, 10_000)
        for length in (128, 1024)
    ]
    cases += [
        Case(
            f"generate/d1024-{'tied' if tied else 'untied'}-k{rows}",
            "generate",
            256_000,
            1024,
            rows,
            tied,
            batch=(1, 16),
        )
        for tied in (True, False)
        for rows in (100, 10_000)
    ]
    cases += [
        Case(f"prompt/v{size}-n{count}", "prompt", size, 1024, count, repeats=7)
        for size in (32_000, 256_000)
        for count in (20, 100)
    ]
    cases += [Case("prompt-generate/v256000-n20", "prompt-generate", 256_000, 1024, 20, batch=(1, 16))]
    return cases


def sweep_cases() -> list[Case]:
    """Those of the two plots."""
    cases = [Case(f"sweep-k/{rows}", "train", 256_000, 1024, rows, repeats=5) for rows in (1, 10, 100, 1_000, 10_000)]
    return cases + [
        Case(f"sweep-v/{size}", "train", size, 1024, 100, repeats=5)
        for size in (16_000, 32_000, 64_000, 128_000, 256_000)
    ]


def quick_cases() -> list[Case]:
    """Seconds in all: to see that the machinery runs, not to measure."""
    small: dict[str, Any] = {"repeats": 3, "layers": 1}
    return [
        Case("train/quick", "train", 2_000, 64, 20, batch=(2, 16), keep=4, **small),
        Case("lookup/quick", "lookup", 2_000, 64, 20, batch=(2, 16), **small),
        Case("generate/quick", "generate", 2_000, 64, 20, batch=(1, 4), **small),
        Case("prompt/quick", "prompt", 2_000, 64, 5, batch=(2, 16), **small),
        Case("prompt-generate/quick", "prompt-generate", 2_000, 64, 5, batch=(1, 4), **small),
        *(Case(f"sweep-k/{rows}", "train", 2_000, 64, rows, batch=(2, 16), **small) for rows in (1, 100)),
        *(Case(f"sweep-v/{size}", "train", size, 64, 10, batch=(2, 16), **small) for size in (500, 2_000)),
    ]


def choose(cases: list[Case], patterns: list[str]) -> list[Case]:
    """The cases whose names match any of the shell patterns, in their order.

    Raises:
        ValueError: A pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"no case matches {pattern!r}: there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in patterns)]
