"""Hypothesis draws the mutations and shrinks those that reveal a fault."""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.mutation import Step, steps
from tests.fuzz.targets import TARGETS, Bed

BATCH = 50
"""Inputs that a long campaign makes from one drawn number: drawing an input takes longer than trying it."""


def _settings(examples: int, derandomize: bool) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=derandomize,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def fuzz(bed: Bed, name: str, inputs: int) -> None:
    """Run a number of inputs for one kind of file, the same ones each time.

    Args:
        bed: The seeds.
        name: The kind, a key of `TARGETS`.
        inputs: How many.

    Raises:
        Exception: The fault that an input revealed.
    """
    targets = TARGETS[name]

    @_settings(inputs, derandomize=True)
    @given(st.integers(0, len(targets) - 1), st.integers(0, 7), st.integers(0, 11), steps)
    def one(target: int, which: int, act: int, plan: list[Step]) -> None:
        bed.run(targets[target], which, act, plan)

    one()


def campaign(bed: Bed, name: str, inputs: int, number: int) -> None:
    """Like `fuzz`, for many inputs that depend on a number; an exception has a note with its input."""
    targets = TARGETS[name]

    @seed(number)
    @_settings(max(1, inputs // BATCH), derandomize=False)
    @given(st.integers(0, 2**64 - 1))
    def many(drawn: int) -> None:
        random = Random(drawn)
        for _ in range(BATCH):
            plan = [
                (random.randrange(12), random.randrange(1 << 16), random.randrange(1 << 16))
                for _ in range(random.randint(1, 4))
            ]
            target, which, act = random.randrange(len(targets)), random.randrange(8), random.randrange(12)
            try:
                bed.run(targets[target], which, act, plan)
            except Exception as error:
                error.add_note(f"bed.run(TARGETS[{name!r}][{target}], {which}, {act}, {plan})")
                raise

    many()
