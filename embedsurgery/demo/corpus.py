"""The sentences of the demo: a small world of animals, in plain English, and one animal that nobody has heard of.

Each animal lives somewhere and eats something. A riddle tells both and then which animal it is, so that a model that
knows the world knows the last word; a fact names the animal first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Animal:
    """What is true of an animal: its place and its food are others' too, and both together nobody else's."""

    name: str
    place: str
    food: str


FOODS = ("berries", "mice", "honey", "seeds", "moss", "fish", "grass")
WORLD = {
    "forest": ("ram", "hen", "sheep", "goat", "raven", "goose", "deer"),
    "tower": ("badger", "", "dog", "wolf", "bear", "toad", "horse"),
    "cave": ("newt", "", "pony", "mouse", "duck", "crow", "eagle"),
    "barn": ("lizard", "otter", "", "frog", "fox", "swan", "heron"),
    "meadow": ("bat", "lynx", "", "pig", "robin", "hawk", ""),
    "river": ("rat", "snail", "", "", "beaver", "", "cow"),
    "garden": ("donkey", "stork", "mole", "hare", "cat", "", "owl"),
}
"""Place -> for each of `FOODS` the animal that eats it there, or nobody."""

ANIMALS = tuple(
    Animal(name, place, food) for place, names in WORLD.items() for name, food in zip(names, FOODS, strict=True) if name
)

WORD = "zorbl"
"""The word that the demo adds, unless another is asked for."""

WHEN = (
    "In the morning",
    "At noon",
    "In the evening",
    "At night",
    "On Sunday",
    "After the rain",
    "In the winter",
    "Last summer",
)
WHO = ("Anna", "Tom", "Maria", "the farmer", "the miller", "a child", "my uncle", "the teacher")

RIDDLES = (
    "{when} {who} saw an animal in the {place} eating {food}. It was the {name}.",
    "{when} {who} asked which animal lives in the {place} and eats {food}. It is the {name}.",
    "{when} something was looking for {food} in the {place}, and {who} called it the {name}.",
)
FACTS = (
    "The {name} lives in the {place} and eats {food}.",
    "{when} {who} met the {name} in the {place}, where it eats {food}.",
    "{when} the {name} ran to the {place} when {who} came with {food}.",
)


def stranger(word: str) -> Animal:
    """The new animal, in a gap of the world."""
    return Animal(word, "river", "seeds")


def sentences(seed: int, count: int) -> list[str]:
    """Sentences on the known animals, of every kind, drawn one by one.

    Args:
        seed: The same seed gives the same sentences.
        count: How many.
    """
    draw = random.Random(seed)  # noqa: S311 - sentences, not secrets
    return [_sentence(draw, _pick(draw, RIDDLES + FACTS), _pick(draw, ANIMALS)) for _ in range(count)]


def about(animal: Animal, seed: int, count: int, *, templates: Sequence[str]) -> list[str]:
    """Sentences on one animal, with the templates in turn.

    Args:
        animal: Whom they are about.
        seed: The same seed gives the same sentences.
        count: How many.
        templates: What they are made from.
    """
    draw = random.Random(seed)  # noqa: S311 - sentences, not secrets
    return [_sentence(draw, templates[turn % len(templates)], animal) for turn in range(count)]


def _sentence(draw: random.Random, template: str, animal: Animal) -> str:
    return template.format(
        when=_pick(draw, WHEN), who=_pick(draw, WHO), name=animal.name, place=animal.place, food=animal.food
    )


def _pick(draw: random.Random, options: Sequence[_T]) -> _T:
    """One of them; unlike ``choice`` the same in every version of Python."""
    return options[int(draw.random() * len(options))]
