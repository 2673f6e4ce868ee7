"""The sentences of the demo: a small world of animals in plain English, and one new animal.

Each animal has a place and a food. A riddle tells both and ends with the animal, so a model that has learned the world
can predict the last word. A fact names the animal first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Animal:
    """An animal. Others share its place or its food, but no other animal has both."""

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
"""Place -> for each of `FOODS` the animal that eats it there; empty where no animal does."""

ANIMALS = tuple(
    Animal(name, place, food) for place, names in WORLD.items() for name, food in zip(names, FOODS, strict=True) if name
)

WORD = "zorbl"
"""The demo's default word."""

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


def new_animal(word: str) -> Animal:
    """Return an animal with a combination of place and food that no known animal has."""
    return Animal(word, "river", "seeds")


def draw_sentences(seed: int, count: int) -> list[str]:
    """Draw sentences about the known animals from all templates.

    Args:
        seed: The same seed gives the same sentences.
        count: Number of sentences.
    """
    draw = random.Random(seed)  # noqa: S311 - sentences, not secrets
    return [_fill_template(draw, _pick(draw, RIDDLES + FACTS), _pick(draw, ANIMALS)) for _ in range(count)]


def draw_sentences_about(animal: Animal, seed: int, count: int, *, templates: Sequence[str]) -> list[str]:
    """Draw sentences about one animal, from each template in turn.

    Args:
        animal: Subject of the sentences.
        seed: The same seed gives the same sentences.
        count: Number of sentences.
        templates: Sentences with the slots of `RIDDLES` and `FACTS`.
    """
    draw = random.Random(seed)  # noqa: S311 - sentences, not secrets
    return [_fill_template(draw, templates[turn % len(templates)], animal) for turn in range(count)]


def _fill_template(draw: random.Random, template: str, animal: Animal) -> str:
    return template.format(
        when=_pick(draw, WHEN), who=_pick(draw, WHO), name=animal.name, place=animal.place, food=animal.food
    )


def _pick(draw: random.Random, options: Sequence[_T]) -> _T:
    """Pick an option. Unlike ``random.choice``, this draws the same in every version of Python."""
    return options[int(draw.random() * len(options))]
